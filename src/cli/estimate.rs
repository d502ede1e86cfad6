//! What a job's lines will take, from its file alone.
//!
//! **Invariant:** an estimate: it decides placement, never an answer, and lines that do not parse are left to the job.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use serde_json::Value;

use crate::engine::AHEAD_PROMPTS;
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
    /// Whether prompts that begin alike share what is computed of it.
    pub shares: bool,
}

/// Estimates the job in `file`.
///
/// # Errors
/// [`Error::Io`] when it cannot be read, [`Error::Input`] when no line says anything.
pub fn job(file: &Path, reading: &Reading<'_>) -> Result<Job> {
    let opened = File::open(file).map_err(Error::io("read", file))?;
    let size = opened.metadata().map_err(Error::io("read", file))?.len();
    let (mut requests, mut bytes, mut lines) = (Vec::new(), 0, 0);
    let mut window = Vec::new();
    let (mut reader, mut line) = (BufReader::new(opened), Vec::new());
    for _ in 0..LINES {
        let len = next_line(&mut reader, &mut line).map_err(Error::io("read", file))?;
        if len == 0 {
            break;
        }
        bytes += len;
        lines += 1;
        if let Ok(value) = serde_json::from_slice::<Value>(&line) {
            reading.read(&value, &mut requests, &mut window);
        }
        if window.len() >= AHEAD_PROMPTS {
            share(&mut window, &mut requests);
        }
    }
    share(&mut window, &mut requests);
    if requests.is_empty() {
        let hint = Some("write one JSON object with a `prompt` per line".into());
        return Err(Error::Input { path: file.to_owned(), what: "has no prompts".into(), hint });
    }
    let job = Job::of(&requests);
    let more = if lines == LINES { size as f64 / bytes.max(1) as f64 } else { 1.0 };
    Ok(Job { requests: ((job.requests as f64 * more) as usize).max(1), ..job })
}

/// A prompt as it is written, to see with whom it begins alike.
struct Written {
    /// The beginning of its text, how long all of it is, and how many tokens that is.
    text: Vec<u8>,
    len: usize,
    tokens: usize,
    /// Its first sequence, and how many there are.
    first: usize,
    samples: usize,
}

/// Bytes that beginnings are compared over.
const COMPARED_BYTES: usize = 1 << 16;

/// Notes what prompts of a window share: each with the one that it has most in common with of those that are computed
/// before it, and samples all of their prompt. Ends the window.
fn share(window: &mut Vec<Written>, requests: &mut [Request]) {
    window.sort_by(|a, b| a.text.cmp(&b.text));
    let mut before: &[u8] = &[];
    for written in window.iter() {
        let alike = written.text.iter().zip(before).take_while(|(a, b)| a == b).count();
        let tokens = alike * written.tokens / written.len.max(1);
        for (sample, request) in requests[written.first..][..written.samples].iter_mut().enumerate() {
            *request = request.sharing(if sample == 0 { tokens } else { written.tokens });
        }
        before = &written.text;
    }
    window.clear();
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
    /// Adds the sequences of a line, if it is one.
    fn read(&self, line: &Value, requests: &mut Vec<Request>, window: &mut Vec<Written>) {
        let body = line.get("body").unwrap_or(line);
        let Some(prompt) = body.get("prompt").or(body.get("messages")) else {
            // What is scored is computed in windows, and nothing is generated.
            let parts = ["context", "continuation", "text"].into_iter().filter_map(|key| body.get(key));
            let (tokens, len) = (parts.map(|part| self.tokens(part)).sum::<usize>(), self.context_len.max(1));
            let windows = (0..tokens).step_by(len).map(|first| (tokens - first).min(len));
            if let (Some(context), true) = (body.get("context"), (1..=len).contains(&tokens)) {
                self.note(context, self.tokens(context), (requests.len(), 1), window);
            }
            requests.extend(windows.map(|len| Request::new(len, 1, 1, self.kv_policy)));
            return;
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
        for prompt in prompts {
            let prompt_len = self.tokens(prompt).clamp(1, self.context_len.saturating_sub(1).max(1));
            let max_tokens = most.min(self.context_len.saturating_sub(prompt_len)).max(1);
            let gen_len = self.expected.unwrap_or(max_tokens).clamp(1, max_tokens);
            self.note(prompt, prompt_len, (requests.len(), samples), window);
            let request = Request::new(prompt_len, gen_len, max_tokens, self.kv_policy);
            requests.extend(std::iter::repeat_n(request, samples));
        }
    }

    /// Notes how a prompt is written if it may share.
    fn note(&self, prompt: &Value, tokens: usize, (first, samples): (usize, usize), window: &mut Vec<Written>) {
        if self.shares {
            let mut text = prompt.to_string().into_bytes();
            let len = text.len();
            text.truncate(COMPARED_BYTES);
            window.push(Written { text, len, tokens, first, samples });
        }
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
        let kv_policy = crate::kv::policies::full();
        let reading = Reading {
            max_tokens: None,
            expected: Some(100),
            context_len: 50,
            kv_policy: &*kv_policy,
            count: &count,
            shares: false,
        };
        let job = job(file.path(), &reading).unwrap();
        assert_eq!(job.requests, 1 + 3 + 1 + 2);
        let prompts = f64::from(3 + 3 * 4 + 6 + 2 * 2);
        assert!((job.prompt_len - prompts / 7.0).abs() < 1e-9);
        let generated = f64::from(7 + 3 * 46 + 1 + 2 * 16);
        assert!((job.gen_len - generated / 7.0).abs() < 1e-9);
    }

    #[test]
    fn what_prompts_share_is_computed_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let header = |word: &str| format!("{word} ").repeat(200);
        let question = |at: usize| format!("{{\"prompt\": \"{}{at} ?\", \"n\": 1}}", header(["a", "b"][at % 2]));
        let mut lines: Vec<String> = (0..100).map(question).collect();
        lines.push(format!("{{\"prompt\": \"{}\", \"n\": 3}}", header("c")));
        std::fs::write(file.path(), lines.join("\n")).unwrap();
        let count = |text: &str| text.split_whitespace().count();
        let full = crate::kv::policies::full();
        let evicting = crate::kv::policies::parse("h2o:heavy=32,recent=32").unwrap();
        let read = |kv_policy: &dyn KvPolicy, shares: bool| {
            let reading =
                Reading { max_tokens: Some(10), expected: None, context_len: 500, kv_policy, count: &count, shares };
            job(file.path(), &reading).unwrap()
        };
        let shared = |job: &Job| job.lengths.iter().map(|request| request.shared).sum::<usize>();
        let job = read(&*full, true);
        // One of each kind computes the header, the others the end of their own; three pages of 200 tokens are whole.
        assert_eq!(shared(&job), 98 * 192 + 2 * 192);
        assert_eq!(job.sharing.1, 3.0);
        assert!(job.fresh_len < 20.0 && job.prompt_len > 200.0, "{} of {}", job.fresh_len, job.prompt_len);
        assert_eq!((job.pages.round(), job.most_pages), (1.0, 4));
        assert_eq!((shared(&read(&*full, false)), shared(&read(&*evicting, true))), (0, 0));
    }
}
