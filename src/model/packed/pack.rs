//! Packing on the fly: tensors of a checkpoint into chunks of panels.
//!
//! **Invariant:** one tensor at a time is read, and nothing beside the output is allocated but what the source makes.

use rayon::prelude::*;

use super::layout::{ModelLayout, Small, StageId};
use super::panels::{PANEL_OUTPUTS, panel_bytes, put_group, tile_bytes};
use super::planes::Planes;
use super::{Extent, Packed};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::dtype::DType;
use crate::model::source::{LinearSource, Rows, TensorView};
use crate::quant::groups::{GROUP, encode};

/// A model's own tensors, packed when they are asked for.
pub struct Packer<'m> {
    model: &'m Model,
    layout: ModelLayout,
}

impl<'m> Packer<'m> {
    /// Packs `model` with matrices in `weights`, or in the checkpoint's dtype.
    pub fn new(model: &'m Model, weights: Option<DType>) -> Self {
        Packer { model, layout: ModelLayout::new(model, weights) }
    }

    /// Panels `first..` of a matrix, as many as `out` holds.
    fn panels(&self, linear: &LinearSource, dtype: DType, first: usize, out: &mut [u8]) -> Result<()> {
        let panel = panel_bytes(linear.inputs, dtype);
        let from = first * PANEL_OUTPUTS;
        let to = linear.outputs.min(from + out.len() / panel * PANEL_OUTPUTS);
        // The rows that these outputs come from, each with the view that holds it; views with the tensor that they are
        // of and their first row there.
        let mut views = Vec::new();
        let mut rows = Vec::with_capacity(to - from);
        let mut at = 0;
        for part in &linear.weight {
            for range in &part.ranges {
                let (low, high) = (from.clamp(at, at + range.len()), to.clamp(at, at + range.len()));
                if low < high {
                    let wanted = range.start + low - at..range.start + high - at;
                    rows.extend((0..wanted.len()).map(|row| (views.len(), row)));
                    views.push((self.rows(&part.tensor, wanted.clone())?, &part.tensor, wanted.start));
                }
                at += range.len();
            }
        }
        assert_eq!((at, rows.len()), (linear.outputs, to - from), "{}: parts of {at} rows", linear.weight[0].tensor);
        out.par_chunks_exact_mut(panel).zip(rows.par_chunks(PANEL_OUTPUTS)).try_for_each(|(panel, rows)| {
            // Lanes and inputs that pad the panel.
            panel.fill(0);
            rows.iter().enumerate().try_for_each(|(lane, &(view, row))| {
                let (view, tensor, first) = &views[view];
                match dtype {
                    DType::Int8 | DType::Int4 => quantize_row(view, row, linear.inputs, dtype, lane, panel)
                        .map_err(|k| not_finite(tensor, first + row, k, dtype)),
                    _ => {
                        pack_row(view, row, linear.inputs, dtype, lane, panel);
                        Ok(())
                    }
                }
            })
        })
    }

    fn rows(&self, name: &str, rows: std::ops::Range<usize>) -> Result<TensorView<'_>> {
        let missing = || Error::model(&self.model.name, format!("tensor {name} is missing"));
        self.model.weights.rows(name, rows)?.ok_or_else(missing)
    }

    /// Elements of vectors (or of flattened tables), widened to f32.
    fn vector(&self, parts: &[Rows], out: &mut [u8]) -> Result<()> {
        let mut out = out.chunks_exact_mut(4);
        for part in parts {
            let missing = || Error::model(&self.model.name, format!("tensor {} is missing", part.tensor));
            let view = self.model.weights.tensor(&part.tensor)?.ok_or_else(missing)?;
            for index in part.ranges.iter().cloned().flatten() {
                let to = out.next().expect("the layout has summed the parts");
                to.copy_from_slice(&element(&view, index).to_le_bytes());
            }
        }
        assert!(out.next().is_none(), "{}: too few elements", parts[0].tensor);
        Ok(())
    }
}

impl Packed for Packer<'_> {
    fn layout(&self) -> &ModelLayout {
        &self.layout
    }

    fn chunk(&self, stage: StageId, chunk: usize, out: &mut [u8]) -> Result<()> {
        let stage = self.layout.stage(stage);
        let chunk = &stage.chunks[chunk];
        assert_eq!(out.len(), chunk.bytes);
        let matrix = &stage.matrices[chunk.matrix];
        self.panels(&matrix.source, matrix.dtype, chunk.panels.start, out)
    }

    fn small(&self, index: usize, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), self.layout.small[index].bytes);
        match &self.layout.small[index].what {
            Small::Vector(parts) => self.vector(parts, out),
            Small::Matrix(linear, dtype) => self.panels(linear, *dtype, 0, out),
        }
    }

    fn extent(&self, _: StageId) -> Result<Option<Extent>> {
        Ok(None)
    }

    fn planes(&self, _: StageId) -> Result<Option<Planes>> {
        Ok(None)
    }
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
                    DType::Int8 | DType::Int4 => unreachable!("groups are packed by another function"),
                }
            }
        }
    }
}

/// As [`pack_row`], in groups of small integers; fails with the input whose weight is not a finite number.
fn quantize_row(
    view: &TensorView<'_>,
    row: usize,
    inputs: usize,
    dtype: DType,
    lane: usize,
    panel: &mut [u8],
) -> Result<(), usize> {
    let most = if dtype == DType::Int4 { 15 } else { 255 };
    let (mut weights, mut codes) = ([0f32; GROUP], [0u8; GROUP]);
    for (index, tile) in panel.chunks_exact_mut(tile_bytes(dtype)).enumerate() {
        let first = index * GROUP;
        let count = GROUP.min(inputs - first);
        widen(view, row * inputs + first, &mut weights[..count]);
        let grid = encode(&weights[..count], most, &mut codes).map_err(|k| first + k)?;
        put_group(tile, dtype, lane, &codes, grid);
    }
    Ok(())
}

fn copy_lane<const SIZE: usize>(from: &[u8], lane: usize, panel: &mut [u8]) {
    for (from, to) in from.chunks_exact(SIZE).zip(panel.chunks_exact_mut(SIZE * PANEL_OUTPUTS)) {
        to[lane * SIZE..(lane + 1) * SIZE].copy_from_slice(from);
    }
}

/// Element `index` of a tensor, widened.
fn element(view: &TensorView<'_>, index: usize) -> f32 {
    let mut value = [0.0];
    widen(view, index, &mut value);
    value[0]
}

/// Elements of a tensor from `first` on, widened.
fn widen(view: &TensorView<'_>, first: usize, out: &mut [f32]) {
    let size = view.dtype.size();
    let bytes = view.data[first * size..(first + out.len()) * size].chunks_exact(size);
    match view.dtype {
        DType::F32 => {
            out.iter_mut().zip(bytes).for_each(|(out, b)| *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        }
        DType::Bf16 => {
            out.iter_mut().zip(bytes).for_each(|(out, b)| *out = half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
        }
        DType::F16 => {
            out.iter_mut().zip(bytes).for_each(|(out, b)| *out = half::f16::from_le_bytes([b[0], b[1]]).to_f32())
        }
        DType::Int8 | DType::Int4 => unreachable!("checkpoints are plain"),
    }
}

fn not_finite(tensor: &str, row: usize, input: usize, dtype: DType) -> Error {
    let what = format!("tensor {tensor} has a weight that is not a finite number, in row {row} at input {input}");
    Error::model(tensor, format!("{what}: it cannot be stored as {dtype}"))
}
