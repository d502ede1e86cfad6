//! Files opened for transfers past the page cache.
//!
//! **Invariant:** a file that calls itself direct has done a direct read; everything else goes through the page
//! cache and says so.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::ALIGNMENT;
use crate::error::{Error, Result};

/// An open file, direct where the file system allows it.
#[derive(Debug)]
pub struct DirectFile {
    file: File,
    path: PathBuf,
    direct: bool,
}

#[repr(C, align(4096))]
struct Block([u8; ALIGNMENT]);

impl DirectFile {
    /// Opens the file at `path` for reading.
    ///
    /// # Errors
    /// `Error::Io` when there is none or it may not be read.
    pub fn open(path: &Path) -> Result<DirectFile> {
        DirectFile::with_flags(path, OFlags::RDONLY).map_err(Error::io("open", path))
    }

    /// Makes the file at `path` for reading and writing, empty if there was one, with room for `bytes`.
    ///
    /// The room is reserved now, so that a full disk shows before the first write.
    ///
    /// # Errors
    /// `Error::Io`, with `StorageFull` when the room is not there; no file is left then.
    pub fn create(path: &Path, bytes: u64) -> Result<DirectFile> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        let buffered = open(path, flags).map_err(Error::io("create", path))?;
        let reserved = reserve(&buffered, bytes).map_err(io::Error::from);
        let opened = reserved
            .map_err(Error::io("reserve space for", path))
            .and_then(|()| DirectFile::with_flags(path, OFlags::RDWR).map_err(Error::io("create", path)));
        if opened.is_err() {
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    fn with_flags(path: &Path, flags: OFlags) -> io::Result<DirectFile> {
        let direct = match open(path, flags | OFlags::DIRECT) {
            Ok(file) => Some(file).filter(reads_directly),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) => None,
            Err(error) => return Err(error),
        };
        let (file, direct) = match direct {
            Some(file) => (file, true),
            None => (open(path, flags)?, false),
        };
        Ok(DirectFile { file, path: path.to_owned(), direct })
    }

    /// The same file through the page cache, whatever the file system allows.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be opened again.
    pub fn buffered(self) -> Result<DirectFile> {
        let flags = rustix::fs::fcntl_getfl(&self.file).map_err(io::Error::from);
        let flags = flags.map_err(Error::io("inspect", &self.path))? & OFlags::RWMODE;
        let file = open(&self.path, flags).map_err(Error::io("open", &self.path))?;
        Ok(DirectFile { file, direct: false, ..self })
    }

    /// The path, as opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether transfers go past the page cache and must be aligned to [`ALIGNMENT`].
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The file's length now.
    ///
    /// # Errors
    /// `Error::Io` when the system does not say.
    pub fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(Error::io("inspect", &self.path))?.len())
    }

    /// Whether the file has no bytes now.
    ///
    /// # Errors
    /// As [`DirectFile::len`].
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Waits until everything written is on the device.
    ///
    /// # Errors
    /// `Error::Io` when something could not be written.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    loop {
        match rustix::fs::open(path, flags | OFlags::CLOEXEC, mode) {
            Err(Errno::INTR) => {}
            result => {
                let file = File::from(result?);
                let regular = file.metadata()?.is_file();
                return regular.then_some(file).ok_or_else(|| io::Error::other("not a regular file"));
            }
        }
    }
}

/// Some file systems take the flag and refuse the transfer.
fn reads_directly(file: &File) -> bool {
    let mut block = Box::new(Block([0; ALIGNMENT]));
    !matches!(rustix::io::pread(file, &mut block.0, 0), Err(Errno::INVAL | Errno::OPNOTSUPP))
}

fn reserve(file: &File, bytes: u64) -> rustix::io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let result = loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::INTR) => {}
            result => break result,
        }
    };
    match result {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
            // Not as good: somebody else may still take the room.
            let disk = rustix::fs::fstatvfs(file.as_fd())?;
            if disk.f_bavail.saturating_mul(disk.f_frsize) < bytes {
                return Err(Errno::NOSPC);
            }
            rustix::fs::ftruncate(file, bytes)
        }
        result => result,
    }
}

/// Bytes that can still be written below `directory`.
///
/// # Errors
/// `Error::Io` when there is no such directory.
pub fn free_space(directory: &Path) -> Result<u64> {
    let disk = rustix::fs::statvfs(directory).map_err(|error| Error::io("inspect", directory)(error.into()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}
