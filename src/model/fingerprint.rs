//! One text that identifies a model's files, to tell whether a job may be resumed.
//!
//! Small files count with all their bytes; a weight file with its name, length, first and last bytes (a safetensors
//! header is at the start, a zip directory at the end) and blocks at regular distances in between: enough to tell
//! checkpoints apart without reading hundreds of gigabytes.
//!
//! **Invariant:** independent of the directory's place and of file times.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::files::Files;
use crate::error::{Error, Result};

/// The names of all files beside the weights that a model may consist of; not all of them need to be there.
pub fn small_files(files: &Files) -> Vec<String> {
    let templates = files.list("additional_chat_templates").into_iter();
    let templates = templates.map(|template| format!("additional_chat_templates/{template}"));
    SMALL_FILES.map(str::to_owned).into_iter().chain(templates).collect()
}

/// A fingerprint in the making.
pub struct Fingerprint(Sha256);

const SMALL_FILES: [&str; 9] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];
const EDGE_BYTES: usize = 1 << 20;
const BLOCK_BYTES: usize = 4 << 10;
const BLOCKS: u64 = 64;

impl Fingerprint {
    /// Begins with the configuration, tokenizer and templates among `files`.
    pub fn of_files(files: &Files) -> Result<Self> {
        let mut fingerprint = Fingerprint(Sha256::new());
        for name in small_files(files) {
            if let Some(bytes) = files.read(&name)? {
                fingerprint.add_bytes(&name, &bytes);
            }
        }
        Ok(fingerprint)
    }

    /// Adds all of `bytes` under `name`.
    pub fn add_bytes(&mut self, name: &str, bytes: &[u8]) {
        for part in [name.as_bytes(), bytes] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
    }

    /// Adds samples of the weight file at `path`.
    pub fn add_weights(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let len = file.metadata().map_err(Error::io("inspect", path))?.len();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        self.add_bytes(&name, &len.to_le_bytes());
        let mut buffer = vec![0; EDGE_BYTES];
        let edge = len.min(EDGE_BYTES as u64);
        let step = (len / (BLOCKS + 1)).max(1);
        let blocks =
            (1..=BLOCKS).map(|block| (block * step, (BLOCK_BYTES as u64).min(len.saturating_sub(block * step))));
        for (offset, size) in [(0, edge), (len - edge, edge)].into_iter().chain(blocks) {
            let bytes = &mut buffer[..size as usize];
            file.read_exact_at(bytes, offset).map_err(Error::io("read", path))?;
            self.0.update(&*bytes);
        }
        Ok(())
    }

    /// The fingerprint, in hexadecimal.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
