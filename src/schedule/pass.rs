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
    /// Streamed frames of the last block, of the layer that has most.
    streamed: HashSet<Frame>,
}

/// A page as one layer uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frame {
    /// Whether the frame is that of the layer at the same distance from the other end ([`Kept::place`]).
    pub mirrored: bool,
    /// The page.
    pub page: PageId,
}

impl Frame {
    /// The layer whose frame it is, for `layer` of `num_layers`.
    pub fn layer(self, layer: usize, num_layers: usize) -> usize {
        if self.mirrored { num_layers - 1 - layer } else { layer }
    }
}

/// A sequence's page `index`, as a layer that keeps `kept` of it uses it.
pub fn frame(pages: &[PageId], kept: Kept, index: usize) -> Frame {
    let (index, mirrored) = kept.place(index);
    Frame { mirrored, page: pages[index] }
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
        if count == 0 {
            return 0;
        }
        // The first layer needs the most.
        let first = kept.at(0, placement.num_layers);
        let needed = first.touches(&(range.start..range.start + count)).map(|index| frame(pages, kept, index));
        let streamed = |frame: &Frame| placement.page_tier(frame.page as usize) != placement.compute;
        let new: Vec<Frame> = needed.filter(streamed).filter(|frame| !self.streamed.contains(frame)).collect();
        if self.streamed.len() + new.len() > placement.policy.block_pages {
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
    /// The block in numbers; averages where layers differ.
    pub shape: BlockShape,
    /// What layers bring and put away: of every layer, or of all where they are alike.
    layers: Vec<Streamed>,
}

/// Frames of a block in a layer that live elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Streamed {
    /// In the order in which they lie in a slot.
    pub frames: Vec<Frame>,
    /// Which of them are brought from main memory, and from disk.
    pub loads: [Vec<usize>; 2],
    /// Which of them go back to main memory, and to disk.
    pub stores: [Vec<usize>; 2],
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
        for segment in segments {
            let (range, kept) = (segment.start..segment.start + segment.len, segment.kept);
            shape.keys += range.clone().map(|position| kept.keys(position) as u64).sum::<u64>();
            shape.pages += kept.touches(&range).count() as u64;
            shape.upkeep += kept.upkeep(&range);
        }
        let differ = segments.iter().any(|segment| segment.kept.depends_on_layer());
        let layers = if differ { placement.num_layers } else { 1 };
        let layers: Vec<_> = (0..layers).map(|layer| Streamed::new(segments, placement, layer)).collect();
        let mean = |count: &dyn Fn(&Streamed) -> usize| layers.iter().map(count).sum::<usize>().div_ceil(layers.len());
        let pages = |lists: &dyn Fn(&Streamed) -> &[Vec<usize>; 2]| Pages {
            cpu: mean(&|layer| lists(layer)[0].len()),
            disk: mean(&|layer| lists(layer)[1].len()),
        };
        (shape.loads, shape.stores) = (pages(&|layer| &layer.loads), pages(&|layer| &layer.stores));
        let relative = |segment: &Segment| Segment { first_row: segment.first_row - rows.start, ..segment.clone() };
        let segments = segments.iter().map(relative).collect();
        Block { rows, segments, shape, layers }
    }

    /// What a layer brings and puts away.
    pub fn streamed(&self, layer: usize) -> &Streamed {
        &self.layers[layer.min(self.layers.len() - 1)]
    }

    /// The block in numbers, layer by layer; none where they are alike.
    fn shapes(&self, num_layers: usize) -> impl Iterator<Item = BlockShape> {
        (0..num_layers).map(|layer| {
            let Streamed { loads, stores, .. } = self.streamed(layer);
            let pages = |lists: &[Vec<usize>; 2]| Pages { cpu: lists[0].len(), disk: lists[1].len() };
            BlockShape { loads: pages(loads), stores: pages(stores), ..self.shape }
        })
    }
}

/// The blocks of every layer in numbers; nothing where layers are alike.
pub fn layer_shapes(blocks: &[Block], num_layers: usize) -> Option<Vec<Vec<BlockShape>>> {
    blocks.iter().any(|block| block.layers.len() > 1).then(|| {
        let mut layers = vec![Vec::with_capacity(blocks.len()); num_layers];
        for block in blocks {
            layers.iter_mut().zip(block.shapes(num_layers)).for_each(|(layer, shape)| layer.push(shape));
        }
        layers
    })
}

impl Streamed {
    fn new(segments: &[Segment], placement: &Placement, layer: usize) -> Streamed {
        let (mut read, mut written, mut frames) = (HashSet::new(), HashSet::new(), Vec::new());
        for segment in segments {
            let range = segment.start..segment.start + segment.len;
            let kept = segment.kept.at(layer, placement.num_layers);
            let elsewhere = |frame: &Frame| placement.page_tier(frame.page as usize) != placement.compute;
            let frame = |index: usize| frame(&segment.pages, segment.kept, index);
            read.extend(kept.reads(&range).map(frame).filter(elsewhere));
            written.extend(kept.writes(&range).map(frame).filter(elsewhere));
            frames.extend(kept.touches(&range).map(frame).filter(elsewhere));
        }
        // Ascending pages lie together in files, and so do their frames.
        frames.sort_unstable();
        frames.dedup();
        let within = |set: &HashSet<Frame>, tier: Tier| -> Vec<usize> {
            let chosen =
                |(_, frame): &(usize, &Frame)| set.contains(frame) && placement.page_tier(frame.page as usize) == tier;
            frames.iter().enumerate().filter(chosen).map(|(index, _)| index).collect()
        };
        let loads = [within(&read, Tier::Cpu), within(&read, Tier::Disk)];
        let stores = [within(&written, Tier::Cpu), within(&written, Tier::Disk)];
        Streamed { frames, loads, stores }
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
