//! What the computing lane does: embedding, layers, head.
//!
//! **Invariant:** every family runs through the same straight line; what differs is data in the configuration. A
//! block's result does not depend on the blocks beside it, or on where its weights and pages came from.

use super::layer::{Attention, Layer, LayerNorms};
use super::memory::{Own, Shared, read, write};
use super::pass::PassData;
use crate::device::sampling::{Draw, Drawn};
use crate::device::{Device, Frames, HeadNorms, Matrix, NormParameters, Piece, Target};
use crate::kv::pages::Segment;
use crate::model::config::{ModelConfig, Norm, Positions};
use crate::model::packed::layout::{ModelLayout, StageId};
use crate::schedule::pass::{Block, Frame, frame};
use crate::schedule::placement::Placement;
use crate::schedule::step::{Slot, Step};

/// What computing needs to know, besides memory.
pub struct Fixed<D: Device> {
    /// The device.
    pub device: D,
    /// The model.
    pub config: ModelConfig,
    /// How its weights are cut.
    pub layout: ModelLayout,
    /// Where everything lies.
    pub placement: Placement,
    /// Stages of a pass by name.
    pub stages: Vec<StageId>,
}

/// The computing lane's own state.
pub struct Compute<D: Device> {
    /// Its memory; norms are built once from the small tensors.
    own: Own<D::Buffer>,
    norms: Vec<LayerNorms<D::Buffer>>,
    final_norm: Option<NormParameters<D::Buffer>>,
    drawn: Vec<Drawn>,
}

/// Hidden state of a block: with the device for good, or in a slot.
enum Hidden<'a, B> {
    Own(&'a mut B),
    Slot(std::sync::RwLockWriteGuard<'a, B>),
}

impl<B> Hidden<'_, B> {
    fn get(&mut self) -> &mut B {
        match self {
            Hidden::Own(buffer) => buffer,
            Hidden::Slot(guard) => guard,
        }
    }
}

fn slot_of(step: &Step, wanted: impl Fn(Slot) -> Option<u32>) -> Option<usize> {
    step.reads.iter().chain(step.writes.iter()).find_map(wanted).map(|index| index as usize)
}

impl<D: Device> Compute<D> {
    /// Takes the memory over.
    pub fn new(mut own: Own<D::Buffer>, config: &ModelConfig) -> Self {
        let mut norm = |key: String| {
            let weight = own.small.remove(&format!("{key}.weight"))?;
            Some(NormParameters { norm: config.norm, weight, bias: own.small.remove(&format!("{key}.bias")) })
        };
        let layers: Vec<_> = (0..config.num_layers)
            .map(|layer| (norm(format!("layers.{layer}.attn_norm")), norm(format!("layers.{layer}.mlp_norm"))))
            .collect();
        let final_norm = norm("final_norm".into());
        let norms = layers.into_iter().enumerate().map(|(layer, (attn, mlp))| {
            let mut vector = |name: &str| own.small.remove(&format!("layers.{layer}.{name}"));
            let heads = match (vector("q_norm"), vector("k_norm"), config.norm) {
                (Some(query), Some(key), Norm::Rms { eps }) => Some(HeadNorms { eps, query, key }),
                _ => None,
            };
            let present = "every layer has both norms";
            LayerNorms { attn: attn.expect(present), mlp: mlp.expect(present), heads }
        });
        let norms = norms.collect();
        Compute { own, norms, final_norm, drawn: Vec::new() }
    }

    /// Answers of the pass so far.
    pub fn take_drawn(&mut self) -> Vec<Drawn> {
        std::mem::take(&mut self.drawn)
    }

    /// Copies a page that stays with the device to another one, all layers.
    pub fn copy_page(&mut self, device: &D, placement: &Placement, from: usize, to: usize) {
        let pages = placement.pages[placement.compute as usize];
        for layer in 0..placement.num_layers {
            device.copy_frame(&mut self.own.kv, layer * pages + from, layer * pages + to);
        }
    }

    /// The resident frames.
    pub fn frames(&mut self) -> &mut Frames<D::Buffer> {
        &mut self.own.kv
    }

    fn hidden<'a>(
        hidden: &'a mut [D::Buffer],
        shared: &'a Shared<D::Buffer>,
        placement: &Placement,
        step: &Step,
    ) -> Hidden<'a, D::Buffer> {
        let slot = |slot| if let Slot::Hidden(index) = slot { Some(index) } else { None };
        match slot_of(step, slot) {
            Some(index) => Hidden::Slot(write(&shared.hidden[index])),
            None => {
                let before = &placement.hidden[..step.block as usize];
                Hidden::Own(&mut hidden[before.iter().filter(|&&tier| tier == placement.compute).count()])
            }
        }
    }

    /// Embeddings (and learned positions) of a block's rows.
    pub fn embed(&mut self, fixed: &Fixed<D>, shared: &Shared<D::Buffer>, pass: &PassData, step: &Step) {
        let Fixed { device, config, layout, placement, .. } = fixed;
        let block = &pass.blocks[step.block as usize];
        let rows = block.rows.len();
        let Own { small, activations, hidden, table, head, .. } = &mut self.own;
        let mut hidden = Self::hidden(hidden, shared, placement, step);
        let hidden = hidden.get();
        let project = small.get("project_in");
        let target = if project.is_some() { &mut activations.normed } else { &mut *hidden };
        match &shared.embeddings {
            Some(place) => {
                let indices: Vec<usize> = (0..rows).collect();
                device.gather(&read(place), &indices, config.embed_size, target, 0);
            }
            None => {
                let parts = if table.is_empty() { head } else { table };
                let all = |part: usize| layout.table[part].chunks.len();
                let part = |(part, buffer)| fixed.matrix(StageId::Table(part), 0, all(part), buffer, None).pieces;
                let pieces = parts.iter().enumerate().flat_map(part).collect();
                let (inputs, outputs) = (config.embed_size, config.vocab_size);
                let table = Matrix { pieces, dtype: layout.table[0].matrices[0].dtype, inputs, outputs };
                device.embed(&table, &pass.tokens[block.rows.clone()], target);
            }
        }
        if let Some(data) = project {
            let matrix = fixed.small_matrix("project_in", data);
            let to = Target { buffer: hidden, stride: config.hidden_size, column: 0 };
            let bias = small.get("project_in.bias");
            device.linear(&activations.normed, rows, &matrix, bias, &mut activations.scratch, to);
        }
        if let (Some(table), Positions::Learned { offset }) = (small.get("positions"), &config.positions) {
            let positions = &pass.positions[block.rows.clone()];
            let indices: Vec<u32> = positions.iter().map(|position| position + *offset as u32).collect();
            device.add_rows(table, &indices, config.hidden_size, hidden);
        }
    }

    /// One decoder layer of a block.
    pub fn layer(&mut self, fixed: &Fixed<D>, shared: &Shared<D::Buffer>, pass: &PassData, step: &Step) {
        let Fixed { device, config, placement, .. } = fixed;
        let index = step.stage as usize;
        let block = &pass.blocks[step.block as usize];
        let weights = slot_of(step, |slot| if let Slot::Weights(index) = slot { Some(index) } else { None });
        let weights = weights.map(|index| read(&shared.weights[index]));
        let pages = slot_of(step, |slot| if let Slot::Kv(index) = slot { Some(index) } else { None });
        let pages = pages.map(|index| &shared.kv[index]);
        let Own { stages, small, kv, activations, hidden, .. } = &mut self.own;
        let mut hidden = Self::hidden(hidden, shared, placement, step);
        let id = fixed.stages[index];
        let resident = placement.stages[index].resident;
        let matrix = |matrix: usize| fixed.matrix(id, matrix, resident, &stages[index], weights.as_deref());
        let bias = |name: &str| small.get(&format!("layers.{index}.{name}.bias"));
        let layer = Layer {
            device,
            config,
            index,
            rows: block.rows.len(),
            norms: &self.norms[index],
            qkv: (matrix(0), bias("qkv")),
            o: (matrix(1), bias("o")),
            up: (matrix(2), bias("up")),
            down: (matrix(3), bias("down")),
        };
        let segments = frames(block, placement, index);
        let (rotation, sinks) = (pass.rotation(&block.rows), pass.sinks(&block.rows));
        let attention = Attention { kv, pages, segments: &segments, rotation, sinks };
        layer.run(activations, hidden.get(), attention);
    }

    /// Rows of a block that are asked for logits.
    pub fn gather(&mut self, fixed: &Fixed<D>, shared: &Shared<D::Buffer>, pass: &PassData, step: &Step) {
        let block = &pass.blocks[step.block as usize];
        let first = pass.outputs.partition_point(|&row| row < block.rows.start);
        let count = pass.outputs[first..].partition_point(|&row| row < block.rows.end);
        let rows: Vec<usize> = pass.outputs[first..first + count].iter().map(|row| row - block.rows.start).collect();
        let Own { hidden, outputs, .. } = &mut self.own;
        let mut hidden = Self::hidden(hidden, shared, &fixed.placement, step);
        fixed.device.gather(hidden.get(), &rows, fixed.config.hidden_size, &mut outputs[0], first);
    }

    /// Logits of a part of the vocabulary (or all of it) and, after the last part, the samples.
    pub fn head(&mut self, fixed: &Fixed<D>, shared: &Shared<D::Buffer>, pass: &PassData, step: &Step) {
        let Fixed { device, config, layout, placement, .. } = fixed;
        let count = pass.outputs.len();
        let part = step.stage as usize - placement.num_layers;
        if count == 0 {
            return;
        }
        if part == 0 {
            self.finish_outputs(fixed, count);
        }
        let ids = layout.head_stages();
        if placement.head_resident {
            let mut rest = &pass.draws[..];
            let indices: Vec<usize> = (0..count).collect();
            for rows in indices.chunks(placement.logit_rows) {
                {
                    let [gathered, finished] = &mut self.own.outputs;
                    device.gather(finished, rows, config.embed_size, gathered, 0);
                }
                for (part, &id) in ids.iter().enumerate() {
                    let Own { outputs, output_scratch, logits, head, small, .. } = &mut self.own;
                    let matrix = fixed.head_matrix(id, &head[part], None);
                    let column = fixed.head_column(&ids[..part]);
                    let to = Target { buffer: logits, stride: config.vocab_size, column };
                    let bias = small.get(&format!("head.{part}.bias"));
                    device.linear(&outputs[0], rows.len(), &matrix, bias, output_scratch, to);
                }
                let last = pass.outputs[rows[rows.len() - 1]];
                let (now, later) = rest.split_at(rest.partition_point(|draw| draw.row <= last));
                rest = later;
                self.sample(device, config, &pass.outputs[rows[0]..=rows[rows.len() - 1]], now);
            }
            return;
        }
        let slot = slot_of(step, |slot| if let Slot::Weights(index) = slot { Some(index) } else { None });
        let slot = slot.map(|index| read(&shared.weights[index]));
        let Own { outputs, output_scratch, logits, stages, small, .. } = &mut self.own;
        let matrix = fixed.head_matrix(ids[part], &stages[step.stage as usize], slot.as_deref());
        let column = fixed.head_column(&ids[..part]);
        let to = Target { buffer: logits, stride: config.vocab_size, column };
        let bias = small.get(&format!("head.{part}.bias"));
        device.linear(&outputs[1], count, &matrix, bias, output_scratch, to);
        if part + 1 == ids.len() {
            self.sample(device, config, &pass.outputs, &pass.draws);
        }
    }

    /// The last norm (and projection) of all gathered rows, into the second output buffer.
    fn finish_outputs(&mut self, fixed: &Fixed<D>, count: usize) {
        let Fixed { device, config, .. } = fixed;
        let Own { outputs, output_scratch, small, .. } = &mut self.own;
        let [gathered, finished] = outputs;
        match &self.final_norm {
            Some(norm) => device.norm(gathered, count, config.hidden_size, norm, finished),
            None => std::mem::swap(gathered, finished),
        }
        if let Some(data) = small.get("project_out") {
            let matrix = fixed.small_matrix("project_out", data);
            let to = Target { buffer: gathered, stride: config.embed_size, column: 0 };
            device.linear(finished, count, &matrix, small.get("project_out.bias"), output_scratch, to);
            std::mem::swap(gathered, finished);
        }
    }

    fn sample(&mut self, device: &D, config: &ModelConfig, rows: &[usize], draws: &[Draw]) {
        let within = |draw: &Draw| rows.binary_search(&draw.row).expect("rows are those of the draws");
        let draws: Vec<(usize, &Draw)> = draws.iter().map(|draw| (within(draw), draw)).collect();
        self.drawn.extend(device.sample(&self.own.logits, config.vocab_size, &draws));
    }
}

impl<D: Device> Fixed<D> {
    fn small_matrix<'a>(&self, key: &str, buffer: &'a D::Buffer) -> Matrix<'a, D::Buffer> {
        use crate::model::packed::layout::Small;
        let tensor = self.layout.small.iter().find(|tensor| tensor.key == key).expect("it has a buffer");
        let Small::Matrix(linear, dtype) = &tensor.what else { panic!("{key} is a matrix") };
        let pieces = vec![Piece { buffer, bytes: 0..tensor.bytes }];
        Matrix { pieces, dtype: *dtype, inputs: linear.inputs, outputs: linear.outputs }
    }

    fn head_matrix<'a>(
        &self,
        id: StageId,
        resident: &'a D::Buffer,
        streamed: Option<&'a D::Buffer>,
    ) -> Matrix<'a, D::Buffer> {
        let resident_chunks = if streamed.is_some() { 0 } else { self.layout.stage(id).chunks.len() };
        self.matrix(id, 0, resident_chunks, resident, streamed)
    }

    /// The first logit of a part of the head that comes after `parts`.
    fn head_column(&self, parts: &[StageId]) -> usize {
        parts.iter().map(|&id| self.layout.stage(id).matrices[0].source.outputs).sum()
    }

    /// A matrix of a stage, put together from its resident chunks and from those in a slot.
    fn matrix<'a>(
        &self,
        id: StageId,
        index: usize,
        resident_chunks: usize,
        resident: &'a D::Buffer,
        streamed: Option<&'a D::Buffer>,
    ) -> Matrix<'a, D::Buffer> {
        let stage = self.layout.stage(id);
        let matrix = &stage.matrices[index];
        let base = stage.chunks.get(resident_chunks).map_or(stage.bytes, |chunk| chunk.offset);
        let mut pieces: Vec<Piece<'a, D::Buffer>> = Vec::new();
        for chunk in matrix.chunks.clone() {
            let bytes = stage.chunks[chunk].offset..stage.chunks[chunk].offset + stage.chunks[chunk].bytes;
            let (buffer, bytes) = match chunk < resident_chunks {
                true => (resident, bytes),
                false => {
                    let slot = streamed.expect("a stage with streamed chunks has a slot");
                    (slot, bytes.start - base..bytes.end - base)
                }
            };
            match pieces.last_mut() {
                // Chunks without padding between them are one piece.
                Some(last) if std::ptr::eq(last.buffer, buffer) && last.bytes.end == bytes.start => {
                    last.bytes.end = bytes.end;
                }
                _ => pieces.push(Piece { buffer, bytes }),
            }
        }
        let (inputs, outputs) = (matrix.source.inputs, matrix.source.outputs);
        Matrix { pieces, dtype: matrix.dtype, inputs, outputs }
    }
}

/// The segments of a block as a layer has them, with its frames in place of pages.
fn frames(block: &Block, placement: &Placement, layer: usize) -> Vec<Segment> {
    let resident = placement.pages[placement.compute as usize];
    let streamed = &block.streamed(layer).frames;
    let number = |frame: Frame| {
        let number = match streamed.binary_search(&frame) {
            Ok(index) => placement.num_layers * resident + index,
            Err(_) => frame.layer(layer, placement.num_layers) * resident + frame.page as usize,
        };
        u32::try_from(number).expect("frame numbers are 32 bits wide")
    };
    let translate = |segment: &Segment| {
        let kept = segment.kept.at(layer, placement.num_layers);
        let range = segment.start..segment.start + segment.len;
        // Pages that the block has no use for may lie anywhere: they have no frame.
        let mut pages = vec![u32::MAX; segment.pages.len().max(kept.pages(range.end))];
        for index in kept.touches(&range) {
            pages[index] = number(frame(&segment.pages, segment.kept, index));
        }
        Segment { pages, kept, ..*segment }
    };
    block.segments.iter().map(translate).collect()
}
