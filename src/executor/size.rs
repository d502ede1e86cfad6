//! How much memory a capacity takes, before anything is allocated.
//!
//! **Invariant:** [`total_bytes`] is what [`super::Executor::new`] carves, to the byte.

use crate::kv::layout::KvLayout;
use crate::memory::arena::aligned;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;
use crate::model::packed::panels::packed_bytes;
use crate::model::source::ModelSource;

/// What a pass and the cache can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Rows of a pass.
    pub rows: usize,
    /// Rows whose logits are computed together.
    pub logit_rows: usize,
    /// Pages of the KV cache.
    pub pages: usize,
}

/// What decides how much memory an executor takes.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Store matrices in this dtype rather than the checkpoint's.
    pub weights: Option<DType>,
    /// How the KV cache is laid out.
    pub layout: KvLayout,
    /// What a pass and the cache can hold.
    pub capacity: Capacity,
}

/// Elements of each activation buffer.
pub struct Sizes {
    /// (rows, hidden or embedding width).
    pub hidden: usize,
    /// (rows, fused q, k, v).
    pub qkv: usize,
    /// (rows, query width).
    pub attended: usize,
    /// (rows, gate and up).
    pub up: usize,
    /// (rows, MLP width).
    pub activated: usize,
    /// Rows of the widest product input.
    pub scratch: usize,
    /// (logit rows, vocabulary).
    pub logits: usize,
}

impl Sizes {
    /// The buffers for `capacity`.
    pub fn new(config: &ModelConfig, source: &ModelSource, capacity: &Capacity) -> Self {
        let rows = capacity.rows;
        let layer = |f: fn(&crate::model::source::LayerSource) -> usize| source.layers.iter().map(f).max().unwrap_or(0);
        let hidden = config.hidden_size.max(config.embed_size);
        let attended = config.num_heads * config.head_dim;
        let widest = hidden.max(attended).max(config.intermediate_size);
        Sizes {
            hidden: rows * hidden,
            qkv: rows * layer(|layer| layer.qkv.outputs),
            attended: rows * attended,
            up: rows * layer(|layer| layer.up.outputs),
            activated: rows * config.intermediate_size,
            scratch: rows * widest,
            logits: capacity.logit_rows * config.vocab_size,
        }
    }

    /// Bytes of all of them in an arena.
    pub fn bytes(&self) -> usize {
        let all = [self.hidden, self.hidden, self.hidden, self.qkv, self.attended, self.up, self.activated];
        let rest = [self.scratch, self.logits];
        all.iter().chain(&rest).map(|elements| aligned(elements * size_of::<f32>())).sum()
    }
}

/// Bytes of the packed weights.
pub fn weight_bytes(model: &Model, weights: Option<DType>) -> usize {
    super::load::matrices(model, weights)
        .iter()
        .map(|matrix| {
            let packed = packed_bytes(matrix.linear.inputs, matrix.linear.outputs, matrix.dtype);
            let bias = matrix.linear.bias.as_ref().map_or(0, |_| aligned(matrix.linear.outputs * 4));
            aligned(packed) + bias
        })
        .sum::<usize>()
        + super::load::vector_elements(model).into_iter().map(|elements| aligned(elements * 4)).sum::<usize>()
}

/// Bytes of everything: weights, KV cache, activations.
pub fn total_bytes(model: &Model, shape: &Shape) -> usize {
    let activations = Sizes::new(&model.config, &model.source, &shape.capacity).bytes();
    let kv = aligned(shape.capacity.pages * shape.layout.page_bytes());
    weight_bytes(model, shape.weights) + kv + activations
}
