//! The journal beside the output: what is finished or begun but not yet in the output.
//!
//! **Invariant:** records are only appended; a torn tail is cut off on opening; rewriting goes through a new file and
//! a rename. Memory holds where a line stands, never the line.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::disk::{self, Extent};
use super::record::{Commit, FINISHED_BYTES, FRAME_BYTES, Record, checksum};
use super::request::SampledToken;
use super::runs::Runs;
use crate::error::{Error, Result};

/// Buffered bytes at which records are written out before the next tick.
const BUFFER_BYTES: usize = 1 << 20;

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    /// Bytes in the file.
    bytes: u64,
    buffer: Vec<u8>,
    dirty: bool,
}

/// A finished line that waits in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Waiting {
    /// Where its bytes begin.
    pub offset: u64,
    /// How many there are.
    pub bytes: u32,
    /// Whether it is an error record.
    pub failed: bool,
}

/// The tokens of one sample as far as the journal knows them.
#[derive(Clone, Debug, PartialEq)]
pub struct PartialSample {
    /// Index of the prompt within the request.
    pub prompt: u32,
    /// Index of the sample of that prompt.
    pub sample: u32,
    /// Its tokens from the first on.
    pub tokens: Vec<SampledToken>,
}

/// A retry's source of lines that had succeeded.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    /// Which lines of the old output had failed.
    pub failed: Runs,
    /// The old output.
    pub extent: Extent,
}

/// What a journal tells.
#[derive(Debug)]
pub(crate) struct Replay {
    /// Which retry this is, from 0.
    pub attempt: u32,
    /// The fingerprint's digest.
    pub digest: [u8; 32],
    /// Given for a retry.
    pub kept: Option<Kept>,
    /// For each committed line whether it failed.
    pub failed: Runs,
    /// How far the files reached.
    pub commit: Commit,
    /// Finished lines behind the commit.
    pub waiting: BTreeMap<u64, Waiting>,
    /// Samples of unfinished lines.
    pub partial: BTreeMap<u64, Vec<PartialSample>>,
    /// Bytes of token records of unfinished lines.
    pub token_bytes: HashMap<u64, u64>,
    /// Bytes that a rewrite would save.
    pub dead: u64,
}

impl Journal {
    /// Puts a new journal of the given records in place of an old one.
    pub fn create(path: &Path, records: &[Record<'_>]) -> Result<()> {
        let mut new = Journal::begin(&disk::with_suffix(path, ".tmp"), records)?;
        new.sync()?;
        disk::rename(&new.path, path)
    }

    fn begin(path: &Path, records: &[Record<'_>]) -> Result<Journal> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        let file = file.map_err(Error::io("create", path))?;
        let mut new = Journal { file, path: path.to_owned(), bytes: 0, buffer: Vec::new(), dirty: true };
        records.iter().try_for_each(|record| new.append(record).map(drop))?;
        Ok(new)
    }

    /// Opens a journal, reads it, and cuts off a torn tail.
    pub fn open(path: &Path) -> Result<(Journal, Replay)> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(Error::io("open", path))?;
        let (replay, bytes) = replay(path, &file)?;
        let replay = replay.ok_or_else(|| Error::Output {
            path: path.to_owned(),
            what: "is not a journal of this program".into(),
            hint: Some("remove it together with the output to start again".into()),
        })?;
        file.set_len(bytes).map_err(Error::io("truncate", path))?;
        Ok((Journal { file, path: path.to_owned(), bytes, buffer: Vec::new(), dirty: true }, replay))
    }

    /// Appends a record; it reaches the file at the next flush. Returns where its body stands.
    pub fn append(&mut self, record: &Record<'_>) -> Result<u64> {
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        let at = self.len() + 4;
        record.write(&mut self.buffer);
        Ok(at)
    }

    /// Bytes written and buffered.
    pub fn len(&self) -> u64 {
        self.bytes + self.buffer.len() as u64
    }

    /// Hands buffered records to the system.
    pub fn flush(&mut self) -> Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if let Err(error) = self.file.write_all_at(&self.buffer, self.bytes) {
            // A torn record is cut off on opening as well; cutting now frees the space.
            let _ = self.file.set_len(self.bytes);
            return Err(Error::io("write", &self.path)(error));
        }
        self.bytes += self.buffer.len() as u64;
        self.buffer.clear();
        self.dirty = true;
        Ok(())
    }

    /// Makes every record durable.
    pub fn sync(&mut self) -> Result<()> {
        self.flush()?;
        if std::mem::take(&mut self.dirty) {
            self.file.sync_data().map_err(Error::io("sync", &self.path))?;
        }
        Ok(())
    }

    /// Appends a waiting line's bytes to `out`. It must have been flushed.
    pub fn read_line(&self, waiting: Waiting, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        out.resize(start + waiting.bytes as usize, 0);
        self.file.read_exact_at(&mut out[start..], waiting.offset).map_err(Error::io("read", &self.path))
    }

    /// Rewrites the journal as `head` and those records for which `lives` holds. Returns what the new one tells.
    pub fn rewrite(&mut self, head: &[Record<'_>], lives: impl Fn(&Record<'_>) -> bool) -> Result<Replay> {
        self.flush()?;
        let mut new = Journal::begin(&disk::with_suffix(&self.path, ".tmp"), head)?;
        let mut bodies = Bodies::new(&self.file, self.bytes);
        while let Some((_, body)) = bodies.next().map_err(Error::io("read", &self.path))? {
            let Some(record) = Record::read(body) else { break };
            if lives(&record) {
                new.append(&record)?;
            }
        }
        new.sync()?;
        disk::rename(&new.path, &self.path)?;
        let (journal, replay) = Journal::open(&self.path)?;
        *self = journal;
        Ok(replay)
    }
}

/// Reads a journal up to its first damaged record; also says where that is. No replay without a header.
fn replay(path: &Path, file: &File) -> Result<(Option<Replay>, u64)> {
    let length = file.metadata().map_err(Error::io("read", path))?.len();
    let mut bodies = Bodies::new(file, length);
    let mut replay: Option<Replay> = None;
    let mut end = 0;
    while let Some((offset, body)) = bodies.next().map_err(Error::io("read", path))? {
        let size = body.len() as u64;
        match (Record::read(body), &mut replay) {
            (Some(Record::Header { attempt, digest }), None) => replay = Some(Replay::new(attempt, digest)),
            (Some(record), Some(replay)) => replay.apply(record, offset, size),
            _ => break,
        }
        end = offset + size + 8;
    }
    Ok((replay, end))
}

/// The bodies of a journal's sound records, one after the other.
struct Bodies<'a> {
    source: BufReader<io::Take<&'a File>>,
    offset: u64,
    end: u64,
    body: Vec<u8>,
}

impl<'a> Bodies<'a> {
    fn new(mut file: &'a File, end: u64) -> Self {
        use std::io::Seek;
        let start = file.rewind();
        let end = if start.is_ok() { end } else { 0 };
        Bodies { source: BufReader::with_capacity(1 << 18, file.take(end)), offset: 0, end, body: Vec::new() }
    }

    /// The next body and where it stands; none at the end or at the first damage.
    fn next(&mut self) -> io::Result<Option<(u64, &[u8])>> {
        let left = self.end - self.offset;
        if left < FRAME_BYTES {
            return Ok(None);
        }
        let mut word = [0; 4];
        self.source.read_exact(&mut word)?;
        let size = u64::from(u32::from_le_bytes(word));
        if size == 0 || size > left - FRAME_BYTES {
            return Ok(None);
        }
        self.body.resize(size as usize, 0);
        self.source.read_exact(&mut self.body)?;
        let mut sum = [0; 8];
        self.source.read_exact(&mut sum)?;
        if sum != checksum(&self.body) {
            return Ok(None);
        }
        let offset = self.offset + 4;
        self.offset += size + FRAME_BYTES;
        Ok(Some((offset, &self.body)))
    }
}

impl Replay {
    fn new(attempt: u32, digest: [u8; 32]) -> Self {
        Replay {
            attempt,
            digest,
            kept: None,
            failed: Runs::default(),
            commit: Commit::none(),
            waiting: BTreeMap::new(),
            partial: BTreeMap::new(),
            token_bytes: HashMap::new(),
            dead: 0,
        }
    }

    /// Takes in one record, whose body of `size` bytes stands at `offset`.
    fn apply(&mut self, record: Record<'_>, offset: u64, size: u64) {
        match record {
            Record::Header { .. } => {}
            Record::Kept { failed, extent } => self.kept = Some(Kept { failed, extent }),
            Record::Outcomes { failed } => self.failed = failed,
            Record::Tokens { index, prompt, sample, start, tokens } => {
                *self.token_bytes.entry(index).or_default() += size + FRAME_BYTES;
                self.extend_sample(index, prompt, sample, start as usize, tokens.into_owned());
            }
            Record::Finished { index, failed, line } => {
                self.partial.remove(&index);
                self.dead += self.token_bytes.remove(&index).unwrap_or(0);
                let waiting = Waiting { offset: offset + FINISHED_BYTES, bytes: line.len() as u32, failed };
                self.waiting.insert(index, waiting);
            }
            Record::Commit(commit) => self.commit_to(commit),
        }
    }

    /// A sample that goes on before its known end was begun anew from there; one with a gap is dropped.
    fn extend_sample(&mut self, index: u64, prompt: u32, sample: u32, start: usize, tokens: Vec<SampledToken>) {
        let samples = self.partial.entry(index).or_default();
        let at =
            samples.iter().position(|known| (known.prompt, known.sample) == (prompt, sample)).unwrap_or_else(|| {
                samples.push(PartialSample { prompt, sample, tokens: Vec::new() });
                samples.len() - 1
            });
        if samples[at].tokens.len() < start {
            samples.remove(at);
            return;
        }
        samples[at].tokens.truncate(start);
        samples[at].tokens.extend(tokens);
    }

    fn commit_to(&mut self, commit: Commit) {
        for index in self.failed.len()..commit.lines {
            // Lines that never waited came from a retry's old output, where only successes are kept.
            let failed = self.waiting.remove(&index).is_some_and(|waiting| {
                self.dead += u64::from(waiting.bytes) + FINISHED_BYTES + FRAME_BYTES;
                waiting.failed
            });
            self.failed.push(failed);
        }
        self.commit = commit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32) -> SampledToken {
        SampledToken { id, logprob: -1.0, top: Vec::new() }
    }

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        let records = [
            Record::Header { attempt: 0, digest: [1; 32] },
            Record::Tokens { index: 0, prompt: 0, sample: 0, start: 0, tokens: vec![token(1), token(2)].into() },
            Record::Tokens { index: 1, prompt: 0, sample: 1, start: 0, tokens: vec![token(3)].into() },
            Record::Finished { index: 2, failed: true, line: b"two\n" },
            Record::Tokens { index: 1, prompt: 0, sample: 1, start: 1, tokens: vec![token(4)].into() },
            Record::Finished { index: 0, failed: false, line: b"zero\n" },
            Record::Commit(Commit { lines: 1, ..Commit::none() }),
        ];
        records.iter().for_each(|record| record.write(&mut bytes));
        bytes
    }

    #[test]
    fn any_torn_tail_is_cut_off() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let whole = sample();
        for length in 0..=whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let Ok((journal, replay)) = Journal::open(&path) else {
                assert!(length < 50, "only the header is needed");
                continue;
            };
            assert!(journal.len() <= length as u64);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), journal.len());
            assert!(replay.waiting.len() <= 2);
        }
        let (mut journal, replay) = Journal::open(&path).unwrap();
        assert_eq!(replay.commit.lines, 1);
        assert_eq!(replay.partial[&1][0].tokens, [token(3), token(4)]);
        let mut line = Vec::new();
        journal.read_line(replay.waiting[&2], &mut line).unwrap();
        assert_eq!(line, b"two\n");
        journal.append(&Record::Finished { index: 1, failed: false, line: b"one\n" }).unwrap();
        journal.sync().unwrap();
        assert_eq!(Journal::open(&path).unwrap().1.waiting.len(), 2);
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let whole = sample();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            std::fs::write(&path, &bytes).unwrap();
            if let Ok((journal, _)) = Journal::open(&path) {
                assert!(journal.len() <= at as u64 && (journal.len() as usize) < whole.len());
            }
        }
    }
}
