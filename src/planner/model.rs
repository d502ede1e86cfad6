//! A model to plan with: its costs and bytes, from a configuration alone.
//!
//! **Invariant:** for a dense model in a dtype that can be run, chunks are cut as packing cuts them.

use std::path::Path;

use serde_json::Value;

use crate::cost::{Experts, ModelCost};
use crate::error::{Error, Result};
use crate::kv::layout::NOTE_BYTES;
use crate::model::config::{ModelConfig, Norm, Positions};
use crate::model::dtype::DType;
use crate::schedule::placement::{ModelBytes, Workspace};

/// Outputs of a panel of weights; see `model::packed::panels`.
const PANEL_OUTPUTS: usize = 16;
/// Inputs are padded to a multiple of this.
const TILE_INPUTS: usize = 64;
/// Chunks that a stage is cut into, about.
const CHUNKS_PER_STAGE: usize = 64;
/// Chunks and frames are padded to this.
const ALIGNMENT: u64 = 4096;

/// A model, its numerics resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanModel {
    /// What it is called.
    pub name: String,
    /// Its configuration; of a mixture of experts, that of the dense model with one expert.
    pub config: ModelConfig,
    /// The mixture, if it is one.
    pub experts: Option<Experts>,
    /// What its work costs.
    pub cost: ModelCost,
    /// What its parts take.
    pub bytes: ModelBytes,
    /// Whether pages note the position and the score of every key.
    scored: bool,
}

/// Dtypes to plan with; none is the model's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numerics {
    /// Of the matrices.
    pub weights: Option<DType>,
    /// Of keys and values.
    pub kv: Option<DType>,
}

impl PlanModel {
    /// Reads a `config.json`; `path` names it in messages.
    ///
    /// # Errors
    /// As [`ModelConfig::from_json`]; mixtures of experts of the Mixtral and Qwen3 kind are read too.
    pub fn from_json(name: &str, value: &Value, path: &Path, numerics: Numerics) -> Result<Self> {
        let (value, experts) = dense(value, path)?;
        let config = ModelConfig::from_json(&value, path)?;
        let stored = config.dtype.unwrap_or(DType::F32);
        Ok(PlanModel::new(name, config, experts, numerics.weights.unwrap_or(stored), numerics.kv.unwrap_or(stored)))
    }

    /// A model whose weights and cache are stored so.
    pub fn new(name: &str, config: ModelConfig, experts: Option<Experts>, weights: DType, kv: DType) -> Self {
        let cost = ModelCost::new(&config, experts, weights, kv);
        let bytes = model_bytes(&config, experts, &cost);
        PlanModel { name: name.to_owned(), config, experts, cost, bytes, scored: false }
    }

    /// The same model with its parts' bytes known exactly, from its files.
    #[must_use]
    pub fn with_bytes(mut self, bytes: ModelBytes) -> Self {
        self.cost.frame_bytes = bytes.frame as f64;
        PlanModel { bytes, ..self }
    }

    /// The same model, `scored` with pages that note the position and the score of every key.
    #[must_use]
    pub fn with_scores(mut self, scored: bool) -> Self {
        self.scored = scored;
        let notes = if scored { (NOTE_BYTES * self.cost.num_kv_heads) as u64 } else { 0 };
        self.bytes.frame = (self.bytes.frame + notes).next_multiple_of(ALIGNMENT);
        self.cost.frame_bytes = self.bytes.frame as f64;
        self
    }

    /// The same model with other dtypes.
    #[must_use]
    pub fn with(&self, numerics: Numerics) -> Self {
        let (weights, kv) = (numerics.weights.unwrap_or(self.cost.weights), numerics.kv.unwrap_or(self.cost.kv));
        let mut model = PlanModel::new(&self.name, self.config.clone(), self.experts, weights, kv);
        model.cost.integer_activations = self.cost.integer_activations;
        model.with_scores(self.scored)
    }

    /// Weights in all, and those that a token goes through; the embedding table counts once.
    pub fn parameters(&self) -> (f64, f64) {
        let layers = self.cost.num_layers as f64;
        let head = self.cost.head_weights() * if self.config.tied_head { 1.0 } else { 2.0 };
        (layers * self.cost.layer_weights() + head, layers * self.cost.row_flops() / 2.0 + self.cost.head_weights())
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> u64 {
        let chunks = |stages: &[Vec<u64>]| stages.iter().flatten().sum::<u64>();
        let head = if self.bytes.tied { 0 } else { chunks(&self.bytes.head) };
        chunks(&self.bytes.layers) + head + self.bytes.table + self.bytes.small
    }
}

/// A mixture's configuration as that of a dense model with one expert, and the mixture.
fn dense(value: &Value, path: &Path) -> Result<(Value, Option<Experts>)> {
    let kind = value.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let (count, family) = match kind {
        "mixtral" => ("num_local_experts", "mistral"),
        "qwen3_moe" => ("num_experts", "qwen3"),
        _ => return Ok((value.clone(), None)),
    };
    let size = |key: &str| {
        let size = value.get(key).and_then(Value::as_u64).filter(|size| (1..=1 << 16).contains(size));
        size.map(|size| size as usize).ok_or_else(|| Error::model(path, format!("`{key}` is missing or out of range")))
    };
    let experts = Experts { total: size(count)?, active: size("num_experts_per_tok")? };
    if experts.active > experts.total {
        return Err(Error::model(path, format!("`num_experts_per_tok` is more than `{count}`")));
    }
    let mut value = value.clone();
    if let Some(object) = value.as_object_mut() {
        object.remove(count);
        object.insert("model_type".into(), family.into());
        if let Some(width) = object.get("moe_intermediate_size").cloned() {
            object.insert("intermediate_size".into(), width);
        }
    }
    Ok((value, Some(experts)))
}

/// A matrix in numbers.
#[derive(Clone, Copy)]
struct Matrix {
    inputs: usize,
    outputs: usize,
}

impl Matrix {
    fn panels(self) -> usize {
        self.outputs.div_ceil(PANEL_OUTPUTS)
    }

    fn panel_bytes(self, element: DType) -> f64 {
        (self.inputs.next_multiple_of(TILE_INPUTS) * PANEL_OUTPUTS) as f64 * element.bytes()
    }
}

/// Padded bytes of the chunks of a stage with these matrices.
fn chunks(matrices: &[Matrix], element: DType) -> Vec<u64> {
    let total: f64 = matrices.iter().map(|matrix| matrix.panels() as f64 * matrix.panel_bytes(element)).sum();
    let target = (total / CHUNKS_PER_STAGE as f64).ceil();
    let mut chunks = Vec::new();
    for matrix in matrices {
        let panel = matrix.panel_bytes(element);
        let step = ((target / panel).ceil() as usize).max(1);
        for start in (0..matrix.panels()).step_by(step) {
            let panels = step.min(matrix.panels() - start);
            chunks.push(((panels as f64 * panel).ceil() as u64).next_multiple_of(ALIGNMENT));
        }
    }
    chunks
}

fn model_bytes(config: &ModelConfig, experts: Option<Experts>, cost: &ModelCost) -> ModelBytes {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (query, key) = (cost.query_width, cost.kv_width);
    let (total, active) = experts.map_or((1, 1), |experts| (experts.total, experts.active));
    let up = if config.gated_mlp { 2 * inner } else { inner };
    let matrices = [
        Matrix { inputs: hidden, outputs: query + 2 * key },
        Matrix { inputs: query, outputs: hidden },
        Matrix { inputs: hidden, outputs: up * total },
        Matrix { inputs: inner, outputs: hidden * total },
    ];
    let layer = chunks(&matrices, cost.weights);
    let layer_bytes: u64 = layer.iter().sum();
    let table = Matrix { inputs: config.embed_size, outputs: config.vocab_size };
    let affordable = ((layer_bytes as f64 / table.panel_bytes(cost.weights)) as usize).max(1);
    let step = table.panels().div_ceil(table.panels().div_ceil(affordable)) * PANEL_OUTPUTS;
    let parts = (0..config.vocab_size).step_by(step);
    let head: Vec<Vec<u64>> = parts
        .map(|start| chunks(&[Matrix { outputs: step.min(config.vocab_size - start), ..table }], cost.weights))
        .collect();
    let positions = match config.positions {
        Positions::Learned { offset } => (config.context_len + offset) * hidden,
        Positions::Rotary(_) => 0,
    };
    let norm = match config.norm {
        Norm::Rms { .. } => hidden,
        Norm::Layer { .. } => 2 * hidden,
    };
    let norm = if config.norm_affine { norm } else { 0 };
    let biases =
        if config.mlp_bias { up + hidden } else { 0 } + if config.qkv_bias { query + 2 * key + hidden } else { 0 };
    let f32s = |elements: usize| 4 * elements as u64;
    let wide = hidden.max(config.embed_size);
    let widest = wide.max(query).max(inner);
    ModelBytes {
        table: head.iter().flatten().sum(),
        layers: vec![layer; config.num_layers],
        head,
        tied: config.tied_head,
        small: f32s(positions + norm + config.num_layers * (2 * norm + biases)),
        frame: cost.frame_bytes as u64,
        // As the executor has them: normed, update, qkv, attended, up, activated, scratch.
        activations: [wide, wide, query + 2 * key, query, up * active, inner * active, widest].map(f32s).to_vec(),
        embedding_row: f32s(config.embed_size.next_multiple_of(TILE_INPUTS)),
        hidden_row: f32s(hidden),
        logit_row: f32s(config.vocab_size),
        workspace: Workspace::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json() -> Value {
        serde_json::json!({
            "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "num_local_experts": 8,
            "num_experts_per_tok": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
        })
    }

    #[test]
    fn mixtures_have_total_and_active_parameters() {
        let model = PlanModel::from_json("m", &json(), Path::new("c"), Numerics::default()).unwrap();
        assert_eq!(model.experts, Some(Experts { total: 8, active: 2 }));
        let (total, active) = model.parameters();
        let expert = 3.0 * 3.0 * 256.0 * 512.0;
        assert_eq!(total - active, 6.0 * expert + 256_000.0);
        let bytes = model.weight_bytes() as f64;
        assert!(bytes >= 2.0 * total && bytes < 2.3 * total, "{bytes} {total}");
        let quarter = model.with(Numerics { weights: Some(DType::Int4), kv: None });
        assert!(quarter.weight_bytes() * 3 < model.weight_bytes());
        let mut broken = json();
        broken["num_experts_per_tok"] = 9.into();
        assert!(PlanModel::from_json("m", &broken, Path::new("c"), Numerics::default()).is_err());
    }

    #[test]
    fn parts_are_those_of_the_packed_model() {
        use crate::executor::size::model_bytes;
        use crate::kv::layout::KvLayout;
        use crate::model::packed::layout::ModelLayout;
        use crate::model::synth::SyntheticWeights;
        for (name, tied) in [("llama-1.1b", false), ("opt-6.7b", true), ("llama-3.1-8b", false), ("opt-30b", true)] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("policies/models/{name}.json"));
            let value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            let model = PlanModel::from_json(name, &value, &path, Numerics::default()).unwrap();
            let dtype = model.config.dtype.unwrap();
            let weights = SyntheticWeights::new(&model.config, 1, path.clone());
            let source = crate::model::names::model_source(&model.config, &weights).unwrap();
            let layout = ModelLayout::from_source(&model.config, &source, &|_| dtype);
            let kv = KvLayout {
                num_layers: model.config.num_layers,
                num_kv_heads: model.config.num_kv_heads,
                head_dim: model.config.head_dim,
                dtype,
                scored: false,
            };
            let exact = model_bytes(&model.config, &layout, &kv);
            let mut planned = model.bytes.clone();
            let (small, sum) = (planned.small as f64, |rows: &[u64]| rows.iter().sum::<u64>());
            assert_eq!(sum(&planned.activations), sum(&exact.activations), "{name}");
            assert!((small / exact.small as f64 - 1.0).abs() < 0.01, "{name}: {small} {}", exact.small);
            planned.small = exact.small;
            planned.activations = exact.activations.clone();
            assert_eq!(planned, exact, "{name}");
            assert_eq!(exact.tied, tied);
        }
    }
}
