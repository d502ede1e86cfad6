//! Pages for those who are in flight: given out one by one, and taken from the youngest when there are not enough.
//!
//! Admission goes by a forecast, and a forecast can be wrong. A sequence that is paused gives back all that it holds
//! and waits before all prompts, with its tokens; it is then computed again like one that another process began, so
//! no bit of it changes.
//!
//! **Invariant:** a pass never takes more pages than there are, and the oldest sequence is never paused, so there is
//! always one that goes on.

use std::ops::Range;

use super::admission::path_of;
use super::sequence::{Begin, Sequence};
use super::{Engine, journal_sample};
use crate::device::Device;
use crate::error::Result;
use crate::job::Writer;
use crate::kv::layout::PAGE_POSITIONS;

impl<D: Device> Engine<'_, D> {
    /// Pages that a sequence must be given before the positions `range` are stored: new ones, and copies of those that
    /// it shares and will write to. An empty range is about the next position alone, and about copies.
    pub(super) fn pages_needed(&self, sequence: &Sequence, range: Range<usize>) -> usize {
        let new = sequence.kept.pages(range.end).saturating_sub(sequence.pages.len());
        let next = range.start..range.end.max(range.start + 1);
        let written = sequence.kept.writes(&next).filter_map(|page| sequence.pages.get(page));
        new + written.filter(|&&page| self.pool.is_shared(page)).count()
    }

    /// Pages that nobody in flight holds.
    pub(super) fn free_pages(&self) -> usize {
        self.pool.free() + self.prefixes.idle_pages()
    }

    /// Pauses the youngest until everybody who decodes, and the oldest prompt, has the pages that its next positions
    /// need; notes them, so that no prompt takes them first.
    pub(super) fn make_room(&mut self, writer: &mut Writer) -> Result<()> {
        loop {
            let oldest = self.active.iter().map(|sequence| sequence.number).min();
            let needs = self.active.iter().map(|sequence| {
                let (from, known) = (sequence.computed, sequence.tokens.len());
                // A prompt goes on by a page's end at least.
                let to = known.min((from / PAGE_POSITIONS + 1) * PAGE_POSITIONS);
                let counts = sequence.decodes() || Some(sequence.number) == oldest;
                if counts { self.pages_needed(sequence, from..to) } else { 0 }
            });
            let needs: Vec<usize> = needs.collect();
            let total: usize = needs.iter().sum();
            if total <= self.free_pages() {
                (self.noted, self.noted_pages) = (needs, total);
                return Ok(());
            }
            self.pause_youngest(writer)?;
        }
    }

    /// How far a sequence can go on towards `to` without touching what was noted for others.
    pub(super) fn within_pages(&self, index: usize, to: usize) -> usize {
        let sequence = &self.active[index];
        let (from, mut to) = (sequence.computed, to);
        let free = self.free_pages() - (self.noted_pages - self.noted[index]);
        while to > from && self.pages_needed(sequence, from..to) > free {
            to = (to - 1) / PAGE_POSITIONS * PAGE_POSITIONS;
        }
        to.max(from)
    }

    /// Makes the pages that positions `from .. to` of a sequence are written to its own.
    pub(super) fn own_pages(&mut self, index: usize, from: usize, to: usize) -> Result<()> {
        self.noted_pages -= std::mem::take(&mut self.noted[index]);
        let lacks = self.pages_needed(&self.active[index], from..to).saturating_sub(self.pool.free());
        if lacks > 0 {
            self.prefixes.give_up(lacks, &mut self.pool);
        }
        let sequence = &mut self.active[index];
        let kept = sequence.kept;
        let new = kept.pages(to).saturating_sub(sequence.pages.len());
        sequence.pages.extend((0..new).map(|_| self.pool.take()));
        for page in kept.writes(&(from..to)) {
            let shared = self.active[index].pages[page];
            if self.pool.is_shared(shared) {
                let own = self.pool.take();
                self.executor_mut().copy_page(shared, own)?;
                self.active[index].pages[page] = own;
                self.pool.release(shared);
            }
        }
        Ok(())
    }

    /// Pauses the sequence that began last of those in flight; when one is left, siblings that wait: till then what
    /// they hold is mostly held by others too.
    fn pause_youngest(&mut self, writer: &mut Writer) -> Result<()> {
        let sequence = if self.active.len() > 1 {
            let active = self.active.iter().enumerate();
            let youngest = active.max_by_key(|(_, sequence)| sequence.number).map(|(index, _)| index);
            self.active.remove(youngest.expect("there are several"))
        } else {
            self.waiting.pop_back().expect("a prompt that needs the whole cache was let in")
        };
        self.pause(sequence, writer)
    }

    /// Puts a sequence back before the prompts that have not begun.
    pub(super) fn pause(&mut self, sequence: Sequence, writer: &mut Writer) -> Result<()> {
        self.release(&sequence);
        self.counts.paused += 1;
        let Sequence { job, prompt, number, scored, sample, siblings, .. } = sequence;
        let mut samples: Vec<_> = sample.into_iter().chain(siblings).collect();
        for sample in &mut samples {
            journal_sample(writer, job, prompt, sample)?;
        }
        let shares = self.shares_beginnings();
        let state = &self.jobs[&job].prompts[prompt].prompt;
        let path = path_of(&mut self.prefixes, shares, state, scored);
        self.pending_tokens += state.tokens.len();
        self.pending.push_front(Begin { job, prompt, samples, scored, path, paused: Some(number) });
        Ok(())
    }
}
