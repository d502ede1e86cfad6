//! How a model's weights are cut into stages and chunks.
//!
//! A stage is what a pass brings in at once: a decoder layer, or a part of the embedding table or of the head of about
//! a layer's size. Its matrices are cut into chunks of whole panels, the quantum of placement: every chunk lives in
//! one tier. Norms, biases, learned positions and the projections of OPT-350m are small and always stay with the
//! device.
//!
//! **Invariant:** the layout depends on the shapes and dtypes alone. Chunks of a stage lie one after the other in its
//! extent, each on a boundary of 4 KiB.

use std::ops::Range;

use super::panels::{PANEL_OUTPUTS, panel_bytes};
use crate::model::Model;
use crate::model::config::{ModelConfig, Positions};
use crate::model::dtype::DType;
use crate::model::source::{LinearSource, ModelSource, NormSource, Rows, TensorSource};

/// Chunks start on this boundary, in files and in memory: what direct I/O asks for.
pub const CHUNK_ALIGNMENT: usize = 4096;

/// Chunks that a stage is cut into, about.
pub(super) const CHUNKS_PER_STAGE: usize = 64;

/// A stage's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StageId {
    /// A part of the embedding table.
    Table(usize),
    /// A decoder layer.
    Layer(usize),
    /// A part of the head, where it is not the embedding table.
    Head(usize),
}

/// The whole model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelLayout {
    /// The embedding table, (vocab_size, embed_size), in parts of whole panels.
    pub table: Vec<StageLayout>,
    /// The decoder layers; matrices in the order qkv, o, up, down.
    pub layers: Vec<StageLayout>,
    /// The output head in parts; empty when the embedding table serves.
    pub head: Vec<StageLayout>,
    /// Everything else.
    pub small: Vec<SmallTensor>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageLayout {
    /// Its matrices, in the order of computation.
    pub matrices: Vec<MatrixLayout>,
    /// Their chunks, matrix after matrix.
    pub chunks: Vec<ChunkLayout>,
    /// Bytes of the extent: a multiple of the alignment.
    pub bytes: usize,
}

/// A matrix of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MatrixLayout {
    /// Where its rows come from.
    pub source: LinearSource,
    /// Stored element type.
    pub dtype: DType,
    /// Its chunks among the stage's.
    pub chunks: Range<usize>,
}

/// Consecutive panels of one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkLayout {
    /// The matrix, within the stage.
    pub matrix: usize,
    /// Its panels.
    pub panels: Range<usize>,
    /// Where the chunk begins in the stage's extent.
    pub offset: usize,
    /// Bytes of the panels, without the padding up to the next chunk.
    pub bytes: usize,
}

/// A tensor that always stays with the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallTensor {
    /// Its place in the model, such as `layers.3.qkv.bias`.
    pub key: String,
    /// What it is made of.
    pub what: Small,
    /// Bytes.
    pub bytes: usize,
}

/// What a small tensor is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Small {
    /// Elements of vectors or flattened tables, widened to f32.
    Vector(Vec<Rows>),
    /// A packed matrix.
    Matrix(LinearSource, DType),
}

impl ChunkLayout {
    /// Bytes that the chunk takes in files and in memory.
    pub fn padded_bytes(&self) -> usize {
        self.bytes.next_multiple_of(CHUNK_ALIGNMENT)
    }
}

impl ModelLayout {
    /// The layout of an opened model; `weights` stores matrices in this dtype rather than the checkpoint's.
    pub fn new(model: &Model, weights: Option<DType>) -> Self {
        let dtype = |source: &LinearSource| weights.unwrap_or_else(|| stored_dtype(&*model.weights, &source.weight));
        ModelLayout::from_source(&model.config, &model.source, &dtype)
    }

    /// The layout of tensors whose matrices are stored in `dtype`.
    pub fn from_source(config: &ModelConfig, source: &ModelSource, dtype: &dyn Fn(&LinearSource) -> DType) -> Self {
        let layers: Vec<StageLayout> = source
            .layers
            .iter()
            .map(|layer| StageLayout::new([&layer.qkv, &layer.o, &layer.up, &layer.down], dtype))
            .collect();
        let part_bytes = layers.iter().map(|layer| layer.bytes).max().unwrap_or(0);
        let rows = Rows { tensor: source.embed.clone(), ranges: std::iter::once(0..config.vocab_size).collect() };
        let table =
            LinearSource { inputs: config.embed_size, outputs: config.vocab_size, weight: vec![rows], bias: None };
        let parts = |linear: &LinearSource| -> Vec<StageLayout> {
            split(linear, part_bytes, dtype).iter().map(|part| StageLayout::new([part], dtype)).collect()
        };
        let head = if config.tied_head { Vec::new() } else { parts(&source.head) };
        let small = SmallTensors::collect(config, source, &head, dtype);
        ModelLayout { table: parts(&table), layers, head, small }
    }

    /// A stage by name.
    pub fn stage(&self, id: StageId) -> &StageLayout {
        match id {
            StageId::Table(part) => &self.table[part],
            StageId::Layer(layer) => &self.layers[layer],
            StageId::Head(part) => &self.head[part],
        }
    }

    /// Every stage that is stored, in the order of files.
    pub fn stages(&self) -> impl Iterator<Item = (StageId, &StageLayout)> {
        let table = self.table.iter().enumerate().map(|(part, stage)| (StageId::Table(part), stage));
        let layers = self.layers.iter().enumerate().map(|(layer, stage)| (StageId::Layer(layer), stage));
        let head = self.head.iter().enumerate().map(|(part, stage)| (StageId::Head(part), stage));
        table.chain(layers).chain(head)
    }

    /// The stages that make the logits: the head's, or the table's where it serves.
    pub fn head_stages(&self) -> Vec<StageId> {
        match self.head.is_empty() {
            true => (0..self.table.len()).map(StageId::Table).collect(),
            false => (0..self.head.len()).map(StageId::Head).collect(),
        }
    }

    /// Bytes of all stages and small tensors.
    pub fn bytes(&self) -> usize {
        let small: usize = self.small.iter().map(|tensor| tensor.bytes).sum();
        self.stages().map(|(_, stage)| stage.bytes).sum::<usize>() + small
    }
}

impl StageLayout {
    fn new<const N: usize>(sources: [&LinearSource; N], dtype: &dyn Fn(&LinearSource) -> DType) -> Self {
        let dtypes = sources.map(dtype);
        let panels = |source: &LinearSource| source.outputs.div_ceil(PANEL_OUTPUTS);
        let total: usize =
            sources.iter().zip(dtypes).map(|(source, dtype)| panels(source) * panel_bytes(source.inputs, dtype)).sum();
        let target = total.div_ceil(CHUNKS_PER_STAGE);
        let (mut matrices, mut chunks, mut offset) = (Vec::new(), Vec::new(), 0);
        for (matrix, (source, dtype)) in sources.into_iter().zip(dtypes).enumerate() {
            let (first, panel) = (chunks.len(), panel_bytes(source.inputs, dtype));
            let step = target.div_ceil(panel).max(1);
            for start in (0..panels(source)).step_by(step) {
                let panels = start..panels(source).min(start + step);
                let chunk = ChunkLayout { matrix, bytes: panels.len() * panel, panels, offset };
                offset += chunk.padded_bytes();
                chunks.push(chunk);
            }
            matrices.push(MatrixLayout { source: source.clone(), dtype, chunks: first..chunks.len() });
        }
        StageLayout { matrices, chunks, bytes: offset }
    }
}

/// The dtype that holds every part exactly: the parts' own if they agree, else f32.
fn stored_dtype(source: &dyn TensorSource, parts: &[Rows]) -> DType {
    let mut dtypes = parts.iter().filter_map(|part| source.dtype(&part.tensor));
    let first = dtypes.next().unwrap_or(DType::F32);
    if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
}

/// Cuts a matrix by its outputs into parts of whole panels, each of at most `bytes` (but at least one panel).
fn split(linear: &LinearSource, bytes: usize, dtype: &dyn Fn(&LinearSource) -> DType) -> Vec<LinearSource> {
    let panels = linear.outputs.div_ceil(PANEL_OUTPUTS);
    let affordable = (bytes / panel_bytes(linear.inputs, dtype(linear))).max(1);
    let step = panels.div_ceil(panels.div_ceil(affordable)) * PANEL_OUTPUTS;
    let cut = |rows: &[Rows], range: Range<usize>| select(rows, range);
    (0..linear.outputs)
        .step_by(step)
        .map(|start| {
            let range = start..linear.outputs.min(start + step);
            LinearSource {
                inputs: linear.inputs,
                outputs: range.len(),
                weight: cut(&linear.weight, range.clone()),
                bias: linear.bias.as_ref().map(|bias| cut(bias, range)),
            }
        })
        .collect()
}

/// Rows `wanted` of concatenated rows.
fn select(parts: &[Rows], wanted: Range<usize>) -> Vec<Rows> {
    let mut at = 0;
    let mut selected = Vec::new();
    for part in parts {
        let mut ranges = Vec::new();
        for range in &part.ranges {
            let from = wanted.start.clamp(at, at + range.len());
            let to = wanted.end.clamp(at, at + range.len());
            if from < to {
                ranges.push(range.start + from - at..range.start + to - at);
            }
            at += range.len();
        }
        if !ranges.is_empty() {
            selected.push(Rows { tensor: part.tensor.clone(), ranges });
        }
    }
    selected
}

struct SmallTensors(Vec<SmallTensor>);

impl SmallTensors {
    fn collect(
        config: &ModelConfig,
        source: &ModelSource,
        head: &[StageLayout],
        dtype: &dyn Fn(&LinearSource) -> DType,
    ) -> Vec<SmallTensor> {
        let mut all = SmallTensors(Vec::new());
        let whole = |name: &str, elements: usize| {
            vec![Rows { tensor: name.to_owned(), ranges: std::iter::once(0..elements).collect() }]
        };
        if let (Some(name), Positions::Learned { offset }) = (&source.positions, &config.positions) {
            all.vector("positions", whole(name, (config.context_len + offset) * config.hidden_size));
        }
        let norm = |all: &mut Self, key: &str, norm: &NormSource| {
            all.vector(&format!("{key}.weight"), whole(&norm.weight, config.hidden_size));
            if let Some(bias) = &norm.bias {
                all.vector(&format!("{key}.bias"), whole(bias, config.hidden_size));
            }
        };
        for (index, layer) in source.layers.iter().enumerate() {
            let key = |name: &str| format!("layers.{index}.{name}");
            norm(&mut all, &key("attn_norm"), &layer.attn_norm);
            norm(&mut all, &key("mlp_norm"), &layer.mlp_norm);
            for (name, tensor) in [("q_norm", &layer.q_norm), ("k_norm", &layer.k_norm)] {
                if let Some(tensor) = tensor {
                    all.vector(&key(name), whole(tensor, config.head_dim));
                }
            }
            let linears = [("qkv", &layer.qkv), ("o", &layer.o), ("up", &layer.up), ("down", &layer.down)];
            for (name, linear) in linears {
                all.bias(&key(&format!("{name}.bias")), linear);
            }
        }
        source.final_norm.iter().for_each(|final_norm| norm(&mut all, "final_norm", final_norm));
        for (part, stage) in head.iter().enumerate() {
            all.bias(&format!("head.{part}.bias"), &stage.matrices[0].source);
        }
        for (key, linear) in [("project_in", &source.project_in), ("project_out", &source.project_out)] {
            if let Some(linear) = linear {
                all.bias(&format!("{key}.bias"), linear);
                let dtype = dtype(linear);
                let bytes = super::panels::packed_bytes(linear.inputs, linear.outputs, dtype);
                all.0.push(SmallTensor { key: key.into(), what: Small::Matrix(linear.clone(), dtype), bytes });
            }
        }
        all.0
    }

    fn vector(&mut self, key: &str, parts: Vec<Rows>) {
        let elements: usize = parts.iter().flat_map(|part| &part.ranges).map(Range::len).sum();
        self.0.push(SmallTensor { key: key.into(), what: Small::Vector(parts), bytes: elements * 4 });
    }

    fn bias(&mut self, key: &str, linear: &LinearSource) {
        if let Some(bias) = &linear.bias {
            self.vector(key, bias.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(inputs: usize, outputs: usize) -> LinearSource {
        let rows = |tensor: &str, range| Rows { tensor: tensor.into(), ranges: std::iter::once(range).collect() };
        let half = outputs / 2;
        LinearSource { inputs, outputs, weight: vec![rows("a", 0..half), rows("b", 5..5 + outputs - half)], bias: None }
    }

    #[test]
    fn chunks_cover_every_panel_once_and_lie_one_after_the_other() {
        let dtype = |_: &LinearSource| DType::Bf16;
        for (inputs, outputs) in [(64, 16), (100, 1000), (4096, 4096 * 3), (63, 15)] {
            let stage = StageLayout::new([&linear(inputs, outputs), &linear(outputs, inputs)], &dtype);
            let mut offset = 0;
            for (index, matrix) in stage.matrices.iter().enumerate() {
                let mut panel = 0;
                for chunk in &stage.chunks[matrix.chunks.clone()] {
                    assert_eq!((chunk.matrix, chunk.panels.start, chunk.offset), (index, panel, offset));
                    assert_eq!(chunk.bytes, chunk.panels.len() * panel_bytes(matrix.source.inputs, matrix.dtype));
                    panel = chunk.panels.end;
                    offset += chunk.padded_bytes();
                }
                assert_eq!(panel, matrix.source.outputs.div_ceil(PANEL_OUTPUTS));
            }
            assert_eq!(stage.bytes, offset);
            assert!(stage.chunks.len() <= CHUNKS_PER_STAGE + 2);
        }
    }

    #[test]
    fn parts_of_a_matrix_are_its_rows_in_order() {
        let dtype = |_: &LinearSource| DType::F32;
        let whole = linear(64, 100);
        let parts = split(&whole, 2 * panel_bytes(64, DType::F32), &dtype);
        assert_eq!(parts.iter().map(|part| part.outputs).sum::<usize>(), 100);
        assert!(parts[..parts.len() - 1].iter().all(|part| part.outputs % PANEL_OUTPUTS == 0));
        let rows = |parts: &[LinearSource]| -> Vec<(String, usize)> {
            let all = parts.iter().flat_map(|part| &part.weight);
            all.flat_map(|rows| rows.ranges.iter().cloned().flatten().map(|row| (rows.tensor.clone(), row))).collect()
        };
        assert_eq!(rows(&parts), rows(&[whole]));
    }
}
