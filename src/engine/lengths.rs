//! How long answers get, learned while the job runs.
//!
//! Of every kind of line (its endpoint, and about how long its prompt is) it is counted how many answers were seen at
//! every length and how many of them ended there. That rate is the hazard of a survival estimate (Kaplan and Meier,
//! 1958, over stretches of lengths), so answers that still run and those that were cut by their `max_tokens` count
//! for what they have shown. Kinds that have shown little lean on all lines, and all lines on what was expected.
//!
//! **Invariant:** an estimate. It decides who runs when, never what is answered.

use std::collections::HashMap;

use crate::job::request::{Endpoint, Request};

/// Beginnings of the stretches of lengths, in tokens.
const STARTS: [usize; 24] =
    [0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096];

/// Answers that what is leant on counts for.
const WEIGHT: f64 = 8.0;

/// Lines that are taken to be alike: their endpoint, and the prompt's length up to a factor of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    endpoint: Endpoint,
    prompt_len: u32,
}

impl Kind {
    /// The kind of a line with a prompt of so many tokens.
    pub fn new(endpoint: Endpoint, prompt_len: usize) -> Self {
        Kind { endpoint, prompt_len: prompt_len.max(1).ilog2() }
    }
}

/// Whether an answer goes on to its last token whatever is drawn.
pub fn is_certain(request: &Request) -> bool {
    let sampling = &request.sampling;
    sampling.ignore_eos && sampling.stop.is_empty() && sampling.stop_token_ids.is_empty()
}

/// What has been learned.
#[derive(Debug)]
pub struct Lengths {
    /// Ends for every token that was expected before anything was seen.
    expected: f64,
    all: Seen,
    kinds: HashMap<Kind, Seen>,
}

/// Answers by length.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// Tokens drawn in every stretch.
    tokens: [f64; STARTS.len()],
    /// Answers that ended with one of them.
    ended: [f64; STARTS.len()],
}

/// How likely answers of a kind go on.
#[derive(Clone, Debug)]
pub struct Survival {
    /// Ends for every token within a stretch.
    rates: [f64; STARTS.len()],
    /// Their sum up to the beginning of a stretch.
    upto: [f64; STARTS.len()],
}

impl Lengths {
    /// Nothing seen; answers are expected to end after so many tokens on average, or not before their last.
    pub fn new(expected: Option<usize>) -> Self {
        let expected = expected.map_or(0.0, |tokens| 1.0 / tokens.max(1) as f64);
        Lengths { expected, all: Seen::default(), kinds: HashMap::new() }
    }

    /// A token was drawn after `before` others; `ended` says that the answer ended of itself with it.
    pub fn note(&mut self, kind: Kind, before: usize, ended: bool) {
        let stretch = STARTS.partition_point(|&start| start <= before) - 1;
        for seen in [&mut self.all, self.kinds.entry(kind).or_default()] {
            seen.tokens[stretch] += 1.0;
            seen.ended[stretch] += f64::from(u8::from(ended));
        }
    }

    /// What is known about a kind.
    pub fn survival(&self, kind: Kind) -> Survival {
        let none = Seen::default();
        let seen = self.kinds.get(&kind).unwrap_or(&none);
        let mut rates = [0.0; STARTS.len()];
        let mut upto = [0.0; STARTS.len()];
        let mut sum = 0.0;
        for stretch in 0..STARTS.len() {
            let width = STARTS.get(stretch + 1).map_or(STARTS[stretch], |end| end - STARTS[stretch]) as f64;
            // So many tokens of what it leans on.
            let weight = WEIGHT * width;
            let rate = |seen: &Seen, leans_on: f64| {
                (seen.ended[stretch] + weight * leans_on) / (seen.tokens[stretch] + weight)
            };
            rates[stretch] = rate(seen, rate(&self.all, self.expected));
            upto[stretch] = sum;
            sum += rates[stretch] * width;
        }
        Survival { rates, upto }
    }
}

impl Survival {
    /// Expected ends within the first `len` tokens.
    fn ends(&self, len: usize) -> f64 {
        let stretch = STARTS.partition_point(|&start| start <= len) - 1;
        self.upto[stretch] + self.rates[stretch] * (len - STARTS[stretch]) as f64
    }

    /// Tokens that an answer of `len` is expected to get, of `most` that it may.
    pub fn expected(&self, len: usize, most: usize) -> f64 {
        // Far ahead a step of many tokens is near enough.
        let step = most.div_ceil(256).max(1);
        (0..most).step_by(step).map(|more| self.goes_on(len, more) * step.min(most - more) as f64).sum()
    }

    /// The probability that an answer of `len` tokens gets more than `more` further ones.
    pub fn goes_on(&self, len: usize, more: usize) -> f64 {
        (self.ends(len) - self.ends(len.saturating_add(more))).exp()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { endpoint: Endpoint::Plain, prompt_len: 5 };

    /// Answers of these lengths, seen in passes of `count` at a time as an engine would.
    fn learn(lengths: &mut Lengths, kind: Kind, answers: &[usize], count: usize) {
        let mut waiting = answers.iter();
        let mut active: Vec<(usize, usize)> = Vec::new();
        loop {
            while active.len() < count {
                let Some(&len) = waiting.next() else { return };
                active.push((0, len));
            }
            for (before, len) in &mut active {
                lengths.note(kind, *before, *before + 1 == *len);
                *before += 1;
            }
            active.retain(|(before, len)| before < len);
        }
    }

    /// Lengths as a geometric distribution has them.
    fn geometric(mean: f64, count: usize) -> Vec<usize> {
        let share = |index: usize| (index as f64 + 0.5) / count as f64;
        let mut all: Vec<usize> = (0..count).map(|i| (-mean * share(i).ln()).ceil().max(1.0) as usize).collect();
        // Any order that has nothing to do with lengths.
        (1..count).for_each(|index| all.swap(index, (index * 7919) % (index + 1)));
        all
    }

    #[test]
    fn what_runs_still_is_not_taken_for_short() {
        for expected in [None, Some(10)] {
            let mut lengths = Lengths::new(expected);
            learn(&mut lengths, KIND, &geometric(64.0, 4000), 256);
            let survival = lengths.survival(KIND);
            for (len, more) in [(0, 10), (0, 64), (30, 64), (100, 128)] {
                let (found, true_one) = (survival.goes_on(len, more), (-(more as f64) / 64.0).exp());
                assert!((found - true_one).abs() < 0.05, "{expected:?}: {len} {more}: {found} {true_one}");
            }
        }
    }

    #[test]
    fn before_anything_is_seen_answers_are_as_long_as_expected() {
        let other = Kind::new(Endpoint::Chat, 100);
        assert_eq!(Lengths::new(None).survival(KIND).goes_on(3, 100_000), 1.0);
        let expected = Lengths::new(Some(100)).survival(other);
        assert!((expected.goes_on(20, 100) - (-1f64).exp()).abs() < 1e-9);
        assert!((expected.expected(5, 2000) - 100.0).abs() < 5.0, "{}", expected.expected(5, 2000));
    }

    #[test]
    fn kinds_differ_where_they_have_shown_it() {
        let (short, long) = (Kind::new(Endpoint::Plain, 40), Kind::new(Endpoint::Plain, 400));
        let mut lengths = Lengths::new(None);
        learn(&mut lengths, short, &geometric(8.0, 2000), 100);
        learn(&mut lengths, long, &geometric(200.0, 2000), 100);
        assert!(lengths.survival(short).goes_on(0, 50) < 0.05);
        assert!(lengths.survival(long).goes_on(0, 50) > 0.7);
        // One that has shown nothing is like all.
        let unknown = lengths.survival(Kind::new(Endpoint::Chat, 40)).goes_on(0, 50);
        assert!(unknown > 0.05 && unknown < 0.7, "{unknown}");
    }
}
