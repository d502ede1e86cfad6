//! `OUTPUT.run.json`: which job an output belongs to and how it ended.
//!
//! **Invariant:** the file changes in one step; `result` describes the output as it lies there.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::disk::{self, Extent};
use super::options::{Fingerprint, Summary};
use super::runs::Runs;
use crate::error::{Error, Result};

const VERSION: u32 = 1;

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunState {
    version: u32,
    /// How often failed lines were retried.
    pub attempt: u32,
    fingerprint: Map<String, Value>,
    /// Where failed lines are split off to.
    pub error_file: Option<PathBuf>,
    /// When the job was first started, in seconds since 1970: what templates take for now, however often it is
    /// resumed.
    pub started_secs: u64,
    /// Given once the job is finished.
    pub result: Option<RunResult>,
}

/// How a job ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RunResult {
    /// Lines answered.
    pub succeeded: u64,
    /// Lines with an error record.
    pub failed: u64,
    /// The output.
    pub output: Extent,
    /// The error file; empty without one.
    pub errors: Extent,
    /// The shard's physical lines as run lengths: with text, blank, with text, ...
    pub blank_lines: Runs,
    /// The lines with text as run lengths: succeeded, failed, succeeded, ...
    pub failed_lines: Runs,
}

impl RunResult {
    /// The result as a summary of a job with nothing left to do.
    pub fn summary(&self) -> Summary {
        let (succeeded, failed) = (self.succeeded, self.failed);
        Summary { succeeded, failed, resumed: succeeded + failed }
    }
}

/// Seconds since 1970.
pub(crate) fn now_secs() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

impl RunState {
    /// The state of a job that begins.
    pub fn new(fingerprint: &Fingerprint, error_file: Option<&Path>) -> Self {
        let fingerprint = fingerprint.iter().map(|(name, text)| (name.to_owned(), text.into())).collect();
        RunState {
            version: VERSION,
            attempt: 0,
            fingerprint,
            error_file: error_file.map(Path::to_owned),
            started_secs: now_secs(),
            result: None,
        }
    }

    /// The state of the job once it has ended.
    pub fn finish(self, attempt: u32, result: RunResult) -> Self {
        RunState { attempt, result: Some(result), ..self }
    }

    /// Reads the file; none if there is none.
    pub fn load(path: &Path) -> Result<Option<RunState>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read", path)(error)),
        };
        let state = serde_json::from_slice::<RunState>(&bytes).map_err(|error| error.to_string()).and_then(|state| {
            if state.version == VERSION { Ok(Some(state)) } else { Err(format!("version {}", state.version)) }
        });
        state.map_err(|what| Error::Output {
            path: path.to_owned(),
            what: format!("is not the state of a job of this program: {what}"),
            hint: Some("choose another --output, or remove the output and its side files".into()),
        })
    }

    /// Writes the file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut json = serde_json::to_vec(self).expect("maps with text keys become JSON");
        json.push(b'\n');
        disk::replace(path, &json)
    }

    /// What the job depends on.
    pub fn fingerprint(&self) -> Fingerprint {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.fingerprint.iter().fold(Fingerprint::new(), |all, (name, value)| all.with(name, text(value)))
    }
}
