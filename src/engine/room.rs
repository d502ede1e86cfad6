//! Pages for those who are in flight: given out one by one, and taken from the youngest when there are not enough.
//!
//! Admission goes by a forecast, and a forecast can be wrong. A sequence that is paused gives back all that it holds
//! and waits before all prompts, with its tokens. What it has computed goes to files, and comes back with it; where
//! there is no room for that, it is computed again like a sequence that another process began. Either way no bit of it
//! changes.
//!
//! **Invariant:** a pass never takes more pages than there are, and the oldest sequence is never paused, so there is
//! always one that goes on.

use std::ops::Range;

use super::admission::enter;
use super::sequence::{Aside, Begin, Paused, Sequence};
use super::{Engine, journal_sample};
use crate::device::Device;
use crate::error::Result;
use crate::job::Writer;
use crate::kv::layout::PAGE_POSITIONS;
use crate::kv::pages::{PageId, PagePool};
use crate::policy::Order;

impl<D: Device> Engine<'_, D> {
    /// Pages that a sequence must be given before the positions `range` are stored: new ones, and copies.
    pub(super) fn pages_needed(&self, sequence: &Sequence, range: &Range<usize>) -> usize {
        let new = sequence.kept.pages(range.end).saturating_sub(sequence.pages.len());
        new + self.copies_needed(sequence, range)
    }

    /// Pages that a sequence shares and that the positions `range` are written to.
    pub(super) fn copies_needed(&self, sequence: &Sequence, range: &Range<usize>) -> usize {
        let written = sequence.kept.writes(range).filter_map(|page| sequence.pages.get(page));
        written.filter(|&&page| self.pool.is_shared(page)).count()
    }

    /// Pages that nobody in flight holds.
    pub(super) fn free_pages(&self) -> usize {
        self.pool.free() + self.prefixes.idle_pages() + self.snapshots.pages()
    }

    /// Gives up what is only kept for prompts to come until so many pages are free, if that is enough.
    fn give_up(&mut self, wanted: usize) {
        let lacks = |pool: &PagePool| wanted.saturating_sub(pool.free());
        if lacks(&self.pool) > 0 {
            self.prefixes.give_up(lacks(&self.pool), &mut self.pool);
        }
        if lacks(&self.pool) > 0 {
            self.snapshots.give_up(lacks(&self.pool), &mut self.pool);
        }
    }

    /// Pauses the youngest until everybody who decodes, and the oldest, has the pages that its next positions need;
    /// notes them, so that no prompt takes them first.
    pub(super) fn make_room(&mut self, writer: &mut Writer) -> Result<()> {
        loop {
            // Whoever the pass is for: in phases nobody decodes while there are prompts.
            let prompts = self.active.iter().filter(|sequence| !sequence.decodes()).map(|sequence| sequence.number);
            let waits = self.batch.order == Order::Phased && prompts.clone().next().is_some();
            let all = self.active.iter().map(|sequence| sequence.number);
            let oldest = if waits { prompts.min() } else { all.min() };
            let needs = self.active.iter().map(|sequence| {
                let (from, known) = (sequence.computed, sequence.tokens.len());
                // A prompt goes on by a page's end at least.
                let to = sequence.kept.reach(&(from..known.min((from / PAGE_POSITIONS + 1) * PAGE_POSITIONS)));
                let counts = (sequence.decodes() && !waits) || Some(sequence.number) == oldest;
                if counts { self.pages_needed(sequence, &(from..to)) } else { 0 }
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
        while to > from && self.pages_needed(sequence, &(from..to)) > free {
            to = (to - 1) / PAGE_POSITIONS * PAGE_POSITIONS;
        }
        to.max(from)
    }

    /// Makes the pages that positions `from .. to` of a sequence are written to its own.
    pub(super) fn own_pages(&mut self, index: usize, from: usize, to: usize) -> Result<()> {
        self.noted_pages -= std::mem::take(&mut self.noted[index]);
        self.give_up(self.pages_needed(&self.active[index], &(from..to)));
        let sequence = &mut self.active[index];
        let kept = sequence.kept;
        let new = kept.pages(to).saturating_sub(sequence.pages.len());
        sequence.pages.extend((0..new).map(|_| self.pool.take()));
        for page in kept.writes(&(from..to)) {
            let shared = self.active[index].pages[page];
            if self.pool.is_shared(shared) {
                let own = self.pool.take();
                self.executor_mut().copy_pages(&[(shared, own)])?;
                self.active[index].pages[page] = own;
                self.pool.release(shared);
            }
        }
        Ok(())
    }

    /// Gives back the pages that sequences do not go on with: those whose prompts were kept whole till they were read.
    pub(super) fn give_back(&mut self) {
        for Sequence { kept, computed, pages, .. } in &mut self.active {
            let held = kept.held(*computed).min(pages.len());
            pages.drain(held..).for_each(|page| self.pool.release(page));
        }
    }

    /// Leaves snapshots of those who stand where one is wanted, if there is room.
    pub(super) fn leave_snapshots(&mut self) -> Result<()> {
        for index in 0..self.active.len() {
            let Sequence { trail, computed, kept, .. } = &self.active[index];
            let (computed, count) = (*computed, kept.held(*computed));
            let stands = self.snapshots.next_point(trail) == Some(computed);
            if stands {
                self.snapshots.make_way(trail, computed, count, &mut self.pool);
            }
            if stands && count <= self.pool.free() {
                let pages = &self.active[index].pages[..count];
                let pairs: Vec<_> = pages.iter().map(|&page| (page, self.pool.take())).collect();
                self.executor_mut().copy_pages(&pairs)?;
                let copies = pairs.into_iter().map(|(_, copy)| copy).collect();
                self.snapshots.leave(&self.active[index].trail, computed, copies);
            }
            self.snapshots.pass(&mut self.active[index].trail, computed);
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
        self.counts.paused += 1;
        self.pause(sequence, true, writer)
    }

    /// Copies what a sequence has computed to pages that are not of the cache, if there are enough.
    fn put_aside(&mut self, sequence: &Sequence) -> Result<Option<Aside>> {
        let computed = sequence.computed;
        let pages = &sequence.pages[..sequence.kept.held(computed)];
        let before = self.prefixes.held_by_others(&sequence.path, pages);
        let pages = &pages[before..];
        if pages.is_empty() {
            return Ok(None);
        }
        let Some(aside) = self.pool.take_aside(pages.len()) else { return Ok(None) };
        let pairs: Vec<_> = pages.iter().copied().zip(aside.iter().copied()).collect();
        self.executor_mut().copy_pages(&pairs)?;
        Ok(Some(Aside { computed, before, pages: aside }))
    }

    /// Gives a sequence that begins with `pages` of its beginning what was put aside of it, or what another one left;
    /// gives how many positions it has then. What is missing is computed again.
    pub(super) fn bring_back(&mut self, aside: Aside, pages: &mut Vec<PageId>) -> Result<usize> {
        let Aside { computed, before, pages: mut copies } = aside;
        let taken = pages.len();
        // Where its beginning is gone what came after it is of no use; nor is what others have computed since.
        if before <= taken && computed > taken * PAGE_POSITIONS {
            copies.drain(..taken - before).for_each(|page| self.pool.release(page));
            let is_own = |pool: &PagePool| copies.iter().all(|&page| pool.is_alone(page));
            if !is_own(&self.pool) {
                self.give_up(copies.len());
            }
            if is_own(&self.pool) {
                pages.append(&mut copies);
                return Ok(computed);
            }
            if copies.len() <= self.pool.free() {
                let pairs: Vec<_> = copies.iter().map(|&copy| (copy, self.pool.take())).collect();
                self.executor_mut().copy_pages(&pairs)?;
                pages.extend(pairs.iter().map(|(_, page)| page));
                copies.into_iter().for_each(|page| self.pool.release(page));
                return Ok(computed);
            }
        }
        copies.into_iter().for_each(|page| self.pool.release(page));
        Ok(taken * PAGE_POSITIONS)
    }

    /// Puts a sequence back before the prompts that have not begun. What it has computed is kept where there is room,
    /// if `keeps` says so.
    pub(super) fn pause(&mut self, sequence: Sequence, keeps: bool, writer: &mut Writer) -> Result<()> {
        let aside = if keeps { self.put_aside(&sequence)? } else { None };
        self.release(&sequence);
        let Sequence { job, prompt, number, scored, sample, siblings, .. } = sequence;
        let mut samples: Vec<_> = sample.into_iter().chain(siblings).collect();
        for sample in &mut samples {
            journal_sample(writer, job, prompt, sample)?;
        }
        let shares = self.shares_beginnings();
        let state = &self.jobs[&job].prompts[prompt].prompt;
        let (path, mut trail) = enter((&mut self.prefixes, &mut self.snapshots), shares, state, scored);
        // It needs nobody else's.
        if aside.is_some() {
            self.snapshots.withdraw(&std::mem::take(&mut trail), &mut self.pool);
        }
        self.pending_tokens += state.tokens.len();
        let paused = Some(Paused { number, aside });
        self.pending.push_front(Begin { job, prompt, samples, scored, path, trail, paused });
        Ok(())
    }
}
