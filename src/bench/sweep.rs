//! The results of a sweep: a line that says where they come from, then one for each point.
//!
//! **Invariant:** the file only grows, by whole lines; what a kill leaves of a line is cut off when it is opened again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::policy::Policy;

/// A combination of settings.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Point {
    /// Sequences in flight.
    pub batch: usize,
    /// Prompt tokens of every sequence.
    pub prompt_len: usize,
    /// Tokens that every sequence generates.
    pub gen_len: usize,
    /// Sequences of the job.
    pub num_prompts: usize,
    /// Budgets and numerics: flags without their dashes, as typed.
    #[serde(flatten)]
    pub settings: BTreeMap<String, String>,
}

/// Where results come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// The program's version.
    pub version: String,
    /// The commit that it was built from, where that is known.
    pub commit: Option<String>,
    /// The model, as typed.
    pub model: String,
    /// Whether its weights are random numbers; null where predictions need none.
    pub synthetic: Option<bool>,
    /// Whether points are run, or predicted alone.
    pub measured: bool,
    /// Runs of a point.
    pub repetitions: usize,
    /// Keys the prompts.
    pub seed: i64,
    /// The grid, as typed.
    pub grid: String,
    /// Flags that all points share.
    pub flags: BTreeMap<String, String>,
    /// The machine.
    pub machine: Machine,
    /// What the machine was measured or stated to do: what predictions are made from.
    pub profile: Value,
}

/// A machine in a few words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The profile's name.
    pub name: String,
    /// The processor.
    pub cpu: String,
    /// Threads that compute; none where nothing was run.
    pub threads: Option<usize>,
    /// Main memory.
    pub memory_bytes: u64,
    /// The card.
    pub gpu: Option<String>,
    /// The operating system's kernel; none where nothing was run.
    pub kernel: Option<String>,
}

/// What is known about a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The point.
    pub point: Point,
    /// Whether it was run.
    pub measured: bool,
    /// What the planner says.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub predicted: Option<Predicted>,
    /// The runs in the middle.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub median: Option<Rates>,
    /// The slowest and the fastest run, in generated tokens per second.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub spread: Option<(f64, f64)>,
    /// All runs.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub runs: Vec<Run>,
    /// Why there is nothing else.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<Failure>,
}

/// What the planner says about a point.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Predicted {
    /// Generated tokens per second over the whole job.
    pub generated_tokens_per_s: f64,
    /// Prompt and generated tokens per second over the whole job.
    pub total_tokens_per_s: f64,
    /// Seconds of the job.
    pub secs: f64,
    /// Seconds of its mean pass.
    pub pass_secs: f64,
    /// What takes them.
    pub binding: String,
    /// Generated tokens per second that the hardware allows whatever the program, and what sets that bound.
    pub bound: Option<(f64, String)>,
    /// Generated tokens per second that each lane and each shared resource allows on its own in this plan.
    pub limits: BTreeMap<String, f64>,
    /// Bytes of each tier: gpu, cpu, disk.
    pub bytes: [u64; 3],
    /// The plan.
    pub policy: Policy,
}

/// Throughput of one or several runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Generated tokens per second over the whole job.
    pub generated_tokens_per_s: f64,
    /// Prompt and generated tokens per second over the whole job.
    pub total_tokens_per_s: f64,
    /// Seconds from the first prompt to the last completion.
    pub wall_s: f64,
}

/// A run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its throughput.
    #[serde(flatten)]
    pub rates: Rates,
    /// Seconds of loading before it.
    pub load_s: f64,
    /// Passes over the model.
    pub passes: u64,
    /// Seconds that each lane was busy.
    pub busy_s: BTreeMap<String, f64>,
}

/// Why a point could not be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong.
    pub what: String,
    /// What would help.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hint: Option<String>,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Failure { what: error.to_string(), hint: error.hint() }
    }
}

impl Row {
    /// A point that could not be had.
    pub fn failed(point: Point, failure: Failure) -> Self {
        Row {
            point,
            measured: false,
            predicted: None,
            median: None,
            spread: None,
            runs: Vec::new(),
            error: Some(failure),
        }
    }

    /// Generated tokens per second: measured where that was done, else predicted.
    pub fn generated_tokens_per_s(&self) -> Option<f64> {
        let predicted = self.predicted.as_ref().map(|predicted| predicted.generated_tokens_per_s);
        self.median.map(|median| median.generated_tokens_per_s).or(predicted)
    }
}

impl Rates {
    /// The median of each figure.
    pub fn median(runs: &[Run]) -> Option<Rates> {
        let middle = |value: &dyn Fn(&Run) -> f64| {
            let mut values: Vec<f64> = runs.iter().map(value).collect();
            values.sort_by(f64::total_cmp);
            (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
        };
        (!runs.is_empty()).then(|| Rates {
            generated_tokens_per_s: middle(&|run| run.rates.generated_tokens_per_s),
            total_tokens_per_s: middle(&|run| run.rates.total_tokens_per_s),
            wall_s: middle(&|run| run.rates.wall_s),
        })
    }
}

/// A number with six digits that count: more would be noise, and take space.
pub fn digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Line {
    Environment(Box<Environment>),
    Point(Box<Row>),
}

/// The file of a sweep's results.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    file: File,
    /// Where what is there comes from; none in a new file.
    pub environment: Option<Environment>,
    /// What is there.
    pub rows: Vec<Row>,
}

impl Results {
    /// Opens or makes the file; a torn last line is cut off.
    ///
    /// # Errors
    /// [`Error::Output`] when it holds something else.
    pub fn open(path: &Path) -> Result<Results> {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = opened.map_err(Error::io("open", path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        let (mut environment, mut rows) = (None, Vec::new());
        for (number, line) in (1..).zip(bytes[..whole].split_inclusive(|&byte| byte == b'\n')) {
            let wrong = |what: String| Error::Output {
                path: path.to_owned(),
                what: format!("line {number} {what}"),
                hint: Some("it holds something else than a sweep's results: choose another --output".into()),
            };
            match serde_json::from_slice(line) {
                Ok(Line::Environment(line)) if number == 1 => environment = Some(*line),
                Ok(Line::Point(row)) if number > 1 => rows.push(*row),
                Ok(_) => return Err(wrong("is out of place".into())),
                Err(error) => return Err(wrong(format!("cannot be read: {error}"))),
            }
        }
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(Error::io("cut", path))?;
        }
        file.seek(SeekFrom::Start(whole as u64)).map_err(Error::io("write", path))?;
        Ok(Results { path: path.to_owned(), file, environment, rows })
    }

    /// Says where results come from.
    ///
    /// # Errors
    /// [`Error::Output`] naming what differs, when results are there that come from elsewhere; another grid is none.
    pub fn begin(&mut self, environment: Environment) -> Result<()> {
        let Some(there) = &self.environment else {
            self.write(&[Line::Environment(Box::new(environment.clone()))])?;
            self.environment = Some(environment);
            return Ok(());
        };
        match there.difference(&environment) {
            None => Ok(()),
            Some((name, old, new)) => Err(Error::Output {
                path: self.path.clone(),
                what: format!("its {name} is {old}, this sweep's is {new}"),
                hint: Some("results of one file belong together: choose another --output".into()),
            }),
        }
    }

    /// The row of a point.
    pub fn row(&self, point: &Point) -> Option<&Row> {
        self.rows.iter().find(|row| row.point == *point)
    }

    /// Adds rows.
    ///
    /// # Errors
    /// [`Error::Io`] when they cannot be written.
    pub fn append(&mut self, rows: Vec<Row>) -> Result<()> {
        self.write(&rows.iter().map(|row| Line::Point(Box::new(row.clone()))).collect::<Vec<_>>())?;
        self.rows.extend(rows);
        Ok(())
    }

    fn write(&mut self, lines: &[Line]) -> Result<()> {
        let text = |line: &Line| serde_json::to_string(line).expect("a line is plain data") + "\n";
        let text: String = lines.iter().map(text).collect();
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.file.sync_data().map_err(Error::io("sync", &self.path))
    }
}

impl Environment {
    /// The first thing but the grid that differs: its name, here and there.
    fn difference(&self, other: &Environment) -> Option<(String, String, String)> {
        let table = |environment: &Environment| match serde_json::to_value(environment) {
            Ok(Value::Object(table)) => table,
            _ => unreachable!("a struct is an object"),
        };
        let (mut here, mut there) = (table(self), table(other));
        for table in [&mut here, &mut there] {
            table.remove("grid");
            // Parts with names of their own.
            for part in ["machine", "flags"] {
                let Some(Value::Object(parts)) = table.remove(part) else { continue };
                table.extend(parts.into_iter().map(|(name, value)| (format!("{part}.{name}"), value)));
            }
        }
        let names: std::collections::BTreeSet<&String> = here.keys().chain(there.keys()).collect();
        let differs = names.into_iter().find(|name| here.get(*name) != there.get(*name))?;
        let shown = |table: &serde_json::Map<String, Value>| match table.get(differs) {
            Some(Value::Object(_)) => "another one".to_owned(),
            value => value.unwrap_or(&Value::Null).to_string(),
        };
        Some((differs.clone(), shown(&here), shown(&there)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_lie_in_the_middle() {
        let run = |rate: f64| Run {
            rates: Rates { generated_tokens_per_s: rate, total_tokens_per_s: 2.0 * rate, wall_s: 1.0 / rate },
            load_s: 0.0,
            passes: 1,
            busy_s: BTreeMap::new(),
        };
        assert_eq!(Rates::median(&[]), None);
        let median = Rates::median(&[8.0, 1.0, 2.0].map(run)).unwrap();
        assert_eq!((median.generated_tokens_per_s, median.total_tokens_per_s, median.wall_s), (2.0, 4.0, 0.5));
        assert_eq!(Rates::median(&[8.0, 1.0, 2.0, 4.0].map(run)).unwrap().generated_tokens_per_s, 3.0);
    }

    #[test]
    fn numbers_keep_six_digits() {
        assert_eq!(
            [123.456_789, 0.001_234_567_89, 0.0, f64::INFINITY].map(digits),
            [123.457, 0.001_234_57, 0.0, f64::INFINITY]
        );
    }
}
