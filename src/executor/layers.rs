//! One pass through the decoder: embedding, layers, head.
//!
//! **Invariant:** every family runs through the same straight line; what differs is data in the configuration.

use super::Executor;
use super::load::Linear;
use crate::device::{AttentionSpan, Device, Heads};
use crate::model::config::Positions;
use crate::schedule::Pass;

impl<D: Device> Executor<D> {
    fn heads(&self) -> Heads {
        Heads {
            num_heads: self.config.num_heads,
            num_kv_heads: self.config.num_kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    /// Embeddings (and learned positions) of every row into `hidden`.
    pub(super) fn embed(&mut self, pass: &Pass) {
        let Executor { device, weights, buffers, config, .. } = self;
        match &weights.project_in {
            None => device.embed(&weights.embed, &pass.tokens, &mut buffers.hidden),
            Some(project) => {
                device.embed(&weights.embed, &pass.tokens, &mut buffers.normed);
                let Linear { weight, bias } = project;
                let scratch = &mut buffers.scratch;
                device.linear(&buffers.normed, pass.rows(), weight, bias.as_ref(), scratch, &mut buffers.hidden);
            }
        }
        if let (Some(table), Positions::Learned { offset }) = (&weights.positions, &config.positions) {
            let indices: Vec<u32> = pass.positions.iter().map(|position| position + *offset as u32).collect();
            device.add_rows(table, &indices, config.hidden_size, &mut buffers.hidden);
        }
    }

    /// One decoder layer over all rows.
    pub(super) fn layer(&mut self, index: usize, pass: &Pass) {
        let rows = pass.rows();
        let width = self.config.hidden_size;
        if self.config.norm_first {
            let Executor { device, weights, buffers, .. } = self;
            device.norm(&buffers.hidden, rows, width, &weights.layers[index].attn_norm, &mut buffers.normed);
        }
        self.attention(index, pass);
        if self.config.parallel_residual {
            // The MLP reads the layer's input, so its norm comes before attention's update is added.
            let Executor { device, weights, buffers, .. } = self;
            device.norm(&buffers.hidden, rows, width, &weights.layers[index].mlp_norm, &mut buffers.normed);
            device.add(&mut buffers.hidden, &buffers.update, rows * width);
            self.mlp(index, rows);
            let Executor { device, buffers, .. } = self;
            device.add(&mut buffers.hidden, &buffers.update, rows * width);
            return;
        }
        let Executor { device, weights, buffers, config, .. } = self;
        let layer = &weights.layers[index];
        device.add(&mut buffers.hidden, &buffers.update, rows * width);
        if config.norm_first {
            device.norm(&buffers.hidden, rows, width, &layer.mlp_norm, &mut buffers.normed);
        } else {
            device.norm(&buffers.hidden, rows, width, &layer.attn_norm, &mut buffers.normed);
            std::mem::swap(&mut buffers.hidden, &mut buffers.normed);
        }
        self.mlp(index, rows);
        let Executor { device, weights, buffers, config, .. } = self;
        device.add(&mut buffers.hidden, &buffers.update, rows * width);
        if !config.norm_first {
            device.norm(&buffers.hidden, rows, width, &weights.layers[index].mlp_norm, &mut buffers.normed);
            std::mem::swap(&mut buffers.hidden, &mut buffers.normed);
        }
    }

    /// Attention of the normalised (or, with the norm after it, plain) rows into `update`.
    fn attention(&mut self, index: usize, pass: &Pass) {
        let (rows, heads) = (pass.rows(), self.heads());
        let Executor { device, weights, buffers, config, kv, rotary, .. } = self;
        let layer = &weights.layers[index];
        let input = if config.norm_first { &buffers.normed } else { &buffers.hidden };
        let Linear { weight, bias } = &layer.qkv;
        device.linear(input, rows, weight, bias.as_ref(), &mut buffers.scratch, &mut buffers.qkv);
        if let Some(norms) = &layer.head_norms {
            device.norm_heads(&mut buffers.qkv, rows, heads, norms);
        }
        if let Some(rotation) = rotary.rotation() {
            device.rotate(&mut buffers.qkv, rows, heads, &rotation);
        }
        device.append_kv(kv, index, &pass.segments, &buffers.qkv, heads);
        let span = AttentionSpan { layer: index, window: config.sliding_window[index], scale: config.attention_scale };
        device.attend(kv, span, &pass.segments, &buffers.qkv, heads, &mut buffers.attended);
        let Linear { weight, bias } = &layer.o;
        device.linear(&buffers.attended, rows, weight, bias.as_ref(), &mut buffers.scratch, &mut buffers.update);
    }

    /// The MLP of the normalised (or plain) rows into `update`.
    fn mlp(&mut self, index: usize, rows: usize) {
        let Executor { device, weights, buffers, config, .. } = self;
        let layer = &weights.layers[index];
        let input = if config.norm_first { &buffers.normed } else { &buffers.hidden };
        let (gated, width) = (config.gated_mlp, config.intermediate_size);
        let Linear { weight, bias } = &layer.up;
        device.linear(input, rows, weight, bias.as_ref(), &mut buffers.scratch, &mut buffers.up);
        device.activate(config.activation, gated, &buffers.up, rows, width, &mut buffers.activated);
        let Linear { weight, bias } = &layer.down;
        device.linear(&buffers.activated, rows, weight, bias.as_ref(), &mut buffers.scratch, &mut buffers.update);
    }

    /// Logits of some rows.
    pub(super) fn head(&mut self, rows: &[usize]) {
        let Executor { device, weights, buffers, config, .. } = self;
        let (count, width) = (rows.len(), config.hidden_size);
        device.gather(&buffers.hidden, rows, width, &mut buffers.update);
        if let Some(norm) = &weights.final_norm {
            device.norm(&buffers.update, count, width, norm, &mut buffers.normed);
            std::mem::swap(&mut buffers.update, &mut buffers.normed);
        }
        if let Some(Linear { weight, bias }) = &weights.project_out {
            device.linear(&buffers.update, count, weight, bias.as_ref(), &mut buffers.scratch, &mut buffers.normed);
            std::mem::swap(&mut buffers.update, &mut buffers.normed);
        }
        let (weight, bias) = match &weights.head {
            Some(Linear { weight, bias }) => (weight, bias.as_ref()),
            None => (&weights.embed, None),
        };
        device.linear(&buffers.update, count, weight, bias, &mut buffers.scratch, &mut buffers.logits);
    }
}
