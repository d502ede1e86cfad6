//! Changing files so that a kill, a power cut or a second process does no harm.
//!
//! **Invariant:** a file is replaced whole or not at all, and a lock has one holder.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, Result};

/// Sole use of an output, given up when dropped or when the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock at `path`, which is made if it is not there.
    ///
    /// # Errors
    /// `Error::Output` naming the process that holds it; `Error::Io` when it cannot be made.
    pub fn take(path: &Path) -> Result<Lock> {
        loop {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(Error::io("create", path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(held(path, &mut file)),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
            }
            // The holder before us may have removed the file between our opening and locking it.
            let ours = file.metadata().map_err(Error::io("lock", path))?;
            if fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
                let write_pid =
                    file.set_len(0).and_then(|()| file.write_all(std::process::id().to_string().as_bytes()));
                write_pid.map_err(Error::io("write", path))?;
                return Ok(Lock { _file: file, path: path.to_owned() });
            }
        }
    }

    /// Takes the lock as soon as nobody else holds it; `held` is called once if somebody does.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be made.
    pub fn wait(path: &Path, held: &mut dyn FnMut()) -> Result<Lock> {
        let mut told = false;
        loop {
            match Lock::take(path) {
                Err(Error::Output { .. }) => {
                    if !std::mem::replace(&mut told, true) {
                        held();
                    }
                    std::thread::sleep(Duration::from_millis(100));
                }
                taken => return taken,
            }
        }
    }

    /// Removes the lock's file while still holding it.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be removed.
    pub fn release(self) -> Result<()> {
        remove(&self.path)
    }
}

fn held(path: &Path, file: &mut File) -> Error {
    let mut pid = String::new();
    let known = file.read_to_string(&mut pid).is_ok() && pid.trim().parse::<u32>().is_ok();
    let who = if known { format!("process {}", pid.trim()) } else { "another process".into() };
    Error::Output {
        path: path.to_owned(),
        what: format!("{who} is working on this output"),
        hint: Some("wait for it to end, or choose another --output".into()),
    }
}

/// Replaces a file by new content in one step that survives a power cut.
///
/// # Errors
/// `Error::Io`; the old content is still there then.
pub fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let temporary = with_suffix(path, ".tmp");
    fs::write(&temporary, content).map_err(Error::io("write", &temporary))?;
    let file = File::open(&temporary).map_err(Error::io("open", &temporary))?;
    file.sync_all().map_err(Error::io("sync", &temporary))?;
    rename(&temporary, path)
}

/// Renames within a directory, durably.
///
/// # Errors
/// `Error::Io` when it cannot be renamed.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(Error::io("rename", from))?;
    sync_directory(to)
}

/// Removes a file if it is there.
///
/// # Errors
/// `Error::Io` when it is there and cannot be removed.
pub fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes the names in a file's directory durable, where the file system can.
///
/// # Errors
/// `Error::Io` when the directory cannot be synced.
pub fn sync_directory(of: &Path) -> Result<()> {
    let directory = match of.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    match File::open(directory).and_then(|directory| directory.sync_all()) {
        Err(error) if error.kind() != ErrorKind::InvalidInput => Err(Error::io("sync", directory)(error)),
        _ => Ok(()),
    }
}

/// A path with something added to its last name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_and_names_the_holder() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.lock");
        let lock = Lock::take(&path).unwrap();
        let message = Lock::take(&path).unwrap_err().to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        lock.release().unwrap();
        assert!(!path.exists());
        drop(Lock::take(&path).unwrap());
        Lock::take(&path).unwrap();
    }
}
