//! `config.json` of every supported family, brought into one form.
//!
//! **Invariant:** a [`ModelConfig`] describes a decoder that the executor can run without asking for the family.

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
    pub dtype: Option<crate::model::dtype::DType>,
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

/// How positions enter the model.
#[derive(Clone, Debug, PartialEq)]
pub enum Positions {
    /// A table added to the embeddings; position p reads row p + offset (OPT: 2).
    Learned {
        /// Added to the position.
        offset: usize,
    },
    /// Rotary embeddings on queries and keys.
    Rotary(super::rope::Rope),
}
