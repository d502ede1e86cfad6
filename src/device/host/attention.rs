//! Attention over pages: one tile of 64 keys at a time, folded in order from position 0.
//!
//! For each tile j: `s = scale * q k^T`, `m_j = max s`, `p = exp(s - m_j)`, `l_j = sum p`, `o_j = p v`; the running
//! (m, l, o) takes the tile in with the usual rescaling (online softmax, Milakov and Gimelshein 2018).
//!
//! **Invariant:** tiles lie at absolute positions and each is reduced on its own before it is folded in, so a
//! query's result depends on its position and on the stored keys and values alone: not on chunks, on the queries
//! computed beside it, or on who shares the pages.
//!
//! Limit: 4 * head_dim operations per query head and key at the multiply-add rate; each page is read once per
//! group of query heads and block of queries.

use rayon::prelude::*;

use super::gemm::{Strided, Tile, register_rows, widen};
use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold, greatest};
use super::math;
use super::shared::SharedMut;
use super::{HostFrames, HostFramesMut};
use crate::device::{AttentionSpan, Heads};
use crate::kv::layout::{KvLayout, PAGE_POSITIONS};
use crate::kv::pages::Segment;
use crate::model::dtype::DType;

/// Queries of one task: bounds its scratch and leaves several tasks per head of a long chunk.
const QUERY_BLOCK: usize = 32;

/// Stores keys and values of every segment's rows.
pub fn append(kv: &mut HostFramesMut<'_>, segments: &[Segment], qkv: &[f32], heads: Heads) {
    let layout = kv.layout;
    for segment in segments {
        for i in 0..segment.len {
            let position = segment.start + i;
            let row = &qkv[(segment.first_row + i) * heads.qkv_width()..][..heads.qkv_width()];
            let page = kv.frame(segment.pages[position / PAGE_POSITIONS]);
            store_position(&layout, page, position % PAGE_POSITIONS, &row[heads.query_width()..], heads);
        }
    }
}

/// Stores one position's keys and values (all heads) into its slot.
fn store_position(layout: &KvLayout, page: &mut [u8], slot: usize, kv: &[f32], heads: Heads) {
    let (keys, values) = kv.split_at(heads.num_kv_heads * heads.head_dim);
    for head in 0..heads.num_kv_heads {
        let from = head * heads.head_dim..(head + 1) * heads.head_dim;
        let to = &mut page[layout.keys(head)];
        store(to, layout.dtype, &keys[from.clone()], |dim| layout.key_element(slot, dim));
        let to = &mut page[layout.values(head)];
        store(to, layout.dtype, &values[from], |dim| layout.value_element(slot, dim));
    }
}

fn store(to: &mut [u8], dtype: DType, from: &[f32], element: impl Fn(usize) -> usize) {
    match dtype {
        DType::F32 => {
            let to: &mut [f32] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = value);
        }
        DType::Bf16 => {
            let to: &mut [half::bf16] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = half::bf16::from_f32(value));
        }
        DType::F16 => {
            let to: &mut [half::f16] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = to_f16(value));
        }
        DType::Int8 | DType::Int4 => unreachable!("the cache is stored plain"),
    }
}

/// Saturates: an infinite value would reach other queries of its tile, as zero times infinity.
fn to_f16(value: f32) -> half::f16 {
    half::f16::from_f32(value.clamp(-65_504.0, 65_504.0))
}

/// Attention of every segment's queries; `out` is (rows, num_heads * head_dim).
pub fn attend(
    isa: Isa,
    kv: &HostFrames<'_>,
    span: AttentionSpan,
    segments: &[Segment],
    qkv: &[f32],
    heads: Heads,
    out: &mut [f32],
) {
    let out = SharedMut::new(out);
    let tasks: Vec<(&Segment, usize, usize)> = segments
        .iter()
        .flat_map(|segment| {
            let blocks = (0..segment.len).step_by(QUERY_BLOCK);
            blocks.flat_map(move |block| (0..heads.num_kv_heads).map(move |head| (segment, block, head)))
        })
        .collect();
    tasks.into_par_iter().for_each(|(segment, block, kv_head)| {
        let queries = QUERY_BLOCK.min(segment.len - block);
        let block = Block {
            kv,
            span,
            pages: &segment.pages,
            qkv,
            heads,
            kv_head,
            first_row: segment.first_row + block,
            first_position: segment.start + block,
            queries,
            out: &out,
        };
        isa.run(block);
    });
}

/// The query heads of one KV head, over some consecutive queries of a segment. Row `t * group + g` of its
/// matrices is query t, head g of the group.
struct Block<'a> {
    kv: &'a HostFrames<'a>,
    span: AttentionSpan,
    pages: &'a [u32],
    qkv: &'a [f32],
    heads: Heads,
    kv_head: usize,
    first_row: usize,
    first_position: usize,
    queries: usize,
    out: &'a SharedMut<'a, f32>,
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
    /// Probabilities, packed like the queries: (64, rows) per group.
    packed: Vec<f32>,
    /// One tile's outputs, (rows, padded head_dim).
    tile: Vec<f32>,
    /// One tile's greatest scores.
    tile_max: Vec<f32>,
    /// One tile's sums of exponentials.
    tile_sum: Vec<f32>,
    /// One page's keys or values in f32.
    widened: Vec<f32>,
}

impl Block<'_> {
    fn group(&self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }

    fn rows(&self) -> usize {
        self.queries * self.group()
    }

    fn padded_dim(&self) -> usize {
        self.heads.head_dim.next_multiple_of(LANES)
    }

    /// The position of a row's query.
    fn position(&self, row: usize) -> usize {
        self.first_position + row / self.group()
    }

    /// The keys that a row sees within the tile that starts at `start`, relative to it.
    fn visible(&self, row: usize, start: usize) -> std::ops::Range<usize> {
        let position = self.position(row);
        let first = self.span.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let low = first.saturating_sub(start).min(PAGE_POSITIONS);
        let high = (position + 1).saturating_sub(start).min(PAGE_POSITIONS);
        low..high.max(low)
    }

    fn state(&self, tile_rows: usize) -> State {
        let (rows, head_dim, padded) = (self.rows(), self.heads.head_dim, self.padded_dim());
        let mut queries = vec![0f32; rows * head_dim];
        for row in 0..rows {
            let (group, within) = (row / tile_rows, row % tile_rows);
            let count = tile_rows.min(rows - group * tile_rows);
            let head = self.kv_head * self.group() + row % self.group();
            let from = (self.first_row + row / self.group()) * self.heads.qkv_width() + head * head_dim;
            for dim in 0..head_dim {
                queries[group * tile_rows * head_dim + dim * count + within] = self.qkv[from + dim];
            }
        }
        State {
            queries,
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
            output: vec![0.0; rows * padded],
            scores: vec![0.0; rows * PAGE_POSITIONS],
            packed: vec![0.0; rows * PAGE_POSITIONS],
            tile: vec![0.0; rows * padded],
            tile_max: vec![0.0; rows],
            tile_sum: vec![0.0; rows],
            widened: vec![0.0; PAGE_POSITIONS * padded],
        }
    }
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        let mut state = self.state(R::ROWS);
        let last = self.position(self.rows() - 1);
        let first = self.span.window.map_or(0, |window| (self.first_position + 1).saturating_sub(window));
        for tile in first / PAGE_POSITIONS..=last / PAGE_POSITIONS {
            // SAFETY: the instruction set is the caller's.
            unsafe { self.tile::<V, R>(tile, &mut state) };
        }
        self.finish(&state);
    }
}

impl Block<'_> {
    /// Scores, probabilities and outputs of one tile, folded into the running state.
    #[inline(always)]
    unsafe fn tile<V: Lanes, R: Registers>(&self, tile: usize, state: &mut State) {
        let start = tile * PAGE_POSITIONS;
        let layout = &self.kv.layout;
        let page = self.kv.frame(self.pages[tile]);
        let (rows, head_dim, padded) = (self.rows(), self.heads.head_dim, self.padded_dim());
        // The last row sees the most recent keys, the first row the oldest.
        let high = self.visible(rows - 1, start).end;
        let low = self.visible(0, start).start;
        // SAFETY: the buffers have the extents named in `State`; the instruction set is the caller's.
        unsafe {
            let keys = &mut state.widened[..PAGE_POSITIONS * head_dim];
            widen::<V>(&page[layout.keys(self.kv_head)], layout.dtype, keys);
            for group in 0..high.div_ceil(LANES) {
                let keys = keys[group * head_dim * LANES..].as_ptr();
                let scores = &mut state.scores[group * LANES..];
                product::<V, R>(&state.queries, rows, head_dim, 0..head_dim, keys, scores, PAGE_POSITIONS);
            }
            for row in 0..rows {
                let visible = self.visible(row, start);
                let scores = &mut state.scores[row * PAGE_POSITIONS..][..PAGE_POSITIONS];
                (state.tile_max[row], state.tile_sum[row]) = exponentials::<V>(scores, visible, self.span.scale);
            }
            pack_probabilities(&state.scores, rows, R::ROWS, low..high, &mut state.packed);
            let values = &mut state.widened[..PAGE_POSITIONS * padded];
            widen::<V>(&page[layout.values(self.kv_head)], layout.dtype, values);
            for group in 0..padded / LANES {
                let values = values[(group * PAGE_POSITIONS + low) * LANES..].as_ptr();
                let tile = &mut state.tile[group * LANES..];
                product::<V, R>(&state.packed, rows, PAGE_POSITIONS, low..high, values, tile, padded);
            }
            for row in 0..rows {
                if !self.visible(row, start).is_empty() {
                    state.fold::<V>(row, padded);
                }
            }
        }
    }

    /// Divides by the sums and writes the rows out.
    fn finish(&self, state: &State) {
        let head_dim = self.heads.head_dim;
        for row in 0..self.rows() {
            let head = self.kv_head * self.group() + row % self.group();
            let to = (self.first_row + row / self.group()) * self.heads.query_width() + head * head_dim;
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
unsafe fn exponentials<V: Lanes>(scores: &mut [f32], visible: std::ops::Range<usize>, scale: f32) -> (f32, f32) {
    for (key, score) in scores.iter_mut().enumerate() {
        *score = if visible.contains(&key) { *score * scale } else { f32::NEG_INFINITY };
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
        for (key, score) in scores.iter_mut().enumerate() {
            // A masked key counts for exactly nothing; exp clamps its argument.
            if !visible.contains(&key) {
                *score = 0.0;
            }
        }
        for i in (0..PAGE_POSITIONS).step_by(LANES) {
            sum = sum.add(V::load(scores.as_ptr().add(i)));
        }
        (max, fold(sum.to_array()))
    }
}

/// Lays probabilities out as the product's left operand: groups of `tile_rows` rows, each (64, rows).
fn pack_probabilities(scores: &[f32], rows: usize, tile_rows: usize, keys: std::ops::Range<usize>, packed: &mut [f32]) {
    for first in (0..rows).step_by(tile_rows) {
        let count = tile_rows.min(rows - first);
        let group = &mut packed[first * PAGE_POSITIONS..];
        for row in 0..count {
            let scores = &scores[(first + row) * PAGE_POSITIONS..];
            for key in keys.clone() {
                group[key * count + row] = scores[key];
            }
        }
    }
}

/// `c[row] = sum over k in terms of a[k, row] * b[k]` for 16 outputs; rows of `c` are `stride` apart and `a` is
/// packed in groups of rows, each (depth, rows).
///
/// # Safety
/// `b` points to `terms.len()` vectors of 16; `V`'s instruction set exists.
#[inline(always)]
unsafe fn product<V: Lanes, R: Registers>(
    a: &[f32],
    rows: usize,
    depth: usize,
    terms: std::ops::Range<usize>,
    b: *const f32,
    c: &mut [f32],
    stride: usize,
) {
    assert!(c.len() >= (rows - 1) * stride + LANES && a.len() >= rows * depth && terms.end <= depth);
    let start = [0f32; 2 * LANES];
    for first in (0..rows).step_by(R::ROWS) {
        let count = R::ROWS.min(rows - first);
        let group = &a[first * depth..];
        let mut row = 0;
        while row < count {
            let some = register_rows(count - row, R::ROWS);
            let a = Strided { start: group[terms.start * count + row..].as_ptr(), stride: count };
            let tile = Tile { depth: terms.len(), a, b: [b], from_memory: false, start: &start, width: LANES };
            // SAFETY: `a` and `c` hold the rows (asserted above), `b` the terms by the caller's promise.
            unsafe { tile.run::<V, R>(some, c.as_mut_ptr().add((first + row) * stride), stride) };
            row += some;
        }
    }
}
