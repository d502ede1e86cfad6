//! The canonical layout of weight matrices, the same for every device.
//!
//! A matrix is cut into panels of 16 outputs, a panel into tiles of 64 inputs by 16 outputs, one after the other. A
//! tile of a plain dtype holds element (k, lane) at k * 16 + lane. A tile of integers holds a group of 64 per output:
//!
//! - codes, four inputs of an output side by side, as dot products of bytes want them: of 8 bits, input k of a lane is
//!   byte (k / 4) * 64 + lane * 4 + k % 4; of 4 bits, inputs k and k + 32 share the byte that 8 bits would give k, the
//!   first in the low half;
//! - then 16 scales, then 16 offsets, in f16.
//!
//! **Invariant:** the layout depends on shape and dtype alone.

use half::f16;

use crate::model::dtype::DType;
use crate::quant::groups::{GROUP, Grid};

/// Outputs of a panel.
pub const PANEL_OUTPUTS: usize = 16;

/// Inputs of a tile; panels are padded to a multiple of it.
pub const TILE_INPUTS: usize = 64;

const _: () = assert!(TILE_INPUTS == GROUP);

/// Bytes of a tile.
pub fn tile_bytes(dtype: DType) -> usize {
    let elements = TILE_INPUTS * PANEL_OUTPUTS;
    match dtype {
        DType::Int8 | DType::Int4 => code_bytes(dtype) + 4 * PANEL_OUTPUTS,
        plain => elements * plain.size(),
    }
}

/// Bytes of a tile of integers that are codes.
pub fn code_bytes(dtype: DType) -> usize {
    let elements = TILE_INPUTS * PANEL_OUTPUTS;
    if dtype == DType::Int4 { elements / 2 } else { elements }
}

/// Bytes of one panel.
pub fn panel_bytes(inputs: usize, dtype: DType) -> usize {
    inputs.div_ceil(TILE_INPUTS) * tile_bytes(dtype)
}

/// Bytes of a whole packed matrix.
pub fn packed_bytes(inputs: usize, outputs: usize, dtype: DType) -> usize {
    outputs.div_ceil(PANEL_OUTPUTS) * panel_bytes(inputs, dtype)
}

/// Where a code of input `k` (within the tile) lies: its byte, and by how many bits it is shifted.
fn code_place(dtype: DType, k: usize, lane: usize) -> (usize, u32) {
    let (k, shift) = if dtype == DType::Int4 { (k % 32, 4 * (k / 32) as u32) } else { (k, 0) };
    (k / 4 * 64 + lane * 4 + k % 4, shift)
}

/// Puts a group of one output into its tile, whose bytes were zero.
pub fn put_group(tile: &mut [u8], dtype: DType, lane: usize, codes: &[u8; GROUP], grid: Grid) {
    for (k, &code) in codes.iter().enumerate() {
        let (byte, shift) = code_place(dtype, k, lane);
        tile[byte] |= code << shift;
    }
    let parameters = &mut tile[code_bytes(dtype)..];
    parameters[2 * lane..][..2].copy_from_slice(&grid.scale.to_le_bytes());
    parameters[2 * (PANEL_OUTPUTS + lane)..][..2].copy_from_slice(&grid.offset.to_le_bytes());
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
            let data: &[f16] = bytemuck::cast_slice(panel);
            out.iter_mut().enumerate().for_each(|(k, out)| *out = data[element(k)].to_f32());
        }
        DType::Int8 | DType::Int4 => {
            let mask = if dtype == DType::Int4 { 15 } else { 255 };
            for (tile, out) in panel.chunks_exact(tile_bytes(dtype)).zip(out.chunks_mut(TILE_INPUTS)) {
                let (codes, parameters) = tile.split_at(code_bytes(dtype));
                let half = |at: usize| f16::from_le_bytes([parameters[2 * at], parameters[2 * at + 1]]);
                let grid = Grid { scale: half(lane), offset: half(PANEL_OUTPUTS + lane) };
                for (k, out) in out.iter_mut().enumerate() {
                    let (byte, shift) = code_place(dtype, k, lane);
                    *out = grid.decode(codes[byte] >> shift & mask);
                }
            }
        }
    }
}
