//! What a job is: where lines come from and go to, and everything that its result depends on.
//!
//! **Invariant:** a [`Fingerprint`] names all that can change a byte of the output and nothing that cannot.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Where the lines come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A file; a pipe is first copied beside the output.
    File(PathBuf),
    /// Standard input (`-`).
    Stdin,
}

/// Where the results go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// A file, in input order, resumable.
    File(PathBuf),
    /// Standard output (`-`), in completion order, without resume.
    Stdout,
}

/// A part of the input: the lines with `(line - 1) % count == index`, lines counted from 1 over the whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which part, from 0.
    pub index: u64,
    /// How many parts there are.
    pub count: u64,
}

impl Shard {
    /// The whole file as one part.
    pub const WHOLE: Shard = Shard { index: 0, count: 1 };

    /// Whether a physical line (from 1) belongs to this part.
    pub fn holds(self, line: u64) -> bool {
        (line - 1) % self.count == self.index
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parsed {
            Some((index, count)) if index < count => Ok(Shard { index, count }),
            _ => Err(Error::usage(format!("shard `{text}` is not i/n with 0 <= i < n"), "the first of four is `0/4`")),
        }
    }
}

/// Everything that the result depends on, as ordered names with texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fingerprint(Vec<(String, String)>);

impl Fingerprint {
    /// An empty fingerprint.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets one name, replacing an earlier text; chains.
    pub fn with(mut self, name: impl Into<String>, text: impl Into<String>) -> Self {
        self.set(name, text);
        self
    }

    /// Sets one name, replacing an earlier text.
    pub fn set(&mut self, name: impl Into<String>, text: impl Into<String>) {
        let (name, text) = (name.into(), text.into());
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some(entry) => entry.1 = text,
            None => self.0.push((name, text)),
        }
    }

    /// The text of a name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, text)| text.as_str())
    }

    /// The same without one name.
    pub fn without(&self, name: &str) -> Self {
        Fingerprint(self.0.iter().filter(|(known, _)| known != name).cloned().collect())
    }

    /// Names and texts in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }

    /// In words, how a job started as `self` differs from `now`; none if it does not.
    pub fn difference(&self, now: &Fingerprint) -> Option<String> {
        let mut then_texts = Vec::new();
        let mut now_texts = Vec::new();
        let names = self.iter().chain(now.iter().filter(|(name, _)| self.get(name).is_none())).map(|(name, _)| name);
        for name in names {
            if self.get(name) != now.get(name) {
                then_texts.push(describe(name, self.get(name)));
                now_texts.push(describe(name, now.get(name)));
            }
        }
        let list = |texts: Vec<String>| texts.join(", ");
        (!then_texts.is_empty()).then(|| format!("was started with {}, now {}", list(then_texts), list(now_texts)))
    }

    /// A hash over names, texts and their order.
    pub fn digest(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for (name, text) in self.iter() {
            for part in [name, text] {
                hasher.update((part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        hasher.finalize().into()
    }
}

fn describe(name: &str, text: Option<&str>) -> String {
    match text {
        Some(text) => format!("{name} {text}"),
        None => format!("no {name}"),
    }
}

/// Sampling values for lines that do not give their own: flags over `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// Tokens to generate; none means 16 for `/v1/completions` and 256 elsewhere.
    pub max_tokens: Option<u32>,
    /// None means 1.
    pub temperature: Option<f32>,
    /// None means 1 (off).
    pub top_p: Option<f32>,
    /// None means 0 (off).
    pub top_k: Option<u32>,
    /// None means 0 (off).
    pub min_p: Option<f32>,
    /// None means 1 (off).
    pub repetition_penalty: Option<f32>,
    /// None means 1.
    pub n: Option<u32>,
    /// None means no stop texts.
    pub stop: Option<Vec<String>>,
    /// None means 0.
    pub seed: Option<i64>,
    /// None means no log-probabilities.
    pub logprobs: Option<u32>,
}

impl Defaults {
    /// `self` where it has a value, else `lower` (flags over a model's generation config).
    pub fn or(self, lower: Defaults) -> Defaults {
        Defaults {
            max_tokens: self.max_tokens.or(lower.max_tokens),
            temperature: self.temperature.or(lower.temperature),
            top_p: self.top_p.or(lower.top_p),
            top_k: self.top_k.or(lower.top_k),
            min_p: self.min_p.or(lower.min_p),
            repetition_penalty: self.repetition_penalty.or(lower.repetition_penalty),
            n: self.n.or(lower.n),
            stop: self.stop.or(lower.stop),
            seed: self.seed.or(lower.seed),
            logprobs: self.logprobs.or(lower.logprobs),
        }
    }
}

/// What a valid line may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Token-id prompts are shorter than this (texts are checked once tokenized).
    pub context: u32,
    /// A longer line becomes a `line_too_long` record without being held in memory.
    pub line_bytes: u64,
}

impl Limits {
    /// The longest line accepted by default.
    pub const LINE_BYTES: u64 = 64 << 20;

    /// Limits of a model, with the default line length.
    pub fn new(vocab_size: u32, context: u32) -> Self {
        Limits { vocab_size, context, line_bytes: Self::LINE_BYTES }
    }
}

/// A job, as the command line resolved it.
#[derive(Clone, Debug)]
pub struct JobOptions {
    /// Where lines come from.
    pub input: Input,
    /// Where results go.
    pub output: Output,
    /// Where failed lines go instead of the output.
    pub error_file: Option<PathBuf>,
    /// Do failed lines of an earlier run again.
    pub retry_failed: bool,
    /// Only this part of the lines.
    pub shard: Option<Shard>,
    /// Model, numerics, sampling flags, seed; input and shard are added here.
    pub fingerprint: Fingerprint,
    /// Sampling values for lines without their own.
    pub defaults: Defaults,
    /// What lines may ask for.
    pub limits: Limits,
    /// The `model` of OpenAI responses to lines that name none.
    pub model_name: String,
}

/// How a job ended, or where it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lines answered, in this process and before.
    pub succeeded: u64,
    /// Lines with an error record, in this process and before.
    pub failed: u64,
    /// Lines that an earlier process had finished.
    pub resumed: u64,
}

impl Summary {
    /// 0 if every line succeeded, else 3.
    pub fn exit_code(&self) -> u8 {
        if self.failed == 0 { 0 } else { 3 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_partition_the_lines() {
        let shards: Vec<Shard> = (0..3).map(|i| format!("{i}/3").parse().unwrap()).collect();
        for line in 1..100 {
            assert_eq!(shards.iter().filter(|shard| shard.holds(line)).count(), 1);
        }
        assert!(shards[0].holds(1));
        for bad in ["", "3/3", "1", "a/b", "-1/3", "0/0"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_difference_is_named() {
        let then = Fingerprint::new().with("model", "m").with("seed", "1");
        let now = Fingerprint::new().with("model", "m").with("seed", "2");
        assert_eq!(then.difference(&now).unwrap(), "was started with seed 1, now seed 2");
        assert_eq!(then.difference(&then), None);
        assert_eq!(then.difference(&then.without("seed")).unwrap(), "was started with seed 1, now no seed");
        assert_ne!(then.digest(), now.digest());
    }
}
