//! One decoder layer over the rows of a block.
//!
//! **Invariant:** the order of operations is that of the model; nothing here knows where anything came from.

use std::sync::RwLock;

use super::memory::{Activations, write};
use crate::device::{AttentionSpan, Device, Frames, HeadNorms, Heads, KvViewMut};
use crate::device::{Matrix, NormParameters, Rotation, Target};
use crate::kv::pages::Segment;
use crate::model::config::ModelConfig;

/// Norms of a layer.
pub struct LayerNorms<B> {
    /// Before (or after) attention.
    pub attn: NormParameters<B>,
    /// Before (or after) the MLP.
    pub mlp: NormParameters<B>,
    /// Of query and key heads.
    pub heads: Option<HeadNorms<B>>,
}

/// A product's weight and bias.
pub type Linear<'a, B> = (Matrix<'a, B>, Option<&'a B>);

/// A layer and the block that it runs over.
pub struct Layer<'a, D: Device> {
    /// The device.
    pub device: &'a D,
    /// The model.
    pub config: &'a ModelConfig,
    /// Which layer.
    pub index: usize,
    /// Rows of the block.
    pub rows: usize,
    /// Its norms.
    pub norms: &'a LayerNorms<D::Buffer>,
    /// Fused queries, keys, values.
    pub qkv: Linear<'a, D::Buffer>,
    /// Attention output.
    pub o: Linear<'a, D::Buffer>,
    /// Gate and up, or up alone.
    pub up: Linear<'a, D::Buffer>,
    /// Down.
    pub down: Linear<'a, D::Buffer>,
}

/// What attention reads and writes.
pub struct Attention<'a, B> {
    /// Frames that stay with the device.
    pub kv: &'a mut Frames<B>,
    /// Frames that were brought in for the block.
    pub pages: Option<&'a RwLock<Frames<B>>>,
    /// The block's segments, by frames.
    pub segments: &'a [Segment],
    /// The rows' rotation; none for models without rotary positions.
    pub rotation: Option<Rotation<'a>>,
    /// Their rotation back for the first positions, where some segment's middle is gone.
    pub sinks: Option<Rotation<'a>>,
}

impl<D: Device> Layer<'_, D> {
    /// Computes the layer in place.
    pub fn run(&self, a: &mut Activations<D::Buffer>, hidden: &mut D::Buffer, attention: Attention<'_, D::Buffer>) {
        let (rows, width, device) = (self.rows, self.config.hidden_size, self.device);
        let first = self.config.norm_first;
        if first {
            device.norm(hidden, rows, width, &self.norms.attn, &mut a.normed);
        }
        self.attention(a, hidden, attention);
        if self.config.parallel_residual {
            // The MLP reads the layer's input, so its norm comes before attention's update is added.
            device.norm(hidden, rows, width, &self.norms.mlp, &mut a.normed);
            device.add(hidden, &a.update, rows * width);
            self.mlp(a, hidden);
            device.add(hidden, &a.update, rows * width);
            return;
        }
        let norm = if first { &self.norms.mlp } else { &self.norms.attn };
        device.add_norm(hidden, &a.update, rows, width, norm, &mut a.normed);
        if first {
            self.mlp(a, hidden);
            device.add(hidden, &a.update, rows * width);
            return;
        }
        std::mem::swap(hidden, &mut a.normed);
        self.mlp(a, hidden);
        device.add_norm(hidden, &a.update, rows, width, &self.norms.mlp, &mut a.normed);
        std::mem::swap(hidden, &mut a.normed);
    }

    /// Attention of the normalised (or, with the norm after it, plain) rows into `update`.
    fn attention(&self, a: &mut Activations<D::Buffer>, hidden: &D::Buffer, attention: Attention<'_, D::Buffer>) {
        let (rows, device, config) = (self.rows, self.device, self.config);
        let heads = Heads { num_heads: config.num_heads, num_kv_heads: config.num_kv_heads, head_dim: config.head_dim };
        let Attention { kv, pages, segments, rotation, sinks } = attention;
        let input = if config.norm_first { &a.normed } else { hidden };
        let to = Target { buffer: &mut a.qkv, stride: self.qkv.0.outputs, column: 0 };
        device.linear(input, rows, &self.qkv.0, self.qkv.1, &mut a.scratch, to);
        if let Some(norms) = &self.norms.heads {
            device.norm_heads(&mut a.qkv, rows, heads, norms);
        }
        if let Some(rotation) = rotation {
            device.rotate(&mut a.qkv, rows, heads, &rotation);
        }
        let (window, scale) = (config.sliding_window[self.index], config.attention_scale);
        let span = AttentionSpan { window, scale, sinks: sinks.as_ref() };
        {
            let mut streamed = pages.map(write);
            let view = KvViewMut { resident: kv, streamed: streamed.as_deref_mut() };
            device.append_kv(view, segments, &a.qkv, heads);
            let view = KvViewMut { resident: kv, streamed: streamed.as_deref_mut() };
            device.attend(view, span, segments, &a.qkv, heads, &mut a.attended);
        }
        let to = Target { buffer: &mut a.update, stride: self.o.0.outputs, column: 0 };
        device.linear(&a.attended, rows, &self.o.0, self.o.1, &mut a.scratch, to);
    }

    /// The MLP of the normalised (or plain) rows into `update`.
    fn mlp(&self, a: &mut Activations<D::Buffer>, hidden: &D::Buffer) {
        let (rows, device, config) = (self.rows, self.device, self.config);
        let input = if config.norm_first { &a.normed } else { hidden };
        let to = Target { buffer: &mut a.up, stride: self.up.0.outputs, column: 0 };
        device.linear(input, rows, &self.up.0, self.up.1, &mut a.scratch, to);
        device.activate(config.activation, config.gated_mlp, &a.up, rows, config.intermediate_size, &mut a.activated);
        let to = Target { buffer: &mut a.update, stride: self.down.0.outputs, column: 0 };
        device.linear(&a.activated, rows, &self.down.0, self.down.1, &mut a.scratch, to);
    }
}
