//! The dozen operations of a transformer, on a device.
//!
//! **Invariant:** an operation's result for a row depends on that row (and, in attention, on its own sequence)
//! alone, never on which rows share the call. A device knows no policy and no schedule.

pub mod host;
pub mod sampling;

use crate::error::Result;
use crate::kv::layout::KvLayout;
use crate::kv::pages::{PageId, Segment};
use crate::model::config::{Activation, Norm};
use crate::model::dtype::DType;
use sampling::{Draw, Drawn};

/// A packed weight matrix: panels of 16 outputs, each (inputs padded to 64, 16), in the device's memory.
pub struct Matrix<B> {
    /// The panels.
    pub data: B,
    /// Element type.
    pub dtype: DType,
    /// Input width.
    pub inputs: usize,
    /// Output width.
    pub outputs: usize,
}

/// Heads of an attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of a row of fused queries, keys and values.
    pub fn qkv_width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Width of a row of queries or of attention outputs.
    pub fn query_width(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// Rotation of a pass's rows.
pub struct Rotation<'a> {
    /// Cosines, (rows, rotary_dim / 2).
    pub cos: &'a [f32],
    /// Sines, likewise.
    pub sin: &'a [f32],
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
}

/// Which keys a query sees, and how scores are scaled.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpan {
    /// The decoder layer.
    pub layer: usize,
    /// Keys k > q - window only.
    pub window: Option<usize>,
    /// Multiplies the products.
    pub scale: f32,
}

/// A place that computes. Buffers hold f32 rows unless said otherwise; `rows` counts the leading rows in use.
pub trait Device: Send + Sync {
    /// Memory of the device.
    type Buffer: Send + Sync;
    /// The KV cache in the device's memory.
    type Kv: Send + Sync;

    /// The next `bytes` of the device's arena, zeroed. Sizes were summed against the budget beforehand.
    fn allocate(&mut self, bytes: usize) -> Result<Self::Buffer>;

    /// Makes a KV cache of `pages` pages out of `memory`.
    fn kv_cache(&self, memory: Self::Buffer, layout: KvLayout, pages: usize) -> Self::Kv;

    /// Bytes to be written into a buffer that is being loaded.
    fn upload(&self, to: &mut Self::Buffer, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()>;

    /// `out[r] = table row tokens[r]`; the table is packed with vocabulary as outputs, width as inputs.
    fn embed(&self, table: &Matrix<Self::Buffer>, tokens: &[u32], out: &mut Self::Buffer);

    /// `x[r] += table[rows[r]]`; the table holds f32 rows of `width`.
    fn add_rows(&self, table: &Self::Buffer, indices: &[u32], width: usize, x: &mut Self::Buffer);

    /// `out[r] = x[indices[r]]`, rows of `width`.
    fn gather(&self, x: &Self::Buffer, indices: &[usize], width: usize, out: &mut Self::Buffer);

    /// Normalises rows of `width`.
    fn norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        width: usize,
        parameters: &NormParameters<Self::Buffer>,
        out: &mut Self::Buffer,
    );

    /// `y = x w^T + bias`; `scratch` holds at least as many elements as x.
    fn linear(
        &self,
        x: &Self::Buffer,
        rows: usize,
        w: &Matrix<Self::Buffer>,
        bias: Option<&Self::Buffer>,
        scratch: &mut Self::Buffer,
        y: &mut Self::Buffer,
    );

    /// RMSNorm of every query head and key head within rows of fused q, k, v (Qwen3).
    fn norm_heads(&self, qkv: &mut Self::Buffer, rows: usize, heads: Heads, norms: &HeadNorms<Self::Buffer>);

    /// Rotates queries and keys within rows of fused q, k, v.
    fn rotate(&self, qkv: &mut Self::Buffer, rows: usize, heads: Heads, rotation: &Rotation<'_>);

    /// Stores the keys and values of every segment's rows into its pages.
    fn append_kv(&self, kv: &mut Self::Kv, layer: usize, segments: &[Segment], qkv: &Self::Buffer, heads: Heads);

    /// Attention of every segment's queries over its positions, reading keys and values as stored.
    fn attend(
        &self,
        kv: &Self::Kv,
        span: AttentionSpan,
        segments: &[Segment],
        qkv: &Self::Buffer,
        heads: Heads,
        out: &mut Self::Buffer,
    );

    /// `out = act(up)`, or `act(gate) * up` for rows of `[gate | up]`, each of `width`.
    fn activate(
        &self,
        activation: Activation,
        gated: bool,
        up: &Self::Buffer,
        rows: usize,
        width: usize,
        out: &mut Self::Buffer,
    );

    /// `x += y` over `elements`.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, elements: usize);

    /// Copies all layers of page `from` to page `to`.
    fn copy_page(&self, kv: &mut Self::Kv, from: PageId, to: PageId);

    /// Answers each draw from its row of `logits`, (rows, vocab_size).
    fn sample(&self, logits: &Self::Buffer, vocab_size: usize, draws: &[(usize, &Draw)]) -> Vec<Drawn>;
}

/// A normalisation's parameters in the device's memory, f32.
pub struct NormParameters<B> {
    /// Which normalisation.
    pub norm: Norm,
    /// The scale.
    pub weight: B,
    /// The shift.
    pub bias: Option<B>,
}

/// Norms of query and key heads.
pub struct HeadNorms<B> {
    /// Epsilon of the RMSNorm.
    pub eps: f32,
    /// Scale of query heads, (head_dim).
    pub query: B,
    /// Scale of key heads, (head_dim).
    pub key: B,
}
