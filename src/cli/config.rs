//! `--config FILE.toml`: flags in a file.
//!
//! **Invariant:** flag > environment > file > default. The keys are the flags' names, so there is nothing to keep
//! in step.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result, Tier};
use crate::policy::{Order, Split};

/// `given` (flags and environment) over the file's values, but for those that are another command's.
///
/// # Errors
/// [`Error::Usage`] when the file does not parse or names a key that is no flag.
pub fn overlay<T: Serialize + DeserializeOwned>(given: &T, file: &Path, foreign: impl Fn(&str) -> bool) -> Result<T> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    let wrong = |error: toml::de::Error| {
        Error::usage(format!("{}: {}", file.display(), error.message()), "keys are the long flags without the dashes")
    };
    let mut table: toml::Table = text.parse().map_err(wrong)?;
    table.retain(|key, _| !foreign(key));
    let given = toml::Table::try_from(given).expect("flags serialize as a table");
    table.extend(given);
    table.try_into().map_err(wrong)
}

/// A policy file: a [`Policy`](crate::policy::Policy) of which any part may be left out.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PolicyFile {
    /// Sequences in flight.
    pub sequences: Option<usize>,
    /// Prompt tokens in a pass.
    pub chunk_tokens: Option<usize>,
    /// Blocks of a pass.
    pub blocks: Option<usize>,
    /// Rows of a block.
    pub block_rows: Option<usize>,
    /// Stages whose streamed weights the device holds.
    pub weight_slots: Option<usize>,
    /// Blocks whose streamed pages the device holds.
    pub kv_slots: Option<usize>,
    /// Pages of the KV cache.
    pub pages: Option<usize>,
    /// Streamed pages of a block.
    pub block_pages: Option<usize>,
    /// Pages in files for sequences that are paused.
    pub paused_pages: Option<usize>,
    /// Decoder layers.
    pub weights: Option<Split>,
    /// Pages.
    pub kv: Option<Split>,
    /// Hidden states.
    pub hidden: Option<Split>,
    /// The embedding table.
    pub embed: Option<Tier>,
    /// The head.
    pub head: Option<Tier>,
    /// Compressed planes on disk.
    pub compressed: Option<bool>,
    /// As in [`Policy`](crate::policy::Policy).
    pub schedule: Option<Order>,
}

impl PolicyFile {
    /// Reads a policy file.
    ///
    /// # Errors
    /// [`Error::Usage`] when a key is unknown or a value out of range.
    pub fn read(file: &Path) -> Result<PolicyFile> {
        let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
        let wrong = |what: String| {
            let keys = "a policy has keys such as `sequences`, `chunk-tokens` and `weights`; `plan --save` writes one";
            Error::usage(format!("{}: {what}", file.display()), keys)
        };
        let policy: PolicyFile = toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
        let counts = [
            ("sequences", policy.sequences, 1 << 20),
            ("chunk-tokens", policy.chunk_tokens, 1 << 20),
            ("blocks", policy.blocks, 1 << 16),
            ("block-rows", policy.block_rows, 1 << 20),
            ("weight-slots", policy.weight_slots, 64),
            ("kv-slots", policy.kv_slots, 64),
            ("pages", policy.pages, 1 << 30),
            ("block-pages", policy.block_pages, 1 << 30),
        ];
        let counts = counts.map(|(key, value, most)| (key, value, 1..=most));
        for (key, value, range) in counts.into_iter().chain([("paused-pages", policy.paused_pages, 0..=1 << 30)]) {
            if value.is_some_and(|value| !range.contains(&value)) {
                return Err(wrong(format!("{key} must be between {} and {}", range.start(), range.end())));
            }
        }
        for (key, split) in [("weights", policy.weights), ("kv", policy.kv), ("hidden", policy.hidden)] {
            let Some(Split { gpu, cpu, disk }) = split else { continue };
            if [gpu, cpu, disk].iter().any(|share| !(0.0..=1.0).contains(share))
                || (gpu + cpu + disk - 1.0).abs() > 1e-6
            {
                return Err(wrong(format!("the shares of {key} are not between 0 and 1 with the sum 1")));
            }
        }
        Ok(policy)
    }
}
