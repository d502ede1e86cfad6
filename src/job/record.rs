//! The journal's records as bytes.
//!
//! **Invariant:** a record is read back whole or not at all: `length u32 | body | first 8 bytes of SHA-256(body)`,
//! little endian, the body beginning with its kind.

use std::borrow::Cow;

use sha2::{Digest, Sha256};

use super::disk::Extent;
use super::request::SampledToken;
use super::runs::Runs;

/// Bytes around a body.
pub(crate) const FRAME_BYTES: u64 = 4 + 8;
/// Bytes of a [`Record::Finished`] body before its line.
pub(crate) const FINISHED_BYTES: u64 = 1 + 8 + 1;

const VERSION: u8 = 1;

/// How far the output files reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Commit {
    /// Lines of the job whose results are in the files.
    pub lines: u64,
    /// The output.
    pub output: Extent,
    /// The error file; empty without one.
    pub errors: Extent,
}

impl Commit {
    /// Nothing written yet.
    pub fn none() -> Self {
        Commit { lines: 0, output: Extent::empty(), errors: Extent::empty() }
    }
}

/// One entry of the journal.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Record<'a> {
    /// The first record: which job, and how often it was retried.
    Header { attempt: u32, digest: [u8; 32] },
    /// A retry: successes among these lines (`true` failed) are copied from the old output, which is `extent`.
    Kept { failed: Runs, extent: Extent },
    /// For the lines of the next [`Record::Commit`], which failed: stands for finished records that were dropped.
    Outcomes { failed: Runs },
    /// Tokens of a sample, from its `start`-th generated one.
    Tokens { index: u64, prompt: u32, sample: u32, start: u32, tokens: Cow<'a, [SampledToken]> },
    /// A finished line with its line end.
    Finished { index: u64, failed: bool, line: &'a [u8] },
    /// The files were durable up to here.
    Commit(Commit),
}

impl Record<'_> {
    /// Appends the record to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        self.write_body(out);
        let length = u32::try_from(out.len() - start - 4).expect("a record is below 4 GiB: lines are checked");
        out[start..start + 4].copy_from_slice(&length.to_le_bytes());
        let sum = checksum(&out[start + 4..]);
        out.extend_from_slice(&sum);
    }

    fn write_body(&self, out: &mut Vec<u8>) {
        match self {
            Record::Header { attempt, digest } => {
                out.extend_from_slice(&[0, VERSION]);
                out.extend_from_slice(&attempt.to_le_bytes());
                out.extend_from_slice(digest);
            }
            Record::Kept { failed, extent } => {
                out.push(1);
                write_extent(extent, out);
                write_runs(failed, out);
            }
            Record::Outcomes { failed } => {
                out.push(2);
                write_runs(failed, out);
            }
            Record::Tokens { index, prompt, sample, start, tokens } => {
                out.push(3);
                out.extend_from_slice(&index.to_le_bytes());
                [prompt, sample, start].iter().for_each(|value| out.extend_from_slice(&value.to_le_bytes()));
                tokens.iter().for_each(|token| write_token(token, out));
            }
            Record::Finished { index, failed, line } => {
                out.push(4);
                out.extend_from_slice(&index.to_le_bytes());
                out.push(u8::from(*failed));
                out.extend_from_slice(line);
            }
            Record::Commit(commit) => {
                out.push(5);
                out.extend_from_slice(&commit.lines.to_le_bytes());
                write_extent(&commit.output, out);
                write_extent(&commit.errors, out);
            }
        }
    }
}

impl<'a> Record<'a> {
    /// Reads a body; none if it is not one.
    pub fn read(body: &'a [u8]) -> Option<Record<'a>> {
        let mut body = Bytes(body);
        let record = match body.u8()? {
            0 if body.u8()? == VERSION => Record::Header { attempt: body.u32()?, digest: body.array()? },
            1 => Record::Kept { extent: body.extent()?, failed: body.runs()? },
            2 => Record::Outcomes { failed: body.runs()? },
            3 => Record::Tokens {
                index: body.u64()?,
                prompt: body.u32()?,
                sample: body.u32()?,
                start: body.u32()?,
                tokens: body.tokens()?.into(),
            },
            4 => Record::Finished { index: body.u64()?, failed: body.u8()? != 0, line: std::mem::take(&mut body.0) },
            5 => Record::Commit(Commit { lines: body.u64()?, output: body.extent()?, errors: body.extent()? }),
            _ => return None,
        };
        body.0.is_empty().then_some(record)
    }
}

/// What follows a body.
pub(crate) fn checksum(body: &[u8]) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(body).into();
    *digest.first_chunk().expect("8 of 32 bytes")
}

fn write_extent(extent: &Extent, out: &mut Vec<u8>) {
    out.extend_from_slice(&extent.bytes.to_le_bytes());
    out.extend_from_slice(extent.sha256.as_bytes());
}

fn write_runs(runs: &Runs, out: &mut Vec<u8>) {
    runs.lengths().iter().for_each(|length| out.extend_from_slice(&length.to_le_bytes()));
}

fn write_token(token: &SampledToken, out: &mut Vec<u8>) {
    out.extend_from_slice(&token.id.to_le_bytes());
    out.extend_from_slice(&token.logprob.to_bits().to_le_bytes());
    let count = u8::try_from(token.top.len()).expect("at most 255 alternatives");
    out.push(count);
    for (id, logprob) in &token.top {
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(&logprob.to_bits().to_le_bytes());
    }
}

/// The rest of a body.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*array)
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn f32(&mut self) -> Option<f32> {
        self.u32().map(f32::from_bits)
    }

    fn extent(&mut self) -> Option<Extent> {
        let bytes = self.u64()?;
        let sha256 = String::from_utf8(self.array::<64>()?.to_vec()).ok()?;
        Some(Extent { bytes, sha256 })
    }

    fn runs(&mut self) -> Option<Runs> {
        let mut lengths = Vec::with_capacity(self.0.len() / 8);
        while !self.0.is_empty() {
            lengths.push(self.u64()?);
        }
        Runs::from_lengths(lengths)
    }

    fn tokens(&mut self) -> Option<Vec<SampledToken>> {
        let mut tokens = Vec::new();
        while !self.0.is_empty() {
            let (id, logprob, count) = (self.u32()?, self.f32()?, self.u8()?);
            let top = (0..count).map(|_| Some((self.u32()?, self.f32()?))).collect::<Option<_>>()?;
            tokens.push(SampledToken { id, logprob, top });
        }
        Some(tokens)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::lines::hex;

    #[test]
    fn records_come_back() {
        let mut runs = Runs::default();
        [true, false, false, true].iter().for_each(|&value| runs.push(value));
        let extent = Extent { bytes: 7, sha256: hex(&[0xab; 32]) };
        let token = SampledToken { id: 5, logprob: -0.25, top: vec![(5, -0.25), (9, f32::NEG_INFINITY)] };
        let records = [
            Record::Header { attempt: 3, digest: [9; 32] },
            Record::Kept { failed: runs.clone(), extent: extent.clone() },
            Record::Outcomes { failed: runs },
            Record::Tokens {
                index: 1 << 40,
                prompt: 1,
                sample: 2,
                start: 3,
                tokens: vec![token.clone(), token].into(),
            },
            Record::Finished { index: 8, failed: true, line: b"{}\n" },
            Record::Commit(Commit { lines: 4, output: extent, errors: Extent::empty() }),
        ];
        for record in &records {
            let mut bytes = Vec::new();
            record.write(&mut bytes);
            let body = &bytes[4..bytes.len() - 8];
            assert_eq!(Record::read(body).as_ref(), Some(record));
            assert_eq!(checksum(body), bytes[bytes.len() - 8..]);
            assert_eq!(Record::read(&body[..0]), None);
        }
    }
}
