//! Which prompts and samples may run now.
//!
//! Prompts begin while the cache is expected to hold everybody to the end (`outlook`), so it is full of what is used
//! rather than of what may be; who has no room after all is paused (`room`).
//!
//! **Invariant:** places are promised before a sequence begins. A prompt with several samples either begins with room
//! for all of them, or alone, and then keeps new prompts out until its last sample has begun; so samples that wait are
//! of one prompt at most, and there is always one that fits. Samples whose cache evicts share a prompt if they all fit,
//! else each computes its own.

use std::collections::HashMap;

use super::outlook::Outlook;
use super::prefix::{Found, Path, Prefixes};
use super::prepare::{Prepared, PreparedPrompt, Scored, Unfit, Work};
use super::sample::{Rules, Sample};
use super::sequence::{Aside, Begin, Job, PromptState, Sequence};
use super::snapshot::{Snapshots, Trail};
use super::{AHEAD_PROMPTS, Engine};
use crate::device::Device;
use crate::error::Result;
use crate::job::Writer;
use crate::job::request::{FinishReason, LineError};
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::policy::Kept;

/// Who was paused comes back when this part of the cache stays free, so that it is not paused again at once.
const PAUSED_SPARE: usize = 32;
/// Prompts that are tried where the first one finds no room, and how often that may happen to it.
const SMALLER: usize = 16;
const PASSED_OVER: usize = 64;

impl<D: Device> Engine<'_, D> {
    /// Takes a line in: errors are answered at once, prompts wait for admission.
    pub(super) fn accept(&mut self, prepared: Prepared, writer: &mut Writer) -> Result<()> {
        let Prepared { header, work } = prepared;
        self.accepted += 1;
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
        let shares = self.shares_beginnings();
        let mut job = Job { header, rules, prompts: Vec::new(), open: 0, error: None };
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
            job.prompts.push(PromptState { prompt, scores, samples });
            let mut groups: Vec<Vec<Sample>> =
                if self.batch.share_prompts { vec![begin] } else { begin.into_iter().map(|one| vec![one]).collect() };
            if groups.is_empty() {
                groups.push(Vec::new());
            }
            for (group, samples) in groups.into_iter().enumerate() {
                let scored = scored.filter(|_| group == 0);
                if scored.is_some() || !samples.is_empty() {
                    let prompt = &job.prompts[prompt_index].prompt;
                    let (path, trail) = enter((&mut self.prefixes, &mut self.snapshots), shares, prompt, scored);
                    self.pending_tokens += prompt.tokens.len();
                    let prompt = prompt_index;
                    self.pending.push_back(Begin { job: index, prompt, samples, scored, path, trail, paused: None });
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
    pub(super) fn admit(&mut self) -> Result<()> {
        if self.places() == 0 || self.waiting.is_empty() && self.pending.is_empty() {
            return Ok(());
        }
        let mut outlook = self.outlook.take().unwrap_or_else(|| self.outlook());
        self.admit_into(&mut outlook)?;
        self.outlook = Some(outlook);
        Ok(())
    }

    fn admit_into(&mut self, outlook: &mut Outlook) -> Result<()> {
        while let Some(sequence) = self.waiting.front() {
            let before = outlook.forecast;
            self.look_at(sequence, outlook);
            let fits = self.active.is_empty() || outlook.forecast.peak() <= self.free_pages() as f64;
            if self.places() == 0 || !fits {
                outlook.forecast = before;
                return Ok(());
            }
            self.active.extend(self.waiting.pop_front());
        }
        // Siblings that will wait for room keep new prompts out.
        if self.active.iter().any(|sequence| !sequence.siblings.is_empty() && !sequence.siblings_go_on) {
            return Ok(());
        }
        if self.active.is_empty() {
            self.closed = false;
        } else if self.closed {
            return Ok(());
        }
        while let Some((index, siblings_go_on)) = self.next_prompt(outlook) {
            if !siblings_go_on && self.must_part(index) {
                self.part_samples(index);
                *outlook = self.outlook();
                continue;
            }
            self.passed_over = if index == 0 { 0 } else { self.passed_over + 1 };
            let begin = self.pending.remove(index).expect("it was looked at");
            if self.begin(begin, siblings_go_on)? {
                *outlook = self.outlook();
            }
        }
        Ok(())
    }

    /// The prompt that is to begin next, and whether all of its samples have room; the outlook then counts them.
    fn next_prompt(&self, outlook: &mut Outlook) -> Option<(usize, bool)> {
        for (index, taken) in self.candidates() {
            let begin = &self.pending[index];
            let siblings = begin.samples.len().saturating_sub(1);
            // What it takes can no longer be given up; and who was paused comes back when there is room to spare.
            let spare = if begin.paused.is_some() { self.pool.len() / PAUSED_SPARE } else { 0 };
            let free = self.free_pages() as f64 - (self.prefixes.idle_pages_of(&begin.path, taken) + spare) as f64;
            let before = outlook.forecast;
            self.look_at_prompt(begin, taken, true, outlook);
            if outlook.forecast.peak() <= free && self.places() > siblings {
                return Some((index, true));
            }
            outlook.forecast = before;
            // It was let in because it fits when it is alone.
            if self.active.is_empty() {
                self.look_at_prompt(begin, taken, false, outlook);
                return Some((index, siblings == 0));
            }
        }
        None
    }

    /// Prompts that may begin next, the most welcome first, and how many pages of its beginning each takes. The first
    /// goes first, unless its beginning is being computed or a later one finds more ready; the next few may take the
    /// room that is too small for it.
    fn candidates(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let pending = self.pending.iter().enumerate().take(if self.places() > 0 { usize::MAX } else { 0 });
        // What is ready of a beginning: pages to take, or to copy.
        let mut found = pending.filter_map(|(index, begin)| {
            match (self.prefixes.look(&begin.path), self.snapshots.look(&begin.trail)) {
                (Found::Pages(takes), Found::Pages(copies)) => Some((index, takes, takes + copies)),
                _ => None,
            }
        });
        let first = found.next();
        // Nobody is passed over for ever, nor whoever was paused at all but while its beginning is being computed.
        let paused = self.pending.front().is_some_and(|begin| begin.paused.is_some());
        let strict = paused || self.passed_over >= AHEAD_PROMPTS;
        let looks = !strict && first.is_some_and(|(_, _, ready)| ready == 0);
        let ready = if looks { found.clone().find(|&(_, _, ready)| ready > 0) } else { None };
        let smaller = if strict || self.passed_over >= PASSED_OVER { 0 } else { SMALLER };
        ready.into_iter().chain(first).chain(found.take(smaller)).map(|(index, takes, _)| (index, takes))
    }

    /// Whether samples that do not fit together compute their prompt for themselves.
    fn must_part(&self, index: usize) -> bool {
        let begin = &self.pending[index];
        self.jobs[&begin.job].prompts[begin.prompt].prompt.kept != Kept::All
    }

    /// Lets every sample of a prompt in line compute it for itself.
    fn part_samples(&mut self, place: usize) {
        let begin = self.pending.remove(place).expect("it was looked at");
        let Begin { job, prompt, samples, scored, trail, mut paused, .. } = begin;
        self.snapshots.withdraw(&trail, &mut self.pool);
        let tokens = self.jobs[&job].prompts[prompt].prompt.tokens.len();
        self.pending_tokens += tokens * (samples.len() - 1);
        let shares = self.shares_beginnings();
        for (index, sample) in samples.into_iter().enumerate().rev() {
            let (samples, scored) = (vec![sample], scored.filter(|_| index == 0));
            let state = &self.jobs[&job].prompts[prompt].prompt;
            let trees = (&mut self.prefixes, &mut self.snapshots);
            let (path, trail) = enter(trees, shares, state, scored);
            // One of them is who was paused, the others are new.
            let paused = if index == 0 { paused.take() } else { None };
            self.pending.insert(place, Begin { job, prompt, samples, scored, path, trail, paused });
        }
    }

    /// Begins a prompt; gives whether it holds pages already that it was expected to take.
    fn begin(&mut self, begin: Begin, siblings_go_on: bool) -> Result<bool> {
        let Begin { job, prompt, samples, scored, mut path, mut trail, paused } = begin;
        let is_new = paused.is_none();
        self.begun += u64::from(is_new);
        let number = paused.as_ref().map_or(self.begun, |paused| paused.number);
        let mut pages = self.prefixes.begin(&mut path, number, &mut self.pool);
        let kept = self.jobs[&job].prompts[prompt].prompt.kept;
        let taken = pages.len();
        // What it had itself, or what another has left, whichever goes further.
        let (snapped, copies) = self.snapshots.begin(&trail, &mut self.pool);
        let mut best = Aside { computed: snapped, before: 0, pages: copies };
        if let Some(mut own) = paused.and_then(|paused| paused.aside) {
            if own.computed > snapped {
                std::mem::swap(&mut best, &mut own);
            }
            own.pages.into_iter().for_each(|page| self.pool.release(page));
        }
        let is_own = best.computed > snapped;
        let computed = self.bring_back(best, &mut pages)?;
        if is_own {
            self.counts.kept_tokens += (computed - taken * PAGE_POSITIONS) as u64;
        }
        let brings = pages.len() > taken;
        self.snapshots.set_out(&mut trail, computed);
        let prepared = &self.jobs[&job].prompts[prompt].prompt;
        let prompt_tokens = &prepared.tokens;
        let mut samples = samples.into_iter();
        let sample = samples.next();
        let mut tokens = prompt_tokens.clone();
        tokens.extend(sample.iter().flat_map(|sample| &sample.tokens).map(|token| token.id));
        let siblings: Vec<Sample> = samples.collect();
        if is_new {
            self.counts.prompt_tokens += prompt_tokens.len() as u64;
            self.counts.shared_tokens += computed as u64;
        }
        self.pending_tokens -= prompt_tokens.len();
        self.promised_places += if siblings_go_on { siblings.len() } else { 0 };
        self.active.push(Sequence {
            job,
            prompt,
            prompt_len: prompt_tokens.len(),
            tokens,
            computed,
            kept,
            pages,
            number,
            path,
            trail,
            scored,
            sample,
            siblings,
            siblings_go_on,
        });
        Ok(brings)
    }

    /// Starts the siblings of a sequence whose prompt has just been computed: each takes a share of its pages.
    pub(super) fn start_siblings(&mut self, leader: usize) {
        let siblings = std::mem::take(&mut self.active[leader].siblings);
        for sample in siblings {
            self.begun += 1;
            let leader = &self.active[leader];
            let prompt = &self.jobs[&leader.job].prompts[leader.prompt].prompt;
            let pages: Vec<_> = leader.pages[..leader.kept.held(leader.prompt_len)].to_vec();
            let mut tokens = prompt.tokens.clone();
            tokens.extend(sample.tokens.iter().map(|token| token.id));
            let sequence = Sequence {
                job: leader.job,
                prompt: leader.prompt,
                tokens,
                prompt_len: leader.prompt_len,
                computed: leader.prompt_len,
                kept: leader.kept,
                pages,
                number: self.begun,
                path: self.prefixes.join(&leader.path, &leader.pages),
                trail: Trail::default(),
                scored: None,
                sample: Some(sample),
                siblings: Vec::new(),
                siblings_go_on: false,
            };
            sequence.pages.iter().for_each(|&page| self.pool.share(page));
            self.counts.prompt_tokens += sequence.prompt_len as u64;
            self.counts.shared_tokens += sequence.prompt_len as u64;
            if leader.siblings_go_on {
                self.promised_places -= 1;
                self.active.push(sequence);
            } else {
                self.waiting.push_back(sequence);
            }
        }
    }

    /// Gives back everything that a sequence holds.
    pub(super) fn release(&mut self, sequence: &Sequence) {
        self.prefixes.end(&sequence.path, sequence.number, &sequence.pages, &mut self.pool);
        self.snapshots.end(&sequence.trail, &mut self.pool);
        sequence.pages.iter().for_each(|&page| self.pool.release(page));
        // Siblings that have not begun.
        if sequence.siblings_go_on {
            self.promised_places -= sequence.siblings.len();
        }
    }

    pub(super) fn places(&self) -> usize {
        self.batch.sequences.saturating_sub(self.active.len() + self.promised_places)
    }
}

/// The way of a prompt through the tree of beginnings, or of snapshots where its cache evicts, if it shares its own.
pub(super) fn enter(
    (prefixes, snapshots): (&mut Prefixes, &mut Snapshots),
    shares: bool,
    prompt: &PreparedPrompt,
    scored: Option<Scored>,
) -> (Path, Trail) {
    // The row before the first token that is scored predicts it.
    let from = scored.map_or(usize::MAX, |scored| scored.from - 1);
    match prompt.kept {
        _ if !shares => Default::default(),
        Kept::All => (prefixes.enter(&prompt.tokens, from), Trail::default()),
        kept => (Path::default(), snapshots.enter(&prompt.tokens, from, kept)),
    }
}
