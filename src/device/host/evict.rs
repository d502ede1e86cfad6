//! Sequences that evict by attention: heavy hitters (H2O, arXiv 2306.14048), per KV head.
//!
//! A head of a sequence goes through its positions in stretches ([`Kept::stretch_end`]): the stretch's keys are stored
//! in the next free slots, its queries attend to all slots up to their own key, every key adds up what it receives, and
//! at the end of the stretch what is too much is evicted: never one of the latest positions, of the others those that
//! received least, the older of equals. Keys that stay in slots beyond the capacity move to those that became free.
//! That is done for a page's worth of keys at a time, as cards have room for, so slots are the same everywhere.
//!
//! Heads that share their slots ([`Spread::Heads`]) go through a stretch side by side and evict together. The 64 slots
//! that a page has for a head may then be any head's: notes say whose.
//!
//! **Invariant:** which key lies in which slot follows from the sequence's own rows and lengths; a page's notes say
//! which position every taken slot holds, and what it has received.

use rayon::prelude::*;

use super::attention::{Block, Call, QUERY_BLOCK, Query, Tile};
use super::cache::{key_and_value, put_slot, store_slot, take_slot};
use super::isa::Isa;
use super::shared::SharedMut;
use crate::kv::layout::{Owner, PAGE_POSITIONS, POSITION_BITS, pages_for};
use crate::kv::pages::{PageId, Segment};
use crate::kv::policy::{Kept, Spread};

/// One head's 64 slots of a page.
#[derive(Clone, Copy)]
struct Part {
    page: PageId,
    /// Whose they are where heads do not share.
    head: usize,
}

/// One KV head of a sequence's cache.
struct Head<'a> {
    call: &'a Call<'a>,
    parts: Vec<Part>,
    head: usize,
}

/// What is known of a key.
struct Note {
    slot: usize,
    position: u32,
    score: f32,
}

/// Positions of a segment between two evictions.
struct Stretch {
    first_position: usize,
    first_row: usize,
    len: usize,
}

/// The stretches of a segment, and whether an eviction follows.
fn stretches(segment: &Segment) -> impl Iterator<Item = (Stretch, bool)> {
    let end = segment.start + segment.len;
    let mut position = segment.start;
    std::iter::from_fn(move || {
        if position == end {
            return None;
        }
        let stretch_end = segment.kept.stretch_end(position);
        let stop = stretch_end.min(end);
        let first_row = segment.first_row + position - segment.start;
        let stretch = Stretch { first_position: position, first_row, len: stop - position };
        position = stop;
        Some((stretch, stop == stretch_end))
    })
}

/// All rows of a segment, for one KV head.
pub fn run(isa: Isa, call: &Call<'_>, segment: &Segment, kv_head: usize, out: &SharedMut<'_, f32>) {
    let Kept::Heavy { heavy, recent, .. } = segment.kept else { unreachable!("others evict nothing here") };
    let parts = segment.pages.iter().map(|&page| Part { page, head: kv_head }).collect();
    let head = Head { call, parts, head: kv_head };
    for (stretch, evicts) in stretches(segment) {
        let taken = segment.kept.slots(stretch.first_position);
        head.pass(isa, taken, &stretch, out);
        let (mut count, stop) = (taken + stretch.len, stretch.first_position + stretch.len);
        while evicts && count > heavy + recent {
            let left = (heavy + recent).max(count.saturating_sub(PAGE_POSITIONS));
            head.evict(count, left, stop - recent.min(stop));
            count = left;
        }
    }
}

/// All rows of a segment whose KV heads share their slots.
pub fn run_together(isa: Isa, call: &Call<'_>, segment: &Segment, out: &SharedMut<'_, f32>) {
    let Kept::Heavy { heavy, recent, spread: Spread::Heads { least }, .. } = segment.kept else {
        unreachable!("other heads go alone")
    };
    let mut heads = Heads::open(call, segment);
    let capacity = heads.heads.len() * (heavy + recent);
    for (stretch, evicts) in stretches(segment) {
        heads.make_room(stretch.len);
        heads.heads.par_iter().zip(&heads.taken).for_each(|(head, &taken)| head.pass(isa, taken, &stretch, out));
        heads.taken.iter_mut().for_each(|taken| *taken += stretch.len);
        let (count, stop) = (heads.taken.iter().sum::<usize>(), stretch.first_position + stretch.len);
        if evicts && count > capacity {
            heads.evict(count - capacity, stop - recent.min(stop), least);
        }
    }
    heads.close();
}

/// All KV heads of a sequence's cache.
struct Heads<'a> {
    heads: Vec<Head<'a>>,
    /// Slots that each has taken.
    taken: Vec<usize>,
    /// Parts that are nobody's.
    free: Vec<Part>,
}

impl<'a> Heads<'a> {
    /// Reads whose the parts are that the sequence had before the segment; those of new pages are nobody's.
    fn open(call: &'a Call<'a>, segment: &Segment) -> Self {
        let count = call.heads.num_kv_heads;
        let heads = (0..count).map(|head| Head { call, parts: Vec::new(), head }).collect();
        let mut all = Heads { heads, taken: vec![0; count], free: Vec::new() };
        let (before, now) = (segment.kept.pages(segment.start), segment.kept.pages(segment.start + segment.len));
        let mut owned: Vec<Vec<(u32, Part)>> = vec![Vec::new(); count];
        for (index, &page) in segment.pages[..now].iter().enumerate() {
            for head in 0..count {
                let part = Part { page, head };
                let Owner { head: owner, order, taken } =
                    Owner::read(all.heads[head].notes(all.heads[head].bytes(part)).0);
                match usize::from(owner).checked_sub(1) {
                    Some(owner) if index < before => {
                        owned[owner].push((order, part));
                        all.taken[owner] += usize::from(taken);
                    }
                    _ => all.free.push(part),
                }
            }
        }
        for (head, mut owned) in all.heads.iter_mut().zip(owned) {
            owned.sort_unstable_by_key(|(order, _)| *order);
            head.parts = owned.into_iter().map(|(_, part)| part).collect();
        }
        all
    }

    /// Gives every head the parts that it needs for `more` slots.
    fn make_room(&mut self, more: usize) {
        for (head, taken) in self.heads.iter_mut().zip(&self.taken) {
            while head.parts.len() < pages_for(taken + more) {
                head.parts.push(self.free.pop().expect("all heads together have as many parts as they can need"));
            }
        }
    }

    /// Removes `victims` keys in all from before `latest`, those that received least, the older of equals, but `least`
    /// of every head.
    fn evict(&mut self, victims: usize, latest: usize, least: usize) {
        let mut candidates: Vec<(usize, Note)> = Vec::new();
        for (index, (head, &taken)) in self.heads.iter().zip(&self.taken).enumerate() {
            let mut older = head.older(taken, latest);
            let may_go = older.len() - least.min(older.len());
            if may_go > 0 && may_go < older.len() {
                older.select_nth_unstable_by(may_go - 1, Note::order);
            }
            older.truncate(may_go);
            candidates.extend(older.into_iter().map(|note| (index, note)));
        }
        if victims < candidates.len() {
            candidates.select_nth_unstable_by(victims - 1, |a, b| a.1.order(&b.1).then(a.0.cmp(&b.0)));
        }
        let mut gone: Vec<Vec<usize>> = vec![Vec::new(); self.heads.len()];
        candidates[..victims].iter().for_each(|(head, note)| gone[*head].push(note.slot));
        for ((head, taken), gone) in self.heads.iter_mut().zip(&mut self.taken).zip(gone) {
            let count = std::mem::replace(taken, *taken - gone.len());
            head.remove(count, gone);
            self.free.extend(head.parts.drain(pages_for(*taken)..));
        }
    }

    /// Notes whose every part is.
    fn close(self) {
        let Heads { heads, taken, free } = self;
        for part in free {
            heads[0].owned(part, Owner::default());
        }
        for (head, taken) in heads.iter().zip(taken) {
            for (order, &part) in head.parts.iter().enumerate() {
                let taken = taken.saturating_sub(order * PAGE_POSITIONS).min(PAGE_POSITIONS) as u8;
                head.owned(part, Owner { head: head.head as u16 + 1, order: order as u32, taken });
            }
        }
    }
}

impl Note {
    /// What goes first.
    fn order(&self, other: &Note) -> std::cmp::Ordering {
        self.score.total_cmp(&other.score).then(self.position.cmp(&other.position))
    }
}

impl Head<'_> {
    /// The bytes of a part.
    #[allow(clippy::mut_from_ref)]
    fn bytes(&self, part: Part) -> &mut [u8] {
        // SAFETY: a part belongs to one head, which is one task, and pages of sequences that evict belong to one
        // sequence; callers here drop a part's bytes before they ask for it again.
        unsafe { self.call.frames.head_mut(part.page, part.head) }
    }

    /// The part that holds a slot.
    fn part(&self, slot: usize) -> (&mut [u8], usize) {
        (self.bytes(self.parts[slot / PAGE_POSITIONS]), slot % PAGE_POSITIONS)
    }

    /// Positions and scores of a part's slots.
    fn notes<'a>(&self, part: &'a mut [u8]) -> (&'a mut [u32], &'a mut [f32]) {
        let (positions, scores) = part[self.call.frames.layout.notes()].split_at_mut(4 * PAGE_POSITIONS);
        (bytemuck::cast_slice_mut(positions), bytemuck::cast_slice_mut(scores))
    }

    /// Notes whose a part is.
    fn owned(&self, part: Part, owner: Owner) {
        owner.write(self.notes(self.bytes(part)).0);
    }

    /// Stores the rows of a stretch behind the slots that are taken, and answers its queries.
    fn pass(&self, isa: Isa, taken: usize, stretch: &Stretch, out: &SharedMut<'_, f32>) {
        for i in 0..stretch.len {
            self.store(taken + i, stretch.first_row + i, stretch.first_position + i);
        }
        for first in (0..stretch.len).step_by(QUERY_BLOCK) {
            let queries = QUERY_BLOCK.min(stretch.len - first);
            self.attend(isa, taken + first, stretch.first_row + first, queries, out);
        }
    }

    /// Stores a row's key and value in a slot.
    fn store(&self, slot: usize, row: usize, position: usize) {
        let Call { frames, qkv, heads, .. } = self.call;
        let (part, within) = self.part(slot);
        let (key, value) = key_and_value(qkv, row, self.head, *heads);
        store_slot(&frames.layout, part, within, key, value);
        let (positions, scores) = self.notes(part);
        (positions[within], scores[within]) = (position as u32, 0.0);
    }

    /// Some queries, the first of which sees all slots up to `last`.
    fn attend(&self, isa: Isa, last: usize, first_row: usize, queries: usize, out: &SharedMut<'_, f32>) {
        let pages = pages_for(last + queries);
        let mut scores = vec![0f32; pages * PAGE_POSITIONS];
        for (&part, scores) in self.parts.iter().zip(scores.chunks_exact_mut(PAGE_POSITIONS)) {
            scores.copy_from_slice(self.notes(self.bytes(part)).1);
        }
        // SAFETY: as in `bytes`; nothing is written until the block is done.
        let keys = |part: Part| unsafe { self.call.frames.head(part.page, part.head) };
        let tile =
            |page: usize| Tile { start: page * PAGE_POSITIONS, page: keys(self.parts[page]), queries: 0..queries };
        let tiles: Vec<_> = (0..pages).map(tile).collect();
        isa.run(Block {
            call: self.call,
            tiles: &tiles,
            window: None,
            sinks: 0,
            kv_head: self.head,
            queries: &Query::consecutive(first_row, last, queries),
            out,
            scores: Some(&mut scores),
        });
        for (&part, scores) in self.parts.iter().zip(scores.chunks_exact(PAGE_POSITIONS)) {
            self.notes(self.bytes(part)).1.copy_from_slice(scores);
        }
    }

    /// Of `count` keys those from before `latest`.
    fn older(&self, count: usize, latest: usize) -> Vec<Note> {
        let mut older: Vec<Note> = Vec::with_capacity(count);
        for (page, &part) in self.parts[..pages_for(count)].iter().enumerate() {
            let (positions, scores) = self.notes(self.bytes(part));
            let first = page * PAGE_POSITIONS;
            let here = positions.iter().zip(scores).enumerate().take(count - first);
            let notes = here.map(|(within, (&position, &mut score))| Note {
                slot: first + within,
                position: position & POSITION_BITS,
                score,
            });
            older.extend(notes.filter(|note| (note.position as usize) < latest));
        }
        older
    }

    /// Of `count` keys leaves `capacity`, all from position `latest` on among them.
    fn evict(&self, count: usize, capacity: usize, latest: usize) {
        let mut older = self.older(count, latest);
        let victims = count - capacity;
        if victims < older.len() {
            older.select_nth_unstable_by(victims - 1, Note::order);
        }
        self.remove(count, older[..victims].iter().map(|note| note.slot).collect());
    }

    /// Of `count` slots frees those that are `gone`, and fills them with what lies beyond the number that stays.
    fn remove(&self, count: usize, mut gone: Vec<usize>) {
        let stay = count - gone.len();
        gone.sort_unstable();
        // Both in ascending order.
        let free = gone.iter().take_while(|&&slot| slot < stay);
        let moves = (stay..count).filter(|slot| gone.binary_search(slot).is_err());
        for (&to, from) in free.zip(moves) {
            self.shift(from, to);
        }
    }

    /// Moves a key, its value and what is noted of it to another slot.
    fn shift(&self, from: usize, to: usize) {
        let layout = &self.call.frames.layout;
        let (part, within) = self.part(from);
        let bits = take_slot(layout, part, within);
        let (positions, scores) = self.notes(part);
        let (position, score) = (positions[within], scores[within]);
        let (part, within) = self.part(to);
        put_slot(layout, part, within, &bits);
        let (positions, scores) = self.notes(part);
        (positions[within], scores[within]) = (position, score);
    }
}
