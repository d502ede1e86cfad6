//! The canonical layout of weight matrices, the same for every device.
//!
//! A matrix is cut into panels of 16 outputs; a panel holds (inputs padded to 64, 16) elements, so a tile of 64 inputs
//! by 16 outputs is contiguous.
//!
//! **Invariant:** the layout depends on shape and dtype alone.

use crate::model::dtype::DType;

/// Outputs of a panel.
pub const PANEL_OUTPUTS: usize = 16;

/// Inputs of a tile; panels are padded to a multiple of it.
pub const TILE_INPUTS: usize = 64;

/// Elements of one panel.
pub fn panel_elements(inputs: usize) -> usize {
    inputs.next_multiple_of(TILE_INPUTS) * PANEL_OUTPUTS
}

/// Bytes of a whole packed matrix.
pub fn packed_bytes(inputs: usize, outputs: usize, dtype: DType) -> usize {
    outputs.div_ceil(PANEL_OUTPUTS) * panel_elements(inputs) * dtype.size()
}

/// Bytes of one panel.
pub fn panel_bytes(inputs: usize, dtype: DType) -> usize {
    panel_elements(inputs) * dtype.size()
}

/// The weights of one output of a panel, widened.
pub fn panel_lane(panel: &[u8], dtype: DType, lane: usize, out: &mut [f32]) {
    let element = |k: usize| k * PANEL_OUTPUTS + lane;
    match dtype {
        DType::F32 => {
            let data: &[f32] = bytemuck::cast_slice(panel);
            out.iter_mut().enumerate().for_each(|(k, out)| *out = data[element(k)]);
        }
        DType::Bf16 => {
            let data: &[half::bf16] = bytemuck::cast_slice(panel);
            out.iter_mut().enumerate().for_each(|(k, out)| *out = data[element(k)].to_f32());
        }
        DType::F16 => {
            let data: &[half::f16] = bytemuck::cast_slice(panel);
            out.iter_mut().enumerate().for_each(|(k, out)| *out = data[element(k)].to_f32());
        }
    }
}
