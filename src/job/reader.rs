//! The input as items for the engine.
//!
//! **Invariant:** items come in input order; lines that are already finished are skipped, but their names still count
//! when duplicates are looked for, and so do lines of other shards.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use super::ids::Ids;
use super::journal::PartialSample;
use super::lines::{Line, Lines};
use super::options::{Defaults, Limits, Shard};
use super::parse::Envelope;
use super::request::{Endpoint, ItemHeader, LineError, Request};
use super::runs::{Runs, Values};
use crate::error::{Error, Result};

/// One input line that has work left: a request, or the reason why it is none.
#[derive(Debug)]
pub struct Item {
    /// Position among the job's non-blank lines (of this shard), from 0.
    pub index: u64,
    /// Physical line in the input file, from 1.
    pub line: u64,
    /// The user's name for the line, or `line-<physical line>`.
    pub custom_id: Arc<str>,
    /// The shape of the answer.
    pub endpoint: Endpoint,
    /// What to do; an error goes to [`super::Writer::finish`] as it is.
    pub request: Result<Request, LineError>,
    /// Samples that an earlier process began.
    pub partial: Vec<PartialSample>,
}

impl Item {
    /// What [`super::Writer::finish`] needs to know of the line.
    pub fn header(&self) -> ItemHeader {
        match &self.request {
            Ok(request) => request.header(),
            Err(_) => ItemHeader {
                index: self.index,
                line: self.line,
                custom_id: self.custom_id.clone(),
                endpoint: self.endpoint,
                metadata: None,
                model: None,
                return_token_ids: false,
                return_prompt_logprobs: false,
            },
        }
    }
}

/// What a reader comes upon.
#[derive(Debug)]
// Items are what nearly every event is.
#[allow(clippy::large_enum_variant)]
pub enum Event {
    /// A line with work left.
    Item(Item),
    /// A worker is told not to wait for more.
    Flush,
}

/// What the reader is to do with the lines.
pub(crate) struct Reading {
    /// Names the input in errors.
    pub path: PathBuf,
    /// Which lines are the job's.
    pub shard: Shard,
    /// Sampling values for lines without their own.
    pub defaults: Defaults,
    /// What lines may ask for.
    pub limits: Limits,
    /// Which of the job's lines are finished; those behind its end are not.
    pub done: Runs,
    /// Samples begun earlier.
    pub partial: BTreeMap<u64, Vec<PartialSample>>,
    /// The hash that the whole input must have, if it was read before.
    pub sha256: Option<String>,
    /// Which names are taken.
    pub ids: Ids,
    /// Whether lines may also be words to a worker, of whom there may be none at all.
    pub control: bool,
}

/// Reads the input on a thread of its own.
pub struct Reader {
    lines: Lines<Box<dyn Read + Send>>,
    reading: Reading,
    done: Values,
    any: bool,
    index: u64,
    ended: bool,
}

impl Reader {
    pub(crate) fn new(source: Box<dyn Read + Send>, mut reading: Reading) -> Self {
        let done = std::mem::take(&mut reading.done).into_values();
        let lines = Lines::new(source, reading.limits.line_bytes);
        Reader { lines, reading, done, any: false, index: 0, ended: false }
    }

    /// The next line with work left; none at the end of the input. Words to a worker are passed over.
    ///
    /// # Errors
    /// `Error::Io` if the input cannot be read, `Error::Input` if it changed since the job began or has no lines.
    #[allow(clippy::should_implement_trait)] // Errors come first: `?` reads better than `transpose`.
    pub fn next(&mut self) -> Result<Option<Item>> {
        loop {
            match self.next_event()? {
                Some(Event::Item(item)) => return Ok(Some(item)),
                Some(Event::Flush) => {}
                None => return Ok(None),
            }
        }
    }

    /// The next line with work left or word to a worker; none at the end of the input.
    ///
    /// # Errors
    /// As [`Reader::next`].
    pub fn next_event(&mut self) -> Result<Option<Event>> {
        while !self.ended {
            let read = self.lines.next().map_err(Error::io("read", &self.reading.path))?;
            let (number, envelope) = match read {
                None => {
                    self.ended = true;
                    return self.check_end().map(|()| None);
                }
                Some((_, Line::Blank)) => continue,
                Some((_, Line::Text(text))) if self.reading.control && is_flush(text) => {
                    return Ok(Some(Event::Flush));
                }
                Some((number, line)) => (number, Envelope::open(number, &line, &self.reading.limits)),
            };
            self.any = true;
            let duplicate = !self.reading.ids.take(&envelope.custom_id);
            if !self.reading.shard.holds(number) {
                continue;
            }
            let index = self.index;
            self.index += 1;
            if self.done.next() != Some(true) {
                return Ok(Some(Event::Item(self.item(index, number, envelope, duplicate))));
            }
        }
        Ok(None)
    }

    fn item(&mut self, index: u64, line: u64, envelope: Envelope, duplicate: bool) -> Item {
        let (custom_id, endpoint) = (envelope.custom_id.clone(), envelope.endpoint);
        let request = if duplicate {
            let message = format!("an earlier line has the same custom_id \"{custom_id}\"");
            Err(LineError::new("duplicate_custom_id", message))
        } else {
            envelope.request(index, line, &self.reading.defaults, &self.reading.limits)
        };
        let partial = self.reading.partial.remove(&index).unwrap_or_default();
        Item { index, line, custom_id, endpoint, request, partial }
    }

    fn check_end(&self) -> Result<()> {
        let refuse = |what: &str, hint: &str| {
            Err(Error::Input { path: self.reading.path.clone(), what: what.into(), hint: Some(hint.into()) })
        };
        match &self.reading.sha256 {
            Some(before) if *before != self.lines.sha256() => {
                refuse("changed while the job was reading it", "restore the file and run the same command again")
            }
            None if !self.any && !self.reading.control => refuse("has no lines", "give it one JSON object per line"),
            _ => Ok(()),
        }
    }
}

/// Whether a line is `{"type":"flush"}`.
fn is_flush(text: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    #[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
    enum Control {
        Flush {},
    }
    text.len() < 100 && matches!(serde_json::from_slice(text), Ok(Control::Flush {}))
}
