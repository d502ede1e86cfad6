//! Runs passes on a device: the only place where plan and metal meet.
//!
//! **Invariant:** all memory is allocated by [`Executor::new`]; a pass allocates nothing large.

mod layers;
pub mod load;
pub mod rotary;
pub mod size;

use std::ops::Range;

use crate::device::Device;
use crate::error::Result;
use crate::kv::layout::KvLayout;
use crate::kv::pages::PageId;
use crate::model::Model;
use crate::model::config::ModelConfig;
use crate::schedule::Pass;
use load::Weights;
use rotary::RotaryTables;
use size::{Capacity, Sizes};

/// A loaded model, its KV cache and the activations of one pass.
pub struct Executor<D: Device> {
    device: D,
    config: ModelConfig,
    weights: Weights<D::Buffer>,
    kv: D::Kv,
    buffers: Buffers<D::Buffer>,
    rotary: RotaryTables,
    capacity: Capacity,
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
    /// Allocates everything of `capacity` on `device` and loads the weights, reporting bytes as they are done.
    ///
    /// # Errors
    /// Whatever reading the model's tensors gives.
    pub fn new(mut device: D, model: &Model, layout: KvLayout, capacity: Capacity, on_load: &dyn Fn(u64)) -> Result<Self> {
        let config = model.config.clone();
        let sizes = Sizes::new(&config, &model.source, &capacity);
        let weights = load::load(&mut device, model, on_load)?;
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
        Ok(Executor { device, config, weights, kv, buffers, rotary, capacity })
    }

    /// What one pass and the cache can hold.
    pub fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// Copies a page, all layers.
    pub fn copy_page(&mut self, from: PageId, to: PageId) {
        self.device.copy_page(&mut self.kv, from, to);
    }

    /// Computes a pass: appends its keys and values to their pages, then hands the logits of `pass.outputs` to
    /// `on_logits` in blocks: indices into `pass.outputs`, and as many rows of `vocab_size` logits.
    pub fn run(&mut self, pass: &Pass, mut on_logits: impl FnMut(Range<usize>, &[f32]) -> Result<()>) -> Result<()> {
        assert!(pass.rows() <= self.capacity.rows, "{} rows in a pass of {}", pass.rows(), self.capacity.rows);
        self.rotary.prepare(pass);
        self.embed(pass);
        for layer in 0..self.config.num_layers {
            self.layer(layer, pass);
        }
        let mut done = 0;
        for rows in pass.outputs.chunks(self.capacity.logit_rows) {
            self.head(rows);
            let logits = self.device.read(&self.buffers.logits, rows.len() * self.config.vocab_size);
            on_logits(done..done + rows.len(), &logits)?;
            done += rows.len();
        }
        Ok(())
    }
}
