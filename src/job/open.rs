//! Beginning, resuming or recognising a job.
//!
//! **Invariant:** nothing that the user or an earlier run wrote is overwritten unless it provably belongs to this job.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::disk::{self, Extent, refuse};
use super::files::{Files, Opened, clear};
use super::ids::Ids;
use super::journal::{Journal, Replay};
use super::lines::Survey;
use super::options::{Fingerprint, Input, JobOptions, Output, Shard, Summary};
use super::paths::{Paths, is_stream};
use super::reader::{Reader, Reading};
use super::record::Record;
use super::render::Names;
use super::runs::Runs;
use super::spool::{Spooled, spool};
use super::state::{RunResult, RunState, now_secs};
use super::writer::Writer;
use crate::durable::Lock;
use crate::error::{Error, Result};

/// What a job needs now.
// One value per process: the size of the larger variant does not matter.
#[allow(clippy::large_enum_variant)]
pub enum Opening {
    /// Nothing: it is already finished.
    Finished(Summary),
    /// Work.
    Run(Job),
}

/// A job with work left.
pub struct Job {
    /// Where items come from; may move to a thread of its own.
    pub reader: Reader,
    /// Where results go.
    pub writer: Writer,
    /// Non-blank lines of this shard, finished ones included; none when standard input goes to standard output.
    pub total: Option<u64>,
    /// Lines that an earlier process finished.
    pub resumed: u64,
    /// When the job was first started, in seconds since 1970.
    pub started_secs: u64,
}

/// What the job of an output depends on, if there is one.
///
/// # Errors
/// When it cannot be read, or `output` is no place for one.
pub fn begun(output: &Path) -> Result<Option<Fingerprint>> {
    let paths = Paths::of(&Input::Stdin, output, None)?;
    // Whoever removes a finished output wants it made anew.
    let is_there = |state: &RunState| state.result.is_none() || paths.output.exists() || paths.journal.exists();
    Ok(RunState::load(&paths.state)?.filter(is_there).map(|state| state.fingerprint()))
}

/// Opens a job: begins it, or finds where an earlier process left it.
///
/// # Errors
/// When input or output cannot be used, or the output belongs to another job or to nobody; the message names why.
pub fn open(options: JobOptions) -> Result<Opening> {
    match &options.output {
        Output::Stdout => open_stream(&options),
        Output::File(output) => {
            let paths = Paths::of(&options.input, output, options.error_file.as_deref())?;
            open_files(&options, paths)
        }
    }
}

fn open_stream(options: &JobOptions) -> Result<Opening> {
    let shard = options.shard.unwrap_or(Shard::WHOLE);
    let file = match &options.input {
        Input::File(path) if !is_stream(path)? => Some(path.clone()),
        _ => None,
    };
    let survey = file.as_ref().map(|path| survey(path, path, options)).transpose()?;
    let (path, source): (PathBuf, Box<dyn Read + Send>) = match &options.input {
        Input::File(path) => (path.clone(), Box::new(File::open(path).map_err(Error::io("open", path))?)),
        Input::Stdin => ("standard input".into(), Box::new(io::stdin())),
    };
    let errors = options.error_file.as_ref().map(|path| {
        if disk::length(path)?.is_some_and(|bytes| bytes > 0) {
            return Err(refuse(path, "already holds something", "choose another --error-file, or remove it"));
        }
        let open = OpenOptions::new().append(true).create(true).open(path);
        open.map(|file| (path.clone(), file)).map_err(Error::io("create", path))
    });
    let names = Names::new(&options.fingerprint, &options.model_name);
    let reading = Reading {
        path,
        shard,
        defaults: options.defaults.clone(),
        limits: options.limits,
        done: Runs::default(),
        partial: Default::default(),
        sha256: survey.as_ref().map(|survey| survey.sha256.clone()),
        ids: Ids::all(),
        control: false,
    };
    Ok(Opening::Run(Job {
        reader: Reader::new(source, reading),
        writer: Writer::to_stream(names, Box::new(io::stdout()), errors.transpose()?),
        total: survey.map(|survey| survey.total()),
        resumed: 0,
        started_secs: now_secs(),
    }))
}

/// Surveys a file that `named` is known by, and refuses it if it has no lines at all.
fn survey(path: &Path, named: &Path, options: &JobOptions) -> Result<Survey> {
    let survey = Survey::of(path, options.shard.unwrap_or(Shard::WHOLE), options.limits.line_bytes)?;
    if survey.any {
        return Ok(survey);
    }
    let hint = Some("give it one JSON object per line".into());
    Err(Error::Input { path: named.to_owned(), what: "has no lines (empty_file)".into(), hint })
}

fn open_files(options: &JobOptions, paths: Paths) -> Result<Opening> {
    let lock = paths.lock()?;
    let state = RunState::load(&paths.state)?;
    let shard = options.shard.unwrap_or(Shard::WHOLE).to_string();
    let fingerprint = |input: &str| options.fingerprint.clone().with("input", input).with("shard", shard);
    let (input, named) = match &options.input {
        Input::File(path) if !is_stream(path)? => (path.clone(), path.clone()),
        stream => match spool(stream, &paths, state.as_ref(), options.retry_failed)? {
            Spooled::At(named) => (paths.spool.clone(), named),
            Spooled::NotNeeded(finished) => {
                let (state, result) = *finished;
                let before = state.fingerprint();
                compare(&state, &fingerprint(before.get("input").unwrap_or_default()), &paths)?;
                check_finished(&paths, &result)?;
                return lock.release().map(|()| Opening::Finished(result.summary()));
            }
        },
    };
    let survey = survey(&input, &named, options)?;
    let fingerprint = fingerprint(&survey.sha256);
    let opening = Opener { options, paths, lock, fingerprint, survey, input };
    match opening.decide(state)? {
        Decision::Finished(summary) => {
            disk::remove(&opening.paths.spool)?;
            opening.lock.release()?;
            Ok(Opening::Finished(summary))
        }
        Decision::Run(begun) => opening.run(*begun),
    }
}

struct Opener<'a> {
    options: &'a JobOptions,
    paths: Paths,
    lock: Lock,
    fingerprint: Fingerprint,
    survey: Survey,
    input: PathBuf,
}

enum Decision {
    Finished(Summary),
    Run(Box<Begun>),
}

/// A job's state and journal, to go on from.
struct Begun {
    state: RunState,
    journal: Journal,
    replay: Replay,
}

impl Opener<'_> {
    /// Looks at what lies there and brings it into a state to go on from.
    fn decide(&self, state: Option<RunState>) -> Result<Decision> {
        let paths = &self.paths;
        let output_bytes = disk::length(&paths.output)?;
        let has_journal = disk::length(&paths.journal)?.is_some();
        // Whoever removes a finished output wants it made anew.
        let removed = output_bytes.is_none() && !has_journal && state.as_ref().is_some_and(|s| s.result.is_some());
        let (state, earlier) = if removed { (None, state) } else { (state, None) };
        let Some(state) = state else {
            return self.begin(output_bytes.unwrap_or(0), has_journal, earlier.as_ref());
        };
        compare(&state, &self.fingerprint, paths)?;
        if !has_journal {
            return match state.result.clone() {
                Some(result) => self.finished(state, result),
                None if output_bytes.unwrap_or(0) == 0 => self.start(),
                None => Err(refuse(&paths.journal, "the journal of this unfinished output is missing", START_AGAIN)),
            };
        }
        let (journal, replay) = Journal::open(&paths.journal)?;
        if replay.digest != self.fingerprint.digest() {
            return Err(refuse(&paths.journal, "belongs to another job", START_AGAIN));
        }
        match state.result.clone() {
            // Killed between the last two steps of finishing.
            Some(result) if replay.attempt <= state.attempt => {
                clear(paths)?;
                self.finished(state, result)
            }
            _ => self.resume(state, journal, replay),
        }
    }

    /// A job that was never begun here, or whose output was removed.
    fn begin(&self, output_bytes: u64, has_journal: bool, earlier: Option<&RunState>) -> Result<Decision> {
        let output = &self.paths.output;
        let ours = |errors: &Path| {
            let result = earlier.filter(|state| state.error_file.as_deref() == Some(errors))?.result.as_ref()?;
            disk::verify(errors, &result.errors).ok()
        };
        let taken = |errors: &&Path| disk::length(errors).ok().flatten().unwrap_or(0) > 0 && ours(errors).is_none();
        if output_bytes > 0 {
            return Err(refuse(output, "already exists and was not made by this command", "choose another --output"));
        }
        if has_journal {
            return Err(refuse(&self.paths.journal, "lies there without its .run.json", START_AGAIN));
        }
        if let Some(errors) = self.paths.errors.as_deref().filter(taken) {
            let hint = "choose another --error-file";
            return Err(refuse(errors, "already exists and was not made by this command", hint));
        }
        self.start()
    }

    fn start(&self) -> Result<Decision> {
        let state = RunState::new(&self.fingerprint, self.paths.errors.as_deref());
        state.save(&self.paths.state)?;
        Journal::create(&self.paths.journal, &[Record::Header { attempt: 0, digest: self.fingerprint.digest() }])?;
        let (journal, replay) = Journal::open(&self.paths.journal)?;
        Ok(Decision::Run(Box::new(Begun { state, journal, replay })))
    }

    /// The job is finished: nothing to do, unless failed lines are to be retried.
    fn finished(&self, state: RunState, result: RunResult) -> Result<Decision> {
        check_finished(&self.paths, &result)?;
        if result.failed == 0 || !self.options.retry_failed {
            return Ok(Decision::Finished(result.summary()));
        }
        // From here on the journal's higher attempt says that a retry is under way.
        let head = self.retry_head(state.attempt + 1, result.failed_lines, result.output);
        Journal::create(&self.paths.journal, &head)?;
        let (journal, replay) = Journal::open(&self.paths.journal)?;
        Ok(Decision::Run(Box::new(Begun { state, journal, replay })))
    }

    fn retry_head(&self, attempt: u32, failed: Runs, extent: Extent) -> [Record<'static>; 2] {
        [Record::Header { attempt, digest: self.fingerprint.digest() }, Record::Kept { failed, extent }]
    }

    /// The job was begun and not finished.
    fn resume(&self, state: RunState, mut journal: Journal, mut replay: Replay) -> Result<Decision> {
        let renamed = replay.kept.is_some()
            && replay.commit.lines == self.survey.total()
            && disk::length(&self.paths.partial)?.is_none();
        if renamed {
            // Killed between the rename that ends a retry and the state that tells of it.
            replay.kept = None;
        }
        let failures = replay.failed.ones() > 0 || replay.waiting.values().any(|waiting| waiting.failed);
        if self.options.retry_failed && failures && replay.kept.is_none() && !renamed {
            disk::verify(&self.paths.output, &replay.commit.output)?;
            let head = self.retry_head(replay.attempt + 1, replay.failed, replay.commit.output);
            replay = journal.rewrite(&head, |record| match record {
                Record::Finished { index, failed, .. } => *index >= replay.commit.lines && !failed,
                Record::Tokens { index, .. } => *index >= replay.commit.lines && !replay.waiting.contains_key(index),
                _ => false,
            })?;
        }
        Ok(Decision::Run(Box::new(Begun { state, journal, replay })))
    }

    fn run(self, begun: Begun) -> Result<Opening> {
        let Begun { state, journal, mut replay } = begun;
        let partial = std::mem::take(&mut replay.partial);
        let total = self.survey.total();
        let started_secs = state.started_secs;
        let opened = Opened { paths: self.paths, lock: self.lock, state, blank_lines: self.survey.layout, journal };
        let mut files = Files::resume(opened, replay)?;
        let done = files.done();
        let resumed = done.ones();
        files.set_resumed(resumed);
        if resumed == total {
            return files.close(true).map(Opening::Finished);
        }
        let source = File::open(&self.input).map_err(Error::io("open", &self.input))?;
        let reading = Reading {
            path: self.input,
            shard: self.options.shard.unwrap_or(Shard::WHOLE),
            defaults: self.options.defaults.clone(),
            limits: self.options.limits,
            done,
            partial,
            sha256: Some(self.survey.sha256),
            ids: Ids::all(),
            control: false,
        };
        let names = Names::new(&self.options.fingerprint, &self.options.model_name);
        Ok(Opening::Run(Job {
            reader: Reader::new(Box::new(source), reading),
            writer: Writer::to_files(names, files),
            total: Some(total),
            resumed,
            started_secs,
        }))
    }
}

const START_AGAIN: &str = "to start again, remove the output and the files whose names begin with its name";

/// Refuses an output that another job began.
fn compare(state: &RunState, fingerprint: &Fingerprint, paths: &Paths) -> Result<()> {
    let hint = "rerun with the settings it was started with, or choose another --output";
    if let Some(difference) = state.fingerprint().difference(fingerprint) {
        return Err(refuse(&paths.output, &difference, hint));
    }
    if state.error_file != paths.errors {
        let name = |path: &Option<PathBuf>| path.as_ref().map_or("none".into(), |path| path.display().to_string());
        let (then, now) = (name(&state.error_file), name(&paths.errors));
        return Err(refuse(&paths.output, &format!("was started with error file {then}, now {now}"), hint));
    }
    Ok(())
}

/// Refuses a finished output that is no longer as the job left it.
fn check_finished(paths: &Paths, result: &RunResult) -> Result<()> {
    let changed = |path: &Path, extent: &Extent| {
        if disk::length(path)? != Some(extent.bytes) {
            return Err(refuse(path, "was changed after the job finished", START_AGAIN));
        }
        disk::verify(path, extent)
    };
    changed(&paths.output, &result.output)?;
    paths.errors.as_deref().map_or(Ok(()), |errors| changed(errors, &result.errors))
}
