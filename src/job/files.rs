//! The output files of a job and the journal that feeds them.
//!
//! **Invariant:** a finished line is in the journal before it is in the output, and leaves the journal only when the
//! output that holds it is durable.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::disk::{self, Appender};
use super::journal::{Journal, Kept, Replay, Waiting};
use super::options::Summary;
use super::paths::Paths;
use super::record::{Commit, FINISHED_BYTES, FRAME_BYTES, Record};
use super::request::SampledToken;
use super::runs::{Runs, Values};
use super::state::{RunResult, RunState};
use crate::durable::Lock;
use crate::error::{Error, Result};

/// How long finished work may stay in the system's memory only.
const SYNC_INTERVAL: Duration = Duration::from_secs(1);
/// Output bytes gathered before a write.
const WRITE_BYTES: usize = 1 << 20;
/// Dead bytes from which on the journal is rewritten, once they are more than half of it.
const REWRITE_BYTES: u64 = 64 << 20;

/// Output files with their journal.
pub(crate) struct Files {
    paths: Paths,
    lock: Lock,
    state: RunState,
    blank_lines: Runs,
    resumed: u64,
    journal: Journal,
    attempt: u32,
    digest: [u8; 32],
    output: Appender,
    errors: Option<Appender>,
    kept: Option<Kept>,
    old: Option<OldOutput>,
    /// Lines in the files; which of them failed.
    failed: Runs,
    next: u64,
    committed: Commit,
    waiting: BTreeMap<u64, Waiting>,
    /// Journal bytes of token records, per unfinished line.
    token_bytes: HashMap<u64, u64>,
    /// Journal bytes that a rewrite would save: now, and once the next commit is written.
    dead: u64,
    dying: u64,
    /// See [`REWRITE_BYTES`].
    rewrite_bytes: u64,
    synced: Instant,
}

/// What [`Files`] is made of, beside what the journal tells.
pub(crate) struct Opened {
    /// Where everything lies.
    pub paths: Paths,
    /// Held until the end.
    pub lock: Lock,
    /// To be completed with the result.
    pub state: RunState,
    /// From the survey.
    pub blank_lines: Runs,
    /// Ready to append.
    pub journal: Journal,
}

impl Files {
    /// Goes on where the journal ends.
    pub fn resume(opened: Opened, replay: Replay) -> Result<Files> {
        let Opened { paths, lock, state, blank_lines, journal } = opened;
        let output_path = if replay.kept.is_some() { &paths.partial } else { &paths.output };
        let output = Appender::open(output_path, &replay.commit.output)?;
        let errors = paths.errors.as_deref().map(|path| Appender::open(path, &replay.commit.errors)).transpose()?;
        disk::sync_directory(&paths.output)?;
        paths.errors.as_deref().map_or(Ok(()), disk::sync_directory)?;
        let old = match &replay.kept {
            Some(kept) => Some(OldOutput::open(&paths.output, kept, errors.is_none(), replay.commit.lines)?),
            None => None,
        };
        Ok(Files {
            paths,
            lock,
            state,
            blank_lines,
            resumed: 0,
            journal,
            attempt: replay.attempt,
            digest: replay.digest,
            output,
            errors,
            kept: replay.kept,
            old,
            failed: replay.failed,
            next: replay.commit.lines,
            committed: replay.commit,
            waiting: replay.waiting,
            token_bytes: replay.token_bytes,
            dead: replay.dead,
            dying: 0,
            rewrite_bytes: REWRITE_BYTES,
            synced: Instant::now(),
        })
    }

    /// Which lines are finished, of those up to the last finished one.
    pub fn done(&self) -> Runs {
        let mut done = Runs::default();
        done.extend(true, self.next);
        let mut old = self.kept.as_ref().map(|kept| kept.failed.clone().into_values().skip(self.next as usize));
        for index in self.next..self.total() {
            let kept = old.as_mut().and_then(Iterator::next) == Some(false);
            done.push(kept || self.waiting.contains_key(&index));
        }
        done
    }

    /// Tells how many lines an earlier process had finished.
    pub fn set_resumed(&mut self, resumed: u64) {
        self.resumed = resumed;
    }

    fn total(&self) -> u64 {
        self.blank_lines.len() - self.blank_lines.ones()
    }

    /// See [`super::Writer::tokens`].
    pub fn tokens(&mut self, index: u64, prompt: u32, sample: u32, start: u32, tokens: &[SampledToken]) -> Result<()> {
        let before = self.journal.len();
        self.journal.append(&Record::Tokens { index, prompt, sample, start, tokens: tokens.into() })?;
        *self.token_bytes.entry(index).or_default() += self.journal.len() - before;
        Ok(())
    }

    /// See [`super::Writer::finish`].
    pub fn finish(&mut self, index: u64, line: &[u8], failed: bool) -> Result<()> {
        assert!(index >= self.next && !self.waiting.contains_key(&index), "line {index} is finished twice");
        let offset = self.journal.append(&Record::Finished { index, failed, line })? + FINISHED_BYTES;
        self.waiting.insert(index, Waiting { offset, bytes: line.len() as u32, failed });
        self.dead += self.token_bytes.remove(&index).unwrap_or(0);
        Ok(())
    }

    /// See [`super::Writer::tick`].
    pub fn tick(&mut self, now: Instant) -> Result<()> {
        self.journal.flush()?;
        self.advance()?;
        if now.saturating_duration_since(self.synced) >= SYNC_INTERVAL {
            self.sync()?;
            self.synced = now;
        }
        Ok(())
    }

    /// Moves lines that are next in input order from the journal (or a retry's old output) to the files.
    fn advance(&mut self) -> Result<()> {
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        let mut moved = Vec::new();
        loop {
            let index = self.next + moved.len() as u64;
            if let Some(waiting) = self.waiting.get(&index).copied() {
                let split = waiting.failed && self.errors.is_some();
                self.journal.read_line(waiting, if split { &mut errors } else { &mut output })?;
                self.old.as_mut().map_or(Ok(false), |old| old.take(index, None))?;
                moved.push(waiting.failed);
            } else if self.old.as_mut().map_or(Ok(false), |old| old.take(index, Some(&mut output)))? {
                moved.push(false);
            } else {
                return self.write(&output, &errors, &moved);
            }
            if output.len() + errors.len() >= WRITE_BYTES {
                self.write(&output, &errors, &moved)?;
                (output, errors, moved) = Default::default();
            }
        }
    }

    fn write(&mut self, output: &[u8], errors: &[u8], moved: &[bool]) -> Result<()> {
        if moved.is_empty() {
            return Ok(());
        }
        self.output.append(output)?;
        self.errors.as_mut().map_or(Ok(()), |file| file.append(errors))?;
        for &failed in moved {
            if let Some(waiting) = self.waiting.remove(&self.next) {
                self.dying += u64::from(waiting.bytes) + FINISHED_BYTES + FRAME_BYTES;
            }
            self.failed.push(failed);
            self.next += 1;
        }
        Ok(())
    }

    /// Makes journal and files durable, then says so in the journal.
    fn sync(&mut self) -> Result<()> {
        self.journal.sync()?;
        self.output.sync()?;
        self.errors.as_mut().map_or(Ok(()), Appender::sync)?;
        if self.next > self.committed.lines {
            let errors = self.errors.as_ref().map_or_else(disk::Extent::empty, Appender::extent);
            self.committed = Commit { lines: self.next, output: self.output.extent(), errors };
            let before = self.journal.len();
            self.journal.append(&Record::Commit(self.committed.clone()))?;
            self.journal.flush()?;
            // The commit before this one is now dead.
            self.dead += std::mem::take(&mut self.dying) + self.journal.len() - before;
        }
        if self.dead > self.rewrite_bytes && self.dead > self.journal.len() / 2 {
            self.rewrite_journal()?;
        }
        Ok(())
    }

    /// Drops dead records from the journal. All that is in the files is committed.
    fn rewrite_journal(&mut self) -> Result<()> {
        let mut head = vec![Record::Header { attempt: self.attempt, digest: self.digest }];
        head.extend(
            self.kept
                .iter()
                .map(|Kept { failed, extent }| Record::Kept { failed: failed.clone(), extent: extent.clone() }),
        );
        head.push(Record::Outcomes { failed: self.failed.clone() });
        head.push(Record::Commit(self.committed.clone()));
        let (next, waiting) = (self.next, &self.waiting);
        let replay = self.journal.rewrite(&head, |record| match record {
            Record::Finished { index, .. } => *index >= next,
            Record::Tokens { index, .. } => *index >= next && !waiting.contains_key(index),
            _ => false,
        })?;
        assert_eq!(self.waiting.len(), replay.waiting.len(), "a rewrite keeps what waits");
        (self.waiting, self.token_bytes, self.dead) = (replay.waiting, replay.token_bytes, replay.dead);
        Ok(())
    }

    /// See [`super::Writer::close`].
    pub fn close(mut self, complete: bool) -> Result<Summary> {
        self.journal.flush()?;
        self.advance()?;
        self.sync()?;
        self.journal.sync()?;
        if complete {
            let (next, total) = (self.next, self.total());
            assert_eq!(next, total, "a complete job has no lines left");
            return self.complete();
        }
        self.leave()
    }

    /// Gives up the output as it is.
    pub fn leave(self) -> Result<Summary> {
        let waiting_failed = self.waiting.values().filter(|waiting| waiting.failed).count() as u64;
        let failed = self.failed.ones() + waiting_failed;
        let succeeded = self.next + self.waiting.len() as u64 - failed;
        self.lock.release()?;
        Ok(Summary { succeeded, failed, resumed: self.resumed })
    }

    fn complete(self) -> Result<Summary> {
        if self.kept.is_some() {
            disk::rename(&self.paths.partial, &self.paths.output)?;
        }
        let failed = self.failed.ones();
        let summary = Summary { succeeded: self.next - failed, failed, resumed: self.resumed };
        let result = RunResult {
            succeeded: summary.succeeded,
            failed,
            output: self.committed.output,
            errors: self.committed.errors,
            blank_lines: self.blank_lines,
            failed_lines: self.failed,
        };
        self.state.finish(self.attempt, result).save(&self.paths.state)?;
        clear(&self.paths)?;
        disk::remove(&self.paths.spool)?;
        self.lock.release()?;
        Ok(summary)
    }
}

/// Removes what a finished job no longer needs, but for its input.
pub(crate) fn clear(paths: &Paths) -> Result<()> {
    for path in [&paths.journal, &paths.partial] {
        disk::remove(path)?;
        disk::remove(&disk::with_suffix(path, ".tmp"))?;
    }
    disk::sync_directory(&paths.output)
}

/// The output before a retry: its successes are copied.
struct OldOutput {
    path: PathBuf,
    source: BufReader<File>,
    failed: Values,
    /// Whether failed lines have a line in it.
    inline: bool,
    /// Line of the job that `head` is about.
    at: u64,
    /// Whether line `at` failed; none behind the end.
    head: Option<bool>,
    line: Vec<u8>,
}

impl OldOutput {
    /// Opens the output as it was and passes over the first `lines`.
    fn open(path: &Path, kept: &Kept, inline: bool, lines: u64) -> Result<OldOutput> {
        disk::verify(path, &kept.extent)?;
        let source = BufReader::with_capacity(1 << 18, File::open(path).map_err(Error::io("open", path))?);
        let mut failed = kept.failed.clone().into_values();
        let head = failed.next();
        let mut old = OldOutput { path: path.to_owned(), source, failed, inline, at: 0, head, line: Vec::new() };
        for index in 0..lines {
            old.take(index, None)?;
        }
        Ok(old)
    }

    /// Passes over line `index`, copying it to `out` if it had succeeded. With somewhere to copy to, a line that had
    /// not stays, and the answer is `false`.
    fn take(&mut self, index: u64, out: Option<&mut Vec<u8>>) -> Result<bool> {
        assert_eq!(self.at, index, "the old output is read in order");
        let kept = self.head == Some(false);
        if out.is_some() && !kept {
            return Ok(false);
        }
        if kept || (self.head.is_some() && self.inline) {
            self.line.clear();
            self.source.read_until(b'\n', &mut self.line).map_err(Error::io("read", &self.path))?;
        }
        if let Some(out) = out {
            out.extend_from_slice(&self.line);
        }
        self.at += 1;
        self.head = self.failed.next();
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::render::Names;
    use crate::job::request::{Endpoint, ItemHeader, LineError};
    use crate::job::{Fingerprint, Input, JobOptions, Limits, Opening, Output, open};

    fn options(directory: &Path, lines: usize) -> JobOptions {
        let input = directory.join("in");
        std::fs::write(&input, "{\"prompt\":\"x\"}\n".repeat(lines)).unwrap();
        JobOptions {
            input: Input::File(input),
            output: Output::File(directory.join("out")),
            error_file: None,
            retry_failed: false,
            shard: None,
            fingerprint: Fingerprint::new(),
            defaults: Default::default(),
            limits: Limits::new(10, 10),
            model_name: "m".into(),
        }
    }

    fn error_of(index: u64) -> LineError {
        LineError::new("test", format!("{index} {}", "x".repeat(index as usize % 50)))
    }

    fn header(index: u64) -> ItemHeader {
        ItemHeader {
            index,
            line: index + 1,
            custom_id: format!("line-{}", index + 1).into(),
            endpoint: Endpoint::Plain,
            metadata: None,
            model: None,
            return_token_ids: false,
            return_prompt_logprobs: false,
        }
    }

    #[test]
    fn the_journal_stays_small_whenever_the_kill_comes() {
        const LINES: u64 = 200;
        let token = |id| SampledToken { id, logprob: 0.0, top: Vec::new() };
        for kill_every in [0, 7, 23, 64] {
            let directory = tempfile::tempdir().unwrap();
            let options = options(directory.path(), LINES as usize);
            let mut now = Instant::now();
            let mut largest = 0;
            let summary = 'runs: loop {
                let mut job = match open(options.clone()).unwrap() {
                    Opening::Finished(summary) => break summary,
                    Opening::Run(job) => job,
                };
                job.writer.files().rewrite_bytes = 2000;
                let mut items = Vec::new();
                let mut finished = 0;
                loop {
                    while let Some(item) = (items.len() < 10).then(|| job.reader.next().unwrap()).flatten() {
                        let known = item.partial.first().map_or(0, |sample| sample.tokens.len() as u32);
                        items.push((item, known));
                    }
                    // A fixed but mixed order, with tokens for all that are under way.
                    for (item, known) in &mut items {
                        job.writer.tokens(item.index, 0, 0, *known, &[token(*known)]).unwrap();
                        *known += 1;
                    }
                    if items.is_empty() {
                        break 'runs job.writer.close(true).unwrap();
                    }
                    let (item, known) = items.swap_remove(finished * 7 % items.len());
                    assert!(
                        item.partial
                            .iter()
                            .flat_map(|sample| &sample.tokens)
                            .map(|token| token.id)
                            .eq(0..item.partial.first().map_or(0, |sample| sample.tokens.len() as u32))
                    );
                    assert!(known > 0);
                    job.writer.finish(&item.header(), Err(&error_of(item.index))).unwrap();
                    finished += 1;
                    now += SYNC_INTERVAL;
                    job.writer.tick(now).unwrap();
                    largest = largest.max(job.writer.files().journal.len());
                    if finished == kill_every {
                        break;
                    }
                }
            };
            assert_eq!(summary.failed, LINES);
            assert!(largest < 12_000, "{largest} bytes");
            let names = Names::new(&Fingerprint::new(), "m");
            let expected: Vec<u8> =
                (0..LINES).flat_map(|index| names.line(&header(index), Err(&error_of(index)))).collect();
            assert!(std::fs::read(directory.path().join("out")).unwrap() == expected);
        }
    }

    #[test]
    fn a_kill_between_the_last_steps_is_made_good() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let mut options = options(directory.path(), 3);
        let work = |options: &JobOptions, complete| {
            let Opening::Run(mut job) = open(options.clone()).unwrap() else { panic!("work is left") };
            while let Some(item) = job.reader.next().unwrap() {
                job.writer.finish(&item.header(), Err(&error_of(item.index))).unwrap();
            }
            job.writer.close(complete).unwrap()
        };
        // Everything is committed, nothing is tidied.
        work(&options, false);
        let journal = std::fs::read(at("out.journal")).unwrap();
        assert!(matches!(open(options.clone()).unwrap(), Opening::Finished(Summary { failed: 3, resumed: 3, .. })));
        // The state tells of the end, the journal is still there.
        std::fs::write(at("out.journal"), &journal).unwrap();
        assert!(matches!(open(options.clone()).unwrap(), Opening::Finished(Summary { failed: 3, .. })));
        assert!(!at("out.journal").exists());
        // A retry is committed; its output is renamed, the state does not tell of it.
        options.retry_failed = true;
        work(&options, false);
        let journal = std::fs::read(at("out.journal")).unwrap();
        std::fs::rename(at("out.partial"), at("out")).unwrap();
        assert!(matches!(open(options.clone()).unwrap(), Opening::Finished(Summary { failed: 3, .. })));
        // ... and once more with the journal left behind.
        std::fs::write(at("out.journal"), &journal).unwrap();
        options.retry_failed = false;
        assert!(matches!(open(options.clone()).unwrap(), Opening::Finished(Summary { failed: 3, .. })));
        let mut left: Vec<_> =
            std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["in", "out", "out.run.json"]);
    }
}
