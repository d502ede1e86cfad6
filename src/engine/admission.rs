//! Which prompts and samples may run now.
//!
//! **Invariant:** pages and places are promised before a sequence begins. A prompt with several samples either
//! reserves for all of them, or begins alone and keeps new prompts out until its last sample has begun; so samples
//! that wait are of one prompt at most, and there is always one that fits. Samples whose cache evicts share a prompt if
//! they all fit, else each computes its own.

use std::collections::HashMap;

use super::prefix::{Found, Path};
use super::prepare::{Prepared, Reservation, Unfit, Work};
use super::sample::{Rules, Sample};
use super::sequence::{Begin, Job, PromptState, Sequence};
use super::{AHEAD_PROMPTS, Engine};
use crate::device::Device;
use crate::error::Result;
use crate::job::Writer;
use crate::job::request::{FinishReason, LineError};
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::policy::Kept;

impl<D: Device> Engine<'_, D> {
    /// Takes a line in: errors are answered at once, prompts wait for admission.
    pub(super) fn accept(&mut self, prepared: Prepared, writer: &mut Writer) -> Result<()> {
        let Prepared { header, work } = prepared;
        let work = match work {
            Ok(work) => work,
            Err(Unfit::Line(error)) => return self.fail(&header, &error, writer),
            Err(Unfit::Pages { cache, block }) if self.serves => {
                let what = format!(
                    "the line needs {cache} pages of the KV cache and {block} in a block, there is room for {} and {}",
                    self.pool.len(),
                    self.block_pages().min(self.pool.len()),
                );
                return self.fail(&header, &LineError::new("kv_cache_exceeded", what), writer);
            }
            Err(Unfit::Pages { cache, block }) => {
                self.postponed += 1;
                let [most_cache, most_block] = &mut self.pages_wanted;
                (*most_cache, *most_block) = (cache.max(*most_cache), block.max(*most_block));
                return Ok(());
            }
        };
        let Work { request, prompts, partial } = work;
        let rules = Rules::new(request.clone(), &self.model.generation.eos_token_ids);
        let index = header.index;
        let mut known: HashMap<(u32, u32), _> =
            partial.into_iter().map(|sample| ((sample.prompt, sample.sample), sample.tokens)).collect();
        let mut job = Job { header, rules, prompts: Vec::new(), open: 0, error: None };
        let shares_beginnings = self.shares_beginnings();
        for (prompt_index, prompt) in prompts.into_iter().enumerate() {
            let n = request.sampling.n;
            let mut samples: Vec<Option<Sample>> = (0..n).map(|_| None).collect();
            let mut begin = Vec::new();
            for sample_index in 0..n {
                let mut sample =
                    Sample::new(&job.rules, self.model, prompt_index, &prompt.tokens, sample_index, prompt.max_tokens);
                for token in known.remove(&(prompt_index as u32, sample_index)).unwrap_or_default() {
                    if sample.finish.is_none() {
                        sample.accept(token, &job.rules, self.model)?;
                    }
                }
                sample.journalled = sample.tokens.len();
                if prompt.max_tokens == 0 {
                    sample.finish = Some((FinishReason::Length, None));
                }
                if sample.finish.is_some() {
                    samples[sample_index as usize] = Some(sample);
                } else {
                    begin.push(sample);
                }
            }
            let scored = prompt.scored;
            job.open += begin.len() + usize::from(scored.is_some());
            let scores = scored.map_or(0, |scored| prompt.tokens.len() + usize::from(scored.after.is_some()));
            let scores = vec![None; scores];
            let shares = shares_beginnings && prompt.kept == Kept::All;
            job.prompts.push(PromptState { prompt, scores, samples });
            let mut groups: Vec<Vec<Sample>> =
                if self.batch.share_prompts { vec![begin] } else { begin.into_iter().map(|one| vec![one]).collect() };
            if groups.is_empty() {
                groups.push(Vec::new());
            }
            for (group, samples) in groups.into_iter().enumerate() {
                let scored = scored.filter(|_| group == 0);
                if scored.is_some() || !samples.is_empty() {
                    let tokens = &job.prompts[prompt_index].prompt.tokens;
                    // The row before the first token that is scored predicts it.
                    let from = scored.map_or(usize::MAX, |scored| scored.from - 1);
                    let path = if shares { self.prefixes.enter(tokens, from) } else { Path::default() };
                    self.pending_tokens += tokens.len();
                    self.pending.push_back(Begin { job: index, prompt: prompt_index, samples, scored, path });
                }
            }
        }
        if job.open == 0 {
            return self.finish(job, writer);
        }
        self.jobs.insert(index, job);
        Ok(())
    }

    /// Begins what there is room for.
    pub(super) fn admit(&mut self) {
        while let Some(sequence) = self.waiting.front() {
            if self.places() == 0 || self.free_pages() < sequence.reserved {
                return;
            }
            let sequence = self.waiting.pop_front().expect("front exists");
            self.reserved += sequence.reserved;
            self.active.push(sequence);
        }
        // Siblings that will wait for room keep new prompts out.
        if self.active.iter().any(|sequence| !sequence.siblings.is_empty() && sequence.sibling_pages.is_none()) {
            return;
        }
        while let Some((index, taken)) = self.next_prompt() {
            let begin = &self.pending[index];
            let job = &self.jobs[&begin.job];
            let prompt = &job.prompts[begin.prompt].prompt;
            let siblings = begin.samples.len().saturating_sub(1);
            let Reservation { alone, sibling, .. } = Reservation::of(prompt, begin.samples.len());
            let (all, alone) = (alone - taken + sibling * siblings, alone - taken);
            let lacks = all.saturating_sub(self.free_pages());
            // Pages that are given up are computed again: not for a prompt that must wait all the same.
            if lacks > 0 && (lacks <= self.prefixes.idle_pages() || self.active.is_empty()) {
                self.prefixes.give_up(lacks, (&begin.path, taken), &mut self.pool);
            }
            let fits = |pages: usize, places: usize| self.free_pages() >= pages && self.places() >= places;
            let sibling_pages = if fits(all, siblings + 1) {
                Some(sibling)
            } else if siblings > 0 && self.active.is_empty() && prompt.kept != Kept::All {
                self.part_samples(index);
                continue;
            } else if siblings > 0 && self.active.is_empty() && fits(alone, 1) {
                None
            } else {
                return;
            };
            self.passed_over = if index == 0 { 0 } else { self.passed_over + 1 };
            let begin = self.pending.remove(index).expect("it was looked at");
            self.begin(begin, sibling_pages, alone);
        }
    }

    /// The prompt that is to begin next, and how many pages of its beginning are ready: the first in line, unless its
    /// beginning is being computed or a later one finds more ready.
    fn next_prompt(&self) -> Option<(usize, usize)> {
        if self.places() == 0 {
            return None;
        }
        let found =
            self.pending.iter().enumerate().filter_map(|(index, begin)| match self.prefixes.look(&begin.path) {
                Found::Pages(pages) => Some((index, pages)),
                Found::Soon => None,
            });
        // Nobody is passed over for ever.
        let mut found = found.take(if self.passed_over < AHEAD_PROMPTS { usize::MAX } else { 1 });
        let first = found.next()?;
        if first.1 > 0 { Some(first) } else { found.find(|&(_, pages)| pages > 0).or(Some(first)) }
    }

    /// Lets every sample of a prompt in line compute it for itself.
    fn part_samples(&mut self, place: usize) {
        let Begin { job, prompt, samples, scored, .. } = self.pending.remove(place).expect("it was looked at");
        let tokens = self.jobs[&job].prompts[prompt].prompt.tokens.len();
        self.pending_tokens += tokens * (samples.len() - 1);
        for (index, sample) in samples.into_iter().enumerate().rev() {
            // Caches that evict share no beginnings.
            let (samples, scored, path) = (vec![sample], scored.filter(|_| index == 0), Path::default());
            self.pending.insert(place, Begin { job, prompt, samples, scored, path });
        }
    }

    fn begin(&mut self, begin: Begin, sibling_pages: Option<usize>, reserved: usize) {
        let Begin { job, prompt, samples, scored, mut path } = begin;
        self.begun += 1;
        let pages = self.prefixes.begin(&mut path, self.begun, &mut self.pool);
        let taken = pages.len() * PAGE_POSITIONS;
        let prepared = &self.jobs[&job].prompts[prompt].prompt;
        let (prompt_tokens, kept) = (&prepared.tokens, prepared.kept);
        let mut samples = samples.into_iter();
        let sample = samples.next();
        let mut tokens = prompt_tokens.clone();
        tokens.extend(sample.iter().flat_map(|sample| &sample.tokens).map(|token| token.id));
        let siblings: Vec<Sample> = samples.collect();
        self.counts.prompt_tokens += prompt_tokens.len() as u64;
        self.counts.shared_tokens += taken as u64;
        self.pending_tokens -= prompt_tokens.len();
        self.reserved += reserved + sibling_pages.unwrap_or(0) * siblings.len();
        self.promised_places += if sibling_pages.is_some() { siblings.len() } else { 0 };
        self.active.push(Sequence {
            job,
            prompt,
            prompt_len: prompt_tokens.len(),
            tokens,
            computed: taken,
            kept,
            pages,
            reserved,
            number: self.begun,
            path,
            scored,
            sample,
            siblings,
            sibling_pages,
        });
    }

    /// Starts the siblings of a sequence whose prompt has just been computed: each takes a share of its pages.
    pub(super) fn start_siblings(&mut self, leader: usize) {
        let siblings = std::mem::take(&mut self.active[leader].siblings);
        for sample in siblings {
            let leader = &self.active[leader];
            let prompt = &self.jobs[&leader.job].prompts[leader.prompt].prompt;
            let pages: Vec<_> = leader.pages[..leader.kept.pages(leader.prompt_len)].to_vec();
            let mut tokens = prompt.tokens.clone();
            tokens.extend(sample.tokens.iter().map(|token| token.id));
            let sequence = Sequence {
                job: leader.job,
                prompt: leader.prompt,
                tokens,
                prompt_len: leader.prompt_len,
                computed: leader.prompt_len,
                kept: leader.kept,
                reserved: Reservation::of(prompt, 2).sibling,
                pages,
                number: leader.number,
                path: Path::default(),
                scored: None,
                sample: Some(sample),
                siblings: Vec::new(),
                sibling_pages: None,
            };
            sequence.pages.iter().for_each(|&page| self.pool.share(page));
            self.counts.prompt_tokens += sequence.prompt_len as u64;
            self.counts.shared_tokens += sequence.prompt_len as u64;
            if leader.sibling_pages.is_some() {
                self.promised_places -= 1;
                self.active.push(sequence);
            } else {
                self.waiting.push_back(sequence);
            }
        }
    }

    /// Makes the pages that positions `from .. to` of a sequence are written to its own.
    pub(super) fn own_pages(&mut self, index: usize, from: usize, to: usize) -> Result<()> {
        let sequence = &mut self.active[index];
        let new = sequence.kept.pages(to).saturating_sub(sequence.pages.len());
        sequence.pages.extend((0..new).map(|_| self.pool.take()));
        sequence.reserved -= new;
        self.reserved -= new;
        for page in sequence.kept.writes(&(from..to)) {
            if self.pool.is_shared(sequence.pages[page]) {
                let own = self.pool.take();
                self.executor.copy_page(sequence.pages[page], own)?;
                self.pool.release(std::mem::replace(&mut sequence.pages[page], own));
                sequence.reserved -= 1;
                self.reserved -= 1;
            }
        }
        Ok(())
    }

    /// Gives back everything that a sequence holds.
    pub(super) fn release(&mut self, sequence: &Sequence) {
        self.prefixes.end(&sequence.path, sequence.number, &mut self.pool);
        sequence.pages.iter().for_each(|&page| self.pool.release(page));
        self.reserved -= sequence.reserved;
        // Siblings that never began, because the request failed.
        if let Some(pages) = sequence.sibling_pages {
            self.reserved -= pages * sequence.siblings.len();
            self.promised_places -= sequence.siblings.len();
        }
    }

    fn free_pages(&self) -> usize {
        self.pool.free() - self.reserved
    }

    pub(super) fn places(&self) -> usize {
        self.batch.sequences.saturating_sub(self.active.len() + self.promised_places)
    }
}
