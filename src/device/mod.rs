//! The dozen operations of a transformer, on a device.
//!
//! **Invariant:** an operation's result for a row depends on that row (and, in attention, on its own sequence)
//! alone, never on which rows share the call. A device knows no policy and no schedule.

pub mod cuda;
pub mod host;
pub mod sampling;

use std::ops::Range;

use crate::error::Result;
use crate::kv::layout::KvLayout;
use crate::kv::pages::Segment;
use crate::model::config::{Activation, Norm};
use crate::model::dtype::DType;
use sampling::{Draw, Drawn};

/// A packed weight matrix: panels of 16 outputs, each (inputs padded to 64, 16), in the device's memory.
pub struct Matrix<'a, B> {
    /// The panels, in pieces of whole panels.
    pub pieces: Vec<Piece<'a, B>>,
    /// Element type.
    pub dtype: DType,
    /// Input width.
    pub inputs: usize,
    /// Output width.
    pub outputs: usize,
}

/// Consecutive panels of a matrix.
pub struct Piece<'a, B> {
    /// The memory that they lie in.
    pub buffer: &'a B,
    /// Where they lie in it.
    pub bytes: Range<usize>,
}

/// Where a product goes: row r begins at element `r * stride + column`.
pub struct Target<'a, B> {
    /// The memory.
    pub buffer: &'a mut B,
    /// Elements from row to row.
    pub stride: usize,
    /// Elements before the first.
    pub column: usize,
}

/// Frames of the KV cache: a frame holds one layer of one page.
pub struct Frames<B> {
    /// The memory.
    pub memory: B,
    /// How a frame is laid out.
    pub layout: KvLayout,
    /// Bytes from frame to frame.
    pub stride: usize,
    /// How many.
    pub count: usize,
}

/// What attention reads and writes: frames that stay with the device, then those that were brought in for a block.
/// Segments count frames over both.
pub struct KvViewMut<'a, B> {
    /// Frames that stay.
    pub resident: &'a mut Frames<B>,
    /// Frames that were brought in.
    pub streamed: Option<&'a mut Frames<B>>,
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
#[derive(Debug)]
pub struct Rotation<'a> {
    /// Cosines, (rows, rotary_dim / 2).
    pub cos: &'a [f32],
    /// Sines, likewise.
    pub sin: &'a [f32],
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
}

/// Which keys a query sees, besides what its segment says, and how scores are scaled.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSpan<'a> {
    /// Keys k > q - window only.
    pub window: Option<usize>,
    /// Multiplies the products.
    pub scale: f32,
    /// Rotates a row's queries back to where they stand within a cache whose middle is gone, for the positions at its
    /// beginning; none where no segment has such a cache or nothing rotates.
    pub sinks: Option<&'a Rotation<'a>>,
}

/// What a device does beside each other, each in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Operations.
    Compute,
    /// Copies into the device's memory.
    In,
    /// Copies out of it.
    Out,
}

/// A place that computes. Buffers hold f32 rows unless said otherwise; `rows` counts the leading rows in use.
///
/// Operations and copies are handed over and may run later, each [`Stream`]'s in the order in which they were handed
/// over, streams beside each other. Marks order streams, and tell when something is over: what a copy reads and writes,
/// on both of its sides, is left alone until a mark behind it has been passed. What has gone wrong is told by the next
/// mark or wait, and nothing is computed after it.
pub trait Device: Send + Sync + 'static {
    /// Memory of the device.
    type Buffer: Send + Sync + 'static;

    /// A point in what a stream was given, passed when all before it is over.
    type Mark: Clone + Send + Sync + 'static;

    /// The next `bytes` of the device's arena, zeroed. Sizes were summed against the budget beforehand. Buffers of
    /// multiples of 4 KiB, allocated first, begin on such a boundary.
    fn allocate(&mut self, bytes: usize) -> Self::Buffer;

    /// Whether products with weights of small integers round activations to 8 bits, in groups of 64 inputs: faster, and
    /// less exact. Not so at first, and never in matrices of fewer than 64 inputs.
    fn round_activations(&mut self, round: bool);

    /// Bytes of the arena that have been handed out.
    fn used_bytes(&self) -> usize;

    /// The bytes of a buffer, where main memory is the device's memory.
    fn bytes<'a>(&self, buffer: &'a Self::Buffer) -> Option<&'a [u8]>;

    /// As [`Device::bytes`], writable.
    fn bytes_mut<'a>(&self, buffer: &'a mut Self::Buffer) -> Option<&'a mut [u8]>;

    /// Copies parts of main memory into a buffer, each from the byte on that stands beside it, on [`Stream::In`]. Parts
    /// that do not lie in the arena of main memory that belongs to the device are copied when this returns.
    ///
    /// # Errors
    /// When the device fails.
    fn copy_in(&self, parts: &[(&[u8], usize)], to: &mut Self::Buffer) -> Result<()>;

    /// Copies a buffer's bytes, from the byte on that stands beside each part, to these parts of main memory, on
    /// [`Stream::Out`]. As with [`Device::copy_in`], parts that lie anywhere are there when this returns.
    ///
    /// # Errors
    /// When the device fails.
    fn copy_out(&self, from: &Self::Buffer, parts: &mut [(usize, &mut [u8])]) -> Result<()>;

    /// A mark behind everything that a stream was given so far.
    ///
    /// # Errors
    /// The first thing that went wrong with handing over.
    fn mark(&self, stream: Stream) -> Result<Self::Mark>;

    /// Makes what a stream is given from now on begin after a mark of another stream.
    ///
    /// # Errors
    /// When the device fails.
    fn follow(&self, stream: Stream, mark: &Self::Mark) -> Result<()>;

    /// Whether a mark has been passed.
    ///
    /// # Errors
    /// What went wrong on the way to it.
    fn passed(&self, mark: &Self::Mark) -> Result<bool>;

    /// Waits, asleep, until a mark has been passed.
    ///
    /// # Errors
    /// What went wrong on the way to it.
    fn wait(&self, mark: &Self::Mark) -> Result<()>;

    /// Seconds from one mark to another, both passed.
    ///
    /// # Errors
    /// When the device fails.
    fn between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;

    /// Waits until everything that was handed over is over.
    ///
    /// # Errors
    /// The first thing that went wrong, now and every time after.
    fn finish(&self) -> Result<()>;

    /// `out[r] = table row tokens[r]`; the table is packed with vocabulary as outputs, width as inputs.
    fn embed(&self, table: &Matrix<'_, Self::Buffer>, tokens: &[u32], out: &mut Self::Buffer);

    /// `x[r] += table[rows[r]]`; the table holds f32 rows of `width`.
    fn add_rows(&self, table: &Self::Buffer, indices: &[u32], width: usize, x: &mut Self::Buffer);

    /// `out[first + r] = x[indices[r]]`, rows of `width`.
    fn gather(&self, x: &Self::Buffer, indices: &[usize], width: usize, out: &mut Self::Buffer, first: usize);

    /// Normalises rows of `width`.
    fn norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        width: usize,
        parameters: &NormParameters<Self::Buffer>,
        out: &mut Self::Buffer,
    );

    /// `x += y`, then as [`Device::norm`].
    fn add_norm(
        &self,
        x: &mut Self::Buffer,
        y: &Self::Buffer,
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
        w: &Matrix<'_, Self::Buffer>,
        bias: Option<&Self::Buffer>,
        scratch: &mut Self::Buffer,
        y: Target<'_, Self::Buffer>,
    );

    /// RMSNorm of every query head and key head within rows of fused q, k, v (Qwen3).
    fn norm_heads(&self, qkv: &mut Self::Buffer, rows: usize, heads: Heads, norms: &HeadNorms<Self::Buffer>);

    /// Rotates queries and keys within rows of fused q, k, v.
    fn rotate(&self, qkv: &mut Self::Buffer, rows: usize, heads: Heads, rotation: &Rotation<'_>);

    /// Stores the keys and values of every segment's rows into its frames; not of segments that evict by attention,
    /// whose keys find their slots as they are attended to.
    fn append_kv(&self, kv: KvViewMut<'_, Self::Buffer>, segments: &[Segment], qkv: &Self::Buffer, heads: Heads);

    /// Attention of every segment's queries over what is kept of its positions, reading keys and values as stored.
    /// Segments that evict by attention do all of it here, stretch by stretch: storing, attending, scoring, evicting.
    fn attend(
        &self,
        kv: KvViewMut<'_, Self::Buffer>,
        span: AttentionSpan<'_>,
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

    /// Copies frame `from` to frame `to`.
    fn copy_frame(&self, frames: &mut Frames<Self::Buffer>, from: usize, to: usize);

    /// Answers each draw from its row of `logits`, (rows, vocab_size). After a failure, which [`Device::finish`] tells,
    /// the answers mean nothing.
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
