//! What is asked of a row of logits, and what comes back.
//!
//! **Invariant:** a [`Draw`] carries everything that its result depends on, randomness included, so the result is
//! the same on any row of any pass.

use std::sync::Arc;

/// A question to one row of logits.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The row of the pass.
    pub row: usize,
    /// What is wanted.
    pub target: Target,
    /// How many of the most probable tokens to report.
    pub top: usize,
}

/// What is wanted of a row.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// The log-probability of this token.
    Score(u32),
    /// A token, drawn by this rule.
    Sample(SampleRule),
}

/// How a token is drawn; the order of steps is that of the fields (formats, section 1.5).
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRule {
    /// Only these tokens, if given.
    pub allowed: Option<Arc<[u32]>>,
    /// Not these (end of sequence before `min_tokens`).
    pub banned: Arc<[u32]>,
    /// Added to single logits.
    pub bias: Arc<[(u32, f32)]>,
    /// Tokens that penalties apply to.
    pub counts: Arc<[TokenCount]>,
    /// Divides positive and multiplies negative logits of counted tokens.
    pub repetition_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Subtracted once for a token in the output.
    pub presence_penalty: f32,
    /// Below 1e-5 greedy.
    pub temperature: f32,
    /// Keep tokens at least this probable relative to the best.
    pub min_p: f32,
    /// Keep this many tokens (and ties with the last); 0 is off.
    pub top_k: u32,
    /// Keep the most probable tokens up to this mass.
    pub top_p: f32,
    /// In [0, 1): which of the kept tokens.
    pub uniform: f64,
}

/// How often a token occurred.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenCount {
    /// The token.
    pub token: u32,
    /// Occurrences in the output; 0 for a token of the prompt alone.
    pub output: u32,
}

/// The answer to a [`Draw`].
#[derive(Clone, Debug, PartialEq)]
pub struct Drawn {
    /// The token sampled or scored.
    pub token: u32,
    /// Its log-probability under the unmodified logits.
    pub logprob: f32,
    /// The most probable tokens under the unmodified logits, best first, ties by id.
    pub top: Vec<(u32, f32)>,
    /// Why the rest means nothing.
    pub problem: Option<Problem>,
}

/// Why a row gives no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A logit is not a finite number.
    NotFinite,
    /// The rule excludes every token.
    NoneAllowed,
}

/// Temperatures below this mean greedy.
pub const GREEDY_BELOW: f32 = 1e-5;
