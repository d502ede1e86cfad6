//! What is finished, a line each after one that says of what.
//!
//! **Invariant:** a line is on the disk before the next is begun; one torn by a kill counts for nothing.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::manifest::Identity;
use crate::durable;
use crate::error::{Error, Result};
use crate::model::files::read_bounded;

const MAX_BYTES: u64 = 256 << 20;

/// A journal that grows.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
}

/// What a journal says.
pub(super) enum Noted<T> {
    /// There is none.
    Nothing,
    /// It is of another pack.
    OfAnother,
    /// These entries.
    Entries(Vec<T>),
}

impl Journal {
    /// Begins with entries that are finished already, in place of what was there.
    pub fn begin(path: &Path, identity: &Identity, entries: &[impl Serialize]) -> Result<Journal> {
        let mut text = line(identity);
        entries.iter().for_each(|entry| text += &line(entry));
        durable::replace(path, text.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("open", path))?;
        Ok(Journal { file, path: path.to_owned() })
    }

    /// Notes one more.
    pub fn append(&mut self, entry: &impl Serialize) -> Result<()> {
        let write = self.file.write_all(line(entry).as_bytes()).and_then(|()| self.file.sync_data());
        write.map_err(Error::io("write", &self.path))
    }

    /// Reads what was noted about the pack `identity`.
    pub fn read<T: DeserializeOwned>(path: &Path, identity: &Identity) -> Result<Noted<T>> {
        if !path.exists() {
            return Ok(Noted::Nothing);
        }
        let text = read_bounded(path, MAX_BYTES)?;
        let text = String::from_utf8_lossy(&text);
        let mut lines = text.lines();
        let head = lines.next().and_then(|line| serde_json::from_str::<Identity>(line).ok());
        if head.as_ref() != Some(identity) {
            return Ok(Noted::OfAnother);
        }
        Ok(Noted::Entries(lines.map_while(|line| serde_json::from_str(line).ok()).collect()))
    }
}

fn line(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data is JSON") + "\n"
}
