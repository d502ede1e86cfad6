//! How much memory a model's parts take, before anything is allocated.
//!
//! **Invariant:** a placement made from these numbers is what [`super::Executor::new`] carves, to the byte.

use crate::kv::layout::KvLayout;
use crate::memory::arena::aligned;
use crate::model::config::ModelConfig;
use crate::model::dtype::DType;
use crate::model::packed::layout::{CHUNK_ALIGNMENT, ModelLayout, Small, StageLayout};
use crate::model::packed::panels::{PANEL_OUTPUTS, TILE_INPUTS};
use crate::schedule::placement::{ModelBytes, Workspace};

/// Widths of the activation buffers of a block, in elements per row.
#[derive(Clone, Copy, Debug)]
pub struct Widths {
    /// Hidden or embedding width, whichever is greater.
    pub hidden: usize,
    /// Fused q, k, v.
    pub qkv: usize,
    /// Queries.
    pub attended: usize,
    /// Gate and up.
    pub up: usize,
    /// The MLP.
    pub activated: usize,
    /// The widest product input.
    pub scratch: usize,
}

impl Widths {
    /// The widths of a model.
    pub fn new(config: &ModelConfig, layout: &ModelLayout) -> Self {
        let widest =
            |matrix: usize| layout.layers.iter().map(|layer| layer.matrices[matrix].source.outputs).max().unwrap_or(0);
        let hidden = config.hidden_size.max(config.embed_size);
        let attended = config.num_heads * config.head_dim;
        let scratch = hidden.max(attended).max(config.intermediate_size);
        Widths { hidden, qkv: widest(0), attended, up: widest(2), activated: config.intermediate_size, scratch }
    }

    /// Bytes per row of every buffer, in the order of allocation: normed, qkv, attended, up, activated, update,
    /// scratch.
    pub fn row_bytes(&self) -> [usize; 7] {
        [self.hidden, self.qkv, self.attended, self.up, self.activated, self.hidden, self.scratch]
            .map(|width| 4 * width)
    }
}

/// Bytes of one layer of one page, as it is stored and moved.
pub fn frame_bytes(layout: &KvLayout) -> usize {
    layout.layer_bytes().next_multiple_of(CHUNK_ALIGNMENT)
}

/// Bytes of the largest matrix as a device multiplies it: rows of 16 outputs, of elements of f32 where it is stored so,
/// else of 16 bits.
pub fn product_bytes(layout: &ModelLayout) -> usize {
    let bytes = |inputs: usize, outputs: usize, dtype: DType| {
        let element = if dtype == DType::F32 { 4 } else { 2 };
        element * outputs.next_multiple_of(PANEL_OUTPUTS) * inputs.next_multiple_of(8)
    };
    let staged = layout.stages().flat_map(|(_, stage)| &stage.matrices);
    let staged = staged.map(|matrix| bytes(matrix.source.inputs, matrix.source.outputs, matrix.dtype));
    let small = layout.small.iter().filter_map(|tensor| match &tensor.what {
        Small::Matrix(linear, dtype) => Some(bytes(linear.inputs, linear.outputs, *dtype)),
        _ => None,
    });
    staged.chain(small).max().unwrap_or(0)
}

/// Everything that is placed.
pub fn model_bytes(config: &ModelConfig, layout: &ModelLayout, kv: &KvLayout) -> ModelBytes {
    let chunks = |stage: &StageLayout| stage.chunks.iter().map(|chunk| chunk.padded_bytes() as u64).collect();
    let head = layout.head_stages().into_iter().map(|stage| chunks(layout.stage(stage))).collect();
    let widths = Widths::new(config, layout);
    ModelBytes {
        layers: layout.layers.iter().map(chunks).collect(),
        head,
        table: layout.table.iter().map(|part| part.bytes as u64).sum(),
        tied: layout.head.is_empty(),
        small: layout.small.iter().map(|tensor| aligned(tensor.bytes) as u64).sum(),
        frame: frame_bytes(kv) as u64,
        activations: widths.row_bytes().map(|bytes| bytes as u64).to_vec(),
        embedding_row: 4 * config.embed_size.next_multiple_of(TILE_INPUTS) as u64,
        hidden_row: 4 * widths.hidden as u64,
        logit_row: 4 * config.vocab_size as u64,
        workspace: Workspace::default(),
    }
}
