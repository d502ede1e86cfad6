//! The outputs of all shards of a job as the output that the job would have had in one piece.
//!
//! **Invariant:** nothing is written unless every shard is finished, intact and of the same job.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::disk::{self, Appender, Extent, refuse, with_suffix};
use super::options::{Fingerprint, Input, Shard, Summary};
use super::paths::Paths;
use super::runs::{Runs, Values};
use super::state::{RunResult, RunState};
use crate::error::{Error, Result};

/// Added to the output's name for the error records of shards that split them off.
const ERRORS_SUFFIX: &str = ".errors.jsonl";
const WRITE_BYTES: usize = 1 << 20;

/// Interleaves the outputs of all shards into `output`, in the order of the whole input.
///
/// Error records that the shards had split off go to `<output>.errors.jsonl`.
///
/// # Errors
/// If shards are missing, unfinished, changed or of different jobs, or if `output` holds something else.
pub fn merge(output: &Path, shards: &[PathBuf]) -> Result<Summary> {
    let parts = shards.iter().map(|path| Part::load(path)).collect::<Result<Vec<_>>>()?;
    let parts = in_order(parts)?;
    let fingerprint = parts[0].fingerprint.clone().with("shard", Shard::WHOLE.to_string());
    let split = parts[0].errors.is_some();
    let errors = split.then(|| with_suffix(output, ERRORS_SUFFIX));
    for part in &parts {
        Paths::of(&Input::File(part.output.clone()), output, errors.as_deref())?;
    }
    let paths = Paths::of(&Input::Stdin, output, errors.as_deref())?;
    let lock = paths.lock()?;
    let summary = match already_merged(&paths, &fingerprint)? {
        Some(summary) => summary,
        None => interleave(&paths, &fingerprint, parts)?,
    };
    lock.release()?;
    Ok(summary)
}

/// One finished shard.
struct Part {
    output: PathBuf,
    errors: Option<PathBuf>,
    fingerprint: Fingerprint,
    shard: Shard,
    result: RunResult,
}

impl Part {
    fn load(output: &Path) -> Result<Part> {
        let state = RunState::load(&with_suffix(output, ".run.json"))?.ok_or_else(|| {
            refuse(output, "has no .run.json beside it", "name outputs of `tidemill generate --shard`")
        })?;
        let fingerprint = state.fingerprint();
        let shard = fingerprint.get("shard").and_then(|shard| shard.parse().ok());
        let shard = shard.ok_or_else(|| refuse(output, "does not say which shard it is", "run its command again"))?;
        let result = state
            .result
            .ok_or_else(|| refuse(output, &format!("shard {shard} is not finished"), "run its command again"))?;
        disk_holds(output, &result.output)?;
        let errors = state.error_file.map(|path| find_errors(output, &path, &result.errors)).transpose()?;
        Ok(Part { output: output.to_owned(), errors, fingerprint, shard, result })
    }
}

/// A shard's error file: beside its output, as when both were copied here, or where it was written.
fn find_errors(output: &Path, written: &Path, extent: &Extent) -> Result<PathBuf> {
    let beside = written.file_name().map(|name| output.with_file_name(name));
    let found = beside.into_iter().chain([written.to_owned()]).find(|path| disk_holds(path, extent).is_ok());
    found.ok_or_else(|| refuse(written, "is missing or was changed", "put it beside the shard's output"))
}

fn disk_holds(path: &Path, extent: &Extent) -> Result<()> {
    if disk::length(path)?.is_some_and(|bytes| bytes != extent.bytes) {
        return Err(refuse(path, "was changed after its job finished", "restore it, or run its command again"));
    }
    disk::verify(path, extent)
}

/// The parts by shard index, complete and of one job.
fn in_order(mut parts: Vec<Part>) -> Result<Vec<Part>> {
    parts.sort_by_key(|part| part.shard.index);
    let Some(first) = parts.first() else {
        return Err(Error::usage("no shards to merge", "name the output of every shard"));
    };
    let whole = first.fingerprint.without("shard");
    for part in &parts {
        if let Some(difference) = whole.difference(&part.fingerprint.without("shard")) {
            let what = format!("is of another job: {} {difference}", first.output.display());
            return Err(refuse(&part.output, &what, "merge shards of one command only"));
        }
        if part.shard.count != first.shard.count {
            let what = format!("is shard {}, but {} is {}", part.shard, first.output.display(), first.shard);
            return Err(refuse(&part.output, &what, "merge shards of one command only"));
        }
        if part.errors.is_some() != first.errors.is_some() {
            return Err(refuse(&part.output, "differs from other shards in --error-file", "run it as the others"));
        }
    }
    if let Some(pair) = parts.windows(2).find(|pair| pair[0].shard == pair[1].shard) {
        let what = format!("is shard {}, and so is {}", pair[1].shard, pair[0].output.display());
        return Err(refuse(&pair[1].output, &what, "name each shard once"));
    }
    let count = first.shard.count;
    let given = parts.len() as u64;
    let missing = (0..count).filter(|index| parts.binary_search_by_key(index, |part| part.shard.index).is_err());
    let missing: Vec<String> = missing.take(10).map(|index| Shard { index, count }.to_string()).collect();
    if !missing.is_empty() {
        let more = if missing.len() as u64 + given < count { ", ..." } else { "" };
        let what = format!("shards are missing: {}{more}", missing.join(", "));
        return Err(Error::usage(what, "name the output of every shard"));
    }
    Ok(parts)
}

/// The summary of an earlier merge of the same shards; refuses anything else that lies there.
fn already_merged(paths: &Paths, fingerprint: &Fingerprint) -> Result<Option<Summary>> {
    let state = RunState::load(&paths.state)?;
    let ours = state.as_ref().is_some_and(|state| state.fingerprint() == *fingerprint);
    let there = |path: &Path| disk::length(path).map(|bytes| bytes.is_some_and(|bytes| bytes > 0));
    if !there(&paths.output)? {
        let orphan = paths.errors.as_deref().filter(|errors| !ours && there(errors).unwrap_or(false));
        return orphan.map_or(Ok(None), |errors| Err(refuse(errors, "already exists", "choose another --output")));
    }
    match state.and_then(|state| state.result).filter(|_| ours) {
        Some(result) if disk_holds(&paths.output, &result.output).is_ok() => Ok(Some(result.summary())),
        _ => Err(refuse(&paths.output, "already exists", "choose another --output")),
    }
}

/// A shard's lines, still to come.
struct Source {
    output: Stream,
    errors: Option<Stream>,
    blank: Values,
    failed: Values,
}

struct Stream {
    path: PathBuf,
    reader: BufReader<File>,
}

impl Stream {
    fn open(path: &Path) -> Result<Stream> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        Ok(Stream { path: path.to_owned(), reader: BufReader::with_capacity(1 << 18, file) })
    }

    fn copy_line(&mut self, out: &mut Vec<u8>) -> Result<()> {
        match self.reader.read_until(b'\n', out) {
            Ok(0) => Err(refuse(&self.path, "has fewer lines than its .run.json says", "run its command again")),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::io("read", &self.path)(error)),
        }
    }
}

fn interleave(paths: &Paths, fingerprint: &Fingerprint, parts: Vec<Part>) -> Result<Summary> {
    let mut sources = Vec::new();
    for part in parts {
        sources.push(Source {
            output: Stream::open(&part.output)?,
            errors: part.errors.as_deref().map(Stream::open).transpose()?,
            blank: part.result.blank_lines.into_values(),
            failed: part.result.failed_lines.into_values(),
        });
    }
    let errors_partial = paths.errors.as_deref().map(|path| with_suffix(path, ".partial"));
    let mut output = Target::open(&paths.partial)?;
    let mut errors = errors_partial.as_deref().map(Target::open).transpose()?;
    let (mut blank_lines, mut failed_lines) = (Runs::default(), Runs::default());
    for turn in 0.. {
        let at = turn % sources.len();
        let source = &mut sources[at];
        let Some(blank) = source.blank.next() else { break };
        blank_lines.push(blank);
        if blank {
            continue;
        }
        let failed = source.failed.next() == Some(true);
        failed_lines.push(failed);
        match (&mut source.errors, &mut errors) {
            (Some(from), Some(to)) if failed => to.copy_line(from)?,
            _ => output.copy_line(&mut source.output)?,
        }
    }
    let failed = failed_lines.ones();
    let result = RunResult {
        succeeded: failed_lines.len() - failed,
        failed,
        output: output.finish()?,
        errors: errors.map_or_else(|| Ok(Extent::empty()), Target::finish)?,
        blank_lines,
        failed_lines,
    };
    let summary = Summary { resumed: 0, ..result.summary() };
    // The output comes last: until it is there, merging again starts over.
    RunState::new(fingerprint, paths.errors.as_deref()).finish(0, result).save(&paths.state)?;
    if let (Some(partial), Some(path)) = (&errors_partial, &paths.errors) {
        disk::rename(partial, path)?;
    }
    disk::rename(&paths.partial, &paths.output)?;
    Ok(summary)
}

/// A file being written, in large pieces.
struct Target {
    file: Appender,
    buffer: Vec<u8>,
}

impl Target {
    fn open(path: &Path) -> Result<Target> {
        Ok(Target { file: Appender::open(path, &Extent::empty())?, buffer: Vec::new() })
    }

    fn copy_line(&mut self, from: &mut Stream) -> Result<()> {
        from.copy_line(&mut self.buffer)?;
        if self.buffer.len() >= WRITE_BYTES {
            self.file.append(&self.buffer)?;
            self.buffer.clear();
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Extent> {
        self.file.append(&self.buffer)?;
        self.file.sync()?;
        Ok(self.file.extent())
    }
}
