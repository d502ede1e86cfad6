//! Sequences in flight and the requests that they belong to.
//!
//! **Invariant:** a sequence holds exactly the pages of its computed positions, shared ones counted once per holder.

use crate::error::Result;
use crate::job::request::{Answer, Choice, ItemHeader, LineError, PromptAnswer, SampledToken, TokenLogprob, TokenText};
use crate::kv::pages::PageId;
use crate::kv::policy::Kept;
use crate::model::Model;

use super::prefix::Path;
use super::prepare::{PreparedPrompt, Scored};
use super::sample::{Rules, Sample};
use super::snapshot::Trail;

/// A request with samples in flight or to come.
pub struct Job {
    /// Names the line in the output.
    pub header: ItemHeader,
    /// How its samples are drawn.
    pub rules: Rules,
    /// Its prompts.
    pub prompts: Vec<PromptState>,
    /// Samples (and scorings) that have not ended.
    pub open: usize,
    /// What went wrong with one of them: the whole request fails.
    pub error: Option<LineError>,
}

/// A prompt and what has come of it.
pub struct PromptState {
    /// The prompt.
    pub prompt: PreparedPrompt,
    /// Scores of its tokens and of the one after them, if they were asked for; the first stay empty.
    pub scores: Vec<Option<SampledToken>>,
    /// Finished samples by index.
    pub samples: Vec<Option<Sample>>,
}

/// A sequence that is computed.
pub struct Sequence {
    /// The request's index.
    pub job: u64,
    /// The prompt's index within the request.
    pub prompt: usize,
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    /// How many are prompt.
    pub prompt_len: usize,
    /// Positions whose keys and values are stored.
    pub computed: usize,
    /// What of it is kept.
    pub kept: Kept,
    /// Pages of the computed positions.
    pub pages: Vec<PageId>,
    /// Counts sequences, in the order in which they first began.
    pub number: u64,
    /// The way of its prompt through the tree of beginnings, and through that of snapshots.
    pub path: Path,
    pub trail: Trail,
    /// Which of the prompt's tokens it scores.
    pub scored: Option<Scored>,
    /// The sample that it generates; none when only the prompt is scored.
    pub sample: Option<Sample>,
    /// Further samples, which begin when the prompt is computed.
    pub siblings: Vec<Sample>,
    /// Whether they have their places as soon as it is; else they wait for room.
    pub siblings_go_on: bool,
}

/// A prompt that has not begun.
pub struct Begin {
    /// The request's index.
    pub job: u64,
    /// The prompt's index within the request.
    pub prompt: usize,
    /// Samples that have not ended, of which the first computes the prompt.
    pub samples: Vec<Sample>,
    /// Which of the prompt's tokens are scored on the way.
    pub scored: Option<Scored>,
    /// The prompt's way through the tree of beginnings, and through that of snapshots: one of the two at most.
    pub path: Path,
    pub trail: Trail,
    /// What is left of the sequence that it was before it was paused.
    pub paused: Option<Paused>,
}

/// What is left of a sequence that was paused, beside its tokens.
pub struct Paused {
    /// Its number.
    pub number: u64,
    /// What it had computed; none where it is to be computed again.
    pub aside: Option<Aside>,
}

/// What a sequence has computed, in pages that are not of the cache.
pub struct Aside {
    /// Positions whose keys and values are stored.
    pub computed: usize,
    /// Pages before them, which others held too.
    pub before: usize,
    /// Copies of the others.
    pub pages: Vec<PageId>,
}

impl Sequence {
    /// Positions that are known and not computed.
    pub fn uncomputed(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// How many of the positions `range` are asked for logits, at most: each once, whatever is drawn from them.
    pub fn asks(&self, range: std::ops::Range<usize>) -> usize {
        let first_samples = range.end == self.prompt_len && !self.siblings.is_empty();
        let drawn = usize::from(range.end == self.tokens.len() || first_samples);
        self.scored.map_or(drawn, |scored| range.end.saturating_sub(range.start.max(scored.from - 1)).max(drawn))
    }

    /// The token at a position, if it is scored.
    pub fn target(&self, position: usize) -> Option<u32> {
        let scored = self.scored.filter(|scored| position >= scored.from)?;
        match position.cmp(&self.prompt_len) {
            std::cmp::Ordering::Less => Some(self.tokens[position]),
            std::cmp::Ordering::Equal => scored.after,
            std::cmp::Ordering::Greater => None,
        }
    }

    /// Whether the next row is a generated token.
    pub fn decodes(&self) -> bool {
        self.computed >= self.prompt_len && self.tokens.len() - self.computed == 1
    }
}

/// Puts a finished request's answer together.
pub fn answer(job: Job, model: &Model) -> Result<Answer> {
    let sampling = &job.rules.request().sampling;
    let with_logprobs = sampling.logprobs.is_some();
    let with_prompt_logprobs = prompt_scores(&job.rules).is_some();
    let mut prompts = Vec::with_capacity(job.prompts.len());
    for state in job.prompts {
        let tokens = &state.prompt.tokens;
        let after = state.prompt.scored.and_then(|scored| scored.after);
        // An echoed prompt shows its first token too, which nothing predicts.
        let first = state.prompt.scored.filter(|scored| scored.after.is_some()).map_or(0, |scored| scored.from);
        let prompt_logprobs = with_prompt_logprobs.then(|| {
            let scores = tokens.iter().chain(&after).zip(&state.scores).skip(first);
            scores.map(|(&id, score)| token_logprob(id, score.as_ref(), model))
        });
        let prompt_logprobs = prompt_logprobs.map(|scores| scores.collect::<Result<Vec<_>>>()).transpose()?;
        let mut choices = Vec::with_capacity(state.samples.len());
        for sample in state.samples {
            let sample = sample.expect("a request is answered when its last sample has ended");
            let logprobs = with_logprobs
                .then(|| sample.tokens.iter().map(|token| token_logprob(token.id, Some(token), model)))
                .map(|logprobs| logprobs.collect::<Result<Vec<_>>>())
                .transpose()?;
            let (finish_reason, stop_reason) = sample.finish.expect("only ended samples are put away");
            let token_ids = sample.tokens.iter().map(|token| token.id).collect();
            choices.push(Choice { text: sample.text, token_ids, finish_reason, stop_reason, logprobs });
        }
        let PreparedPrompt { tokens, text, cut_tokens, .. } = state.prompt;
        let (prompt_token_ids, prompt_text) = (tokens, text);
        prompts.push(PromptAnswer { prompt_token_ids, prompt_text, cut_tokens, prompt_logprobs, choices });
    }
    Ok(Answer { prompts })
}

/// How many alternatives are reported for each prompt token; none when prompt tokens are not scored.
pub fn prompt_scores(rules: &Rules) -> Option<usize> {
    let sampling = &rules.request().sampling;
    let echoed = sampling.logprobs.filter(|_| sampling.echo);
    sampling.prompt_logprobs.max(echoed).map(|count| count as usize)
}

fn token_logprob(id: u32, scored: Option<&SampledToken>, model: &Model) -> Result<TokenLogprob> {
    let top = scored.map_or(&[][..], |scored| &scored.top);
    let top = top.iter().map(|&(id, logprob)| Ok((token_text(id, model)?, logprob))).collect::<Result<_>>()?;
    Ok(TokenLogprob { token: token_text(id, model)?, logprob: scored.map(|scored| scored.logprob), top })
}

fn token_text(id: u32, model: &Model) -> Result<TokenText> {
    let bytes = model.tokenizer.token_bytes(id);
    Ok(TokenText { id, text: String::from_utf8_lossy(&bytes).into_owned(), bytes })
}
