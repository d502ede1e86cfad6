//! Weights from a model's tensors into the device's packed form.
//!
//! **Invariant:** values are stored in the dtype of the checkpoint, or the one asked for; norms, biases and
//! positions always in f32. Only one tensor is in flight beside the arena.

use rayon::prelude::*;

use crate::device::{Device, HeadNorms, Matrix, NormParameters};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::config::{ModelConfig, Norm};
use crate::model::dtype::DType;
use crate::model::packed::panels::{PANEL_OUTPUTS, packed_bytes, panel_elements};
use crate::model::source::{LinearSource, NormSource, Rows, TensorSource, TensorView};

/// A linear layer in the device's memory.
pub struct Linear<B> {
    /// The weight.
    pub weight: Matrix<B>,
    /// One f32 per output.
    pub bias: Option<B>,
}

/// One decoder layer in the device's memory; see [`crate::model::source::LayerSource`].
pub struct Layer<B> {
    /// Before (or after) attention.
    pub attn_norm: NormParameters<B>,
    /// Fused queries, keys, values.
    pub qkv: Linear<B>,
    /// Norms of query and key heads.
    pub head_norms: Option<HeadNorms<B>>,
    /// Attention output.
    pub o: Linear<B>,
    /// Before (or after) the MLP.
    pub mlp_norm: NormParameters<B>,
    /// Gate and up, or up alone.
    pub up: Linear<B>,
    /// Down.
    pub down: Linear<B>,
}

/// A whole model in the device's memory.
pub struct Weights<B> {
    /// Embedding table, vocabulary as outputs.
    pub embed: Matrix<B>,
    /// Learned positions, f32 rows.
    pub positions: Option<B>,
    /// Embedding width to hidden width.
    pub project_in: Option<Linear<B>>,
    /// The layers in order.
    pub layers: Vec<Layer<B>>,
    /// After the last layer.
    pub final_norm: Option<NormParameters<B>>,
    /// Hidden width to embedding width.
    pub project_out: Option<Linear<B>>,
    /// The output head; none when the embedding table serves.
    pub head: Option<Linear<B>>,
}

/// A matrix to be packed: its source and the dtype that it is stored in.
pub struct Packing<'a> {
    /// Where its rows come from.
    pub linear: std::borrow::Cow<'a, LinearSource>,
    /// Stored element type.
    pub dtype: DType,
}

/// Every matrix that [`load`] packs.
pub fn matrices(model: &Model, weights: Option<DType>) -> Vec<Packing<'_>> {
    let source = &model.source;
    let mut linears = vec![std::borrow::Cow::Owned(embedding(model))];
    let layers = source.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.up, &layer.down]);
    let head = (!model.config.tied_head).then_some(&source.head);
    let others = source.project_in.iter().chain(layers).chain(&source.project_out).chain(head);
    linears.extend(others.map(std::borrow::Cow::Borrowed));
    let stored = |linear: &LinearSource| weights.unwrap_or_else(|| stored_dtype(&*model.weights, &linear.weight));
    linears.into_iter().map(|linear| Packing { dtype: stored(&linear), linear }).collect()
}

/// Lengths of every f32 vector (norms and positions) that [`load`] stores; biases belong to their matrices.
pub fn vector_elements(model: &Model) -> Vec<usize> {
    let (config, source) = (&model.config, &model.source);
    let of_norm = |norm: &NormSource| if norm.bias.is_some() { 2 } else { 1 };
    let mut norms = source.final_norm.iter().map(of_norm).sum::<usize>();
    let mut head_norms = 0;
    for layer in &source.layers {
        norms += of_norm(&layer.attn_norm) + of_norm(&layer.mlp_norm);
        head_norms += usize::from(layer.q_norm.is_some()) + usize::from(layer.k_norm.is_some());
    }
    let mut elements = vec![config.hidden_size; norms];
    elements.extend(vec![config.head_dim; head_norms]);
    if source.positions.is_some() {
        elements.push(position_rows(config) * config.hidden_size);
    }
    elements
}

fn position_rows(config: &ModelConfig) -> usize {
    match config.positions {
        crate::model::config::Positions::Learned { offset } => config.context_len + offset,
        crate::model::config::Positions::Rotary(_) => 0,
    }
}

/// The embedding table as a linear layer from width to vocabulary.
fn embedding(model: &Model) -> LinearSource {
    let (inputs, outputs) = (model.config.embed_size, model.config.vocab_size);
    let rows = Rows { tensor: model.source.embed.clone(), ranges: std::iter::once(0..outputs).collect() };
    LinearSource { inputs, outputs, weight: vec![rows], bias: None }
}

/// The dtype that holds every part exactly: the parts' own if they agree, else f32.
fn stored_dtype(source: &dyn TensorSource, parts: &[Rows]) -> DType {
    let mut dtypes = parts.iter().filter_map(|part| source.dtype(&part.tensor));
    let first = dtypes.next().unwrap_or(DType::F32);
    if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
}

/// Loads everything.
pub fn load<D: Device>(device: &mut D, model: &Model, weights: Option<DType>) -> Result<Weights<D::Buffer>> {
    let mut loader = Loader { device, model, weights };
    let source = &model.source;
    let embed = loader.matrix(&embedding(model))?;
    let positions = match &source.positions {
        Some(name) => Some(loader.vector(name, position_rows(&model.config) * model.config.hidden_size)?),
        None => None,
    };
    let project_in = source.project_in.as_ref().map(|linear| loader.linear(linear)).transpose()?;
    let layers = source.layers.iter().map(|layer| loader.layer(layer)).collect::<Result<_>>()?;
    let final_norm = source.final_norm.as_ref().map(|norm| loader.norm(norm)).transpose()?;
    let project_out = source.project_out.as_ref().map(|linear| loader.linear(linear)).transpose()?;
    let head = if model.config.tied_head { None } else { Some(loader.linear(&source.head)?) };
    Ok(Weights { embed, positions, project_in, layers, final_norm, project_out, head })
}

struct Loader<'a, D> {
    device: &'a mut D,
    model: &'a Model,
    weights: Option<DType>,
}

impl<D: Device> Loader<'_, D> {
    fn layer(&mut self, layer: &crate::model::source::LayerSource) -> Result<Layer<D::Buffer>> {
        let head_dim = self.model.config.head_dim;
        let head_norms = match (&layer.q_norm, &layer.k_norm, self.model.config.norm) {
            (Some(query), Some(key), Norm::Rms { eps }) => {
                Some(HeadNorms { eps, query: self.vector(query, head_dim)?, key: self.vector(key, head_dim)? })
            }
            _ => None,
        };
        Ok(Layer {
            attn_norm: self.norm(&layer.attn_norm)?,
            qkv: self.linear(&layer.qkv)?,
            head_norms,
            o: self.linear(&layer.o)?,
            mlp_norm: self.norm(&layer.mlp_norm)?,
            up: self.linear(&layer.up)?,
            down: self.linear(&layer.down)?,
        })
    }

    fn norm(&mut self, norm: &NormSource) -> Result<NormParameters<D::Buffer>> {
        let width = self.model.config.hidden_size;
        let weight = self.vector(&norm.weight, width)?;
        let bias = norm.bias.as_ref().map(|bias| self.vector(bias, width)).transpose()?;
        Ok(NormParameters { norm: self.model.config.norm, weight, bias })
    }

    fn linear(&mut self, linear: &LinearSource) -> Result<Linear<D::Buffer>> {
        let bias = linear.bias.as_ref().map(|parts| self.gather(parts, linear.outputs)).transpose()?;
        Ok(Linear { weight: self.matrix(linear)?, bias })
    }

    fn vector(&mut self, name: &str, elements: usize) -> Result<D::Buffer> {
        let rows = Rows { tensor: name.to_owned(), ranges: std::iter::once(0..elements).collect() };
        self.gather(&[rows], elements)
    }

    /// Elements of vectors (or of flattened tables), widened to f32.
    fn gather(&mut self, parts: &[Rows], elements: usize) -> Result<D::Buffer> {
        let model = self.model;
        let mut buffer = self.device.allocate(elements * 4)?;
        self.device.upload(&mut buffer, &mut |bytes| {
            let out: &mut [f32] = bytemuck::cast_slice_mut(bytes);
            let mut at = 0;
            for part in parts {
                let view = tensor(model, &part.tensor)?;
                for range in &part.ranges {
                    for (out, index) in out[at..at + range.len()].iter_mut().zip(range.clone()) {
                        *out = element(&view, index);
                    }
                    at += range.len();
                }
            }
            assert_eq!(at, elements, "{}: parts of {at} elements for {elements}", parts[0].tensor);
            Ok(())
        })?;
        Ok(buffer)
    }

    fn matrix(&mut self, linear: &LinearSource) -> Result<Matrix<D::Buffer>> {
        let dtype = self.weights.unwrap_or_else(|| stored_dtype(&*self.model.weights, &linear.weight));
        let (inputs, outputs, model) = (linear.inputs, linear.outputs, self.model);
        let bytes = packed_bytes(inputs, outputs, dtype);
        let mut data = self.device.allocate(bytes)?;
        self.device.upload(&mut data, &mut |data| {
            let views = linear.weight.iter().map(|part| tensor(model, &part.tensor)).collect::<Result<Vec<_>>>()?;
            let rows: Vec<(usize, usize)> = linear
                .weight
                .iter()
                .enumerate()
                .flat_map(|(part, rows)| rows.ranges.iter().cloned().flatten().map(move |row| (part, row)))
                .collect();
            assert_eq!(rows.len(), outputs, "{}: parts of {} rows", linear.weight[0].tensor, rows.len());
            let panel = panel_elements(inputs) * dtype.size();
            data[..bytes].par_chunks_exact_mut(panel).zip(rows.par_chunks(PANEL_OUTPUTS)).for_each(|(panel, rows)| {
                for (lane, &(part, row)) in rows.iter().enumerate() {
                    pack_row(&views[part], row, inputs, dtype, lane, panel);
                }
            });
            Ok(())
        })?;
        Ok(Matrix { data, dtype, inputs, outputs })
    }
}

fn tensor<'a>(model: &'a Model, name: &str) -> Result<TensorView<'a>> {
    let missing = || Error::model(&model.name, format!("tensor {name} is missing"));
    model.weights.tensor(name)?.ok_or_else(missing)
}

/// One output's weights into its lane of a panel.
fn pack_row(view: &TensorView<'_>, row: usize, inputs: usize, dtype: DType, lane: usize, panel: &mut [u8]) {
    let size = view.dtype.size();
    let from = &view.data[row * inputs * size..(row + 1) * inputs * size];
    match (view.dtype, dtype) {
        (DType::F32, DType::F32) => copy_lane::<4>(from, lane, panel),
        (DType::Bf16, DType::Bf16) | (DType::F16, DType::F16) => copy_lane::<2>(from, lane, panel),
        _ => {
            for k in 0..inputs {
                let value = element(view, row * inputs + k);
                let at = (k * PANEL_OUTPUTS + lane) * dtype.size();
                match dtype {
                    DType::F32 => panel[at..at + 4].copy_from_slice(&value.to_le_bytes()),
                    DType::Bf16 => panel[at..at + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
                    DType::F16 => panel[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                }
            }
        }
    }
}

fn copy_lane<const SIZE: usize>(from: &[u8], lane: usize, panel: &mut [u8]) {
    for (from, to) in from.chunks_exact(SIZE).zip(panel.chunks_exact_mut(SIZE * PANEL_OUTPUTS)) {
        to[lane * SIZE..(lane + 1) * SIZE].copy_from_slice(from);
    }
}

/// Element `index` of a tensor, widened.
fn element(view: &TensorView<'_>, index: usize) -> f32 {
    let size = view.dtype.size();
    let bytes = &view.data[index * size..(index + 1) * size];
    match view.dtype {
        DType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        DType::Bf16 => half::bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        DType::F16 => half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
    }
}
