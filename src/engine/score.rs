//! What is scored to tokens: contexts with continuations, and texts in windows, as lm-evaluation-harness does it.
//!
//! **Invariant:** every scored token is predicted exactly once, from as many tokens before it as the rules allow; the
//! last one is never computed, so a window of the whole context scores a token more than the context has positions.

use super::prepare::{PreparedPrompt, Scored};
use crate::error::Error;
use crate::job::request::{Given, LineError, Scored as Target, Scoring};
use crate::kv::policy::Kept;
use crate::model::Model;

/// Windows of one text.
const MAX_WINDOWS: usize = 4096;

/// Tokens whose last ones are predicted, from those before them.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    /// At least two.
    tokens: Vec<u32>,
    /// How many of them are predicted; at least one, and not the first.
    predicted: usize,
    /// Tokens that were cut off before them.
    cut: usize,
}

/// The prompts that score what a line asks for.
///
/// # Errors
/// What is wrong with the line.
pub fn prepare(scoring: &Scoring, model: &Model, context_len: usize) -> Result<Vec<PreparedPrompt>, LineError> {
    let rules = Rules { scoring, model, most: scoring.max_length.map_or(context_len, |most| most as usize) };
    let windows = match &scoring.target {
        Target::Continuation { context, continuation } => vec![rules.continuation(context, continuation)?],
        Target::Rolling(text) => rules.rolling(text)?,
    };
    Ok(windows.into_iter().map(Window::prompt).collect())
}

/// How a line is scored.
struct Rules<'a> {
    scoring: &'a Scoring,
    model: &'a Model,
    /// Tokens that predictions are made from at most.
    most: usize,
}

impl Rules<'_> {
    /// The one window of a continuation.
    fn continuation(&self, context: &Given, continuation: &Given) -> Result<Window, LineError> {
        let (mut tokens, context_len) = match (context, continuation) {
            (Given::Tokens(context), Given::Tokens(continuation)) => {
                ([&context[..], &continuation[..]].concat(), context.len())
            }
            (Given::Text(context), Given::Text(continuation)) => self.pair(context, continuation)?,
            _ => unreachable!("the parser lets no mixture pass"),
        };
        let mut predicted = tokens.len().saturating_sub(context_len);
        if context_len == 0 && predicted > 0 {
            let prefix = self.prefix()?;
            // A text that begins with the prefix brings its own.
            if tokens[0] == prefix {
                predicted -= 1;
            } else {
                tokens.insert(0, prefix);
            }
        }
        if predicted == 0 {
            let what = "the continuation has no tokens of its own beside the context's";
            return Err(LineError::new("empty_continuation", what));
        }
        if predicted > self.most {
            let what = format!("the continuation has {predicted} tokens, which {} positions cannot score", self.most);
            return Err(LineError::new("context_length_exceeded", what));
        }
        let cut = tokens.len().saturating_sub(self.most + 1);
        tokens.drain(..cut);
        Ok(Window { tokens, predicted, cut })
    }

    /// The windows of a whole text.
    fn rolling(&self, text: &Given) -> Result<Vec<Window>, LineError> {
        let tokens = match text {
            Given::Tokens(tokens) => tokens.clone(),
            Given::Text(text) => self.encode(text)?,
        };
        let count = tokens.len().div_ceil(self.most);
        if count > MAX_WINDOWS {
            let what = format!("the text has {} tokens, {count} windows of {}", tokens.len(), self.most);
            return Err(LineError::new("too_many_windows", format!("{what}; at most {MAX_WINDOWS} are scored")));
        }
        if tokens.is_empty() { Ok(Vec::new()) } else { Ok(windows(&tokens, self.prefix()?, self.most)) }
    }

    /// Context and continuation as tokens, and how many are the context's. Spaces between the two are the
    /// continuation's, so that they become part of its first word.
    fn pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, usize), LineError> {
        if context.is_empty() {
            let encoded = self.model.tokenizer.encode(continuation, false).map_err(failed)?;
            return Ok((encoded, 0));
        }
        let whole = self.encode(&format!("{context}{continuation}"))?;
        let context_len = self.encode(context.trim_end_matches(is_python_space))?.len();
        let context_len = context_len.min(whole.len());
        Ok((whole, context_len))
    }

    /// Special tokens are added unless the text begins with the prefix already.
    fn encode(&self, text: &str) -> Result<Vec<u32>, LineError> {
        let tokenizer = &self.model.tokenizer;
        let brings_prefix = || {
            let prefix = self.prefix().ok().and_then(|prefix| tokenizer.decode(&[prefix], false).ok());
            prefix.is_some_and(|prefix| text.starts_with(&prefix))
        };
        let adds = self.scoring.add_special_tokens.unwrap_or_else(|| !brings_prefix());
        tokenizer.encode(text, adds).map_err(failed)
    }

    /// What stands before the first token.
    fn prefix(&self) -> Result<u32, LineError> {
        let named = |name: &str| self.model.tokenizer.id(self.model.tokenizer.special_texts().get(name)?);
        let prefix = self.scoring.prefix_token_id.or_else(|| named("bos_token")).or_else(|| named("eos_token"));
        prefix.or(self.model.generation.eos_token_ids.first().copied()).ok_or_else(|| {
            let what = "the model names no token to begin with; give `prefix_token_id`";
            LineError::new("missing_field", what)
        })
    }
}

/// Windows that predict every token once: the first from the prefix on, each further one from the last token of the
/// one before it, and the last from as many tokens as fit.
fn windows(tokens: &[u32], prefix: u32, most: usize) -> Vec<Window> {
    let first = tokens.len().min(most);
    let mut windows = vec![Window { tokens: [&[prefix], &tokens[..first]].concat(), predicted: first, cut: 0 }];
    let mut done = first;
    while done < tokens.len() {
        let predicted = (tokens.len() - done).min(most);
        done += predicted;
        windows.push(Window { tokens: tokens[done - most - 1..done].to_vec(), predicted, cut: 0 });
    }
    windows
}

impl Window {
    fn prompt(mut self) -> PreparedPrompt {
        let from = self.tokens.len() - self.predicted;
        let after = self.tokens.pop();
        let scored = Some(Scored { from, after });
        PreparedPrompt { tokens: self.tokens, text: None, max_tokens: 0, kept: Kept::All, scored, cut_tokens: self.cut }
    }
}

/// What Python's `str.rstrip` takes off.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn failed(error: Error) -> LineError {
    LineError::new("tokenizer_error", error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn windows_are_those_of_the_harness() {
        let tokens: Vec<u32> = (0..10).collect();
        let found: Vec<(Vec<u32>, usize)> =
            windows(&tokens, 99, 4).into_iter().map(|window| (window.tokens, window.predicted)).collect();
        let expected =
            [(vec![99, 0, 1, 2, 3], 4), (vec![3, 4, 5, 6, 7], 4), (vec![5, 6, 7, 8, 9], 2)].map(|(t, p)| (t, p));
        assert_eq!(found, expected);
        let short = windows(&tokens[..3], 99, 4);
        assert_eq!(short, [Window { tokens: vec![99, 0, 1, 2], predicted: 3, cut: 0 }]);
    }

    proptest! {
        #[test]
        fn every_token_is_predicted_once(len in 1usize..400, most in 1usize..70) {
            let tokens: Vec<u32> = (0..len as u32).collect();
            let mut predicted = Vec::new();
            for window in windows(&tokens, u32::MAX, most) {
                prop_assert!(window.tokens.len() <= most + 1 && window.tokens.len() > window.predicted);
                predicted.extend_from_slice(&window.tokens[window.tokens.len() - window.predicted..]);
            }
            prop_assert_eq!(predicted, tokens);
        }
    }
}
