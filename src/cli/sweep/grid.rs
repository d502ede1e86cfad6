//! `--grid "batch=1,8,64;prompt-len=128,512;..."`: axes with values, and the points that they span.
//!
//! **Invariant:** every value of a grid that parses means something to the flag that it stands for; whether a point
//! fits is another question.

use std::collections::BTreeMap;
use std::str::FromStr;

use clap::ValueEnum;

use crate::bench::sweep::Point;
use crate::cli::flags::{ActivationsChoice, DeviceChoice, KvChoice, ScheduleChoice, Size, WeightsChoice};
use crate::error::{Error, Result};
use crate::kv::policies;

/// Points of a grid at most.
const MOST_POINTS: usize = 100_000;
/// Sequences of a job, for each that is in flight, where the grid does not say.
const ROUNDS: usize = 4;
/// No axis of lengths goes further.
const MOST: usize = 1 << 20;

/// Lengths and numbers of sequences.
const COUNTS: [&str; 4] = ["batch", "prompt-len", "gen-len", "num-prompts"];

/// A flag whose values can be an axis: its name, and what is wrong with a value.
type Setting = (&'static str, fn(&str) -> Option<String>);

/// Budgets and numerics that can be axes. A new one is a line here.
const SETTINGS: [Setting; 9] = [
    ("device", one_of::<DeviceChoice>),
    ("gpu-memory", size),
    ("cpu-memory", size),
    ("disk-space", size),
    ("weights", one_of::<WeightsChoice>),
    ("activations", one_of::<ActivationsChoice>),
    ("kv-dtype", one_of::<KvChoice>),
    ("kv-policy", |text| policies::parse(text).err()),
    ("schedule", one_of::<ScheduleChoice>),
];

fn one_of<T: ValueEnum>(text: &str) -> Option<String> {
    let names = T::value_variants().iter().filter_map(|choice| choice.to_possible_value());
    let names: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
    (!names.iter().any(|name| name == text)).then(|| format!("is none of {}", names.join(", ")))
}

fn size(text: &str) -> Option<String> {
    text.parse::<Size>().err().map(|_| "is no size; write one such as 14GiB".to_owned())
}

/// Whether a flag can be an axis.
pub fn is_setting(name: &str) -> bool {
    SETTINGS.iter().any(|(setting, _)| *setting == name)
}

/// Axes in the order in which they were typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    axes: Vec<(String, Vec<String>)>,
}

/// Pieces between commas; what has a key but no name of its own goes on with the policy before it, as in
/// `full,h2o:heavy=0.1,recent=0.1`.
fn values(text: &str) -> Vec<String> {
    let mut values: Vec<String> = Vec::new();
    for piece in text.split(',') {
        match values.last_mut() {
            Some(last) if piece.contains('=') && !piece.contains(':') => {
                last.push(',');
                last.push_str(piece.trim());
            }
            _ => values.push(piece.trim().to_owned()),
        }
    }
    values
}

fn wrong_value(axis: &str, value: &str) -> Option<String> {
    if value.is_empty() {
        return Some("is empty".to_owned());
    }
    if COUNTS.contains(&axis) {
        let good = value.parse().is_ok_and(|count: usize| (1..=MOST).contains(&count));
        return (!good).then(|| format!("is no number from 1 to {MOST}"));
    }
    SETTINGS.iter().find(|(name, _)| *name == axis).and_then(|(_, check)| check(value))
}

impl FromStr for Grid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |what: String| {
            let hint = "write it as --grid \"batch=1,8,64;prompt-len=128,512;gen-len=32\"";
            Error::usage(format!("--grid: {what}"), hint)
        };
        let mut axes: Vec<(String, Vec<String>)> = Vec::new();
        for axis in text.split(';').map(str::trim).filter(|axis| !axis.is_empty()) {
            let (name, list) = axis.split_once('=').ok_or_else(|| wrong(format!("`{axis}` has no values")))?;
            let name = name.trim();
            if !COUNTS.contains(&name) && !is_setting(name) {
                let known: Vec<&str> = COUNTS.into_iter().chain(SETTINGS.iter().map(|setting| setting.0)).collect();
                let hint = format!("use {}", known.join(", "));
                return Err(Error::usage(format!("--grid: `{name}` is no axis"), hint));
            }
            if axes.iter().any(|(other, _)| other == name) {
                return Err(wrong(format!("`{name}` is there twice")));
            }
            let values = values(list);
            for (index, value) in values.iter().enumerate() {
                if let Some(what) = wrong_value(name, value) {
                    return Err(wrong(format!("{name}: `{value}` {what}")));
                }
                if values[..index].contains(value) {
                    return Err(wrong(format!("{name}: `{value}` is there twice")));
                }
            }
            axes.push((name.to_owned(), values));
        }
        for needed in &COUNTS[..3] {
            if !axes.iter().any(|(name, _)| name == needed) {
                return Err(wrong(format!("`{needed}` is missing")));
            }
        }
        let points = axes.iter().try_fold(1usize, |points, (_, values)| points.checked_mul(values.len()));
        match points.filter(|&points| points <= MOST_POINTS) {
            Some(_) => Ok(Grid { axes }),
            None => Err(wrong(format!("more than {MOST_POINTS} points"))),
        }
    }
}

impl Grid {
    /// All points, the last axis going round fastest; `flags` are settings of all points, unless they are axes.
    pub fn points<'a>(&'a self, flags: &BTreeMap<String, String>) -> Vec<Point> {
        let mut all: Vec<BTreeMap<&'a str, &'a str>> = vec![BTreeMap::new()];
        for (name, values) in &self.axes {
            let with = |(point, value): (&BTreeMap<&'a str, &'a str>, &'a String)| {
                let mut point = point.clone();
                point.insert(name.as_str(), value.as_str());
                point
            };
            all = all.iter().flat_map(|point| values.iter().map(move |value| (point, value))).map(with).collect();
        }
        let point = |chosen: BTreeMap<&str, &str>| {
            let count = |name: &str| chosen.get(name).and_then(|value| value.parse().ok());
            let mut settings = flags.clone();
            let own = chosen.iter().filter(|(name, _)| is_setting(name));
            settings.extend(own.map(|(&name, &value)| (name.to_owned(), value.to_owned())));
            let batch = count("batch").expect("it was checked");
            Point {
                batch,
                prompt_len: count("prompt-len").expect("it was checked"),
                gen_len: count("gen-len").expect("it was checked"),
                num_prompts: count("num-prompts").unwrap_or(ROUNDS * batch),
                settings,
            }
        };
        all.into_iter().map(point).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_span_points() {
        let grid: Grid =
            "batch=1,8; prompt-len=16;gen-len=4,5;kv-policy=full,h2o:heavy=0.1,recent=0.1,sink".parse().unwrap();
        let flags = BTreeMap::from([("kv-policy".to_owned(), "full".to_owned()), ("weights".into(), "int4".into())]);
        let points = grid.points(&flags);
        assert_eq!(points.len(), 2 * 2 * 3);
        assert_eq!((points[0].batch, points[0].gen_len, points[0].num_prompts), (1, 4, 4));
        assert_eq!((points[11].batch, points[11].gen_len, points[11].num_prompts), (8, 5, 32));
        assert_eq!(points[1].settings["kv-policy"], "h2o:heavy=0.1,recent=0.1");
        assert!(points.iter().all(|point| point.settings["weights"] == "int4"));
    }

    #[test]
    fn grids_that_make_no_sense_are_refused() {
        let refused = |text: &str| text.parse::<Grid>().unwrap_err().to_string();
        for (text, what) in [
            ("", "`batch` is missing"),
            ("batch=1;prompt-len=4", "`gen-len` is missing"),
            ("batch=;prompt-len=4;gen-len=4", "batch: `` is empty"),
            ("batch=0;prompt-len=4;gen-len=4", "`0` is no number"),
            ("batch=1,two;prompt-len=4;gen-len=4", "`two` is no number"),
            ("batch=1,1;prompt-len=4;gen-len=4", "`1` is there twice"),
            ("batch=1;batch=2;prompt-len=4;gen-len=4", "`batch` is there twice"),
            ("batch=1;prompt-len=4;gen-len=4;kv-dtype=int3", "`int3` is none of"),
            ("batch=1;prompt-len=4;gen-len=4;gpu-memory=much", "`much` is no size"),
            ("batch=1;prompt-len=4;gen-len=4;kv-policy=lru", "kv-policy: `lru`"),
            ("batch=1;prompt-len=4;gen-len=4;tides=2", "`tides` is no axis"),
            ("batch", "`batch` has no values"),
        ] {
            assert!(refused(text).contains(what), "{text}: {}", refused(text));
        }
        let many: Vec<String> = (1..400).map(|count| count.to_string()).collect();
        let many = many.join(",");
        assert!(refused(&format!("batch={many};prompt-len={many};gen-len=1,2")).contains("more than"));
    }
}
