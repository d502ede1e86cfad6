//! What a pass carries: ragged token segments over all layers, in blocks.
//!
//! **Invariant:** the rows of a pass are its segments in order, packed without padding; a row is one position of one
//! sequence, and a block is some consecutive segments whose rows and streamed pages the device can hold at once.

use std::collections::HashSet;
use std::ops::Range;

use super::placement::Placement;
use super::shape::{BlockShape, Pages};
use crate::error::Tier;
use crate::kv::pages::{PageId, Segment};
use crate::kv::policy::Kept;

/// One trip over all layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// The token of every row.
    pub tokens: Vec<u32>,
    /// The position of every row in its sequence.
    pub positions: Vec<u32>,
    /// The sequence length that position scaling goes by: the prompt's for its tokens, position + 1 after it.
    pub rope_lens: Vec<u32>,
    /// Which rows continue which sequence.
    pub segments: Vec<Segment>,
    /// Which segments are computed together.
    pub blocks: Vec<Range<usize>>,
    /// Streamed pages of the last block.
    streamed: HashSet<PageId>,
}

/// A sequence's next tokens, to be put into a pass.
pub struct Run<'a> {
    /// All tokens of the sequence so far.
    pub tokens: &'a [u32],
    /// Which of them to compute.
    pub range: Range<usize>,
    /// How many of the tokens are prompt.
    pub prompt_len: usize,
    /// The sequence's pages, covering `range`.
    pub pages: &'a [PageId],
    /// What of the sequence is kept.
    pub kept: Kept,
}

impl Pass {
    /// Forgets all rows, keeping the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.rope_lens.clear();
        self.segments.clear();
        self.blocks.clear();
        self.streamed.clear();
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Begins a block; a block that stays empty is none.
    pub fn open_block(&mut self) {
        self.streamed.clear();
        let end = self.segments.len();
        match self.blocks.last_mut() {
            Some(block) if block.start == block.end => {}
            _ => self.blocks.push(end..end),
        }
    }

    /// How many of the positions `range` of a sequence the last block can take. Pages that it makes the block bring
    /// count as taken.
    pub fn room(&mut self, placement: &Placement, (pages, kept): (&[PageId], Kept), range: Range<usize>) -> usize {
        let taken = self.blocks.last().map_or(0, |block| self.block_rows(block));
        let count = placement.policy.block_rows.saturating_sub(taken).min(range.len());
        let needed = kept.touches(&(range.start..range.start + count)).map(|index| pages[index]);
        let streamed = |page: &PageId| placement.page_tier(*page as usize) != placement.compute;
        let new: Vec<PageId> = needed.filter(streamed).filter(|page| !self.streamed.contains(page)).collect();
        if count == 0 || self.streamed.len() + new.len() > placement.policy.block_pages {
            return 0;
        }
        self.streamed.extend(new);
        count
    }

    fn block_rows(&self, block: &Range<usize>) -> usize {
        self.segments[block.clone()].iter().map(|segment| segment.len).sum()
    }

    /// Appends a segment to the last block; gives its first row.
    pub fn push(&mut self, run: &Run<'_>) -> usize {
        let first_row = self.rows();
        assert!(!run.range.is_empty() && run.range.end <= run.tokens.len());
        for position in run.range.clone() {
            let generated = position >= run.prompt_len;
            self.tokens.push(run.tokens[position]);
            self.positions.push(position as u32);
            self.rope_lens.push(if generated { position + 1 } else { run.prompt_len } as u32);
        }
        self.segments.push(Segment {
            first_row,
            len: run.range.len(),
            start: run.range.start,
            pages: run.pages.to_vec(),
            kept: run.kept,
        });
        let end = self.segments.len();
        match self.blocks.last_mut() {
            Some(block) => block.end = end,
            None => self.blocks.push(0..end),
        }
        first_row
    }
}

/// A block with its pages in order.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its rows among the pass's.
    pub rows: Range<usize>,
    /// Its segments; rows count within the block, pages over the whole cache.
    pub segments: Vec<Segment>,
    /// Pages that live elsewhere, in the order of their frames in a slot.
    pub streamed: Vec<PageId>,
    /// Which of them are brought from main memory, and from disk.
    pub loads: [Vec<usize>; 2],
    /// Which of them go back to main memory, and to disk.
    pub stores: [Vec<usize>; 2],
    /// The block in numbers.
    pub shape: BlockShape,
}

impl Block {
    /// The blocks of a pass. `outputs` are the rows that are asked for logits, ascending.
    pub fn of(pass: &Pass, placement: &Placement, outputs: &[usize]) -> Vec<Block> {
        let blocks = pass.blocks.iter().filter(|block| !block.is_empty());
        blocks.map(|block| Block::new(&pass.segments[block.clone()], placement, outputs)).collect()
    }

    fn new(segments: &[Segment], placement: &Placement, outputs: &[usize]) -> Block {
        let last = &segments[segments.len() - 1];
        let rows = segments[0].first_row..last.first_row + last.len;
        let count = |row: usize| outputs.partition_point(|&output| output < row);
        let mut shape = BlockShape {
            rows: rows.len(),
            segments: segments.len(),
            outputs: count(rows.end) - count(rows.start),
            ..BlockShape::default()
        };
        let (mut read, mut written, mut all) = (HashSet::new(), HashSet::new(), Vec::new());
        for segment in segments {
            let (range, kept) = (segment.start..segment.start + segment.len, segment.kept);
            shape.keys += range.clone().map(|position| kept.keys(position) as u64).sum::<u64>();
            shape.pages += kept.touches(&range).count() as u64;
            let elsewhere = |page: &PageId| placement.page_tier(*page as usize) != placement.compute;
            let page = |index: usize| segment.pages[index];
            read.extend(kept.reads(&range).map(page).filter(elsewhere));
            written.extend(kept.writes(&range).map(page).filter(elsewhere));
            all.extend(kept.touches(&range).map(page).filter(elsewhere));
        }
        // Ascending pages lie together in files, and so do their frames.
        all.sort_unstable();
        all.dedup();
        let within = |set: &HashSet<PageId>, tier: Tier| -> Vec<usize> {
            let chosen =
                |(_, page): &(usize, &PageId)| set.contains(page) && placement.page_tier(**page as usize) == tier;
            all.iter().enumerate().filter(chosen).map(|(index, _)| index).collect()
        };
        let loads = [within(&read, Tier::Cpu), within(&read, Tier::Disk)];
        let stores = [within(&written, Tier::Cpu), within(&written, Tier::Disk)];
        shape.loads = Pages { cpu: loads[0].len(), disk: loads[1].len() };
        shape.stores = Pages { cpu: stores[0].len(), disk: stores[1].len() };
        let relative = |segment: &Segment| Segment { first_row: segment.first_row - rows.start, ..segment.clone() };
        let segments = segments.iter().map(relative).collect();
        Block { rows, segments, streamed: all, loads, stores, shape }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_rows_go_by_the_prompts_length_and_generated_rows_by_their_own() {
        let mut pass = Pass::default();
        let tokens = [5, 6, 7, 8, 9];
        let run = Run { tokens: &tokens, range: 1..5, prompt_len: 3, pages: &[0], kept: Kept::All };
        assert_eq!(pass.push(&run), 0);
        assert_eq!(pass.positions, [1, 2, 3, 4]);
        assert_eq!(pass.rope_lens, [3, 3, 4, 5]);
        assert_eq!(pass.push(&Run { range: 0..1, ..run }), 4);
        assert_eq!(pass.blocks.first(), Some(&(0..2)));
    }
}
