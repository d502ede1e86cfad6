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
