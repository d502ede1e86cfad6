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
//! Single queries of sequences that begin alike go through the pages that they share together, however their ways part
//! later: one product for all of them.
//!
//! Limit: 4 * head_dim operations per query head and key at the multiply-add rate; each page is read and widened once
//! per group of query heads and block of queries. Rows go through a tile some at a time, so that their scores stay in
//! the first cache.

use std::ops::Range;

use rayon::prelude::*;

use super::cache::{widen_keys, widen_values};
use super::isa::{Isa, Kernel, Registers, prefetch};
use super::lanes::{LANES, Lanes};
use super::rows::rotate_head;
use super::shared::SharedMut;
use super::tiles::{Left, Right, Sums, multiply};
use super::{HostFrames, evict, math};
use crate::device::{AttentionSpan, Heads, Rotation};
use crate::kv::layout::{PAGE_POSITIONS, pages_for};
use crate::kv::pages::{PageId, Segment};
use crate::kv::policy::{Kept, Spread};
use crate::model::dtype::DType;

/// Queries of one task: bounds its scratch and leaves several tasks per head of a long chunk.
pub const QUERY_BLOCK: usize = 32;

/// Tasks that are left for every thread where queries could go together in fewer.
const TASKS_PER_THREAD: usize = 4;

/// Bytes of the next page that are asked for while a page is computed: all of small elements; with large ones the
/// processor sees for itself, once it has begun, what will be read.
const AHEAD_BYTES: usize = 10 << 10;

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

impl Call<'_> {
    /// One head's part of a page whose keys and values are stored.
    fn part(&self, page: PageId, head: usize) -> &[u8] {
        // SAFETY: what is read was written before the call; nobody writes while queries of it are answered.
        unsafe { self.frames.head(page, head) }
    }
}

/// Some work of a call.
enum Task<'a> {
    /// A head's queries of a segment, from this one on.
    Block(&'a Segment, usize, usize),
    /// A head's single queries of segments that begin alike, in the order of their pages.
    Together(&'a [&'a Segment], usize),
    /// A whole head of a segment that evicts by attention.
    Evicting(&'a Segment, usize),
    /// All heads of a segment that evict together.
    EvictingTogether(&'a Segment),
}

/// Attention of every segment's queries; `out` is (rows, num_heads * head_dim).
pub fn attend(isa: Isa, call: &Call<'_>, segments: &[Segment], out: &mut [f32]) {
    let out = SharedMut::new(out);
    let heads = || 0..call.heads.num_kv_heads;
    let (mut single, others): (Vec<_>, Vec<_>) = segments.iter().partition(|segment| can_join(call, segment));
    single.sort_by(|a, b| a.pages.cmp(&b.pages));
    let (together, alone) = alike(&single);
    let per_segment = alone.into_iter().chain(others).flat_map(|segment| -> Vec<Task<'_>> {
        match segment.kept {
            Kept::Heavy { spread: Spread::Heads { .. }, .. } => vec![Task::EvictingTogether(segment)],
            Kept::Heavy { .. } => heads().map(|head| Task::Evicting(segment, head)).collect(),
            Kept::All | Kept::Window { .. } => {
                let blocks = (0..segment.len).step_by(QUERY_BLOCK);
                blocks.flat_map(|block| heads().map(move |head| Task::Block(segment, block, head))).collect()
            }
        }
    });
    let tasks = TASKS_PER_THREAD * rayon::current_num_threads();
    let joint = together.into_iter().flat_map(|segments| {
        // As many as fill a register tile at least.
        let least = (LANES * call.heads.num_kv_heads / call.heads.num_heads).max(1);
        let each = (segments.len() * call.heads.num_kv_heads / tasks).max(least).min(QUERY_BLOCK);
        segments.chunks(each).flat_map(|segments| heads().map(move |head| Task::Together(segments, head)))
    });
    let tasks: Vec<Task<'_>> = joint.chain(per_segment).collect();
    tasks.into_par_iter().for_each(|task| match task {
        Task::Evicting(segment, head) => evict::run(isa, call, segment, head, &out),
        Task::EvictingTogether(segment) => evict::run_together(isa, call, segment, &out),
        Task::Together(segments, kv_head) => {
            let queries: Vec<Query> =
                segments.iter().map(|segment| Query { row: segment.first_row, position: segment.start }).collect();
            let tiles = shared_tiles(call, segments, kv_head);
            let (queries, tiles, out) = (&queries, &tiles, &out);
            isa.run(Block { call, tiles, window: None, sinks: 0, kv_head, queries, out, scores: None });
        }
        Task::Block(segment, first, kv_head) => {
            let count = QUERY_BLOCK.min(segment.len - first);
            let queries: Vec<Query> = Query::consecutive(segment.first_row + first, segment.start + first, count);
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
            let last = (first_position + count - 1) / PAGE_POSITIONS;
            let tile = |tile: usize| {
                let page = segment.pages[segment.kept.page(tile)];
                Tile { start: tile * PAGE_POSITIONS, page: call.part(page, kv_head), queries: 0..count }
            };
            let tiles: Vec<_> = (0..pages_for(sinks).min(oldest)).chain(oldest..=last).map(tile).collect();
            let (queries, tiles, out) = (&queries, &tiles, &out);
            isa.run(Block { call, tiles, window, sinks, kv_head, queries, out, scores: None });
        }
    });
}

/// Whether a segment is one query that sees all that came before it, more than a page.
fn can_join(call: &Call<'_>, segment: &Segment) -> bool {
    let sees_all = segment.kept == Kept::All && call.span.window.is_none();
    sees_all && segment.len == 1 && segment.start >= PAGE_POSITIONS
}

/// Segments in the order of their pages that have the first page in common, and those that have it alone.
fn alike<'a, 's>(segments: &'a [&'s Segment]) -> (Vec<&'a [&'s Segment]>, Vec<&'s Segment>) {
    let (together, alone): (Vec<_>, Vec<_>) =
        segments.chunk_by(|a, b| a.pages[0] == b.pages[0]).partition(|segments| segments.len() > 1);
    (together, alone.concat())
}

/// The tiles of single queries of segments in the order of their pages: a whole page that some share is one for all of
/// them.
fn shared_tiles<'a>(call: &'a Call<'_>, segments: &[&Segment], kv_head: usize) -> Vec<Tile<'a>> {
    let mut tiles = Vec::new();
    let most = segments.iter().map(|segment| pages_for(segment.start + 1)).max().unwrap_or(0);
    for index in 0..most {
        let start = index * PAGE_POSITIONS;
        let page = |segment: &Segment| segment.pages[..pages_for(segment.start + 1)].get(index).copied();
        let is_whole = |segment: &Segment| segment.start + 1 >= start + PAGE_POSITIONS;
        let mut first = 0;
        for run in segments.chunk_by(|a, b| is_whole(a) && is_whole(b) && page(a) == page(b)) {
            let queries = first..first + run.len();
            first = queries.end;
            if let Some(page) = page(run[0]) {
                tiles.push(Tile { start, page: call.part(page, kv_head), queries });
            }
        }
    }
    tiles
}

/// A query: its row, and its position in the count of the tiles.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// The row of its heads.
    pub row: usize,
    /// It sees keys up to this position.
    pub position: usize,
}

impl Query {
    /// Those of consecutive rows.
    pub fn consecutive(first_row: usize, first_position: usize, count: usize) -> Vec<Query> {
        (0..count).map(|index| Query { row: first_row + index, position: first_position + index }).collect()
    }
}

/// A head's part of a page.
pub struct Tile<'a> {
    /// The position of its first key.
    pub start: usize,
    /// Its bytes.
    pub page: &'a [u8],
    /// The queries that may see something of it; they are consecutive, or see all of it.
    pub queries: Range<usize>,
}

/// The query heads of one KV head, over some queries. Row `t * group + g` of its matrices is query t, head g of the
/// group.
pub struct Block<'a> {
    /// What it is a part of.
    pub call: &'a Call<'a>,
    /// What is read, every query's in ascending order.
    pub tiles: &'a [Tile<'a>],
    /// Keys k > q - window only, and the first ones.
    pub window: Option<usize>,
    /// How many of the first keys are seen wherever the window is.
    pub sinks: usize,
    /// Which KV head.
    pub kv_head: usize,
    /// Whose results are wanted.
    pub queries: &'a [Query],
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

    /// Whether all 16 keys from `first` on are.
    fn contains_vector(&self, first: usize) -> bool {
        let end = first + LANES;
        end <= self.high && (end <= self.sinks || self.low <= first.max(self.sinks))
    }

    fn is_empty(&self) -> bool {
        self.sinks == 0 && self.low >= self.high
    }
}

/// The running state of a block's rows, and room for what a tile takes. Vectors of 16 rows may be read from any row on.
struct State {
    /// Queries, groups of register rows by (head_dim, rows).
    queries: Vec<f32>,
    /// Greatest score so far.
    max: Vec<f32>,
    /// Sum of exponentials so far.
    sum: Vec<f32>,
    /// Unnormalised outputs, (rows, padded head_dim).
    output: Vec<f32>,
    /// One tile's outputs for some rows, (rows, padded head_dim).
    tile: Vec<f32>,
    /// One page's keys and values in f32, where they are stored as something else.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Scores of some rows with one tile, then probabilities, (rows, 64).
    scores: [[f32; PAGE_POSITIONS]; LANES],
    /// Queries as they meet the first keys, like the others; and their scores.
    sink_queries: Vec<f32>,
    sink_scores: [[f32; PAGE_POSITIONS]; LANES],
    /// Scores and greatest scores of all tiles, where keys are scored: (tiles, rows, 64) and (tiles, rows).
    all_scores: Vec<f32>,
    all_max: Vec<f32>,
}

/// A tile's keys and values in f32.
#[derive(Clone, Copy)]
struct Page {
    /// Which tile it is, and the position of its first key.
    index: usize,
    start: usize,
    keys: *const f32,
    values: *const f32,
}

impl Block<'_> {
    fn group(&self) -> usize {
        self.call.heads.num_heads / self.call.heads.num_kv_heads
    }

    fn rows(&self) -> usize {
        self.queries.len() * self.group()
    }

    fn padded_dim(&self) -> usize {
        self.call.heads.head_dim.next_multiple_of(LANES)
    }

    /// The position of a row's query.
    fn position(&self, row: usize) -> usize {
        self.queries[row / self.group()].position
    }

    /// The keys that a row sees within the tile that starts at `start`, relative to it.
    fn visible(&self, row: usize, start: usize) -> Visible {
        let position = self.position(row);
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let low = first.saturating_sub(start).min(PAGE_POSITIONS);
        let high = (position + 1).saturating_sub(start).min(PAGE_POSITIONS);
        Visible { sinks: self.sinks.saturating_sub(start).min(high), low, high: high.max(low) }
    }

    /// The rows that see something of a tile.
    fn seeing(&self, tile: &Tile<'_>) -> Range<usize> {
        // Rows from before the tile are the first, those whose window lies behind it the last.
        let sees = |query: &usize| !self.visible(query * self.group(), tile.start).is_empty();
        let first = tile.queries.clone().find(sees).unwrap_or(tile.queries.end);
        let last = (first..tile.queries.end).rev().find(sees).map_or(first, |query| query + 1);
        first * self.group()..last * self.group()
    }

    /// Queries packed for products; `sinks` as they meet the first keys.
    #[inline(always)]
    fn queries(&self, tile_rows: usize, sinks: Option<&Rotation<'_>>) -> Vec<f32> {
        let (rows, heads) = (self.rows(), self.call.heads);
        let head_dim = heads.head_dim;
        let mut queries = vec![0f32; rows * head_dim];
        let mut turned = vec![0f32; if sinks.is_some() { tile_rows * head_dim } else { 0 }];
        for (first, to) in (0..rows).step_by(tile_rows).zip(queries.chunks_mut(tile_rows * head_dim)) {
            let count = to.len() / head_dim;
            let row = |row: usize| {
                let head = self.kv_head * self.group() + row % self.group();
                let index = self.queries[row / self.group()].row;
                (index, &self.call.qkv[index * heads.qkv_width() + head * head_dim..][..head_dim])
            };
            let mut from = [[].as_slice(); LANES];
            from.iter_mut().zip(first..first + count).for_each(|(from, at)| *from = row(at).1);
            if let Some(rotation) = sinks {
                for (at, turned) in (first..first + count).zip(turned.chunks_exact_mut(head_dim)) {
                    turned.copy_from_slice(row(at).1);
                    rotate_head(turned, row(at).0, rotation);
                }
                from.iter_mut().zip(turned.chunks_exact(head_dim)).take(count).for_each(|(from, row)| *from = row);
            }
            for (dim, to) in to.chunks_exact_mut(count).enumerate() {
                to.iter_mut().zip(&from).for_each(|(to, from)| *to = from[dim]);
            }
        }
        queries
    }

    #[inline(always)]
    fn state(&self, tile_rows: usize) -> State {
        let (rows, padded) = (self.rows(), self.padded_dim());
        let sinks = self.call.span.sinks.filter(|_| self.sinks > 0);
        let scored = if self.scores.is_some() { rows * self.tiles.len() } else { 0 };
        let wide = if self.call.frames.layout.dtype == DType::F32 { 0 } else { PAGE_POSITIONS };
        State {
            queries: self.queries(tile_rows, None),
            max: vec![f32::NEG_INFINITY; rows + LANES],
            sum: vec![0.0; rows + LANES],
            output: vec![0.0; rows * padded],
            tile: vec![0.0; tile_rows * padded],
            keys: vec![0.0; wide * self.call.heads.head_dim],
            values: vec![0.0; wide * padded],
            scores: [[0.0; PAGE_POSITIONS]; LANES],
            sink_queries: sinks.map_or(Vec::new(), |rotation| self.queries(tile_rows, Some(rotation))),
            sink_scores: [[0.0; PAGE_POSITIONS]; LANES],
            all_scores: vec![0.0; scored * PAGE_POSITIONS],
            all_max: vec![f32::NEG_INFINITY; scored + LANES],
        }
    }
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(mut self) {
        let mut state = self.state(R::ROWS);
        for (index, tile) in self.tiles.iter().enumerate() {
            let layout = &self.call.frames.layout;
            if let Some(Tile { page, .. }) = self.tiles.get(index + 1) {
                prefetch(&page[..page.len().min(AHEAD_BYTES)]);
            }
            let rows = self.seeing(tile);
            // SAFETY: the rows exist; a widened page is read before the next one; the instruction set is the caller's.
            unsafe {
                let keys = widen_keys::<V>(tile.page, layout, &mut state.keys);
                let values = widen_values::<V>(tile.page, layout, &mut state.values);
                let page = Page { index, start: tile.start, keys, values };
                let mut first = rows.start;
                while first < rows.end {
                    let end = rows.end.min(first / R::ROWS * R::ROWS + R::ROWS);
                    self.tile::<V, R>(page, first..end, &mut state);
                    first = end;
                }
            }
        }
        self.finish(&state);
        if let Some(scores) = self.scores.take() {
            // SAFETY: the instruction set is the caller's.
            unsafe { self.score::<V>(&state, scores) };
        }
    }
}

impl Block<'_> {
    /// Scores, probabilities and outputs of one tile for rows of one group, each of which sees some of it, folded into
    /// the running state.
    ///
    /// # Safety
    /// Such rows exist; `V`'s instruction set exists.
    #[inline(always)]
    unsafe fn tile<V: Lanes, R: Registers>(&self, page: Page, rows: Range<usize>, state: &mut State) {
        let (head_dim, padded) = (self.call.heads.head_dim, self.padded_dim());
        let (first, count) = (rows.start, rows.len());
        // The last row sees the most recent keys, the first row the oldest.
        let Visible { sinks, high, .. } = self.visible(rows.end - 1, page.start);
        let low = if sinks > 0 { 0 } else { self.visible(first, page.start).low };
        let vectors = low / LANES..high.div_ceil(LANES);
        let group = first / R::ROWS * R::ROWS;
        let packed = R::ROWS.min(self.rows() - group);
        let queries = |queries: &[f32]| {
            let start = queries[group * head_dim + first - group..].as_ptr();
            (Left::<1> { start, step: packed }, count)
        };
        let keys = |vectors: Range<usize>| {
            let stride = head_dim * LANES;
            let start = page.keys.wrapping_add(vectors.start * stride);
            (Right { start, stride, depth: head_dim }, vectors.len())
        };
        let scores = match &self.scores {
            Some(_) => &mut state.all_scores[(page.index * self.rows() + first) * PAGE_POSITIONS..],
            None => state.scores.as_flattened_mut(),
        };
        let scores = &mut scores.as_chunks_mut::<PAGE_POSITIONS>().0[..count];
        let (mut tile_max, mut tile_sum) = ([f32::NEG_INFINITY; LANES], [0f32; LANES]);
        let (mut old, mut new) = ([0f32; LANES], [0f32; LANES]);
        // SAFETY: operands and results have the extents named in `State` and `KvLayout`; the set is the caller's.
        unsafe {
            let to = scores.as_mut_ptr().cast::<f32>().add(vectors.start * LANES);
            let sums = Sums { to, stride: PAGE_POSITIONS };
            multiply::<V, R, 1>(queries(&state.queries), keys(vectors.clone()), sums);
            if sinks > 0 && !state.sink_queries.is_empty() {
                let sums = Sums { to: state.sink_scores.as_mut_ptr().cast(), stride: PAGE_POSITIONS };
                multiply::<V, R, 1>(queries(&state.sink_queries), keys(0..sinks.div_ceil(LANES)), sums);
                for (row, (scores, first)) in rows.clone().zip(scores.iter_mut().zip(&state.sink_scores)) {
                    let sinks = self.visible(row, page.start).sinks;
                    scores[..sinks].copy_from_slice(&first[..sinks]);
                }
            }
            for (index, scores) in scores.iter_mut().enumerate() {
                let visible = self.visible(first + index, page.start);
                let scale = self.call.span.scale;
                (tile_max[index], tile_sum[index]) = exponentials::<V>(scores, visible, vectors.clone(), scale);
            }
            if self.scores.is_some() {
                state.all_max[page.index * self.rows() + first..][..count].copy_from_slice(&tile_max[..count]);
            }
            // Rows beyond `count` are left as they are.
            let before = V::load(state.max[first..][..LANES].as_ptr());
            let max = before.max(V::load(tile_max.as_ptr()));
            math::exp(before.sub(max)).store(old.as_mut_ptr());
            math::exp(V::load(tile_max.as_ptr()).sub(max)).store(new.as_mut_ptr());
            for (old, before) in old.iter_mut().zip(before.to_array()) {
                // The first tile finds nothing: its predecessor's weight is exactly zero, not exp of a clamped -inf.
                *old = if before == f32::NEG_INFINITY { 0.0 } else { *old };
            }
            let sum = V::load(state.sum[first..][..LANES].as_ptr()).mul(V::load(old.as_ptr()));
            let total = V::load(tile_sum.as_ptr()).fma(V::load(new.as_ptr()), sum);
            state.sum[first..][..count].copy_from_slice(&total.to_array()[..count]);
            state.max[first..][..count].copy_from_slice(&max.to_array()[..count]);
            let weights = Left::<PAGE_POSITIONS> { start: scores.as_ptr().cast::<f32>().add(low), step: 1 };
            let stride = PAGE_POSITIONS * LANES;
            let values = Right { start: page.values.wrapping_add(low * LANES), stride, depth: high - low };
            let sums = Sums { to: state.tile.as_mut_ptr(), stride: padded };
            multiply::<V, R, PAGE_POSITIONS>((weights, count), (values, padded / LANES), sums);
            let output = state.output[first * padded..].chunks_exact_mut(padded);
            for ((output, tile), (old, new)) in
                output.zip(state.tile.chunks_exact(padded)).zip(old.iter().zip(new)).take(count)
            {
                let (old, new) = (V::splat(*old), V::splat(new));
                for (output, tile) in output.as_chunks_mut::<LANES>().0.iter_mut().zip(tile.as_chunks::<LANES>().0) {
                    let before = V::load(output.as_ptr()).mul(old);
                    V::load(tile.as_ptr()).fma(new, before).store(output.as_mut_ptr());
                }
            }
        }
    }

    /// Adds to every key what it receives of each query: its probabilities after the final softmax, summed over the
    /// query heads of the group.
    #[inline(always)]
    unsafe fn score<V: Lanes>(&self, state: &State, scores: &mut [f32]) {
        let (rows, group) = (self.rows(), self.group());
        let mut shares = vec![0f32; rows.next_multiple_of(LANES)];
        for (tile, scores) in scores.chunks_exact_mut(PAGE_POSITIONS).enumerate().take(self.tiles.len()) {
            let all_max = &state.all_max[tile * rows..];
            // SAFETY: there are 64 scores of every row and tile, and whole vectors of what rows have one of; the
            // instruction set is the caller's.
            unsafe {
                for (first, shares) in (0..rows).step_by(LANES).zip(shares.chunks_exact_mut(LANES)) {
                    let late =
                        math::exp(V::load(all_max.as_ptr().add(first)).sub(V::load(state.max.as_ptr().add(first))));
                    let whole = V::splat(1.0).div(V::load(state.sum.as_ptr().add(first)));
                    late.mul(whole).store(shares.as_mut_ptr());
                }
                let mut all: [V; PAGE_POSITIONS / LANES] = [V::splat(0.0); PAGE_POSITIONS / LANES];
                for (lane, all) in all.iter_mut().enumerate() {
                    *all = V::load(scores.as_ptr().add(lane * LANES));
                }
                for first in (0..rows).step_by(group) {
                    let mut sums = [V::splat(0.0); PAGE_POSITIONS / LANES];
                    for row in first..first + group {
                        // Of this tile the query sees nothing.
                        if all_max[row] == f32::NEG_INFINITY {
                            continue;
                        }
                        let from = state.all_scores.as_ptr().add((tile * rows + row) * PAGE_POSITIONS);
                        for (lane, sum) in sums.iter_mut().enumerate() {
                            *sum = V::load(from.add(lane * LANES)).fma(V::splat(shares[row]), *sum);
                        }
                    }
                    for (all, sum) in all.iter_mut().zip(sums) {
                        *all = all.add(sum);
                    }
                }
                for (lane, all) in all.into_iter().enumerate() {
                    all.store(scores.as_mut_ptr().add(lane * LANES));
                }
            }
        }
    }

    /// Divides by the sums and writes the rows out.
    #[inline(always)]
    fn finish(&self, state: &State) {
        let head_dim = self.call.heads.head_dim;
        for row in 0..self.rows() {
            let head = self.kv_head * self.group() + row % self.group();
            let to = self.queries[row / self.group()].row * self.call.heads.query_width() + head * head_dim;
            // SAFETY: each (row, head) belongs to one block alone.
            let to = unsafe { self.out.slice(to, head_dim) };
            let scale = 1.0 / state.sum[row];
            for (to, from) in to.iter_mut().zip(&state.output[row * self.padded_dim()..]) {
                *to = from * scale;
            }
        }
    }
}

/// Scales a row's scores and replaces them with `exp(s - max)`, those of keys that it does not see with 0; gives max
/// and sum. Only these vectors of 16 scores are read and written: of others the row sees nothing.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
unsafe fn exponentials<V: Lanes>(
    scores: &mut [f32; PAGE_POSITIONS],
    visible: Visible,
    vectors: Range<usize>,
    scale: f32,
) -> (f32, f32) {
    const ALL: usize = PAGE_POSITIONS / LANES;
    let hidden = |vector: &usize| !visible.contains_vector(vector * LANES);
    let vector_of = |vector: usize| vector * LANES..(vector + 1) * LANES;
    // SAFETY: there are four vectors of scores; the set is the caller's.
    unsafe {
        let scale = V::splat(scale);
        let at = |vector: usize| vector * LANES;
        if vectors == (0..ALL) && !(0..ALL).any(|vector| hidden(&vector)) {
            // All in registers: this is what nearly every row is like.
            let mut x = [scale; ALL];
            let mut max = V::splat(f32::NEG_INFINITY);
            for (v, x) in x.iter_mut().enumerate() {
                *x = V::load(scores.as_ptr().add(at(v))).mul(scale);
                max = max.max(*x);
            }
            let max = max.greatest();
            let mut sum = V::splat(0.0);
            for (v, x) in x.into_iter().enumerate() {
                let p = math::exp(x.sub(V::splat(max)));
                p.store(scores.as_mut_ptr().add(at(v)));
                sum = sum.add(p);
            }
            return (max, sum.fold());
        }
        let mut max = V::splat(f32::NEG_INFINITY);
        for v in vectors.clone() {
            let scores = &mut scores[vector_of(v)];
            V::load(scores.as_ptr()).mul(scale).store(scores.as_mut_ptr());
            if hidden(&v) {
                let unseen = scores.iter_mut().zip(vector_of(v)).filter(|(_, key)| !visible.contains(*key));
                unseen.for_each(|(score, _)| *score = f32::NEG_INFINITY);
            }
            max = max.max(V::load(scores.as_ptr()));
        }
        let max = max.greatest();
        let mut sum = V::splat(0.0);
        for v in vectors {
            let scores = &mut scores[vector_of(v)];
            math::exp(V::load(scores.as_ptr()).sub(V::splat(max))).store(scores.as_mut_ptr());
            if hidden(&v) {
                // A masked key counts for exactly nothing; exp clamps its argument.
                let unseen = scores.iter_mut().zip(vector_of(v)).filter(|(_, key)| !visible.contains(*key));
                unseen.for_each(|(score, _)| *score = 0.0);
            }
            sum = sum.add(V::load(scores.as_ptr()));
        }
        (max, sum.fold())
    }
}
