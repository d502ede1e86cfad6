//! Sequences that evict by attention: heavy hitters (H2O, arXiv 2306.14048), per KV head.
//!
//! A head of a sequence goes through its positions in stretches ([`Kept::stretch_end`]): the stretch's keys are stored
//! in the next free slots, its queries attend to all slots up to their own key, every key adds up what it receives, and
//! at the end of the stretch what is too much is evicted: never one of the latest positions, of the others those that
//! received least, the older of equals. Keys that stay in slots beyond the capacity move to those that became free.
//!
//! **Invariant:** which key lies in which slot follows from the sequence's own rows and lengths; a page's notes say
//! which position every taken slot holds, and what it has received.

use super::attention::{Block, Call, QUERY_BLOCK};
use super::cache::{key_and_value, put_slot, store_slot, take_slot};
use super::isa::Isa;
use super::shared::SharedMut;
use crate::kv::layout::{PAGE_POSITIONS, pages_for};
use crate::kv::pages::{PageId, Segment};
use crate::kv::policy::Kept;

/// One KV head of a sequence's cache.
struct Head<'a> {
    call: &'a Call<'a>,
    pages: &'a [PageId],
    head: usize,
}

/// What is known of a key.
struct Note {
    slot: usize,
    position: u32,
    score: f32,
}

/// All rows of a segment, for one KV head.
pub fn run(isa: Isa, call: &Call<'_>, segment: &Segment, kv_head: usize, out: &SharedMut<'_, f32>) {
    let Kept::Heavy { heavy, recent, .. } = segment.kept else { unreachable!("others evict nothing here") };
    let head = Head { call, pages: &segment.pages, head: kv_head };
    let end = segment.start + segment.len;
    let mut position = segment.start;
    while position < end {
        let taken = segment.kept.slots(position);
        let stretch_end = segment.kept.stretch_end(position);
        let stop = stretch_end.min(end);
        let first_row = segment.first_row + position - segment.start;
        for i in 0..stop - position {
            head.store(taken + i, first_row + i, position + i);
        }
        for first in (0..stop - position).step_by(QUERY_BLOCK) {
            let queries = QUERY_BLOCK.min(stop - position - first);
            head.attend(isa, taken + first, first_row + first, queries, out);
        }
        let count = taken + stop - position;
        if stop == stretch_end && count > heavy + recent {
            head.evict(count, heavy + recent, stop - recent.min(stop));
        }
        position = stop;
    }
}

impl Head<'_> {
    /// The head's part of a page.
    #[allow(clippy::mut_from_ref)]
    fn part(&self, page: usize) -> &mut [u8] {
        // SAFETY: a head of a sequence is one task, and pages of sequences that evict belong to one sequence; callers
        // here drop a page's part before they ask for it again.
        unsafe { self.call.frames.head_mut(self.pages[page], self.head) }
    }

    /// Positions and scores of a page's slots.
    fn notes<'a>(&self, part: &'a mut [u8]) -> (&'a mut [u32], &'a mut [f32]) {
        let (positions, scores) = part[self.call.frames.layout.notes()].split_at_mut(4 * PAGE_POSITIONS);
        (bytemuck::cast_slice_mut(positions), bytemuck::cast_slice_mut(scores))
    }

    /// Stores a row's key and value in a slot.
    fn store(&self, slot: usize, row: usize, position: usize) {
        let Call { frames, qkv, heads, .. } = self.call;
        let (part, within) = (self.part(slot / PAGE_POSITIONS), slot % PAGE_POSITIONS);
        let (key, value) = key_and_value(qkv, row, self.head, *heads);
        store_slot(&frames.layout, part, within, key, value);
        let (positions, scores) = self.notes(part);
        (positions[within], scores[within]) = (position as u32, 0.0);
    }

    /// Some queries, the first of which sees all slots up to `last`.
    fn attend(&self, isa: Isa, last: usize, first_row: usize, queries: usize, out: &SharedMut<'_, f32>) {
        let pages = pages_for(last + queries);
        let mut scores = vec![0f32; pages * PAGE_POSITIONS];
        for (page, scores) in scores.chunks_exact_mut(PAGE_POSITIONS).enumerate() {
            scores.copy_from_slice(self.notes(self.part(page)).1);
        }
        // SAFETY: as in `part`; nothing is written until the block is done.
        let part = |page: usize| unsafe { self.call.frames.head(self.pages[page], self.head) };
        let tiles: Vec<_> = (0..pages).map(|page| (page * PAGE_POSITIONS, part(page))).collect();
        isa.run(Block {
            call: self.call,
            tiles: &tiles,
            window: None,
            sinks: 0,
            kv_head: self.head,
            first_row,
            first_position: last,
            queries,
            out,
            scores: Some(&mut scores),
        });
        for (page, scores) in scores.chunks_exact(PAGE_POSITIONS).enumerate() {
            self.notes(self.part(page)).1.copy_from_slice(scores);
        }
    }

    /// Of `count` keys leaves `capacity`, all from position `latest` on among them.
    fn evict(&self, count: usize, capacity: usize, latest: usize) {
        let mut older: Vec<Note> = Vec::with_capacity(count);
        for page in 0..pages_for(count) {
            let (positions, scores) = self.notes(self.part(page));
            let first = page * PAGE_POSITIONS;
            let here = positions.iter().zip(scores).enumerate().take(count - first);
            let notes = here.map(|(within, (&position, &mut score))| Note { slot: first + within, position, score });
            older.extend(notes.filter(|note| (note.position as usize) < latest));
        }
        let order = |a: &Note, b: &Note| a.score.total_cmp(&b.score).then(a.position.cmp(&b.position));
        let victims = count - capacity;
        if victims < older.len() {
            older.select_nth_unstable_by(victims - 1, order);
        }
        let mut gone: Vec<usize> = older[..victims].iter().map(|note| note.slot).collect();
        gone.sort_unstable();
        // What stays beyond the capacity moves to the slots that became free, both in ascending order.
        let free = gone.iter().take_while(|&&slot| slot < capacity);
        let moves = (capacity..count).filter(|slot| gone.binary_search(slot).is_err());
        for (&to, from) in free.zip(moves) {
            self.shift(from, to);
        }
    }

    /// Moves a key, its value and what is noted of it to another slot.
    fn shift(&self, from: usize, to: usize) {
        let layout = &self.call.frames.layout;
        let (part, within) = (self.part(from / PAGE_POSITIONS), from % PAGE_POSITIONS);
        let bits = take_slot(layout, part, within);
        let (positions, scores) = self.notes(part);
        let (position, score) = (positions[within], scores[within]);
        let (part, within) = (self.part(to / PAGE_POSITIONS), to % PAGE_POSITIONS);
        put_slot(layout, part, within, &bits);
        let (positions, scores) = self.notes(part);
        (positions[within], scores[within]) = (position, score);
    }
}
