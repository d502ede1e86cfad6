//! Tensor names and shapes of every family, written once: for loading, for checking and for synthetic weights.
//!
//! **Invariant:** a [`ModelSource`] from [`model_source`] names only tensors that exist with the expected shape.

use std::ops::Range;
use std::path::PathBuf;

use super::config::{Family, ModelConfig, Norm, Positions};
use super::dtype::DType;
use super::source::{LayerSource, LinearSource, ModelSource, NormSource, Rows, TensorSource, TensorView};
use crate::error::{Error, Result};

/// The name of `hidden_size` ones, for normalisations without stored weights; see [`WithConstants`].
const ONES: &str = "constant.ones";
/// The name of `hidden_size` zeros.
const ZEROS: &str = "constant.zeros";

/// A weight by name, with its shape and part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightShape {
    /// The stored tensor's name.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What it is.
    pub part: Part,
}

/// The part that a weight plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// An embedding table or output head.
    Embedding,
    /// A table of learned positions.
    Position,
    /// A projection that reads the residual stream.
    Inner,
    /// A projection that is added to the residual stream.
    Residual,
    /// The scale of a normalisation.
    Norm,
    /// A bias or shift.
    Bias,
}

/// Every weight of `config` under the names that transformers saves.
pub fn weight_shapes(config: &ModelConfig) -> Vec<WeightShape> {
    let spelling = match config.family {
        Family::Opt => Spelling { prefix: "model.decoder.", head: "lm_head" },
        Family::GptNeoX => Spelling { prefix: "gpt_neox.", head: "embed_out" },
        _ => Spelling { prefix: "model.", head: "lm_head" },
    };
    Builder::new(config, spelling).build().1
}

/// Finds the tensors of `config` in `source`.
///
/// # Errors
/// `Error::Model` naming the tensor that is missing or has another shape, with both shapes.
pub fn model_source(config: &ModelConfig, source: &dyn TensorSource) -> Result<ModelSource> {
    let (model, mut shapes) = Builder::new(config, spelling(config, source)?).build();
    if !config.norm_affine {
        let constant =
            |name: &str| WeightShape { name: name.into(), shape: vec![config.hidden_size], part: Part::Norm };
        shapes.extend([constant(ONES), constant(ZEROS)]);
    }
    shapes.iter().try_for_each(|weight| check(weight, source))?;
    Ok(model)
}

/// Whether a configuration that ties the head to the embedding comes with a stored head of other values. The stored
/// head counts then, as in transformers 5 (4 ignored it). Torch files always hold both names, for one storage.
pub fn stored_head_differs(config: &ModelConfig, source: &dyn TensorSource) -> Result<bool> {
    if !config.tied_head {
        return Ok(false);
    }
    let spelling = spelling(config, source)?;
    let Some(head) = source.tensor(&format!("{}.weight", spelling.head))? else { return Ok(false) };
    let Some(embed) = source.tensor(&spelling.embed(config.family))? else { return Ok(false) };
    let one = embed.data.as_ptr() == head.data.as_ptr() && embed.data.len() == head.data.len();
    Ok(!one && (embed.dtype != head.dtype || embed.shape != head.shape || embed.data != head.data))
}

/// Looks for the prefix and the head's name that `source` uses; the usual ones if it has neither.
fn spelling(config: &ModelConfig, source: &dyn TensorSource) -> Result<Spelling> {
    let (prefixes, heads): (&[&'static str], &[&'static str]) = match config.family {
        Family::Opt => (&["model.decoder.", "decoder.", ""], &["lm_head"]),
        Family::GptNeoX => (&["gpt_neox.", "model.", ""], &["embed_out", "lm_head"]),
        _ => (&["model.", ""], &["lm_head"]),
    };
    let mut found = Spelling { prefix: prefixes[0], head: heads[0] };
    let there = |name: &str| source.shape(name).map(|shape| shape.is_some());
    for prefix in prefixes {
        let candidate = Spelling { prefix, ..found };
        if there(&candidate.embed(config.family))? {
            found = candidate;
            break;
        }
    }
    for head in heads {
        if there(&format!("{head}.weight"))? {
            found.head = head;
            break;
        }
    }
    Ok(found)
}

fn check(weight: &WeightShape, source: &dyn TensorSource) -> Result<()> {
    let WeightShape { name, shape, .. } = weight;
    match source.shape(name)? {
        Some(found) if found == *shape => Ok(()),
        Some(found) => Err(Error::model(
            source.origin(name),
            format!("tensor `{name}` has shape {found:?}, config.json asks for {shape:?}"),
        )),
        None => Err(Error::model(source.origin(name), format!("tensor `{name}` {shape:?} is missing"))),
    }
}

/// A source with the constants that stand for the weights of normalisations that have none.
pub struct WithConstants {
    inner: Box<dyn TensorSource>,
    hidden_size: usize,
}

impl WithConstants {
    /// `inner`, with constants added if `config` needs them.
    pub fn wrap(config: &ModelConfig, inner: Box<dyn TensorSource>) -> Box<dyn TensorSource> {
        if config.norm_affine {
            return inner;
        }
        Box::new(WithConstants { inner, hidden_size: config.hidden_size })
    }

    fn constant(&self, name: &str) -> Option<f32> {
        match name {
            ONES => Some(1.0),
            ZEROS => Some(0.0),
            _ => None,
        }
    }
}

impl TensorSource for WithConstants {
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>> {
        let Some(value) = self.constant(name) else { return self.inner.tensor(name) };
        let data = value.to_le_bytes().repeat(self.hidden_size).into();
        Ok(Some(TensorView { dtype: DType::F32, shape: vec![self.hidden_size], data }))
    }

    fn dtype(&self, name: &str) -> Option<DType> {
        self.constant(name).map_or_else(|| self.inner.dtype(name), |_| Some(DType::F32))
    }

    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        self.constant(name).map_or_else(|| self.inner.shape(name), |_| Ok(Some(vec![self.hidden_size])))
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Option<TensorView<'_>>> {
        match self.constant(name) {
            Some(_) => Ok(self.tensor(name)?.map(|tensor| tensor.slice(rows))),
            None => self.inner.rows(name, rows),
        }
    }

    fn origin(&self, name: &str) -> PathBuf {
        self.inner.origin(name)
    }
}

/// How a checkpoint spells what differs between checkpoints of one family.
#[derive(Clone, Copy)]
struct Spelling {
    prefix: &'static str,
    head: &'static str,
}

impl Spelling {
    fn embed(&self, family: Family) -> String {
        let name = if family == Family::GptNeoX { "embed_in" } else { "embed_tokens" };
        format!("{}{name}.weight", self.prefix)
    }
}

/// Names weights in the order of a forward pass and notes the shape of each.
struct Builder<'a> {
    config: &'a ModelConfig,
    spelling: Spelling,
    shapes: Vec<WeightShape>,
}

impl<'a> Builder<'a> {
    fn new(config: &'a ModelConfig, spelling: Spelling) -> Self {
        Builder { config, spelling, shapes: Vec::new() }
    }

    fn build(mut self) -> (ModelSource, Vec<WeightShape>) {
        let config = self.config;
        let prefix = self.spelling.prefix;
        let (vocab, hidden, embed_size) = (config.vocab_size, config.hidden_size, config.embed_size);
        let embed = self.tensor(self.spelling.embed(config.family), vec![vocab, embed_size], Part::Embedding);
        let positions = match config.positions {
            Positions::Learned { offset } => {
                let shape = vec![config.context_len + offset, hidden];
                Some(self.tensor(format!("{prefix}embed_positions.weight"), shape, Part::Position))
            }
            Positions::Rotary(_) => None,
        };
        let narrow = embed_size != hidden;
        let project = |builder: &mut Self, name: &str, inputs, outputs| {
            builder.linear(&[(format!("{prefix}{name}"), outputs)], inputs, false, Part::Inner)
        };
        let project_in = narrow.then(|| project(&mut self, "project_in", embed_size, hidden));
        let layers = (0..config.num_layers)
            .map(|layer| match config.family {
                Family::Opt => self.opt_layer(&format!("{prefix}layers.{layer}.")),
                Family::GptNeoX => self.neox_layer(&format!("{prefix}layers.{layer}.")),
                _ => self.llama_layer(&format!("{prefix}layers.{layer}.")),
            })
            .collect();
        let final_name =
            if matches!(config.family, Family::Opt | Family::GptNeoX) { "final_layer_norm" } else { "norm" };
        let final_norm = config.final_norm.then(|| self.norm(format!("{prefix}{final_name}")));
        let project_out = narrow.then(|| project(&mut self, "project_out", hidden, embed_size));
        let head = if config.tied_head {
            let weight = vec![Rows { tensor: embed.clone(), ranges: std::iter::once(0..vocab).collect() }];
            LinearSource { inputs: embed_size, outputs: vocab, weight, bias: None }
        } else {
            let name = self.spelling.head.to_owned();
            self.linear(&[(name, vocab)], embed_size, false, Part::Embedding)
        };
        (ModelSource { embed, positions, project_in, layers, final_norm, project_out, head }, self.shapes)
    }

    fn opt_layer(&mut self, at: &str) -> LayerSource {
        let config = self.config;
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        let name = |name: &str| format!("{at}{name}");
        LayerSource {
            attn_norm: self.norm(name("self_attn_layer_norm")),
            qkv: self.linear(
                &["q_proj", "k_proj", "v_proj"].map(|part| (name(&format!("self_attn.{part}")), hidden)),
                hidden,
                config.qkv_bias,
                Part::Inner,
            ),
            q_norm: None,
            k_norm: None,
            o: self.linear(&[(name("self_attn.out_proj"), hidden)], hidden, config.o_bias, Part::Residual),
            mlp_norm: self.norm(name("final_layer_norm")),
            up: self.linear(&[(name("fc1"), mlp)], hidden, config.mlp_bias, Part::Inner),
            down: self.linear(&[(name("fc2"), hidden)], mlp, config.mlp_bias, Part::Residual),
        }
    }

    fn llama_layer(&mut self, at: &str) -> LayerSource {
        let config = self.config;
        let (hidden, mlp, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (queries, keys) = (config.num_heads * head_dim, config.num_kv_heads * head_dim);
        let name = |name: &str| format!("{at}{name}");
        let head_norm = |builder: &mut Self, part: &str| {
            let tensor = name(&format!("self_attn.{part}.weight"));
            config.qk_norm.then(|| builder.tensor(tensor, vec![head_dim], Part::Norm))
        };
        LayerSource {
            attn_norm: self.norm(name("input_layernorm")),
            qkv: self.linear(
                &[("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]
                    .map(|(part, rows)| (name(&format!("self_attn.{part}")), rows)),
                hidden,
                config.qkv_bias,
                Part::Inner,
            ),
            q_norm: head_norm(self, "q_norm"),
            k_norm: head_norm(self, "k_norm"),
            o: self.linear(&[(name("self_attn.o_proj"), hidden)], queries, config.o_bias, Part::Residual),
            mlp_norm: self.norm(name("post_attention_layernorm")),
            up: self.linear(
                &["gate_proj", "up_proj"].map(|part| (name(&format!("mlp.{part}")), mlp)),
                hidden,
                config.mlp_bias,
                Part::Inner,
            ),
            down: self.linear(&[(name("mlp.down_proj"), hidden)], mlp, config.mlp_bias, Part::Residual),
        }
    }

    fn neox_layer(&mut self, at: &str) -> LayerSource {
        let config = self.config;
        let (hidden, mlp) = (config.hidden_size, config.intermediate_size);
        let name = |name: &str| format!("{at}{name}");
        LayerSource {
            attn_norm: self.norm(name("input_layernorm")),
            qkv: {
                let fused = name("attention.query_key_value");
                let linear = self.linear(&[(fused, 3 * hidden)], hidden, config.qkv_bias, Part::Inner);
                by_kind(linear, config.num_heads, config.head_dim)
            },
            q_norm: None,
            k_norm: None,
            o: self.linear(&[(name("attention.dense"), hidden)], hidden, config.o_bias, Part::Residual),
            mlp_norm: self.norm(name("post_attention_layernorm")),
            up: self.linear(&[(name("mlp.dense_h_to_4h"), mlp)], hidden, config.mlp_bias, Part::Inner),
            down: self.linear(&[(name("mlp.dense_4h_to_h"), hidden)], mlp, config.mlp_bias, Part::Residual),
        }
    }

    /// A linear layer whose rows are those of `parts` (module name, rows), one after the other.
    fn linear(&mut self, parts: &[(String, usize)], inputs: usize, bias: bool, part: Part) -> LinearSource {
        let mut weight = Vec::new();
        let mut shift = Vec::new();
        for (name, rows) in parts {
            let all = |tensor: String| Rows { tensor, ranges: std::iter::once(0..*rows).collect() };
            weight.push(all(self.tensor(format!("{name}.weight"), vec![*rows, inputs], part)));
            if bias {
                shift.push(all(self.tensor(format!("{name}.bias"), vec![*rows], Part::Bias)));
            }
        }
        let outputs = parts.iter().map(|(_, rows)| rows).sum();
        LinearSource { inputs, outputs, weight, bias: bias.then_some(shift) }
    }

    fn norm(&mut self, name: String) -> NormSource {
        if !self.config.norm_affine {
            return NormSource { weight: ONES.into(), bias: Some(ZEROS.into()) };
        }
        let shape = vec![self.config.hidden_size];
        let weight = self.tensor(format!("{name}.weight"), shape.clone(), Part::Norm);
        let bias = match self.config.norm {
            Norm::Layer { .. } => Some(self.tensor(format!("{name}.bias"), shape, Part::Bias)),
            Norm::Rms { .. } => None,
        };
        NormSource { weight, bias }
    }

    fn tensor(&mut self, name: String, shape: Vec<usize>, part: Part) -> String {
        self.shapes.push(WeightShape { name: name.clone(), shape, part });
        name
    }
}

/// Brings fused rows, per head `[q | k | v]`, into the order all q, all k, all v.
fn by_kind(fused: LinearSource, heads: usize, head_dim: usize) -> LinearSource {
    let ranges: Vec<_> = (0..3)
        .flat_map(|kind| (0..heads).map(move |head| (3 * head + kind) * head_dim))
        .map(|start| start..start + head_dim)
        .collect();
    let split = |rows: Vec<Rows>| {
        rows.into_iter().map(|rows| Rows { tensor: rows.tensor, ranges: ranges.clone() }).collect::<Vec<_>>()
    };
    LinearSource { weight: split(fused.weight), bias: fused.bias.map(split), ..fused }
}
