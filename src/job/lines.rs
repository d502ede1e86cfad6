//! Input as physical lines, with bounded memory.
//!
//! **Invariant:** lines end at `\n` only and are numbered from 1; every byte read enters the running hash, so two
//! readers that agree on the hash saw the same lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::options::Shard;
use super::runs::Runs;
use crate::error::{Error, Result};

const BOM: &[u8] = b"\xef\xbb\xbf";
const READ_BYTES: usize = 1 << 18;

/// One physical line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// Nothing but white space.
    Blank,
    /// Its bytes without the line end.
    Text(&'a [u8]),
    /// More bytes than the limit.
    TooLong,
}

/// Reads line after line.
pub(crate) struct Lines<R> {
    source: BufReader<R>,
    limit: u64,
    number: u64,
    buffer: Vec<u8>,
    hasher: Sha256,
}

impl<R: Read> Lines<R> {
    /// Reads `source`; lines longer than `limit` bytes come as [`Line::TooLong`].
    pub fn new(source: R, limit: u64) -> Self {
        let source = BufReader::with_capacity(READ_BYTES, source);
        Lines { source, limit, number: 0, buffer: Vec::new(), hasher: Sha256::new() }
    }

    /// The next line with its number.
    pub fn next(&mut self) -> io::Result<Option<(u64, Line<'_>)>> {
        let Some(fits) = self.read_line()? else { return Ok(None) };
        self.number += 1;
        let text = match self.number {
            1 => self.buffer.strip_prefix(BOM).unwrap_or(&self.buffer),
            _ => &self.buffer,
        };
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let line = match fits {
            false => Line::TooLong,
            true if text.trim_ascii().is_empty() => Line::Blank,
            true => Line::Text(text),
        };
        Ok(Some((self.number, line)))
    }

    /// Fills the buffer up to a line end. None at the end, `false` if the line did not fit.
    fn read_line(&mut self) -> io::Result<Option<bool>> {
        self.buffer.clear();
        let (mut fits, mut any) = (true, false);
        loop {
            let chunk = match self.source.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                chunk => chunk?,
            };
            if chunk.is_empty() {
                return Ok(any.then_some(fits));
            }
            any = true;
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let text = &chunk[..end.unwrap_or(chunk.len())];
            fits = fits && (self.buffer.len() + text.len()) as u64 <= self.limit;
            if fits {
                self.buffer.extend_from_slice(text);
            } else {
                self.buffer = Vec::new();
            }
            let used = end.map_or(chunk.len(), |end| end + 1);
            self.hasher.update(&chunk[..used]);
            self.source.consume(used);
            if end.is_some() {
                return Ok(Some(fits));
            }
        }
    }

    /// The hash of everything read so far, in hexadecimal.
    pub fn sha256(&self) -> String {
        hex(&self.hasher.clone().finalize())
    }
}

/// Bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What one pass over the input tells before any work begins.
#[derive(Debug)]
pub(crate) struct Survey {
    /// The hash of the whole file, in hexadecimal.
    pub sha256: String,
    /// Whether any line of the whole file is not blank.
    pub any: bool,
    /// The shard's physical lines in order; `true` is a blank one.
    pub layout: Runs,
}

impl Survey {
    /// Reads the file once.
    pub fn of(path: &Path, shard: Shard, limit: u64) -> Result<Survey> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        refuse_other_encodings(path, &file)?;
        let mut lines = Lines::new(file, limit);
        let (mut any, mut layout) = (false, Runs::default());
        while let Some((number, line)) = lines.next().map_err(Error::io("read", path))? {
            let blank = line == Line::Blank;
            any |= !blank;
            if shard.holds(number) {
                layout.push(blank);
            }
        }
        Ok(Survey { sha256: lines.sha256(), any, layout })
    }

    /// The shard's lines that are not blank.
    pub fn total(&self) -> u64 {
        self.layout.len() - self.layout.ones()
    }
}

/// A compressed or UTF-16 file is refused as a whole: each of its lines would fail for the same reason.
fn refuse_other_encodings(path: &Path, file: &File) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let mut start = [0; 4];
    let length = file.read_at(&mut start, 0).unwrap_or(0);
    let kind = match &start[..length] {
        [0x1f, 0x8b, ..] => "gzip data",
        [0x28, 0xb5, 0x2f, 0xfd] => "zstd data",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16 text",
        _ => return Ok(()),
    };
    Err(Error::Input {
        path: path.to_owned(),
        what: format!("is {kind}, not JSON lines in UTF-8"),
        hint: Some("convert it first, for example with `zcat`, `zstdcat` or `iconv`, into `--input -`".into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], limit: u64) -> Vec<String> {
        let mut lines = Lines::new(bytes, limit);
        let mut seen = Vec::new();
        while let Some((number, line)) = lines.next().unwrap() {
            seen.push(match line {
                Line::Blank => format!("{number} blank"),
                Line::Text(text) => format!("{number} {}", String::from_utf8_lossy(text)),
                Line::TooLong => format!("{number} too long"),
            });
        }
        assert_eq!(lines.sha256(), hex(&Sha256::digest(bytes)));
        seen
    }

    #[test]
    fn lines_end_at_newline_only() {
        let text = "\u{feff}a\r\n\n \t\r\nb\u{2028}c\rd\nlast".as_bytes();
        assert_eq!(all(text, 100), ["1 a", "2 blank", "3 blank", "4 b\u{2028}c\rd", "5 last"]);
        assert!(all(b"", 100).is_empty());
    }

    #[test]
    fn a_long_line_is_not_held() {
        let mut text = vec![b'x'; 3 * READ_BYTES];
        text.extend_from_slice(b"\nok\n");
        assert_eq!(all(&text, 1000), ["1 too long", "2 ok"]);
        assert_eq!(all(b"1234\n12345\n", 4), ["1 1234", "2 too long"]);
    }
}
