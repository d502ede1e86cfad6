//! Files that survive a kill and a power cut.
//!
//! **Invariant:** an [`Appender`] knows how many bytes it has written whole; a failed write leaves none of its own
//! behind as long as the file can still be cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lines::hex;
pub(crate) use crate::durable::{remove, rename, replace, sync_directory, with_suffix};
use crate::error::{Error, Result};

/// How long a file is and what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extent {
    /// Its length.
    pub bytes: u64,
    /// The hash of these bytes, in hexadecimal.
    pub sha256: String,
}

impl Extent {
    /// The extent of an empty file.
    pub fn empty() -> Self {
        Extent { bytes: 0, sha256: hex(&Sha256::new().finalize()) }
    }
}

/// A file that grows at its end and keeps a running hash.
#[derive(Debug)]
pub(crate) struct Appender {
    file: File,
    path: PathBuf,
    bytes: u64,
    hasher: Sha256,
    dirty: bool,
}

impl Appender {
    /// Opens or creates a file whose first bytes must be `extent`, and cuts off all that follows.
    pub fn open(path: &Path, extent: &Extent) -> Result<Appender> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(Error::io("open", path))?;
        let hasher = hash_prefix(path, &file, extent)?;
        let appender = Appender { file, path: path.to_owned(), bytes: extent.bytes, hasher, dirty: true };
        appender.cut()?;
        Ok(appender)
    }

    /// Writes at the end.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.dirty = true;
        if let Err(error) = self.file.write_all_at(bytes, self.bytes) {
            // Without the cut a torn line would stand at the end; resuming would remove it as well.
            let _ = self.cut();
            return Err(Error::io("write", &self.path)(error));
        }
        self.bytes += bytes.len() as u64;
        self.hasher.update(bytes);
        Ok(())
    }

    fn cut(&self) -> Result<()> {
        self.file.set_len(self.bytes).map_err(Error::io("truncate", &self.path))
    }

    /// Makes everything written so far durable.
    pub fn sync(&mut self) -> Result<()> {
        if std::mem::take(&mut self.dirty) {
            self.file.sync_data().map_err(Error::io("sync", &self.path))?;
        }
        Ok(())
    }

    /// What the file holds.
    pub fn extent(&self) -> Extent {
        Extent { bytes: self.bytes, sha256: hex(&self.hasher.clone().finalize()) }
    }
}

/// Checks that a file begins with `extent`.
pub(crate) fn verify(path: &Path, extent: &Extent) -> Result<()> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    hash_prefix(path, &file, extent).map(drop)
}

fn hash_prefix(path: &Path, file: &File, extent: &Extent) -> Result<Sha256> {
    let mut hasher = Sha256::new();
    let mut reader = BufReader::with_capacity(1 << 18, file).take(extent.bytes);
    let found = io::copy(&mut reader, &mut HashWriter(&mut hasher)).map_err(Error::io("read", path))?;
    if found == extent.bytes && hex(&hasher.clone().finalize()) == extent.sha256 {
        return Ok(hasher);
    }
    Err(Error::Output {
        path: path.to_owned(),
        what: format!("its first {} bytes are no longer what was written", extent.bytes),
        hint: Some(
            "restore the file, or remove it and the files whose names begin with its name to start again".into(),
        ),
    })
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The length of a file; none if there is none.
pub(crate) fn length(path: &Path) -> Result<Option<u64>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.len())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// The error for an output or side file that cannot be used.
pub(crate) fn refuse(path: &Path, what: &str, hint: &str) -> Error {
    Error::Output { path: path.to_owned(), what: what.into(), hint: Some(hint.into()) }
}
