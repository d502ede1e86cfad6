//! Where tensors come from, and which tensors make up which weight.
//!
//! **Invariant:** a [`TensorView`]'s bytes are exactly its shape times its dtype; a source never hands out
//! anything else.

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;

use super::dtype::DType;
use crate::error::Result;

/// A stored tensor, row-major.
pub struct TensorView<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub data: Cow<'a, [u8]>,
}

/// A set of named tensors.
pub trait TensorSource: Send + Sync {
    /// The tensor called `name`, or none.
    fn tensor(&self, name: &str) -> Result<Option<TensorView<'_>>>;

    /// The element type of the tensor called `name`, or none.
    fn dtype(&self, name: &str) -> Option<DType>;

    /// The dimensions of the tensor called `name`, or none. Reads no elements where that can be avoided.
    fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(self.tensor(name)?.map(|tensor| tensor.shape))
    }

    /// Rows `rows` of the tensor called `name` (elements, if it is a vector), or none.
    ///
    /// Sources that make or convert their elements do so for these rows alone.
    ///
    /// # Panics
    /// If `rows` lies outside the tensor: the caller knows its shape.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Option<TensorView<'_>>> {
        Ok(self.tensor(name)?.map(|tensor| tensor.slice(rows)))
    }

    /// The file that holds (or should hold) the tensor called `name`, for messages.
    fn origin(&self, name: &str) -> PathBuf {
        PathBuf::from(name)
    }
}

impl<'a> TensorView<'a> {
    /// The view restricted to `rows` of the outermost dimension.
    ///
    /// # Panics
    /// If `rows` lies outside the tensor.
    pub fn slice(self, rows: Range<usize>) -> TensorView<'a> {
        let TensorView { dtype, mut shape, data } = self;
        let count = *shape.first().expect("a scalar has no rows");
        assert!(rows.start <= rows.end && rows.end <= count, "rows {rows:?} of a tensor with {count}");
        let row_bytes = shape[1..].iter().product::<usize>() * dtype.size();
        let extent = rows.start * row_bytes..rows.end * row_bytes;
        shape[0] = rows.len();
        let data = match data {
            Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[extent]),
            Cow::Owned(bytes) => Cow::Owned(bytes[extent].to_vec()),
        };
        TensorView { dtype, shape, data }
    }
}

/// Rows of a stored matrix (or elements of a stored vector), in the order that they are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The stored tensor's name.
    pub tensor: String,
    /// Row ranges, concatenated in this order.
    pub ranges: Vec<Range<usize>>,
}

/// A linear layer `y = W x + b` put together from stored rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSource {
    /// Columns of W.
    pub inputs: usize,
    /// Rows of W: the sum over `weight`.
    pub outputs: usize,
    /// W's rows.
    pub weight: Vec<Rows>,
    /// b's elements, in the same order.
    pub bias: Option<Vec<Rows>>,
}

/// A normalisation's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NormSource {
    /// The scale's tensor.
    pub weight: String,
    /// The shift's tensor.
    pub bias: Option<String>,
}

/// The tensors of one decoder layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSource {
    /// Before attention (after it when `norm_first` is false).
    pub attn_norm: NormSource,
    /// Queries, keys, values: `[num_heads | num_kv_heads | num_kv_heads] * head_dim` rows.
    pub qkv: LinearSource,
    /// Norm of each query head.
    pub q_norm: Option<String>,
    /// Norm of each key head.
    pub k_norm: Option<String>,
    /// Attention output projection.
    pub o: LinearSource,
    /// Before the MLP (after it when `norm_first` is false).
    pub mlp_norm: NormSource,
    /// `[gate | up]` rows for a gated MLP, else the one up projection.
    pub up: LinearSource,
    /// Down projection.
    pub down: LinearSource,
}

/// The tensors of a whole model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelSource {
    /// Embedding table (vocab_size, embed_size).
    pub embed: String,
    /// Learned positions (context_len + offset, hidden_size).
    pub positions: Option<String>,
    /// embed_size to hidden_size (OPT-350m).
    pub project_in: Option<LinearSource>,
    /// The layers in order.
    pub layers: Vec<LayerSource>,
    /// After the last layer.
    pub final_norm: Option<NormSource>,
    /// hidden_size to embed_size (OPT-350m).
    pub project_out: Option<LinearSource>,
    /// embed_size to vocab_size; reads the embedding table when tied.
    pub head: LinearSource,
}
