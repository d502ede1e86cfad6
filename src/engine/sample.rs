//! One sample of a prompt: its tokens so far, its text, and whether it has ended.
//!
//! **Invariant:** the state is a function of the tokens accepted, so replaying a journal's tokens gives the state
//! that an uninterrupted run would have.

use std::collections::HashMap;
use std::sync::Arc;

use crate::device::sampling::{GREEDY_BELOW, SampleRule, TokenCount};
use crate::error::Result;
use crate::job::request::{FinishReason, Request, SampledToken, StopReason};
use crate::model::Model;
use crate::model::token_text::Detokenizer;
use crate::rng::Philox;
use sha2::{Digest, Sha256};

/// What all samples of a request have in common.
pub struct Rules {
    request: Arc<Request>,
    key: u64,
    eos: Arc<[u32]>,
    banned: Arc<[u32]>,
    nothing: Arc<[u32]>,
    bias: Arc<[(u32, f32)]>,
    allowed: Option<Arc<[u32]>>,
}

impl Rules {
    /// The rules of a request to a model with these end-of-sequence tokens.
    pub fn new(request: Arc<Request>, eos: &[u32]) -> Self {
        let sampling = &request.sampling;
        let eos: Arc<[u32]> = if sampling.ignore_eos { Arc::from([]) } else { Arc::from(eos) };
        let banned: Vec<u32> = eos.iter().chain(&sampling.stop_token_ids).copied().collect();
        // The randomness of a line goes by its name and seed, never by its place in the file.
        let mut hash = Sha256::new();
        hash.update(sampling.seed.to_le_bytes());
        hash.update(request.custom_id.as_bytes());
        let key = hash.finalize()[..8].iter().fold(0, |key, &byte| key << 8 | u64::from(byte));
        let bias = Arc::from(&sampling.logit_bias[..]);
        let allowed = sampling.allowed_token_ids.as_deref().map(Arc::from);
        Rules { key, eos, banned: banned.into(), nothing: Arc::from([]), bias, allowed, request: request.clone() }
    }

    /// The request.
    pub fn request(&self) -> &Arc<Request> {
        &self.request
    }

    fn penalises(&self) -> bool {
        let s = &self.request.sampling;
        s.repetition_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0
    }
}

/// One sample.
pub struct Sample {
    /// Index among the samples of the prompt.
    pub index: u32,
    /// Its tokens.
    pub tokens: Vec<SampledToken>,
    /// How many of them the journal has.
    pub journalled: usize,
    /// Its text, without what is held back.
    pub text: String,
    /// How it ended.
    pub finish: Option<(FinishReason, Option<StopReason>)>,
    detokenizer: Detokenizer,
    counts: HashMap<u32, u32>,
    stream: Philox,
    max_tokens: usize,
}

impl Sample {
    /// A sample without tokens. `prompt` is the prompt's index within the request.
    pub fn new(rules: &Rules, model: &Model, prompt: usize, tokens: &[u32], index: u32, max_tokens: usize) -> Self {
        let sampling = &rules.request.sampling;
        let mut counts = HashMap::new();
        if rules.penalises() {
            counts.extend(tokens.iter().map(|&token| (token, 0)));
        }
        Sample {
            index,
            tokens: Vec::new(),
            journalled: 0,
            text: String::new(),
            finish: None,
            detokenizer: Detokenizer::continuing(&model.tokenizer, tokens, sampling.skip_special_tokens),
            counts,
            stream: Philox::new(rules.key, (prompt as u64) << 32 | u64::from(index)),
            max_tokens,
        }
    }

    /// How the next token is drawn.
    pub fn rule(&self, rules: &Rules) -> SampleRule {
        let s = &rules.request.sampling;
        let early = self.tokens.len() < s.min_tokens as usize;
        let mut counts: Vec<TokenCount> = Vec::new();
        if rules.penalises() {
            // Repetition alone looks at the prompt; the map's order does not matter, each token is adjusted once.
            counts.extend(self.counts.iter().map(|(&token, &output)| TokenCount { token, output }));
        }
        SampleRule {
            allowed: rules.allowed.clone(),
            banned: if early { rules.banned.clone() } else { rules.nothing.clone() },
            bias: rules.bias.clone(),
            counts: counts.into(),
            repetition_penalty: s.repetition_penalty,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            temperature: s.temperature,
            min_p: s.min_p,
            top_k: s.top_k,
            top_p: s.top_p,
            uniform: if s.temperature < GREEDY_BELOW { 0.0 } else { self.stream.uniform(self.tokens.len() as u64) },
        }
    }

    /// Takes the next token in and decides whether the sample ends with it.
    pub fn accept(&mut self, token: SampledToken, rules: &Rules, model: &Model) -> Result<()> {
        assert!(self.finish.is_none(), "a token for a sample that has ended");
        let s = &rules.request.sampling;
        let id = token.id;
        self.tokens.push(token);
        if rules.penalises() {
            *self.counts.entry(id).or_insert(0) += 1;
        }
        let is_eos = rules.eos.contains(&id);
        if is_eos || s.stop_token_ids.contains(&id) {
            if s.include_stop_str_in_output {
                self.text += &self.detokenizer.push(&model.tokenizer, id)?;
            }
            self.text += &self.detokenizer.finish(&model.tokenizer)?;
            self.finish = Some((FinishReason::Stop, (!is_eos).then_some(StopReason::Token(id))));
            return Ok(());
        }
        let before = self.text.len();
        self.text += &self.detokenizer.push(&model.tokenizer, id)?;
        let last = self.tokens.len() >= self.max_tokens;
        if last {
            self.text += &self.detokenizer.finish(&model.tokenizer)?;
        }
        if self.tokens.len() >= s.min_tokens as usize
            && let Some((at, stop)) = find_stop(&self.text, before, &s.stop)
        {
            let end = if s.include_stop_str_in_output { at + stop.len() } else { at };
            self.text.truncate(end);
            self.finish = Some((FinishReason::Stop, Some(StopReason::Text(stop.clone()))));
        } else if last {
            self.finish = Some((FinishReason::Length, None));
        }
        Ok(())
    }
}

/// The first stop text that ends in what was added from byte `new` on.
fn find_stop<'a>(text: &str, new: usize, stops: &'a [String]) -> Option<(usize, &'a String)> {
    if text.len() == new {
        return None;
    }
    let found = stops.iter().filter_map(|stop| {
        let mut from = (new + 1).saturating_sub(stop.len()).min(new);
        while !text.is_char_boundary(from) {
            from += 1;
        }
        text[from..].find(stop.as_str()).map(|at| (from + at, stop))
    });
    found.min_by_key(|(at, stop)| (*at, std::cmp::Reverse(stop.len())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_found_across_the_border_of_old_and_new_text() {
        let stops = ["\nQ:".to_owned(), "END".to_owned(), "é".to_owned()];
        assert_eq!(find_stop("abc\nQ", 4, &stops), None);
        assert_eq!(find_stop("abc\nQ: d", 5, &stops), Some((3, &stops[0])));
        assert_eq!(find_stop("xEND\nQ:", 0, &stops), Some((1, &stops[1])));
        assert_eq!(find_stop("ééé", 4, &stops), Some((4, &stops[2])));
        assert_eq!(find_stop("END", 3, &stops), None);
    }

    #[test]
    fn of_two_stops_at_one_place_the_longer_is_taken() {
        let stops = ["a".to_owned(), "ab".to_owned()];
        assert_eq!(find_stop("xab", 0, &stops), Some((1, &stops[1])));
    }
}
