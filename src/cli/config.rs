//! `--config FILE.toml`: flags in a file.
//!
//! **Invariant:** flag > environment > file > default. The keys are the flags' names, so there is nothing to keep
//! in step.

use std::fs;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// `given` (flags and environment) over the file's values.
///
/// # Errors
/// [`Error::Usage`] when the file does not parse or names a key that is no flag.
pub fn overlay<T: Serialize + DeserializeOwned>(given: &T, file: &Path) -> Result<T> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    let wrong = |error: toml::de::Error| {
        Error::usage(format!("{}: {}", file.display(), error.message()), "keys are the long flags without the dashes")
    };
    let mut table: toml::Table = text.parse().map_err(wrong)?;
    let given = toml::Table::try_from(given).expect("flags serialize as a table");
    table.extend(given);
    table.try_into().map_err(wrong)
}

/// A policy file: how much is computed together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Policy {
    /// Sequences in flight.
    pub sequences: Option<usize>,
    /// Prompt tokens in a pass.
    pub chunk_tokens: Option<usize>,
}

impl Policy {
    /// Reads a policy file.
    ///
    /// # Errors
    /// [`Error::Usage`] when a key is unknown or a value out of range.
    pub fn read(file: &Path) -> Result<Policy> {
        let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
        let wrong = |what: String| {
            Error::usage(format!("{}: {what}", file.display()), "a policy has `sequences` and `chunk-tokens`")
        };
        let policy: Policy = toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
        for (key, value) in [("sequences", policy.sequences), ("chunk-tokens", policy.chunk_tokens)] {
            if value.is_some_and(|value| !(1..=1 << 20).contains(&value)) {
                return Err(wrong(format!("{key} must be between 1 and {}", 1 << 20)));
            }
        }
        Ok(policy)
    }
}
