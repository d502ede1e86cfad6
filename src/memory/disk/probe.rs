//! What the disk below a directory allows, and how fast it is.
//!
//! **Invariant:** nothing is left behind in the directory.

use std::path::Path;
use std::time::Instant;

use super::ring::Ring;
use super::{ALIGNMENT, DirectFile, DiskQueue, Read};
use crate::error::{Error, Result};

/// How files below a directory can be read and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSupport {
    /// Past the page cache.
    pub direct: bool,
    /// Through io_uring.
    pub io_uring: bool,
    /// Why not, for each that is refused.
    pub why: Vec<String>,
}

/// Tries direct access and io_uring below `directory`, with a small file that is removed again.
///
/// # Errors
/// `Error::Io` when no file can be made there at all.
pub fn probe(directory: &Path) -> Result<DiskSupport> {
    let path = directory.join(format!(".tidemill-probe-{}", std::process::id()));
    let file = DirectFile::create(&path, ALIGNMENT as u64)?;
    std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
    let mut why = Vec::new();
    let direct = file.is_direct();
    if !direct {
        why.push(format!("the file system of {} does not take O_DIRECT", directory.display()));
    }
    let ring = Ring::new(1);
    if let Err(error) = &ring {
        why.push(format!("io_uring: {error}"));
    }
    Ok(DiskSupport { direct, io_uring: ring.is_ok(), why })
}

/// Bytes per second of reading the first `bytes` of `file` in order through `queue`, again and again into `buffer`.
///
/// # Errors
/// As [`DiskQueue::read`]; `bytes` is rounded down to whole buffers and must not exceed the file.
pub fn raw_read_rate(file: &DirectFile, bytes: u64, queue: &mut DiskQueue, buffer: &mut [u8]) -> Result<f64> {
    let rounds = (bytes / buffer.len() as u64).max(1);
    let started = Instant::now();
    for round in 0..rounds {
        let offset = round * buffer.len() as u64;
        queue.read(&mut [Read { file, offset, buffer: &mut *buffer }])?;
    }
    Ok((rounds * buffer.len() as u64) as f64 / started.elapsed().as_secs_f64())
}
