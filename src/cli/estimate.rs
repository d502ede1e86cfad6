//! What a job's lines will take, from its file alone.
//!
//! **Invariant:** an estimate: it decides placement, never an answer, and lines that do not parse are left to the job.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::kv::policy::KvPolicy;
use crate::planner::job::{Job, Request};

/// Lines that are looked at; the rest of a long file is taken to be like them.
const LINES: usize = 10_000;
/// Bytes of a line that are looked at: a longer one counts for nothing.
const LINE_BYTES: u64 = 1 << 20;

/// Counts tokens of texts: exactly for the first ones, by their bytes from then on.
pub struct Counter<F> {
    tokenize: F,
    /// Texts, bytes and tokens that were counted exactly.
    known: Cell<(usize, usize, usize)>,
}

/// Texts that are tokenized for an estimate.
const EXACT: usize = 64;

impl<F: Fn(&str) -> usize> Counter<F> {
    /// A counter over a tokenizer.
    pub fn new(tokenize: F) -> Self {
        Counter { tokenize, known: Cell::default() }
    }

    /// Tokens of a text, about.
    pub fn count(&self, text: &str) -> usize {
        let (texts, bytes, tokens) = self.known.get();
        if texts < EXACT {
            let count = (self.tokenize)(text);
            self.known.set((texts + 1, bytes + text.len(), tokens + count));
            return count;
        }
        (text.len() * tokens).div_ceil(bytes.max(1))
    }
}

/// How lines are read.
pub struct Reading<'a> {
    /// Tokens that a line may generate, where it does not say.
    pub max_tokens: Option<usize>,
    /// Tokens that a sequence is expected to generate at most.
    pub expected: Option<usize>,
    /// Positions of prompt and completion.
    pub context_len: usize,
    /// What of a sequence is kept.
    pub kv_policy: &'a dyn KvPolicy,
    /// Tokens of a text.
    pub count: &'a dyn Fn(&str) -> usize,
}

/// Estimates the job in `file`.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Input`] when no line says anything.
pub fn job(file: &Path, reading: &Reading<'_>) -> Result<Job> {
    let opened = File::open(file).map_err(Error::io("read", file))?;
    let size = opened.metadata().map_err(Error::io("read", file))?.len();
    let (mut requests, mut bytes, mut lines) = (Vec::new(), 0, 0);
    let (mut reader, mut line) = (BufReader::new(opened), Vec::new());
    for _ in 0..LINES {
        let len = next_line(&mut reader, &mut line).map_err(Error::io("read", file))?;
        if len == 0 {
            break;
        }
        bytes += len;
        lines += 1;
        if let Ok(value) = serde_json::from_slice::<Value>(&line) {
            requests.extend(reading.requests(&value));
        }
    }
    if requests.is_empty() {
        let hint = Some("write one JSON object with a `prompt` per line".into());
        return Err(Error::Input { path: file.to_owned(), what: "has no prompts".into(), hint });
    }
    let job = Job::of(&requests);
    let more = if lines == LINES { size as f64 / bytes.max(1) as f64 } else { 1.0 };
    Ok(Job { requests: ((job.requests as f64 * more) as usize).max(1), ..job })
}

/// Reads a line, or of a very long one the beginning, and gives how long it is; 0 at the end.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<u64> {
    line.clear();
    let mut len = reader.by_ref().take(LINE_BYTES).read_until(b'\n', line)? as u64;
    let mut rest = Vec::new();
    while len > 0 && !line.ends_with(b"\n") && !rest.ends_with(b"\n") {
        rest.clear();
        match reader.by_ref().take(LINE_BYTES).read_until(b'\n', &mut rest)? {
            0 => break,
            more => len += more as u64,
        }
    }
    Ok(len)
}

impl Reading<'_> {
    /// The sequences of a line; none if it is not one.
    fn requests(&self, line: &Value) -> Vec<Request> {
        let body = line.get("body").unwrap_or(line);
        let Some(prompt) = body.get("prompt").or(body.get("messages")) else {
            // What is scored is computed in windows, and nothing is generated.
            let parts = ["context", "continuation", "text"].into_iter().filter_map(|key| body.get(key));
            let (tokens, window) = (parts.map(|part| self.tokens(part)).sum::<usize>(), self.context_len.max(1));
            let windows = (0..tokens).step_by(window).map(|first| (tokens - first).min(window));
            return windows.map(|len| Request::new(len, 1, 1, self.kv_policy)).collect();
        };
        let completions = line.get("url").and_then(Value::as_str) == Some("/v1/completions");
        let default = self.max_tokens.unwrap_or(if completions { 16 } else { 256 });
        let number = |key: &str| body.get(key).and_then(Value::as_u64).map(|number| number.min(1 << 20) as usize);
        let most = number("max_tokens").or_else(|| number("max_completion_tokens")).unwrap_or(default);
        let samples = number("n").unwrap_or(1).min(4096);
        let many = prompt
            .as_array()
            .is_some_and(|all| body.get("prompt").is_some() && all.iter().all(|one| one.is_string() || one.is_array()));
        let prompts: Vec<&Value> = if many { prompt.as_array().into_iter().flatten().collect() } else { vec![prompt] };
        let requests = prompts.into_iter().flat_map(|prompt| {
            let prompt_len = self.tokens(prompt).clamp(1, self.context_len.saturating_sub(1).max(1));
            let max_tokens = most.min(self.context_len.saturating_sub(prompt_len)).max(1);
            let gen_len = self.expected.unwrap_or(max_tokens).clamp(1, max_tokens);
            std::iter::repeat_n(Request::new(prompt_len, gen_len, max_tokens, self.kv_policy), samples)
        });
        requests.collect()
    }

    /// Tokens of a prompt: ids as they are, texts counted, messages with a few more for their template.
    fn tokens(&self, value: &Value) -> usize {
        match value {
            Value::String(text) => (self.count)(text),
            Value::Array(parts) if parts.iter().all(Value::is_u64) => parts.len(),
            Value::Array(parts) => parts.iter().map(|part| self.tokens(part)).sum(),
            Value::Object(object) => {
                object.get("content").or(object.get("text")).map_or(0, |value| self.tokens(value) + 4)
            }
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind_are_counted() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = [
            r#"{"prompt": [1, 2, 3], "max_tokens": 7}"#,
            r#"{"prompt": "four score and seven", "n": 3}"#,
            r#"{"messages": [{"role": "user", "content": "two words"}], "max_tokens": 1}"#,
            r#"{"custom_id": "x", "url": "/v1/completions", "body": {"prompt": [[1, 2], [3, 4]]}}"#,
            "no line",
            "",
        ];
        std::fs::write(file.path(), lines.join("\n")).unwrap();
        let count = |text: &str| text.split_whitespace().count();
        let kv_policy = crate::kv::policy::full();
        let reading =
            Reading { max_tokens: None, expected: Some(100), context_len: 50, kv_policy: &*kv_policy, count: &count };
        let job = job(file.path(), &reading).unwrap();
        assert_eq!(job.requests, 1 + 3 + 1 + 2);
        let prompts = f64::from(3 + 3 * 4 + 6 + 2 * 2);
        assert!((job.prompt_len - prompts / 7.0).abs() < 1e-9);
        let generated = f64::from(7 + 3 * 46 + 1 + 2 * 16);
        assert!((job.gen_len - generated / 7.0).abs() < 1e-9);
    }
}
