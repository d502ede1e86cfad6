//! The small files of a model: configuration, tokenizer, templates; from a directory or from the program itself.
//!
//! **Invariant:** no file is read beyond a bound, and only plain names inside the model are looked up.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// Where a model's small files are.
#[derive(Clone, Debug)]
pub enum Files {
    /// In a directory.
    Directory(PathBuf),
    /// In memory: a name for messages, and files by name.
    Memory(String, Vec<(String, std::borrow::Cow<'static, [u8]>)>),
}

const MAX_BYTES: u64 = 256 << 20;

impl Files {
    /// The bytes of `name`, or none if there is no such file.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        match self {
            Files::Directory(directory) => {
                let path = directory.join(name);
                if path.exists() { read_bounded(&path, MAX_BYTES).map(Some) } else { Ok(None) }
            }
            Files::Memory(_, files) => Ok(files.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.to_vec())),
        }
    }

    /// The text of `name`, or none if there is no such file.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        String::from_utf8(bytes).map(Some).map_err(|_| Error::model(self.path(name), "is not UTF-8"))
    }

    /// The JSON value in `name`, or none if there is no such file.
    pub fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::model(self.path(name), format!("{error}")))
    }

    /// The names of files directly inside `folder`, sorted.
    pub fn list(&self, folder: &str) -> Vec<String> {
        let mut names: Vec<String> = match self {
            Files::Directory(directory) => std::fs::read_dir(directory.join(folder))
                .into_iter()
                .flatten()
                .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
                .collect(),
            Files::Memory(_, files) => {
                let prefix = format!("{folder}/");
                files.iter().filter_map(|(name, _)| name.strip_prefix(&prefix)).map(str::to_owned).collect()
            }
        };
        names.sort();
        names
    }

    /// `name` as messages show it.
    pub fn path(&self, name: &str) -> PathBuf {
        match self {
            Files::Directory(directory) => directory.join(name),
            Files::Memory(model, _) => Path::new(model).join(name),
        }
    }
}

/// The bytes of the file at `path`, at most `limit` of them.
///
/// # Errors
/// `Error::Io`, or `Error::Model` when the file is longer than `limit`.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::model(path, format!("is longer than {}", crate::error::Bytes(limit))));
    }
    Ok(bytes)
}
