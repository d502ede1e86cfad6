//! Attention over pages: one tile of 64 keys at a time, folded in order from position 0.
//!
//! For each tile j: `s = scale * q k^T`, `m_j = max s`, `p = exp(s - m_j)`, `l_j = sum p`, `o_j = p v`; the running
//! (m, l, o) takes the tile in with the usual rescaling (online softmax, Milakov and Gimelshein 2018).
//!
//! Where the middle of a sequence is gone, queries are rotated for the positions at its beginning as if nothing were
//! missing between (StreamingLLM, arXiv 2309.17453): rotation composes, so keys stay as they were stored.
//!
//! **Invariant:** tiles lie at absolute positions (or at slots that follow from them) and each is reduced on its own
//! before it is folded in, so a query's result depends on its position and on the stored keys and values alone: not on
//! chunks, on the queries computed beside it, or on who shares the pages.
//!
//! Limit: 4 * head_dim operations per query head and key at the multiply-add rate; each page is read once per
//! group of query heads and block of queries.

use rayon::prelude::*;

use super::cache::{widen_keys, widen_values};
use super::gemm::{Strided, Tile, register_rows};
use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold, greatest};
use super::rows::rotate_head;
use super::shared::SharedMut;
use super::{HostFrames, evict, math};
use crate::device::{AttentionSpan, Heads, Rotation};
use crate::kv::layout::{PAGE_POSITIONS, pages_for};
use crate::kv::pages::Segment;
use crate::kv::policy::{Kept, Spread};

/// Queries of one task: bounds its scratch and leaves several tasks per head of a long chunk.
pub const QUERY_BLOCK: usize = 32;

/// What all tasks of a call share.
pub struct Call<'a> {
    /// Keys and values.
    pub frames: &'a HostFrames<'a>,
    /// Which keys a query sees.
    pub span: AttentionSpan<'a>,
    /// Rows of queries, keys and values.
    pub qkv: &'a [f32],
    /// Their heads.
    pub heads: Heads,
}

/// Some work of a call.
enum Task<'a> {
    /// A head's queries of a segment, from this one on.
    Block(&'a Segment, usize, usize),
    /// A whole head of a segment that evicts by attention.
    Evicting(&'a Segment, usize),
    /// All heads of a segment that evict together.
    EvictingTogether(&'a Segment),
}

/// Attention of every segment's queries; `out` is (rows, num_heads * head_dim).
pub fn attend(isa: Isa, call: &Call<'_>, segments: &[Segment], out: &mut [f32]) {
    let out = SharedMut::new(out);
    let heads = || 0..call.heads.num_kv_heads;
    let tasks = segments.iter().flat_map(|segment| -> Vec<Task<'_>> {
        match segment.kept {
            Kept::Heavy { spread: Spread::Heads { .. }, .. } => vec![Task::EvictingTogether(segment)],
            Kept::Heavy { .. } => heads().map(|head| Task::Evicting(segment, head)).collect(),
            Kept::All | Kept::Window { .. } => {
                let blocks = (0..segment.len).step_by(QUERY_BLOCK);
                blocks.flat_map(|block| heads().map(move |head| Task::Block(segment, block, head))).collect()
            }
        }
    });
    let tasks: Vec<Task<'_>> = tasks.collect();
    tasks.into_par_iter().for_each(|task| match task {
        Task::Evicting(segment, head) => evict::run(isa, call, segment, head, &out),
        Task::EvictingTogether(segment) => evict::run_together(isa, call, segment, &out),
        Task::Block(segment, first, kv_head) => {
            let queries = QUERY_BLOCK.min(segment.len - first);
            let first_position = segment.start + first;
            let (window, sinks) = match (call.span.window, segment.kept) {
                (window, Kept::Window { start, recent }) => {
                    // A layer with a window of its own that is narrower counts positions within the cache too.
                    let sinks = if window.is_none_or(|window| window >= start + recent) { start } else { 0 };
                    (Some(window.map_or(recent, |window| window.min(recent))), sinks)
                }
                (window, _) => (window, 0),
            };
            let oldest = window.map_or(0, |window| (first_position + 1).saturating_sub(window)) / PAGE_POSITIONS;
            let last = (first_position + queries - 1) / PAGE_POSITIONS;
            let tile = |tile: usize| {
                let page = segment.pages[segment.kept.page(tile)];
                // SAFETY: what is read was written before the call; nobody writes while queries of it are answered.
                (tile * PAGE_POSITIONS, unsafe { call.frames.head(page, kv_head) })
            };
            let tiles: Vec<_> = (0..pages_for(sinks).min(oldest)).chain(oldest..=last).map(tile).collect();
            let first_row = segment.first_row + first;
            isa.run(Block {
                call,
                tiles: &tiles,
                window,
                sinks,
                kv_head,
                first_row,
                first_position,
                queries,
                out: &out,
                scores: None,
            });
        }
    });
}

/// The query heads of one KV head, over some consecutive queries of a segment. Row `t * group + g` of its
/// matrices is query t, head g of the group.
pub struct Block<'a> {
    /// What it is a part of.
    pub call: &'a Call<'a>,
    /// The head's part of every page that is read, and the position of its first key.
    pub tiles: &'a [(usize, &'a [u8])],
    /// Keys k > q - window only, and the first ones.
    pub window: Option<usize>,
    /// How many of the first keys are seen wherever the window is.
    pub sinks: usize,
    /// Which KV head.
    pub kv_head: usize,
    /// The row of the first query.
    pub first_row: usize,
    /// Its position, in the count of the tiles.
    pub first_position: usize,
    /// How many queries.
    pub queries: usize,
    /// Where results go.
    pub out: &'a SharedMut<'a, f32>,
    /// What the keys of all tiles have received so far; the queries' shares are added one query after the other.
    pub scores: Option<&'a mut [f32]>,
}

/// The keys of a tile that a query sees.
#[derive(Clone, Copy)]
struct Visible {
    /// The first ones.
    sinks: usize,
    /// Those of the window.
    low: usize,
    high: usize,
}

impl Visible {
    fn contains(&self, key: usize) -> bool {
        key < self.sinks || (self.low..self.high).contains(&key)
    }

    fn is_whole(&self) -> bool {
        self.low <= self.sinks && self.high == PAGE_POSITIONS
    }

    fn is_empty(&self) -> bool {
        self.sinks == 0 && self.low >= self.high
    }
}

/// The running state of a block's rows, and room for one tile.
struct State {
    /// Queries, groups of register rows by (head_dim, rows).
    queries: Vec<f32>,
    /// Greatest score so far.
    max: Vec<f32>,
    /// Sum of exponentials so far.
    sum: Vec<f32>,
    /// Unnormalised outputs, (rows, padded head_dim).
    output: Vec<f32>,
    /// One tile's scores, then probabilities, (rows, 64).
    scores: Vec<f32>,
    /// One tile's outputs, (rows, padded head_dim).
    tile: Vec<f32>,
    /// One tile's greatest scores.
    tile_max: Vec<f32>,
    /// One tile's sums of exponentials.
    tile_sum: Vec<f32>,
    /// One page's keys or values in f32.
    widened: Vec<f32>,
    /// Queries as they meet the first keys, like the others; and their scores.
    sink_queries: Vec<f32>,
    sink_scores: Vec<f32>,
    /// Scores and greatest scores of all tiles, where keys are scored.
    all_scores: Vec<f32>,
    all_max: Vec<f32>,
}

impl Block<'_> {
    fn group(&self) -> usize {
        self.call.heads.num_heads / self.call.heads.num_kv_heads
    }

    fn rows(&self) -> usize {
        self.queries * self.group()
    }

    fn padded_dim(&self) -> usize {
        self.call.heads.head_dim.next_multiple_of(LANES)
    }

    /// The position of a row's query.
    fn position(&self, row: usize) -> usize {
        self.first_position + row / self.group()
    }

    /// The keys that a row sees within the tile that starts at `start`, relative to it.
    fn visible(&self, row: usize, start: usize) -> Visible {
        let position = self.position(row);
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let low = first.saturating_sub(start).min(PAGE_POSITIONS);
        let high = (position + 1).saturating_sub(start).min(PAGE_POSITIONS);
        Visible { sinks: self.sinks.saturating_sub(start).min(high), low, high: high.max(low) }
    }

    /// Queries packed for products; `sinks` as they meet the first keys.
    fn queries(&self, tile_rows: usize, sinks: Option<&Rotation<'_>>) -> Vec<f32> {
        let (rows, heads) = (self.rows(), self.call.heads);
        let head_dim = heads.head_dim;
        let mut queries = vec![0f32; rows * head_dim];
        for row in 0..rows {
            let (group, within) = (row / tile_rows, row % tile_rows);
            let count = tile_rows.min(rows - group * tile_rows);
            let head = self.kv_head * self.group() + row % self.group();
            let index = self.first_row + row / self.group();
            let from = &self.call.qkv[index * heads.qkv_width() + head * head_dim..][..head_dim];
            let mut turned;
            let from = match sinks {
                None => from,
                Some(rotation) => {
                    turned = from.to_vec();
                    rotate_head(&mut turned, index, rotation);
                    &turned
                }
            };
            for (dim, value) in from.iter().enumerate() {
                queries[group * tile_rows * head_dim + dim * count + within] = *value;
            }
        }
        queries
    }

    fn state(&self, tile_rows: usize) -> State {
        let (rows, padded) = (self.rows(), self.padded_dim());
        let sinks = self.call.span.sinks.filter(|_| self.sinks > 0);
        let scored = if self.scores.is_some() { rows * self.tiles.len() } else { 0 };
        State {
            queries: self.queries(tile_rows, None),
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            output: vec![0.0; rows * padded],
            scores: vec![0.0; rows * PAGE_POSITIONS],
            tile: vec![0.0; rows * padded],
            tile_max: vec![0.0; rows],
            tile_sum: vec![0.0; rows],
            widened: vec![0.0; PAGE_POSITIONS * padded],
            sink_queries: sinks.map_or(Vec::new(), |rotation| self.queries(tile_rows, Some(rotation))),
            sink_scores: vec![0.0; if sinks.is_some() { rows * PAGE_POSITIONS } else { 0 }],
            all_scores: Vec::with_capacity(scored * PAGE_POSITIONS),
            all_max: Vec::with_capacity(scored),
        }
    }
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(mut self) {
        let mut state = self.state(R::ROWS);
        for tile in self.tiles {
            // SAFETY: the instruction set is the caller's.
            unsafe { self.tile::<V, R>(*tile, &mut state) };
        }
        self.finish(&state);
        if let Some(scores) = self.scores.take() {
            // SAFETY: the instruction set is the caller's.
            unsafe { self.score::<V>(&state, scores) };
        }
    }
}

impl Block<'_> {
    /// Scores, probabilities and outputs of one tile, folded into the running state.
    #[inline(always)]
    unsafe fn tile<V: Lanes, R: Registers>(&self, (start, page): (usize, &[u8]), state: &mut State) {
        let layout = &self.call.frames.layout;
        let (rows, head_dim, padded) = (self.rows(), self.call.heads.head_dim, self.padded_dim());
        // The last row sees the most recent keys, the first row the oldest.
        let high = self.visible(rows - 1, start).high;
        let sinks = self.sinks.saturating_sub(start).min(PAGE_POSITIONS);
        let low = if sinks > 0 { 0 } else { self.visible(0, start).low };
        // SAFETY: the buffers have the extents named in `State`; the instruction set is the caller's.
        unsafe {
            let keys = &mut state.widened[..PAGE_POSITIONS * head_dim];
            widen_keys::<V>(page, layout, keys);
            for group in 0..high.div_ceil(LANES) {
                let keys = keys[group * head_dim * LANES..].as_ptr();
                let scores = &mut state.scores[group * LANES..];
                product::<V, R>(&state.queries, rows, head_dim, keys, scores, PAGE_POSITIONS);
                if group * LANES < sinks && !state.sink_queries.is_empty() {
                    let scores = &mut state.sink_scores[group * LANES..];
                    product::<V, R>(&state.sink_queries, rows, head_dim, keys, scores, PAGE_POSITIONS);
                }
            }
            for row in 0..rows {
                let visible = self.visible(row, start);
                let scores = &mut state.scores[row * PAGE_POSITIONS..][..PAGE_POSITIONS];
                if !state.sink_queries.is_empty() {
                    let first = &state.sink_scores[row * PAGE_POSITIONS..][..visible.sinks];
                    scores[..visible.sinks].copy_from_slice(first);
                }
                (state.tile_max[row], state.tile_sum[row]) = exponentials::<V>(scores, visible, self.call.span.scale);
            }
            let values = &mut state.widened[..PAGE_POSITIONS * padded];
            widen_values::<V>(page, layout, values);
            for group in 0..padded / LANES {
                let values = values[(group * PAGE_POSITIONS + low) * LANES..].as_ptr();
                let tile = &mut state.tile[group * LANES..];
                weighted::<V, R>(&state.scores, rows, low..high, values, tile, padded);
            }
            for row in 0..rows {
                if !self.visible(row, start).is_empty() {
                    state.fold::<V>(row, padded);
                }
            }
        }
        if self.scores.is_some() {
            state.all_scores.extend_from_slice(&state.scores);
            state.all_max.extend_from_slice(&state.tile_max);
        }
    }

    /// Adds to every key what it receives of each query: its probabilities after the final softmax, summed over the
    /// query heads of the group.
    #[inline(always)]
    unsafe fn score<V: Lanes>(&self, state: &State, scores: &mut [f32]) {
        let (rows, group) = (self.rows(), self.group());
        for first in (0..rows).step_by(group) {
            for (tile, scores) in scores.chunks_exact_mut(PAGE_POSITIONS).enumerate().take(self.tiles.len()) {
                // SAFETY: there are 64 scores of every row and tile; the instruction set is the caller's.
                unsafe {
                    let mut sums = [V::splat(0.0); PAGE_POSITIONS / LANES];
                    for row in first..first + group {
                        let max = state.all_max[tile * rows + row];
                        // Of this tile the query sees nothing.
                        if max == f32::NEG_INFINITY {
                            continue;
                        }
                        let share = math::exp(V::splat(max - state.max[row])).mul(V::splat(1.0 / state.sum[row]));
                        let from = state.all_scores.as_ptr().add((tile * rows + row) * PAGE_POSITIONS);
                        for (lane, sum) in sums.iter_mut().enumerate() {
                            *sum = V::load(from.add(lane * LANES)).fma(share, *sum);
                        }
                    }
                    for (lane, sum) in sums.into_iter().enumerate() {
                        let at = scores.as_mut_ptr().add(lane * LANES);
                        V::load(at).add(sum).store(at);
                    }
                }
            }
        }
    }

    /// Divides by the sums and writes the rows out.
    fn finish(&self, state: &State) {
        let head_dim = self.call.heads.head_dim;
        for row in 0..self.rows() {
            let head = self.kv_head * self.group() + row % self.group();
            let to = (self.first_row + row / self.group()) * self.call.heads.query_width() + head * head_dim;
            // SAFETY: each (row, head) belongs to one block alone.
            let to = unsafe { self.out.slice(to, head_dim) };
            let scale = 1.0 / state.sum[row];
            for (to, from) in to.iter_mut().zip(&state.output[row * self.padded_dim()..]) {
                *to = from * scale;
            }
        }
    }
}

impl State {
    /// Takes a row's tile into its running state.
    #[inline(always)]
    unsafe fn fold<V: Lanes>(&mut self, row: usize, padded: usize) {
        let max = self.max[row].max(self.tile_max[row]);
        // SAFETY: the instruction set is the caller's; rows are `padded` elements, a multiple of 16.
        unsafe {
            let old = math::exp(V::splat(self.max[row] - max));
            let new = math::exp(V::splat(self.tile_max[row] - max));
            // The first tile finds nothing: its predecessor's weight is exactly zero, not exp of a clamped -inf.
            let old = if self.max[row] == f32::NEG_INFINITY { V::splat(0.0) } else { old };
            let sum = V::splat(self.sum[row]).mul(old);
            self.sum[row] = V::splat(self.tile_sum[row]).fma(new, sum).to_array()[0];
            for i in (row * padded..(row + 1) * padded).step_by(LANES) {
                let at = self.output.as_mut_ptr().add(i);
                V::load(self.tile.as_ptr().add(i)).fma(new, V::load(at).mul(old)).store(at);
            }
        }
        self.max[row] = max;
    }
}

/// Scales a row's visible scores and replaces them with `exp(s - max)`, the others with 0; gives max and sum.
#[inline(always)]
unsafe fn exponentials<V: Lanes>(scores: &mut [f32], visible: Visible, scale: f32) -> (f32, f32) {
    let whole = visible.is_whole();
    if whole {
        scores.iter_mut().for_each(|score| *score *= scale);
    } else {
        for (key, score) in scores.iter_mut().enumerate() {
            *score = if visible.contains(key) { *score * scale } else { f32::NEG_INFINITY };
        }
    }
    // SAFETY: `scores` holds 64 values; the instruction set is the caller's.
    unsafe {
        let at = scores.as_mut_ptr();
        let mut max = V::load(at);
        for i in (LANES..PAGE_POSITIONS).step_by(LANES) {
            max = max.max(V::load(at.add(i)));
        }
        let max = greatest(max.to_array());
        let mut sum = V::splat(0.0);
        for i in (0..PAGE_POSITIONS).step_by(LANES) {
            let p = math::exp(V::load(at.add(i)).sub(V::splat(max)));
            p.store(at.add(i));
        }
        if !whole {
            for (key, score) in scores.iter_mut().enumerate() {
                // A masked key counts for exactly nothing; exp clamps its argument.
                if !visible.contains(key) {
                    *score = 0.0;
                }
            }
        }
        for i in (0..PAGE_POSITIONS).step_by(LANES) {
            sum = sum.add(V::load(scores.as_ptr().add(i)));
        }
        (max, fold(sum.to_array()))
    }
}

/// `c[row] = sum over k of a[k, row] * b[k]` for 16 outputs; rows of `c` are `stride` apart and `a` is packed in groups
/// of rows, each (depth, rows).
///
/// # Safety
/// `b` points to `depth` vectors of 16; `V`'s instruction set exists.
#[inline(always)]
unsafe fn product<V: Lanes, R: Registers>(
    a: &[f32],
    rows: usize,
    depth: usize,
    b: *const f32,
    c: &mut [f32],
    stride: usize,
) {
    assert!(c.len() >= (rows - 1) * stride + LANES && a.len() >= rows * depth);
    let start = [0f32; 2 * LANES];
    for first in (0..rows).step_by(R::ROWS) {
        let count = R::ROWS.min(rows - first);
        let group = &a[first * depth..];
        let mut row = 0;
        while row < count {
            let some = register_rows(count - row, R::ROWS);
            let a = Strided { start: group[row..].as_ptr(), stride: count };
            let tile = Tile::<1> { depth, a, b: [b], from_memory: false, start: &start, width: LANES };
            // SAFETY: `a` and `c` hold the rows (asserted above), `b` the terms by the caller's promise.
            unsafe { tile.run::<V, R>(some, c.as_mut_ptr().add((first + row) * stride), stride) };
            row += some;
        }
    }
}

/// `c[row] = sum over k in terms of a[row, k] * b[k]` for 16 outputs; rows of `a` have 64 elements, those of `c` are
/// `stride` apart.
///
/// # Safety
/// `b` points to `terms.len()` vectors of 16; `V`'s instruction set exists.
#[inline(always)]
unsafe fn weighted<V: Lanes, R: Registers>(
    a: &[f32],
    rows: usize,
    terms: std::ops::Range<usize>,
    b: *const f32,
    c: &mut [f32],
    stride: usize,
) {
    assert!(c.len() >= (rows - 1) * stride + LANES && a.len() >= rows * PAGE_POSITIONS);
    assert!(terms.end <= PAGE_POSITIONS);
    let start = [0f32; 2 * LANES];
    let mut row = 0;
    while row < rows {
        let some = register_rows(rows - row, R::ROWS);
        let a = Strided { start: a[row * PAGE_POSITIONS + terms.start..].as_ptr(), stride: 1 };
        let (depth, b) = (terms.len(), [b]);
        let tile = Tile::<1, PAGE_POSITIONS> { depth, a, b, from_memory: false, start: &start, width: LANES };
        // SAFETY: `a` and `c` hold the rows (asserted above), `b` the terms by the caller's promise.
        unsafe { tile.run::<V, R>(some, c.as_mut_ptr().add(row * stride), stride) };
        row += some;
    }
}
