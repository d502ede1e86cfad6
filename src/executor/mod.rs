//! Runs passes on a device: the only place where plan and metal meet.
//!
//! **Invariant:** all memory is allocated by [`Executor::new`]; a pass allocates nothing large.

mod layers;
pub mod load;
pub mod rotary;
pub mod size;

use crate::device::Device;
use crate::device::sampling::{Draw, Drawn};
use crate::error::Result;
use crate::kv::pages::PageId;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::schedule::Pass;
use load::Weights;
use rotary::RotaryTables;
use size::{Capacity, Shape, Sizes};

/// A loaded model, its KV cache and the activations of one pass.
pub struct Executor<D: Device> {
    device: D,
    config: ModelConfig,
    weights: Weights<D::Buffer>,
    kv: D::Kv,
    buffers: Buffers<D::Buffer>,
    rotary: RotaryTables,
    capacity: Capacity,
    page_bytes: usize,
}

/// Activations; extents in [`Sizes`].
struct Buffers<B> {
    hidden: B,
    normed: B,
    qkv: B,
    attended: B,
    up: B,
    activated: B,
    update: B,
    scratch: B,
    logits: B,
}

impl<D: Device> Executor<D> {
    /// Allocates everything of `shape` on `device` and loads the weights.
    ///
    /// # Errors
    /// Whatever reading the model's tensors gives.
    pub fn new(mut device: D, model: &Model, shape: Shape) -> Result<Self> {
        let Shape { weights, layout, capacity } = shape;
        let config = model.config.clone();
        let sizes = Sizes::new(&config, &model.source, &capacity);
        let weights = load::load(&mut device, model, weights)?;
        let memory = device.allocate(capacity.pages * layout.page_bytes())?;
        let kv = device.kv_cache(memory, layout, capacity.pages);
        let mut buffer = |elements: usize| device.allocate(elements * size_of::<f32>());
        let buffers = Buffers {
            hidden: buffer(sizes.hidden)?,
            normed: buffer(sizes.hidden)?,
            qkv: buffer(sizes.qkv)?,
            attended: buffer(sizes.attended)?,
            up: buffer(sizes.up)?,
            activated: buffer(sizes.activated)?,
            update: buffer(sizes.hidden)?,
            scratch: buffer(sizes.scratch)?,
            logits: buffer(sizes.logits)?,
        };
        let rotary = RotaryTables::new(&config);
        let page_bytes = layout.page_bytes();
        Ok(Executor { device, config, weights, kv, buffers, rotary, capacity, page_bytes })
    }

    /// What one pass and the cache can hold.
    pub fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// Bytes of a page of the KV cache.
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// The device that it runs on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// Copies a page, all layers.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        self.device.copy_page(&mut self.kv, from, to);
    }

    /// Computes a pass: appends its keys and values to their pages and answers `draws`, which are in ascending
    /// order of their rows.
    pub fn run(&mut self, pass: &Pass, draws: &[Draw]) -> Vec<Drawn> {
        assert!(pass.rows() <= self.capacity.rows, "{} rows in a pass of {}", pass.rows(), self.capacity.rows);
        assert!(draws.is_sorted_by_key(|draw| draw.row));
        self.rotary.prepare(pass);
        self.embed(pass);
        for layer in 0..self.config.num_layers {
            self.layer(layer, pass);
        }
        let mut drawn = Vec::with_capacity(draws.len());
        let mut rows: Vec<usize> = draws.iter().map(|draw| draw.row).collect();
        rows.dedup();
        let mut rest = draws;
        for rows in rows.chunks(self.capacity.logit_rows) {
            self.head(rows);
            let count = rest.partition_point(|draw| draw.row <= rows[rows.len() - 1]);
            let (block, others) = rest.split_at(count);
            rest = others;
            let within = |draw: &Draw| rows.binary_search(&draw.row).expect("rows are those of the draws");
            let block: Vec<(usize, &Draw)> = block.iter().map(|draw| (within(draw), draw)).collect();
            drawn.extend(self.device.sample(&self.buffers.logits, self.config.vocab_size, &block));
        }
        drawn
    }
}
