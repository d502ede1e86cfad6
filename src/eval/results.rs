//! Answers to batch lines as HELM's results.
//!
//! **Invariant:** a completion's tokens are those that begin within its text: what a stop text cut off, and the end
//! token, are not part of it; its log-probability is their sum.

use serde_json::{Value, json};

use super::state::Request;

/// A token of a completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its text; bytes that are no text alone are spelt `bytes:\x..`.
    pub text: String,
    /// Its log-probability; 0 for the first of an echoed prompt.
    pub logprob: f64,
}

impl Token {
    /// Bytes that it stands for, as HELM counts them.
    pub fn bytes(&self) -> usize {
        if self.text.starts_with("bytes:") { self.text.matches("\\x").count() } else { self.text.len() }
    }
}

/// A completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Its text.
    pub text: String,
    /// The sum over its tokens.
    pub logprob: f64,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// `length`, `stop` or `endoftext`.
    pub finish_reason: String,
}

/// What came of a request: completions, or an error's message.
pub type Outcome = Result<Vec<Completion>, String>;

/// Reads the answer to a request's line.
///
/// # Panics
/// If the line is not one that this program wrote.
pub fn outcome(request: &Request, answer: &Value) -> Outcome {
    if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
        let part = |key: &str| error[key].as_str().unwrap_or_default().to_owned();
        return Err(format!("{}: {}", part("code"), part("message")));
    }
    let choices = answer["response"]["body"]["choices"].as_array().expect("an answer has choices");
    Ok(choices.iter().map(|choice| completion(request, choice)).collect())
}

fn completion(request: &Request, choice: &Value) -> Completion {
    let text = if request.is_chat() { &choice["message"]["content"] } else { &choice["text"] };
    let text = text.as_str().unwrap_or_default().to_owned();
    let bytes = |list: &Value| -> Vec<u8> {
        list.as_array().into_iter().flatten().filter_map(|byte| byte.as_u64().map(|byte| byte as u8)).collect()
    };
    let logprobs = &choice["logprobs"];
    let scored: Vec<(Vec<u8>, f64)> = if request.is_chat() {
        let tokens = logprobs["content"].as_array().into_iter().flatten();
        tokens.map(|token| (bytes(&token["bytes"]), token["logprob"].as_f64().unwrap_or(0.0))).collect()
    } else {
        let tokens = logprobs["token_bytes"].as_array().into_iter().flatten();
        let scores = logprobs["token_logprobs"].as_array().into_iter().flatten();
        tokens.zip(scores).map(|(token, score)| (bytes(token), score.as_f64().unwrap_or(0.0))).collect()
    };
    let reason = match (choice["finish_reason"].as_str().unwrap_or_default(), choice["stop_reason"].is_null()) {
        ("stop", true) => "endoftext",
        (reason, _) => reason,
    };
    let kept = if request.echo { scored.len() } else { within(&text, &scored, reason) };
    let tokens: Vec<Token> =
        scored[..kept].iter().map(|(token, logprob)| Token { text: token_text(token), logprob: *logprob }).collect();
    let logprob = tokens.iter().map(|token| token.logprob).sum();
    Completion { text, logprob, tokens, finish_reason: reason.to_owned() }
}

/// How many tokens begin within the text.
fn within(text: &str, scored: &[(Vec<u8>, f64)], reason: &str) -> usize {
    match reason {
        "length" => scored.len(),
        "endoftext" => scored.len().saturating_sub(1),
        _ => {
            // Some tokenizers drop the space before a first word.
            let spaced = scored.first().is_some_and(|(token, _)| token.starts_with(b" "));
            let mut start = if spaced && !text.is_empty() && !text.starts_with(' ') { -1 } else { 0 };
            let begins = |(token, _): &&(Vec<u8>, f64)| {
                let begins = start < text.len() as i64;
                start += token.len() as i64;
                begins
            };
            scored.iter().take_while(begins).count()
        }
    }
}

fn token_text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| format!("{text}\\x{byte:02x}")),
    }
}

/// A result as HELM reads it.
pub fn json(outcome: &Outcome) -> Value {
    match outcome {
        Err(message) => {
            json!({"success": false, "embedding": [], "completions": [], "cached": false, "error": message})
        }
        Ok(completions) => {
            let token = |token: &Token| json!({"text": token.text, "logprob": token.logprob});
            let completion = |completion: &Completion| {
                json!({
                    "text": completion.text,
                    "logprob": completion.logprob,
                    "tokens": completion.tokens.iter().map(token).collect::<Vec<_>>(),
                    "finish_reason": {"reason": completion.finish_reason},
                })
            };
            let completions: Vec<Value> = completions.iter().map(completion).collect();
            json!({"success": true, "embedding": [], "completions": completions, "cached": false})
        }
    }
}
