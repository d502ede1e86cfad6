//! `config.json` of every supported family, brought into one form.
//!
//! **Invariant:** a [`ModelConfig`] describes a decoder that the executor can run without asking for the family;
//! its sizes are bounded so that products of a few of them cannot overflow.

use std::path::Path;

use serde_json::Value;

use super::dtype::DType;
use super::fields::Fields;
use super::rope::{Rope, RopeContext, scaling};
use crate::error::{Error, Result};

/// One decoder-only transformer, all families in one description.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`, for messages and the weight-name mapping.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the embedding table (OPT's `word_embed_proj_dim`; else `hidden_size`).
    pub embed_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Longest sequence, prompt and completion together.
    pub context_len: usize,
    /// Which normalisation, and its epsilon.
    pub norm: Norm,
    /// Normalisations have stored weights; without (Galactica), the scale is 1 and the shift 0.
    pub norm_affine: bool,
    /// The MLP's activation.
    pub activation: Activation,
    /// `down(act(gate(x)) * up(x))` rather than `down(act(up(x)))`.
    pub gated_mlp: bool,
    /// How positions enter.
    pub positions: Positions,
    /// Normalise before each block (false only for OPT-350m's post-norm).
    pub norm_first: bool,
    /// A normalisation after the last layer.
    pub final_norm: bool,
    /// Attention and MLP both read the layer's input (GPT-NeoX): `x + attn(ln1 x) + mlp(ln2 x)`.
    pub parallel_residual: bool,
    /// RMSNorm over `head_dim` on queries and keys before RoPE (Qwen3).
    pub qk_norm: bool,
    /// Multiplies query-key products; `head_dim^-0.5` in the supported families.
    pub attention_scale: f32,
    /// Per layer: a query at position q sees keys k with k > q - window.
    pub sliding_window: Vec<Option<usize>>,
    /// The output head is the embedding table.
    pub tied_head: bool,
    /// Bias on query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention output projection.
    pub o_bias: bool,
    /// Bias on the MLP projections.
    pub mlp_bias: bool,
    /// The checkpoint's dtype by its own account (`torch_dtype` or `dtype`), if it says.
    pub dtype: Option<DType>,
    /// End-of-sequence tokens.
    pub eos_token_ids: Vec<u32>,
    /// Begin-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// Weights were generated from a seed (`tidemill_synthetic` in the config).
    pub synthetic: bool,
}

/// Model families by weight names and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Meta OPT (arXiv 2205.01068).
    Opt,
    /// Llama 1 to 3.x.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen2: Llama with biases on q, k, v.
    Qwen2,
    /// Qwen3: Llama with norms on q and k.
    Qwen3,
    /// GPT-NeoX and Pythia.
    GptNeoX,
}

/// Normalisation of a vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// `x / sqrt(mean(x^2) + eps) * weight`.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * weight + bias`.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

/// Activation functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x * sigmoid(x)
    Silu,
    /// x * Phi(x), exact
    Gelu,
    /// GELU's tanh approximation (`gelu_new`, `gelu_pytorch_tanh`, `gelu_fast`)
    GeluTanh,
}

/// Positions of a sequence that outgrows its model's context: angles, which are products in f32, are still right to a
/// few hundredths.
const OUTGROWN: usize = 1 << 20;

/// How positions enter the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// A table added to the embeddings; position p reads row p + offset (OPT: 2).
    Learned {
        /// Added to the position.
        offset: usize,
    },
    /// Rotary embeddings on queries and keys.
    Rotary(Rope),
}

impl Positions {
    /// Whether they rotate queries and keys, so that only distances count.
    pub fn are_rotary(&self) -> bool {
        matches!(self, Positions::Rotary(_))
    }

    /// Whether the rotation of a token depends on how long its sequence is.
    pub fn depend_on_length(&self) -> bool {
        let class = |len: usize| matches!(self, Positions::Rotary(rope) if rope.length_class(len) > 0);
        class(usize::MAX) || class(1)
    }
}

/// Limits that real models stay far below: they keep products of sizes within 64 bits.
mod limit {
    pub const VOCAB: usize = 1 << 24;
    pub const WIDTH: usize = 1 << 20;
    pub const LAYERS: usize = 1 << 12;
    pub const HEADS: usize = 1 << 14;
    pub const HEAD_DIM: usize = 1 << 12;
    pub const CONTEXT: usize = 1 << 30;
}

impl ModelConfig {
    /// Tokens of prompt and completion together; more than the context where positions are counted within a cache that
    /// keeps part of them, if the model's positions allow it.
    pub fn sequence_len(&self, outgrows_context: bool) -> usize {
        if outgrows_context && self.positions.are_rotary() { OUTGROWN.max(self.context_len) } else { self.context_len }
    }

    /// Reads a `config.json`, in the dialects of transformers 4 and 5.
    ///
    /// # Errors
    /// `Error::Model` naming the key and value: an architecture, quantisation or option that is not supported, a
    /// missing size, or sizes that do not fit together.
    pub fn from_json(value: &Value, path: &Path) -> Result<Self> {
        let fields = Fields::new(value, path)?;
        let family = family(fields)?;
        refuse_unsupported(fields)?;
        let mut config = match family {
            Family::Opt => opt(fields)?,
            Family::GptNeoX => gpt_neox(fields)?,
            _ => llama(fields, family)?,
        };
        config.dtype = dtype(fields)?;
        config.synthetic = fields.flag("tidemill_synthetic", false)?;
        if let Some(&id) = config.eos_token_ids.iter().find(|&&id| id as usize >= limit::VOCAB) {
            return Err(fields.error(format!("`eos_token_id` {id} is beyond any vocabulary")));
        }
        Ok(config)
    }

    /// Elements of all weights, a tied head counted once.
    pub fn num_parameters(&self) -> u64 {
        let shapes = super::names::weight_shapes(self);
        shapes.iter().map(|weight| weight.shape.iter().map(|&size| size as u64).product::<u64>()).sum()
    }
}

impl Family {
    /// The family's `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Opt => "opt",
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::GptNeoX => "gpt_neox",
        }
    }
}

fn family(fields: Fields<'_>) -> Result<Family> {
    const ALL: [Family; 6] =
        [Family::Opt, Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::GptNeoX];
    let name = fields.text("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
    ALL.into_iter().find(|family| family.model_type() == name).ok_or_else(|| {
        let known = ALL.map(Family::model_type).join(", ");
        fields.error(format!("`model_type` \"{name}\" is not supported (supported: {known})"))
    })
}

/// Options that would change the result if they were ignored.
fn refuse_unsupported(fields: Fields<'_>) -> Result<()> {
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let mut error = fields.error(format!("`quantization_config` ({method}) is not supported"));
        if let Error::Model { hint, .. } = &mut error {
            *hint = Some("use the unquantised checkpoint".into());
        }
        return Err(error);
    }
    for key in ["num_local_experts", "num_experts", "n_routed_experts"] {
        if let Some(value) = fields.get(key).filter(|value| value.as_u64() != Some(0)) {
            return Err(fields.error(format!("`{key}` is {value}: mixtures of experts are not supported")));
        }
    }
    if fields.flag("add_cross_attention", false)? || fields.flag("is_encoder_decoder", false)? {
        return Err(fields.error("only decoder-only models are supported"));
    }
    Ok(())
}

fn dtype(fields: Fields<'_>) -> Result<Option<DType>> {
    let key = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(name) = fields.text(key)? else { return Ok(None) };
    match name.trim_start_matches("torch.") {
        "float32" => Ok(Some(DType::F32)),
        "bfloat16" => Ok(Some(DType::Bf16)),
        "float16" | "half" => Ok(Some(DType::F16)),
        _ => Err(fields.error(format!("`{key}` \"{name}\" is not supported (float32, bfloat16 and float16 are)"))),
    }
}

fn activation(fields: Fields<'_>, key: &str, default: &str) -> Result<Activation> {
    match fields.text(key)?.unwrap_or(default) {
        "relu" => Ok(Activation::Relu),
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_pytorch_tanh" | "gelu_python_tanh" => Ok(Activation::GeluTanh),
        other => {
            Err(fields.error(format!("`{key}` \"{other}\" is not supported (relu, silu, gelu and its tanh forms are)")))
        }
    }
}

/// Sizes that every family has, under the same names.
struct Sizes {
    vocab_size: usize,
    hidden_size: usize,
    num_layers: usize,
    num_heads: usize,
    head_dim: usize,
}

fn sizes(fields: Fields<'_>) -> Result<Sizes> {
    let vocab_size = fields.required_size("vocab_size", 1..=limit::VOCAB)?;
    let hidden_size = fields.required_size("hidden_size", 1..=limit::WIDTH)?;
    let num_layers = fields.required_size("num_hidden_layers", 1..=limit::LAYERS)?;
    let num_heads = fields.required_size("num_attention_heads", 1..=limit::HEADS)?;
    let head_dim = match fields.size("head_dim", 1..=limit::HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden_size % num_heads != 0 => {
            return Err(fields
                .error(format!("`hidden_size` {hidden_size} is not a multiple of `num_attention_heads` {num_heads}")));
        }
        None => hidden_size / num_heads,
    };
    if head_dim > limit::HEAD_DIM {
        return Err(fields.error(format!("heads of {head_dim} elements are beyond any model")));
    }
    Ok(Sizes { vocab_size, hidden_size, num_layers, num_heads, head_dim })
}

fn epsilon(fields: Fields<'_>, key: &str, default: f64) -> Result<f32> {
    Ok(fields.number(key, 0.0..=1.0)?.unwrap_or(default) as f32)
}

fn context(fields: Fields<'_>, default: usize) -> Result<usize> {
    Ok(fields.size("max_position_embeddings", 1..=limit::CONTEXT)?.unwrap_or(default))
}

fn attention_scale(head_dim: usize) -> f32 {
    (1.0 / libm::sqrt(head_dim as f64)) as f32
}

/// The id at `bos_token_id`, or `default` when the key is absent.
fn bos(fields: Fields<'_>, default: Option<u32>) -> Result<Option<u32>> {
    Ok(fields.token_ids("bos_token_id")?.map_or(default, |ids| ids.first().copied()))
}

fn eos(fields: Fields<'_>, default: Option<u32>) -> Result<Vec<u32>> {
    Ok(fields.token_ids("eos_token_id")?.unwrap_or_else(|| default.into_iter().collect()))
}

fn opt(fields: Fields<'_>) -> Result<ModelConfig> {
    let sizes = sizes(fields)?;
    if sizes.num_heads * sizes.head_dim != sizes.hidden_size {
        return Err(fields.error("`head_dim` must be `hidden_size` / `num_attention_heads` for OPT"));
    }
    let norm_first = fields.flag("do_layer_norm_before", true)?;
    let bias = fields.flag("enable_bias", true)?;
    Ok(ModelConfig {
        family: Family::Opt,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        embed_size: fields.size("word_embed_proj_dim", 1..=limit::WIDTH)?.unwrap_or(sizes.hidden_size),
        num_layers: sizes.num_layers,
        num_heads: sizes.num_heads,
        num_kv_heads: sizes.num_heads,
        head_dim: sizes.head_dim,
        intermediate_size: fields.required_size("ffn_dim", 1..=limit::WIDTH)?,
        context_len: context(fields, 2048)?,
        norm: Norm::Layer { eps: 1e-5 },
        norm_affine: fields.flag("layer_norm_elementwise_affine", true)?,
        activation: activation(fields, "activation_function", "relu")?,
        gated_mlp: false,
        positions: Positions::Learned { offset: 2 },
        norm_first,
        final_norm: norm_first && !fields.flag("_remove_final_layer_norm", false)?,
        parallel_residual: false,
        qk_norm: false,
        attention_scale: attention_scale(sizes.head_dim),
        sliding_window: vec![None; sizes.num_layers],
        tied_head: fields.flag("tie_word_embeddings", true)?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: bias,
        dtype: None,
        eos_token_ids: eos(fields, Some(2))?,
        bos_token_id: bos(fields, Some(2))?,
        synthetic: false,
    })
}

fn llama(fields: Fields<'_>, family: Family) -> Result<ModelConfig> {
    let mut sizes = sizes(fields)?;
    if family == Family::Qwen3 && fields.get("head_dim").is_none() {
        sizes.head_dim = 128;
    }
    let num_kv_heads = match fields.size("num_key_value_heads", 1..=limit::HEADS)? {
        Some(heads) => heads,
        None if family == Family::Mistral && !fields.has("num_key_value_heads") => 8,
        None => sizes.num_heads,
    };
    if sizes.num_heads % num_kv_heads != 0 {
        let heads = sizes.num_heads;
        return Err(
            fields.error(format!("`num_key_value_heads` {num_kv_heads} does not divide `num_attention_heads` {heads}"))
        );
    }
    let default_context = match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        _ => 32_768,
    };
    let (positions, context_len) = rotary(fields, family, &sizes, context(fields, default_context)?)?;
    let attention_bias = matches!(family, Family::Llama | Family::Qwen3) && fields.flag("attention_bias", false)?;
    let token_default = |id| (!matches!(family, Family::Qwen2 | Family::Qwen3)).then_some(id);
    Ok(ModelConfig {
        family,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        embed_size: sizes.hidden_size,
        num_layers: sizes.num_layers,
        num_heads: sizes.num_heads,
        num_kv_heads,
        head_dim: sizes.head_dim,
        intermediate_size: fields.required_size("intermediate_size", 1..=limit::WIDTH)?,
        context_len,
        norm: Norm::Rms { eps: epsilon(fields, "rms_norm_eps", 1e-6)? },
        norm_affine: true,
        activation: activation(fields, "hidden_act", "silu")?,
        gated_mlp: true,
        positions,
        norm_first: true,
        final_norm: true,
        parallel_residual: false,
        qk_norm: family == Family::Qwen3,
        attention_scale: attention_scale(sizes.head_dim),
        sliding_window: sliding_window(fields, family, sizes.num_layers)?,
        tied_head: fields.flag("tie_word_embeddings", false)?,
        qkv_bias: family == Family::Qwen2 || attention_bias,
        o_bias: attention_bias,
        mlp_bias: family == Family::Llama && fields.flag("mlp_bias", false)?,
        dtype: None,
        eos_token_ids: eos(fields, token_default(2))?,
        bos_token_id: bos(fields, token_default(1))?,
        synthetic: false,
    })
}

fn gpt_neox(fields: Fields<'_>) -> Result<ModelConfig> {
    let sizes = sizes(fields)?;
    if sizes.num_heads * sizes.head_dim != sizes.hidden_size {
        return Err(fields.error("`head_dim` must be `hidden_size` / `num_attention_heads` for GPT-NeoX"));
    }
    let bias = fields.flag("attention_bias", true)?;
    let (positions, context_len) = rotary(fields, Family::GptNeoX, &sizes, context(fields, 2048)?)?;
    Ok(ModelConfig {
        family: Family::GptNeoX,
        vocab_size: sizes.vocab_size,
        hidden_size: sizes.hidden_size,
        embed_size: sizes.hidden_size,
        num_layers: sizes.num_layers,
        num_heads: sizes.num_heads,
        num_kv_heads: sizes.num_heads,
        head_dim: sizes.head_dim,
        intermediate_size: fields.required_size("intermediate_size", 1..=limit::WIDTH)?,
        context_len,
        norm: Norm::Layer { eps: epsilon(fields, "layer_norm_eps", 1e-5)? },
        norm_affine: true,
        activation: activation(fields, "hidden_act", "gelu")?,
        gated_mlp: false,
        positions,
        norm_first: true,
        final_norm: true,
        parallel_residual: fields.flag("use_parallel_residual", true)?,
        qk_norm: false,
        attention_scale: attention_scale(sizes.head_dim),
        sliding_window: vec![None; sizes.num_layers],
        tied_head: fields.flag("tie_word_embeddings", false)?,
        qkv_bias: bias,
        o_bias: bias,
        mlp_bias: true,
        dtype: None,
        eos_token_ids: eos(fields, Some(2))?,
        bos_token_id: bos(fields, Some(0))?,
        synthetic: false,
    })
}

/// Rotary parameters and the context that they make possible.
fn rotary(fields: Fields<'_>, family: Family, sizes: &Sizes, max_len: usize) -> Result<(Positions, usize)> {
    let parameters = match fields.object("rope_scaling", "rope_scaling.")?.filter(|object| !object.is_empty()) {
        Some(object) => Some(object),
        None => fields.object("rope_parameters", "rope_parameters.")?.filter(|object| !object.is_empty()),
    };
    for key in ["full_attention", "sliding_attention"] {
        if parameters.is_some_and(|object| object.has(key)) {
            return Err(fields.error("`rope_parameters` per kind of layer are not supported"));
        }
    }
    let find = |inner: &str, outer: [&str; 2], range: std::ops::RangeInclusive<f64>| -> Result<Option<f64>> {
        if let Some(number) = parameters.map_or(Ok(None), |object| object.number(inner, range.clone()))? {
            return Ok(Some(number));
        }
        for key in outer {
            if let Some(number) = fields.number(key, range.clone())? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    };
    let neox = family == Family::GptNeoX;
    let theta_keys = if neox { ["rotary_emb_base", "rope_theta"] } else { ["rope_theta", "rope_theta"] };
    let theta = find("rope_theta", theta_keys, 1.001..=1e15)?.unwrap_or(10_000.0);
    let fraction_keys = if neox { ["rotary_pct", "partial_rotary_factor"] } else { ["partial_rotary_factor"; 2] };
    let fraction = find("partial_rotary_factor", fraction_keys, 1e-3..=1.0)?;
    if !neox && fraction.is_some_and(|fraction| fraction != 1.0) {
        return Err(fields.error(format!("`partial_rotary_factor` is not supported for {}", family.model_type())));
    }
    let fraction = fraction.unwrap_or(if neox { 0.25 } else { 1.0 });
    let exponent_dim = (sizes.head_dim as f64 * fraction) as usize;
    let rotary_dim = exponent_dim.next_multiple_of(2);
    if rotary_dim == 0 || rotary_dim > sizes.head_dim {
        return Err(fields.error(format!("{exponent_dim} rotary dimensions do not fit heads of {}", sizes.head_dim)));
    }
    let outer_original_len = fields.size("original_max_position_embeddings", 2..=limit::CONTEXT)?;
    let scaling = scaling(parameters, RopeContext { rotary_dim, max_len, outer_original_len })?;
    let context_len = stretched_context(&scaling, max_len);
    Ok((Positions::Rotary(Rope { rotary_dim, exponent_dim, theta, scaling }), context_len))
}

/// `max_position_embeddings` is the stretched context by most accounts; not so for dynamic scaling, which begins
/// beyond it, and for the common way to switch yarn on by hand.
fn stretched_context(scaling: &super::rope::RopeScaling, max_len: usize) -> usize {
    use super::rope::RopeScaling::{Dynamic, Linear, Yarn};
    match scaling {
        Linear { factor } => (max_len as f64 * factor).min(limit::CONTEXT as f64) as usize,
        Dynamic { factor, original_len } | Yarn { factor, original_len, .. } => {
            let stretched = (*original_len as f64 * factor).min(limit::CONTEXT as f64) as usize;
            stretched.max(max_len)
        }
        _ => max_len,
    }
}

fn sliding_window(fields: Fields<'_>, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = fields.size("sliding_window", 1..=limit::CONTEXT)?;
    match family {
        Family::Mistral if fields.has("sliding_window") => Ok(vec![window; num_layers]),
        Family::Mistral => Ok(vec![Some(4096); num_layers]),
        Family::Qwen2 | Family::Qwen3 => {
            // transformers' default, for a config that leaves the key out.
            let window = if fields.has("sliding_window") { window } else { Some(4096) };
            let used = fields.flag("use_sliding_window", false)?;
            let window = window.filter(|_| used);
            match fields.get("layer_types") {
                Some(value) => layer_types(fields, value, window, num_layers),
                None => {
                    let first = fields.size("max_window_layers", 0..=limit::LAYERS)?.unwrap_or(28);
                    Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect())
                }
            }
        }
        _ => Ok(vec![None; num_layers]),
    }
}

fn layer_types(
    fields: Fields<'_>,
    value: &Value,
    window: Option<usize>,
    num_layers: usize,
) -> Result<Vec<Option<usize>>> {
    let wanted = format!("a list of {num_layers} times \"full_attention\" or \"sliding_attention\"");
    let wrong = || fields.unusable("layer_types", value, &wanted);
    let list = value.as_array().filter(|list| list.len() == num_layers).ok_or_else(wrong)?;
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(None),
            Some("sliding_attention") => Ok(window),
            _ => Err(wrong()),
        })
        .collect()
}
