//! What others have measured, to be drawn beside a sweep: published throughput, and what caches cost in quality.
//!
//! **Invariant:** files are people's, so whatever does not fit is an error that names it.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Published figures.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// Where they come from.
    pub source: String,
    /// Points of the same system.
    pub series: Vec<PublishedSeries>,
}

/// Points of one system in one setting.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PublishedSeries {
    /// What the legend says.
    pub name: String,
    /// A part of the model's name, for files about several; none for every model.
    pub model: Option<String>,
    /// Settings that these points go with: they stand beside series of a sweep that do not differ in any.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// Tokens that a sequence generates.
    pub gen_len: usize,
    /// Sequences in flight, and generated tokens per second.
    pub points: Vec<(f64, f64)>,
}

/// What a cache costs in quality.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    /// `--kv-policy`.
    pub kv_policy: String,
    /// Figures in percent, by name.
    pub figures: BTreeMap<String, f64>,
}

fn read(file: &Path) -> Result<String> {
    std::fs::read_to_string(file).map_err(Error::io("read", file))
}

impl Published {
    /// Reads published figures.
    ///
    /// # Errors
    /// [`Error::Usage`] with what is wrong with the file.
    pub fn read(file: &Path) -> Result<Published> {
        let published: Published = serde_json::from_str(&read(file)?).map_err(|error| {
            let hint = "it has a `source` and `series` with `name`, `gen-len` and `points` [[batch, tokens/s], ...]";
            Error::usage(format!("--published {}: {error}", file.display()), hint)
        })?;
        Ok(published)
    }

    /// Series about a model.
    pub fn of<'a>(&'a self, model: &'a str) -> impl Iterator<Item = &'a PublishedSeries> {
        self.series.iter().filter(move |series| series.model.as_ref().is_none_or(|part| model.contains(part)))
    }
}

/// Reads what `scripts/quality.py` writes: sections with entries, whose `flags` name a cache alone, and percentages.
///
/// # Errors
/// [`Error::Usage`] if no entry is about a cache.
pub fn qualities(file: &Path) -> Result<Vec<Quality>> {
    let wrong = |what: String| {
        let hint = "it has sections with entries such as {\"flags\": \"--kv-policy sink\", \"recall\": 12.5}";
        Error::usage(format!("--quality {}: {what}", file.display()), hint)
    };
    let sections: Map<String, Value> = serde_json::from_str(&read(file)?).map_err(|error| wrong(error.to_string()))?;
    let entries = sections.values().filter_map(Value::as_array).flatten().filter_map(Value::as_object);
    let quality = |entry: &Map<String, Value>| {
        let kv_policy = entry.get("flags")?.as_str()?.strip_prefix("--kv-policy ")?.trim();
        // Perplexity is no share of anything.
        let figures = entry.iter().filter(|(name, _)| *name != "perplexity");
        let figures = figures.filter_map(|(name, value)| Some((name.clone(), value.as_f64()?))).collect();
        (!kv_policy.contains(' ')).then(|| Quality { kv_policy: kv_policy.to_owned(), figures })
    };
    let all: Vec<Quality> = entries.filter_map(quality).collect();
    if all.is_empty() { Err(wrong("no entry is about a --kv-policy alone".into())) } else { Ok(all) }
}
