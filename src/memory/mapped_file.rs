//! Reading files through the page cache without copying them.
//!
//! **Invariant:** bytes are handed out only while the file is at least as long as it was when it was mapped.
#![allow(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Result};

/// A regular file, mapped read-only.
#[derive(Debug)]
pub struct MappedFile {
    file: File,
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// The file must not be changed while it is mapped. If another process truncates it between the check in
    /// [`MappedFile::bytes`] and an access to the vanished part, the system ends this process with SIGBUS; if one
    /// overwrites it, the bytes read are unspecified.
    ///
    /// # Errors
    /// `Error::Io` when it cannot be opened, `Error::Model` when it is not a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let metadata = file.metadata().map_err(Error::io("open", path))?;
        if !metadata.is_file() {
            return Err(Error::model(path, "is not a regular file"));
        }
        // SAFETY: the map is private to this process and read-only, its length is the length of the file at this
        // moment, and `file` stays open as long as the map. The remaining requirement, that nobody changes the file
        // meanwhile, no process can enforce: it is documented above, and `bytes` compares the length before each use,
        // so that a file truncated earlier is an error instead of an access beyond its end.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Ok(MappedFile { file, path: path.to_owned(), map })
    }

    /// The file's path, as opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's length when it was mapped.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// `Error::Model` if the file has become shorter since it was mapped.
    pub fn bytes(&self) -> Result<&[u8]> {
        let now = self.file.metadata().map_err(Error::io("inspect", &self.path))?.len();
        if now < self.map.len() as u64 {
            let what = format!("shrank from {} to {now} bytes while it was in use", self.map.len());
            return Err(Error::model(&self.path, what));
        }
        Ok(&self.map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_file_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("weights");
        std::fs::write(&path, vec![7u8; 10_000]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        assert_eq!(mapped.bytes().unwrap().len(), 10_000);
        File::options().write(true).open(&path).unwrap().set_len(5_000).unwrap();
        assert!(mapped.bytes().unwrap_err().to_string().contains("shrank from 10000 to 5000"));
    }

    #[test]
    fn only_regular_files_are_mapped() {
        let directory = tempfile::tempdir().unwrap();
        assert!(MappedFile::open(directory.path()).is_err());
        assert!(MappedFile::open(&directory.path().join("absent")).is_err());
        let empty = directory.path().join("empty");
        std::fs::write(&empty, b"").unwrap();
        assert!(MappedFile::open(&empty).unwrap().is_empty());
    }
}
