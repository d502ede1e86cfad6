//! What the sequences in flight, and those that may join them, will need of the cache.
//!
//! **Invariant:** looks only; whoever begins or is paused is decided by `admission` and `room`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::Engine;
use super::lengths::{Kind, Lengths, Survival, is_certain};
use super::prepare::PreparedPrompt;
use super::sample::Sample;
use super::sequence::{Begin, Job, Sequence};
use crate::device::Device;
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::policy::{Kept, positions};
use crate::schedule::forecast::Forecast;

/// Tokens after which a prompt that is only scored is taken to have ended.
const SCORED: usize = 64;

/// The sequences in flight as far as they were looked at, and what is known about lengths.
#[derive(Debug, Default)]
pub struct Outlook {
    /// Who may not begin after all is taken out by putting back what was here before.
    pub forecast: Forecast,
    survivals: HashMap<Kind, Survival>,
}

impl Outlook {
    /// Adds a sequence that holds some pages alone, will hold `reading` more while its prompt is read, and `grown(n)`
    /// more after n further tokens; one without a sample is only scored.
    fn add(
        &mut self,
        lengths: &Lengths,
        (job, prompt): (&Job, &PreparedPrompt),
        sample: Option<&Sample>,
        (alone, reading): (usize, usize),
        grown: impl Fn(usize) -> isize,
    ) {
        let Some(sample) = sample else {
            return self.forecast.add(alone, reading, grown, |more| f64::from(u8::from(more < SCORED)));
        };
        let (len, request) = (sample.tokens.len(), job.rules.request());
        let left = prompt.max_tokens.saturating_sub(len);
        if is_certain(request) {
            return self.forecast.add(alone, reading, grown, |more| f64::from(u8::from(more < left)));
        }
        let kind = Kind::new(request.endpoint, prompt.tokens.len());
        let survival: &Survival = match self.survivals.entry(kind) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(lengths.survival(kind)),
        };
        self.forecast.add(alone, reading, grown, |more| if more < left { survival.goes_on(len, more) } else { 0.0 });
    }
}

/// Pages of the sequence of a prompt after so many tokens, prompt included.
fn pages_at(prompt: &PreparedPrompt, tokens: usize) -> isize {
    prompt.kept.held(tokens.min(positions(prompt.tokens.len(), prompt.max_tokens))) as isize
}

impl<D: Device> Engine<'_, D> {
    /// The sequences in flight.
    pub(super) fn outlook(&self) -> Outlook {
        let mut outlook = Outlook::default();
        for sequence in &self.active {
            self.look_at(sequence, &mut outlook);
        }
        outlook
    }

    /// Adds a sequence that is in flight or waits for room, and its siblings if they go on with it.
    pub(super) fn look_at(&self, sequence: &Sequence, outlook: &mut Outlook) {
        let job = &self.jobs[&sequence.job];
        let prompt = &job.prompts[sequence.prompt].prompt;
        let shared = sequence.pages.iter().filter(|&&page| self.pool.is_shared(page)).count()
            - self.prefixes.held_alone(&sequence.path, &sequence.pages);
        let (held, known) = (sequence.pages.len(), sequence.tokens.len());
        // What it shares and will write to it must copy first.
        let copies = self.copies_needed(sequence, &(sequence.computed..sequence.computed + 1));
        let reading = sequence.kept.reading(sequence.computed).saturating_sub(held);
        let grown = |more: usize| pages_at(prompt, known + more) - held as isize + copies as isize;
        outlook.add(&self.lengths, (job, prompt), sequence.sample.as_ref(), (held - shared, reading + copies), grown);
        if sequence.siblings_go_on {
            self.look_at_siblings((job, prompt), &sequence.siblings, outlook);
        }
    }

    /// Adds a prompt that may begin with `taken` pages of its beginning; with all its samples, or with the first.
    pub(super) fn look_at_prompt(&self, begin: &Begin, taken: usize, all: bool, outlook: &mut Outlook) {
        let job = &self.jobs[&begin.job];
        let prompt = &job.prompts[begin.prompt].prompt;
        let known = prompt.tokens.len() + begin.samples.first().map_or(0, |sample| sample.tokens.len());
        // The last page is copied by all but one, whoever they are; one that may evict by all of them.
        let copies = match (begin.samples.len(), prompt.kept) {
            (0 | 1, _) => 0,
            (_, Kept::All) => 1,
            (_, kept) => kept.held(prompt.tokens.len()),
        };
        // What was put aside comes back as it was.
        let aside = begin.paused.as_ref().and_then(|paused| paused.aside.as_ref());
        let reading = prompt.kept.reading(aside.map_or(0, |aside| aside.computed)).saturating_sub(taken);
        let grown = |more: usize| pages_at(prompt, known + more) - taken as isize + copies as isize;
        outlook.add(&self.lengths, (job, prompt), begin.samples.first(), (0, reading), grown);
        if all {
            self.look_at_siblings((job, prompt), begin.samples.get(1..).unwrap_or_default(), outlook);
        }
    }

    fn look_at_siblings(&self, (job, prompt): (&Job, &PreparedPrompt), siblings: &[Sample], outlook: &mut Outlook) {
        let len = prompt.tokens.len();
        let shared = if prompt.kept == Kept::All { len / PAGE_POSITIONS } else { 0 };
        for sample in siblings {
            let known = len + sample.tokens.len();
            let grown = |more: usize| pages_at(prompt, known + more) - shared as isize;
            outlook.add(&self.lengths, (job, prompt), Some(sample), (0, 0), grown);
        }
    }
}
