//! The CPU as a device: the reference that every other device is compared with.
//!
//! **Invariant:** f32 arithmetic (and exact sums of integers) in an order that depends on the operands' shapes alone,
//! so that results are the same bits for any batch, chunk, thread count and instruction set.
#![allow(unsafe_code)]

mod attention;
mod cache;
pub mod dot;
mod evict;
pub mod gemm;
pub mod isa;
mod lanes;
mod math;
mod raw;
mod rows;
mod sample;
mod shared;
mod softmax;
mod tiles;

use std::time::Instant;

pub use raw::{raw_fma_gflops, raw_int8_gops, raw_widen_rate};
use rayon::prelude::*;

use super::sampling::{Draw, Drawn};
use super::{
    AttentionSpan, Device, Frames, HeadNorms, Heads, KvViewMut, Matrix, NormParameters, Rotation, Stream, Target,
};
use crate::error::Result;
use crate::kv::layout::KvLayout;
use crate::kv::pages::{PageId, Segment};
use crate::memory::arena::{Arena, Region};
use crate::model::config::Activation;
use crate::model::dtype::DType;
use crate::model::packed::panels::TILE_INPUTS;
use dot::IntegerRows;
use gemm::{PackedRows, Panels};
use isa::Isa;
use shared::SharedMut;

/// The CPU.
pub struct Host {
    isa: Isa,
    arena: Arena,
    rehearses: bool,
    rounds: bool,
}

/// Frames of the KV cache, resident ones first, shared by tasks that each keep to their own heads and sequences.
struct HostFrames<'a> {
    resident: SharedMut<'a, u8>,
    count: usize,
    streamed: SharedMut<'a, u8>,
    layout: KvLayout,
    stride: usize,
}

impl<'a> HostFrames<'a> {
    fn new(kv: KvViewMut<'a, Region>) -> Self {
        let KvViewMut { resident, streamed } = kv;
        HostFrames {
            layout: resident.layout,
            stride: resident.stride,
            count: resident.count,
            resident: SharedMut::new(resident.memory.bytes_mut()),
            streamed: SharedMut::new(streamed.map_or(&mut [], |frames| frames.memory.bytes_mut())),
        }
    }

    /// The memory of a frame's head, and where it lies.
    fn place(&self, frame: PageId, head: usize) -> (&SharedMut<'a, u8>, std::ops::Range<usize>) {
        let frame = frame as usize;
        let (memory, index) =
            if frame < self.count { (&self.resident, frame) } else { (&self.streamed, frame - self.count) };
        let within = self.layout.head(head);
        (memory, index * self.stride + within.start..index * self.stride + within.end)
    }

    /// The bytes of a head of a frame.
    ///
    /// # Safety
    /// No task writes to the head of this frame meanwhile.
    unsafe fn head(&self, frame: PageId, head: usize) -> &[u8] {
        let (memory, range) = self.place(frame, head);
        // SAFETY: passed on from the caller.
        unsafe { memory.view(range.start, range.len()) }
    }

    /// The bytes of a head of a frame, to write.
    ///
    /// # Safety
    /// No other task touches the head of this frame meanwhile.
    #[allow(clippy::mut_from_ref)]
    unsafe fn head_mut(&self, frame: PageId, head: usize) -> &mut [u8] {
        let (memory, range) = self.place(frame, head);
        // SAFETY: passed on from the caller.
        unsafe { memory.slice(range.start, range.len()) }
    }
}

impl Host {
    /// The CPU with its best instruction set, and the arena that everything lives in.
    pub fn new(arena: Arena) -> Self {
        Host::with_isa(arena, Isa::detect())
    }

    /// The CPU restricted to an instruction set, for tests.
    pub fn with_isa(arena: Arena, isa: Isa) -> Self {
        Host { isa, arena, rehearses: false, rounds: false }
    }

    /// Behaves as a device with memory of its own: what goes in and out is copied.
    #[must_use]
    pub fn rehearsing(self) -> Self {
        Host { rehearses: true, ..self }
    }
}

fn panels<'a>(matrix: &Matrix<'a, Region>) -> Panels<'a> {
    let pieces = matrix.pieces.iter().map(|piece| &piece.buffer.bytes()[piece.bytes.clone()]).collect();
    Panels { pieces, dtype: matrix.dtype, inputs: matrix.inputs, outputs: matrix.outputs }
}

impl Device for Host {
    type Buffer = Region;
    /// Everything is over when it returns, so a mark is a moment.
    type Mark = Instant;

    fn allocate(&mut self, bytes: usize) -> Region {
        self.arena.carve(bytes)
    }

    fn round_activations(&mut self, round: bool) {
        self.rounds = round;
    }

    fn used_bytes(&self) -> usize {
        self.arena.used()
    }

    fn bytes<'a>(&self, buffer: &'a Region) -> Option<&'a [u8]> {
        (!self.rehearses).then(|| buffer.bytes())
    }

    fn bytes_mut<'a>(&self, buffer: &'a mut Region) -> Option<&'a mut [u8]> {
        (!self.rehearses).then(|| buffer.bytes_mut())
    }

    fn copy_in(&self, parts: &[(&[u8], usize)], to: &mut Region) -> Result<()> {
        for &(part, offset) in parts {
            to.bytes_mut()[offset..offset + part.len()].copy_from_slice(part);
        }
        Ok(())
    }

    fn copy_out(&self, from: &Region, parts: &mut [(usize, &mut [u8])]) -> Result<()> {
        for (offset, part) in parts {
            part.copy_from_slice(&from.bytes()[*offset..*offset + part.len()]);
        }
        Ok(())
    }

    fn mark(&self, _: Stream) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn follow(&self, _: Stream, _: &Instant) -> Result<()> {
        Ok(())
    }

    fn passed(&self, _: &Instant) -> Result<bool> {
        Ok(true)
    }

    fn wait(&self, _: &Instant) -> Result<()> {
        Ok(())
    }

    fn between(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok((*to - *from).as_secs_f64())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn embed(&self, table: &Matrix<'_, Region>, tokens: &[u32], out: &mut Region) {
        rows::embed(&panels(table), tokens, out.as_mut_slice());
    }

    fn add_rows(&self, table: &Region, indices: &[u32], width: usize, x: &mut Region) {
        rows::add_rows(table.as_slice(), indices, width, x.as_mut_slice());
    }

    fn gather(&self, x: &Region, indices: &[usize], width: usize, out: &mut Region, first: usize) {
        let (x, out) = (x.as_slice::<f32>(), &mut out.as_mut_slice::<f32>()[first * width..]);
        for (&index, out) in indices.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x[index * width..][..width]);
        }
    }

    fn norm(&self, x: &Region, rows: usize, width: usize, parameters: &NormParameters<Region>, out: &mut Region) {
        let weight = &parameters.weight.as_slice::<f32>()[..width];
        let bias = parameters.bias.as_ref().map(|bias| &bias.as_slice::<f32>()[..width]);
        let x = &x.as_slice::<f32>()[..rows * width];
        let out = &mut out.as_mut_slice::<f32>()[..rows * width];
        rows::norm(self.isa, parameters.norm, x, weight, bias, out);
    }

    fn add_norm(
        &self,
        x: &mut Region,
        y: &Region,
        rows: usize,
        width: usize,
        parameters: &NormParameters<Region>,
        out: &mut Region,
    ) {
        self.add(x, y, rows * width);
        self.norm(x, rows, width, parameters, out);
    }

    fn linear(
        &self,
        x: &Region,
        rows: usize,
        w: &Matrix<'_, Region>,
        bias: Option<&Region>,
        scratch: &mut Region,
        y: Target<'_, Region>,
    ) {
        let to = &mut y.buffer.as_mut_slice()[y.column..];
        if self.rounds && matches!(w.dtype, DType::Int8 | DType::Int4) && w.inputs >= TILE_INPUTS {
            let x = IntegerRows::round(self.isa, x.as_slice(), rows, w.inputs, scratch.as_mut_slice());
            return dot::linear(self.isa, &x, &panels(w), bias.map(|bias| bias.as_slice()), to, y.stride);
        }
        let x = PackedRows::pack(self.isa, x.as_slice(), rows, w.inputs, scratch.as_mut_slice());
        gemm::linear(self.isa, &x, &panels(w), bias.map(|bias| bias.as_slice()), to, y.stride);
    }

    fn norm_heads(&self, qkv: &mut Region, rows: usize, heads: Heads, norms: &HeadNorms<Region>) {
        let qkv = &mut qkv.as_mut_slice::<f32>()[..rows * heads.qkv_width()];
        rows::norm_heads(self.isa, qkv, heads, norms.eps, norms.query.as_slice(), norms.key.as_slice());
    }

    fn rotate(&self, qkv: &mut Region, rows: usize, heads: Heads, rotation: &Rotation<'_>) {
        rows::rotate(&mut qkv.as_mut_slice::<f32>()[..rows * heads.qkv_width()], heads, rotation);
    }

    fn append_kv(&self, kv: KvViewMut<'_, Region>, segments: &[Segment], qkv: &Region, heads: Heads) {
        cache::append(&HostFrames::new(kv), segments, qkv.as_slice(), heads);
    }

    fn attend(
        &self,
        kv: KvViewMut<'_, Region>,
        span: AttentionSpan<'_>,
        segments: &[Segment],
        qkv: &Region,
        heads: Heads,
        out: &mut Region,
    ) {
        let call = attention::Call { frames: &HostFrames::new(kv), span, qkv: qkv.as_slice(), heads };
        attention::attend(self.isa, &call, segments, out.as_mut_slice());
    }

    fn activate(&self, activation: Activation, gated: bool, up: &Region, rows: usize, width: usize, out: &mut Region) {
        let up = &up.as_slice::<f32>()[..rows * width * if gated { 2 } else { 1 }];
        rows::activate(self.isa, activation, gated, up, width, &mut out.as_mut_slice::<f32>()[..rows * width]);
    }

    fn add(&self, x: &mut Region, y: &Region, elements: usize) {
        rows::add(&mut x.as_mut_slice::<f32>()[..elements], &y.as_slice::<f32>()[..elements]);
    }

    fn copy_frame(&self, frames: &mut Frames<Region>, from: usize, to: usize) {
        let stride = frames.stride;
        frames.memory.bytes_mut().copy_within(from * stride..(from + 1) * stride, to * stride);
    }

    fn sample(&self, logits: &Region, vocab_size: usize, draws: &[(usize, &Draw)]) -> Vec<Drawn> {
        let logits = logits.as_slice::<f32>();
        draws
            .par_iter()
            .map(|(row, draw)| sample::draw(self.isa, &logits[row * vocab_size..][..vocab_size], draw))
            .collect()
    }
}
