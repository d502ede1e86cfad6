//! What others have measured, to be drawn beside a sweep: published throughput, and what caches cost in quality.
//!
//! **Invariant:** files are people's, so whatever does not fit is an error that names it.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// What sequences in flight and tokens per second can be: what lies outside cannot be drawn beside the rest.
const PLAUSIBLE: RangeInclusive<f64> = 1e-12..=1e12;

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
        for series in &published.series {
            let wrong = |&(batch, rate): &(f64, f64)| !PLAUSIBLE.contains(&batch) || !PLAUSIBLE.contains(&rate);
            if let Some((batch, rate)) = series.points.iter().find(|point| wrong(point)) {
                return Err(Error::usage(
                    format!("--published {}: `{}` has {rate:?} tokens/s at {batch:?}", file.display(), series.name),
                    "both lie between 10^-12 and 10^12",
                ));
            }
        }
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
    let mut figures = all.iter().flat_map(|quality| quality.figures.iter().map(move |figure| (quality, figure)));
    if let Some((quality, (name, value))) = figures.find(|(_, (_, value))| !(0.0..=100.0).contains(*value)) {
        return Err(wrong(format!("{name} of {} is {value}, which is no percentage", quality.kv_policy)));
    }
    if all.is_empty() { Err(wrong("no entry is about a --kv-policy alone".into())) } else { Ok(all) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_that_nobody_can_have_measured_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |text: &str| {
            let file = folder.path().join("given.json");
            std::fs::write(&file, text).expect("a file");
            file
        };
        for (point, good) in [("[8, 1.5]", true), ("[1, 1e308]", false), ("[0, 1.0]", false), ("[1, -2.0]", false)] {
            let series = format!(r#"{{"name": "a", "gen-len": 32, "points": [[4, 1.0], {point}]}}"#);
            let file = write(&format!(r#"{{"source": "s", "series": [{series}]}}"#));
            match Published::read(&file) {
                Ok(_) => assert!(good, "{point}"),
                Err(error) => assert!(!good && error.to_string().contains("`a` has"), "{point}: {error}"),
            }
        }
        for (recall, good) in [("97.1", true), ("-3", false), ("1e300", false)] {
            let file = write(&format!(r#"{{"x": [{{"flags": "--kv-policy full", "recall": {recall}}}]}}"#));
            match qualities(&file) {
                Ok(_) => assert!(good, "{recall}"),
                Err(error) => assert!(!good && error.to_string().contains("recall of full"), "{recall}: {error}"),
            }
        }
    }
}
