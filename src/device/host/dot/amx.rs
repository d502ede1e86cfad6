//! Products of bytes in tile registers (AMX): 16 rows by 16 outputs by a group of 64 inputs in one instruction.
//!
//! A tile of codes, widened to bytes, is what the instruction takes as its second operand, and 16 rows of a group are
//! what it takes as its first. Two panels go through a block of rows a few groups at a time: codes are unpacked once
//! for all, sums go through the first cache, since only vectors can scale them.
//!
//! **Invariant:** tile registers are configured by [`Tiles`] alone and released when it is dropped, on the same thread;
//! between two blocks of assembly they hold nothing.
//!
//! Limit: a product of tiles takes 16 cycles and storing its sums 13 more in the same unit; its 16 vectors of sums take
//! 4 operations each on two units, 32 cycles, and for some 370 cycles after a tile instruction one of the two does no
//! multiplications. Measured alone: 29, 37, and 64 to 70 together, whatever the order; so a quarter of the ceiling of
//! the instruction is what can be had with a scale for every 64 inputs, over twice the rate of vectors.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::super::lanes::{Avx512, LANES, Lanes};
use super::{Task, copy};
use crate::model::dtype::DType;
use crate::model::packed::panels::{TILE_INPUTS, code_bytes, tile_bytes};

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Groups that are multiplied before their sums are scaled: with their codes they fill half of the first cache.
const CHUNK: usize = 4;

/// Rows whose outputs are at hand while panels go through their groups, and whose codes stay in the second cache.
const BLOCK: usize = 8 * ROWS;

/// Panels that are computed together.
const PANELS: usize = 2;

/// Bytes of a tile.
const TILE: usize = 1024;

/// Whether the processor has tiles of bytes, and the system lets this process use them.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        // Leaf 7 exists where AVX-512 does, which is asked before.
        let (tile, int8) = (1 << 24, 1 << 25);
        __cpuid_count(7, 0).edx & (tile | int8) == tile | int8 && is_permitted()
    })
}

/// Asks the system for the state that tiles need on every thread of this process.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let mut result = ARCH_PRCTL;
    // SAFETY: this call reads and writes no memory of ours; the instruction changes rcx and r11 besides its result.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// This thread's tile registers, configured.
///
/// Registers 0 to 3 are for whole tiles: rows, codes, and sums with two panels. 4 to 6 are the same for the `tail` rows
/// that are left, but for the codes.
struct Tiles;

impl Tiles {
    /// # Safety
    /// [`is_available`].
    unsafe fn configure(tail: usize) -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..7].fill(TILE_INPUTS as u16);
        config.rows[..4].fill(ROWS as u8);
        config.rows[4..7].fill(tail.max(1) as u8);
        // SAFETY: the processor has the instruction, which reads 64 bytes, a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: who made this had the instructions.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Products of tiles in a round of [`repeat_products`].
pub const PRODUCTS: usize = 4;

/// Products of whole tiles alone, to measure their rate: nothing is read or written.
///
/// # Safety
/// [`is_available`].
pub unsafe fn repeat_products(rounds: usize) {
    // SAFETY: passed on from the caller.
    unsafe {
        let _tiles = Tiles::configure(ROWS);
        for _ in 0..rounds {
            asm!(
                "tdpbsud tmm2, tmm0, tmm1",
                "tdpbsud tmm3, tmm0, tmm1",
                "tdpbsud tmm5, tmm0, tmm1",
                "tdpbsud tmm6, tmm0, tmm1",
                options(nostack, nomem),
            );
        }
    }
}

/// What a few groups of the panels leave in the first cache.
#[repr(align(64))]
struct Chunk {
    /// Codes of 8 bits: a tile for each group and panel.
    codes: [[[u8; TILE]; PANELS]; CHUNK],
    /// Scales, then offsets.
    parameters: [[[[f32; LANES]; 2]; PANELS]; CHUNK],
    /// Sums of some rows.
    sums: [[[[i32; LANES]; ROWS]; PANELS]; CHUNK],
}

/// Outputs of a block of rows.
#[repr(align(64))]
struct Outputs([[[f32; LANES]; PANELS]; BLOCK]);

/// Some panels, all rows.
///
/// # Safety
/// [`is_available`], and the processor has the set. The task's rows lie in tiles of [`ROWS`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn run(task: &Task<'_>) {
    // SAFETY: passed on from the caller.
    let _tiles = unsafe { Tiles::configure(task.x.rows % ROWS) };
    let mut chunk = Chunk {
        codes: [[[0; TILE]; PANELS]; CHUNK],
        parameters: [[[[0.0; LANES]; 2]; PANELS]; CHUNK],
        sums: [[[[0; LANES]; ROWS]; PANELS]; CHUNK],
    };
    let mut outputs = Outputs([[[0.0; LANES]; PANELS]; BLOCK]);
    for first in (0..task.x.rows).step_by(BLOCK) {
        for panel in task.panels.clone().step_by(PANELS) {
            // SAFETY: the panels and rows exist; the rest is passed on from the caller.
            unsafe {
                match PANELS.min(task.panels.end - panel) {
                    PANELS => block::<PANELS>(task, panel, first, &mut chunk, &mut outputs),
                    _ => block::<1>(task, panel, first, &mut chunk, &mut outputs),
                }
            }
        }
    }
}

/// `N` panels with some rows.
///
/// # Safety
/// As [`run`]; tiles are configured; the panels exist, and `first` is the first row of a tile.
#[inline(always)]
unsafe fn block<const N: usize>(
    task: &Task<'_>,
    panel: usize,
    first: usize,
    chunk: &mut Chunk,
    Outputs(outputs): &mut Outputs,
) {
    let x = task.x;
    let rows = BLOCK.min(x.rows - first);
    let column = panel * LANES;
    let width = (task.w.outputs - column).min(N * LANES);
    let panels: [*const u8; N] = std::array::from_fn(|n| task.w.panel(panel + n).as_ptr());
    let mut start = [[0.0; LANES]; PANELS];
    if let Some(bias) = task.bias {
        start.as_flattened_mut()[..width].copy_from_slice(&bias[column..column + width]);
    }
    outputs[..rows].fill(start);
    for start in (0..x.groups).step_by(CHUNK) {
        let groups = CHUNK.min(x.groups - start);
        // SAFETY: the panels have that many groups, each a tile; the tiles of rows exist; the set is the caller's.
        unsafe {
            for group in 0..groups {
                for (n, panel) in panels.iter().enumerate() {
                    let tile = panel.add((start + group) * tile_bytes(task.w.dtype));
                    unpack(tile, task.w.dtype, &mut chunk.codes[group][n], &mut chunk.parameters[group][n]);
                }
            }
            for tile in (0..rows).step_by(ROWS) {
                let count = ROWS.min(rows - tile);
                // Where the rows of a tile begin, and their first group here.
                let place = (first + tile) * x.groups + start * count;
                for group in 0..groups {
                    let from = x.codes.as_ptr().add((place + group * count) * TILE_INPUTS);
                    multiply::<N>(from, count, &chunk.codes[group], &mut chunk.sums[group]);
                }
                let mut row = 0;
                while row < count {
                    let steps = x.scales.as_ptr().add(place + row);
                    let outputs = outputs[tile + row..].as_mut_ptr();
                    let scaled = Scaled { steps, count, groups, row, chunk, outputs };
                    row += match count - row {
                        8.. => scaled.add::<8, N>(),
                        4..8 => scaled.add::<4, N>(),
                        2..4 => scaled.add::<2, N>(),
                        _ => scaled.add::<1, N>(),
                    };
                }
            }
        }
    }
    for (row, outputs) in outputs[..rows].iter().enumerate() {
        let place = task.y.at((first + row) * task.stride + column);
        // SAFETY: these columns of the output belong to the task alone.
        unsafe { copy::<N>(outputs.as_flattened().as_ptr(), place, width) };
    }
}

/// Widens a tile's codes to bytes, and its scales and offsets to f32.
///
/// # Safety
/// The set exists, and `tile` is a whole tile of the dtype.
#[inline(always)]
unsafe fn unpack(tile: *const u8, dtype: DType, codes: &mut [u8; TILE], parameters: &mut [[f32; LANES]; 2]) {
    // SAFETY: passed on from the caller; a tile of 4 bits has 8 vectors of codes, one of 8 bits 16.
    unsafe {
        let to = codes.as_mut_ptr();
        let mask = _mm512_set1_epi8(15);
        for quad in 0..8 {
            let load = |quad: usize| tile.add(64 * quad).cast();
            let (low, high) = if dtype == DType::Int4 {
                let both = _mm512_loadu_si512(load(quad));
                (_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask))
            } else {
                (_mm512_loadu_si512(load(quad)), _mm512_loadu_si512(load(quad + 8)))
            };
            _mm512_store_si512(to.add(64 * quad).cast(), low);
            _mm512_store_si512(to.add(64 * (quad + 8)).cast(), high);
        }
        let halves: *const u16 = tile.add(code_bytes(dtype)).cast();
        for (index, parameters) in parameters.iter_mut().enumerate() {
            Avx512::load_f16(halves.add(index * LANES)).store(parameters.as_mut_ptr());
        }
    }
}

/// The sums of a group: of `count` rows of 64 codes with those of `N` panels.
///
/// # Safety
/// Tiles are configured for whole tiles and as many rows; the rows exist.
#[inline(always)]
unsafe fn multiply<const N: usize>(
    rows: *const i8,
    count: usize,
    codes: &[[u8; TILE]; PANELS],
    sums: &mut [[[i32; LANES]; ROWS]; PANELS],
) {
    // Registers of rows and sums; those of sums again for the second panel, if there is one.
    macro_rules! products {
        ($rows:literal, $sums:literal $(, $second:literal)?) => {
            asm!(
                concat!("tilezero tmm", $sums),
                concat!("tileloadd tmm", $rows, ", [{rows} + {stride}]"),
                "tileloadd tmm1, [{codes} + {stride}]",
                concat!("tdpbsud tmm", $sums, ", tmm", $rows, ", tmm1"),
                concat!("tilestored [{sums} + {stride}], tmm", $sums),
                $(
                    concat!("tilezero tmm", $second),
                    "tileloadd tmm1, [{codes} + {stride} + 1024]",
                    concat!("tdpbsud tmm", $second, ", tmm", $rows, ", tmm1"),
                    concat!("tilestored [{sums} + {stride} + 1024], tmm", $second),
                )?
                rows = in(reg) rows,
                codes = in(reg) codes.as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) TILE_INPUTS,
                options(nostack),
            )
        };
    }
    // SAFETY: `count` rows of 64 bytes are read, one or two tiles of codes, and as many of sums written.
    unsafe {
        match (count == ROWS, N == PANELS) {
            (true, true) => products!("0", "2", "3"),
            (true, false) => products!("0", "2"),
            (false, true) => products!("4", "5", "6"),
            (false, false) => products!("4", "5"),
        }
    }
}

/// What is added to some rows of outputs.
struct Scaled<'a> {
    /// What a step is worth, and the sum of the codes: of the first of these rows and groups, and of a tile's rows from
    /// one group to the next.
    steps: *const [f32; 2],
    count: usize,
    groups: usize,
    /// The first row within the tile.
    row: usize,
    chunk: &'a Chunk,
    /// Outputs of that row.
    outputs: *mut [[f32; LANES]; PANELS],
}

impl Scaled<'_> {
    /// Adds `M` rows of `N` panels; gives `M`.
    ///
    /// # Safety
    /// The set exists, and so do the rows.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn add<const M: usize, const N: usize>(&self) -> usize {
        // SAFETY: passed on from the caller.
        unsafe {
            let mut outputs = [[Avx512::splat(0.0); N]; M];
            for m in 0..M {
                for n in 0..N {
                    outputs[m][n] = Avx512::load((*self.outputs.add(m))[n].as_ptr());
                }
            }
            for group in 0..self.groups {
                let (parameters, sums) = (&self.chunk.parameters[group], &self.chunk.sums[group]);
                let mut scales = [[Avx512::splat(0.0); 2]; N];
                for n in 0..N {
                    scales[n] = [0, 1].map(|which| Avx512(_mm512_load_ps(parameters[n][which].as_ptr())));
                }
                for m in 0..M {
                    let [step, sum] = *self.steps.add(group * self.count + m);
                    let (step, sum) = (Avx512::splat(step), Avx512::splat(sum));
                    for n in 0..N {
                        let dots = _mm512_load_si512(sums[n].as_ptr().add(self.row + m).cast());
                        let [scale, offset] = scales[n];
                        let value = Avx512(_mm512_cvtepi32_ps(dots)).fma(scale, offset.mul(sum));
                        outputs[m][n] = value.fma(step, outputs[m][n]);
                    }
                }
            }
            for m in 0..M {
                for n in 0..N {
                    outputs[m][n].store((*self.outputs.add(m))[n].as_mut_ptr());
                }
            }
        }
        M
    }
}
