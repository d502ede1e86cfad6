//! The CPU as a device: the reference that every other device is compared with.
//!
//! **Invariant:** f32 arithmetic in an order that depends on the operands' shapes alone, so that results are the
//! same bits for any batch, chunk, thread count and instruction set.
#![allow(unsafe_code)]

mod attention;
pub mod gemm;
pub mod isa;
mod lanes;
mod math;
mod raw;
mod rows;
mod sample;
mod shared;
mod softmax;

pub use raw::raw_fma_gflops;
use rayon::prelude::*;

use super::sampling::{Draw, Drawn};
use super::{AttentionSpan, Device, HeadNorms, Heads, Matrix, NormParameters, Rotation};
use crate::error::Result;
use crate::kv::layout::KvLayout;
use crate::kv::pages::{PageId, Segment};
use crate::memory::arena::{Arena, Region};
use crate::model::config::Activation;
use gemm::{PackedRows, Panels};
use isa::Isa;

/// The CPU.
pub struct Host {
    isa: Isa,
    arena: Arena,
}

/// The KV cache in main memory: pages of one layer lie together, layer after layer.
pub struct HostKv {
    memory: Region,
    layout: KvLayout,
    pages: usize,
}

impl HostKv {
    /// One layer of one page.
    fn page(&self, layer: usize, page: PageId) -> &[u8] {
        let bytes = self.layout.layer_bytes();
        &self.memory.bytes()[self.offset(layer, page)..][..bytes]
    }

    fn offset(&self, layer: usize, page: PageId) -> usize {
        assert!((page as usize) < self.pages && layer < self.layout.num_layers);
        (layer * self.pages + page as usize) * self.layout.layer_bytes()
    }
}

impl Host {
    /// The CPU with its best instruction set, and the arena that everything lives in.
    pub fn new(arena: Arena) -> Self {
        Host { isa: Isa::detect(), arena }
    }

    /// The CPU restricted to an instruction set, for tests.
    pub fn with_isa(arena: Arena, isa: Isa) -> Self {
        Host { isa, arena }
    }

    /// Bytes of the arena that have been handed out.
    pub fn used_bytes(&self) -> usize {
        self.arena.used()
    }
}

fn panels(matrix: &Matrix<Region>) -> Panels<'_> {
    Panels { data: matrix.data.bytes(), dtype: matrix.dtype, inputs: matrix.inputs, outputs: matrix.outputs }
}

impl Device for Host {
    type Buffer = Region;
    type Kv = HostKv;

    fn allocate(&mut self, bytes: usize) -> Result<Region> {
        Ok(self.arena.carve(bytes))
    }

    fn kv_cache(&self, memory: Region, layout: KvLayout, pages: usize) -> HostKv {
        assert!(memory.len() >= pages * layout.page_bytes());
        HostKv { memory, layout, pages }
    }

    fn upload(&self, to: &mut Region, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        fill(to.bytes_mut())
    }

    fn embed(&self, table: &Matrix<Region>, tokens: &[u32], out: &mut Region) {
        rows::embed(panels(table), tokens, out.as_mut_slice());
    }

    fn add_rows(&self, table: &Region, indices: &[u32], width: usize, x: &mut Region) {
        rows::add_rows(table.as_slice(), indices, width, x.as_mut_slice());
    }

    fn gather(&self, x: &Region, indices: &[usize], width: usize, out: &mut Region) {
        let (x, out) = (x.as_slice::<f32>(), out.as_mut_slice::<f32>());
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

    fn linear(
        &self,
        x: &Region,
        rows: usize,
        w: &Matrix<Region>,
        bias: Option<&Region>,
        scratch: &mut Region,
        y: &mut Region,
    ) {
        let x = PackedRows::pack(self.isa, x.as_slice(), rows, w.inputs, scratch.as_mut_slice());
        gemm::linear(self.isa, &x, panels(w), bias.map(|bias| bias.as_slice()), y.as_mut_slice());
    }

    fn norm_heads(&self, qkv: &mut Region, rows: usize, heads: Heads, norms: &HeadNorms<Region>) {
        let qkv = &mut qkv.as_mut_slice::<f32>()[..rows * heads.qkv_width()];
        rows::norm_heads(self.isa, qkv, heads, norms.eps, norms.query.as_slice(), norms.key.as_slice());
    }

    fn rotate(&self, qkv: &mut Region, rows: usize, heads: Heads, rotation: &Rotation<'_>) {
        rows::rotate(&mut qkv.as_mut_slice::<f32>()[..rows * heads.qkv_width()], heads, rotation);
    }

    fn append_kv(&self, kv: &mut HostKv, layer: usize, segments: &[Segment], qkv: &Region, heads: Heads) {
        attention::append(kv, layer, segments, qkv.as_slice(), heads);
    }

    fn attend(
        &self,
        kv: &HostKv,
        span: AttentionSpan,
        segments: &[Segment],
        qkv: &Region,
        heads: Heads,
        out: &mut Region,
    ) {
        attention::attend(self.isa, kv, span, segments, qkv.as_slice(), heads, out.as_mut_slice());
    }

    fn activate(&self, activation: Activation, gated: bool, up: &Region, rows: usize, width: usize, out: &mut Region) {
        let up = &up.as_slice::<f32>()[..rows * width * if gated { 2 } else { 1 }];
        rows::activate(self.isa, activation, gated, up, width, &mut out.as_mut_slice::<f32>()[..rows * width]);
    }

    fn add(&self, x: &mut Region, y: &Region, elements: usize) {
        rows::add(&mut x.as_mut_slice::<f32>()[..elements], &y.as_slice::<f32>()[..elements]);
    }

    fn copy_page(&self, kv: &mut HostKv, from: PageId, to: PageId) {
        let bytes = kv.layout.layer_bytes();
        for layer in 0..kv.layout.num_layers {
            let (from, to) = (kv.offset(layer, from), kv.offset(layer, to));
            kv.memory.bytes_mut().copy_within(from..from + bytes, to);
        }
    }

    fn sample(&self, logits: &Region, vocab_size: usize, draws: &[(usize, &Draw)]) -> Vec<Drawn> {
        let logits = logits.as_slice::<f32>();
        draws
            .par_iter()
            .map(|(row, draw)| sample::draw(self.isa, &logits[row * vocab_size..][..vocab_size], draw))
            .collect()
    }
}
