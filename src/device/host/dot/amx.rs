//! Products of bytes in tile registers (AMX): 16 rows by 16 outputs by a group of 64 inputs in one instruction.
//!
//! A tile of codes, widened to bytes, is what the instruction takes as its second operand, and 16 rows of a group are
//! what it takes as its first. Two panels go through a block of rows a few groups at a time: codes are unpacked once
//! for all, sums go through the first cache, since only vectors can scale them, and while they do the next rows are
//! multiplied.
//!
//! **Invariant:** tile registers are configured by [`Tiles`] alone and released when it is dropped, on the same thread.
//! Compiled code uses none of them, so from one block of assembly to the next they keep what they hold; only
//! [`scale_and_multiply`] counts on that, within one call.
//!
//! Limit: a product of tiles takes 16 cycles and storing its sums 13 more in the same unit; its 16 vectors of sums take
//! 4 operations each on two units, 32 cycles, and for some 370 cycles after a tile instruction one of the two does no
//! multiplications. Measured with everything in the first cache: 8 ns, 13 ns, and 22 ns together, whatever the order;
//! so a quarter of the ceiling of the instruction is what can be had with a scale for every 64 inputs, over twice the
//! rate of vectors.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use super::super::lanes::{Avx512, LANES, Lanes};
use super::{Task, copy};
use crate::model::dtype::DType;
use crate::model::packed::panels::{TILE_INPUTS, code_bytes, tile_bytes};

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Groups that are multiplied before their sums are scaled: with their codes they fill half of the first cache.
const CHUNK: usize = 4;

/// Rows whose outputs are at hand while panels go through their groups, at most.
const BLOCK: usize = 16 * ROWS;

/// Bytes of codes of a block's rows, which stay in the second cache.
const BLOCK_BYTES: usize = 1 << 20;

/// Rows from which on one tile is scaled beside the product of the next. Measured (`cargo bench --bench products`): a
/// gain of 7 % and more from 128 rows on, a loss of 5 to 10 % with 64.
const OVERLAP: usize = 8 * ROWS;

/// Panels that are computed together.
const PANELS: usize = 2;

/// Bytes of a line of the caches.
const LINE: usize = 64;

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
/// Registers 0 to 3 are for whole tiles: rows, codes, and sums with two panels; 7 is for the second panel's codes. 4
/// to 6 are the same for the `tail` rows that are left, but for the codes.
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
        config.row_bytes[..8].fill(TILE_INPUTS as u16);
        config.rows[..8].fill(ROWS as u8);
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
    /// Sums of a tile's rows, and of the next one's.
    sums: [[[[[i32; LANES]; ROWS]; PANELS]; CHUNK]; 2],
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
        sums: [[[[[0; LANES]; ROWS]; PANELS]; CHUNK]; 2],
    };
    let mut outputs = Outputs([[[0.0; LANES]; PANELS]; BLOCK]);
    let rows = (BLOCK_BYTES / (task.x.groups * TILE) * ROWS).clamp(4 * ROWS, BLOCK);
    for first in (0..task.x.rows).step_by(rows) {
        let end = task.x.rows.min(first + rows);
        for panel in task.panels.clone().step_by(PANELS) {
            // SAFETY: the panels and rows exist; the rest is passed on from the caller.
            unsafe {
                match PANELS.min(task.panels.end - panel) {
                    PANELS => block::<PANELS>(task, panel, first..end, &mut chunk, &mut outputs),
                    _ => block::<1>(task, panel, first..end, &mut chunk, &mut outputs),
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
    Range { start: first, end }: Range<usize>,
    chunk: &mut Chunk,
    Outputs(outputs): &mut Outputs,
) {
    let x = task.x;
    let rows = end - first;
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
            let overlap = N == PANELS && groups == CHUNK && rows >= OVERLAP;
            let whole = if overlap { rows / ROWS } else { 0 };
            if overlap {
                let place = first * x.groups + start * ROWS;
                let (codes, steps) = (x.codes.as_ptr().add(place * TILE_INPUTS), x.scales.as_ptr().add(place));
                whole_tiles(codes, steps, x.groups * ROWS, chunk, &mut outputs[..whole * ROWS]);
            }
            for tile in (whole * ROWS..rows).step_by(ROWS) {
                let count = ROWS.min(rows - tile);
                // Where the rows of a tile begin, and their first group here.
                let place = (first + tile) * x.groups + start * count;
                for group in 0..groups {
                    let from = x.codes.as_ptr().add((place + group * count) * TILE_INPUTS);
                    multiply::<N>(from, count, &chunk.codes[group], &mut chunk.sums[0][group]);
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

/// Whole tiles of rows with two panels and all groups of a chunk; `stride` lies between a tile's steps and the next's.
///
/// # Safety
/// Tiles are configured, the set exists, and so do the rows at `codes` and `steps`, as many as `outputs` has.
#[inline(always)]
unsafe fn whole_tiles(
    codes: *const i8,
    steps: *const [f32; 2],
    stride: usize,
    chunk: &mut Chunk,
    outputs: &mut [[[f32; LANES]; PANELS]],
) {
    // SAFETY: passed on from the caller; what is only fetched ahead is an address.
    unsafe {
        for group in 0..CHUNK {
            multiply::<PANELS>(codes.add(group * TILE), ROWS, &chunk.codes[group], &mut chunk.sums[0][group]);
        }
        let last = outputs.len() / ROWS - 1;
        for (tile, outputs) in outputs.chunks_exact_mut(ROWS).enumerate() {
            let steps = steps.add(tile * stride);
            let later = [1, 2].map(|later| codes.wrapping_add((tile + later) * stride * TILE_INPUTS));
            if tile < last {
                scale_and_multiply::<true>(steps, later, tile % 2, chunk, outputs);
            } else {
                scale_and_multiply::<false>(steps, later, tile % 2, chunk, outputs);
            }
        }
    }
}

/// Scales the sums of a tile's rows while the tile unit multiplies the rows of the `next` one; `ahead` is fetched.
///
/// Every half of a group's sums is scaled beside one product of tiles, which is stored with the product after it: so
/// nothing waits for either.
///
/// # Safety
/// Tiles are configured, the set exists; there is a whole tile of rows at `steps` and, with `NEXT`, at `next`.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn scale_and_multiply<const NEXT: bool>(
    steps: *const [f32; 2],
    [next, ahead]: [*const i8; 2],
    now: usize,
    chunk: &mut Chunk,
    outputs: &mut [[[f32; LANES]; PANELS]],
) {
    const HALF: usize = ROWS / 2;
    const PRODUCTS: usize = CHUNK * PANELS;
    const PREFETCHED: usize = CHUNK * TILE / LINE / PRODUCTS;
    let codes = chunk.codes.as_ptr().cast::<u8>();
    let to = chunk.sums[1 - now].as_mut_ptr().cast::<u8>();
    // SAFETY: passed on from the caller; products go to the sums that are not read here.
    unsafe {
        for half in 0..2 {
            let mut values = [[Avx512::splat(0.0); PANELS]; HALF];
            for m in 0..HALF {
                for n in 0..PANELS {
                    values[m][n] = Avx512::load(outputs[half * HALF + m][n].as_ptr());
                }
            }
            for pair in 0..CHUNK / 2 {
                for n in 0..PANELS {
                    if NEXT {
                        let group = half * 2 + pair;
                        let product = group * PANELS + n;
                        // The first of all stores the last one's register where the last one's sums will be.
                        let done = to.add((product + PRODUCTS - 1) % PRODUCTS * TILE);
                        let codes = codes.add(product * TILE);
                        for line in 0..PREFETCHED {
                            let at = (product * PREFETCHED + line) * LINE;
                            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(at));
                        }
                        if n == 0 {
                            asm!(
                                "tileloadd tmm0, [{rows} + {stride}]",
                                "tileloadd tmm1, [{codes} + {stride}]",
                                "tilezero tmm2",
                                "tdpbsud tmm2, tmm0, tmm1",
                                "tilestored [{done} + {stride}], tmm3",
                                rows = in(reg) next.add(group * TILE),
                                codes = in(reg) codes,
                                done = in(reg) done,
                                stride = in(reg) TILE_INPUTS,
                                options(nostack),
                            );
                        } else {
                            asm!(
                                "tileloadd tmm7, [{codes} + {stride}]",
                                "tilezero tmm3",
                                "tdpbsud tmm3, tmm0, tmm7",
                                "tilestored [{done} + {stride}], tmm2",
                                codes = in(reg) codes,
                                done = in(reg) done,
                                stride = in(reg) TILE_INPUTS,
                                options(nostack),
                            );
                        }
                    }
                    let group = pair * PANELS + n;
                    let at = steps.add(group * ROWS + half * HALF);
                    add_group(&mut values, at, &chunk.parameters[group], &chunk.sums[now][group], half * HALF);
                }
            }
            for m in 0..HALF {
                for n in 0..PANELS {
                    values[m][n].store(outputs[half * HALF + m][n].as_mut_ptr());
                }
            }
        }
        if NEXT {
            asm!(
                "tilestored [{last} + {stride}], tmm3",
                last = in(reg) to.add((PRODUCTS - 1) * TILE),
                stride = in(reg) TILE_INPUTS,
                options(nostack),
            );
        }
    }
}

/// Adds what a group gives to `M` rows of `N` panels, beginning with `row` of the sums.
///
/// # Safety
/// The set exists, and there are as many steps.
#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn add_group<const M: usize, const N: usize>(
    values: &mut [[Avx512; N]; M],
    steps: *const [f32; 2],
    parameters: &[[[f32; LANES]; 2]; PANELS],
    sums: &[[[i32; LANES]; ROWS]; PANELS],
    row: usize,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut scales = [[Avx512::splat(0.0); 2]; N];
        for n in 0..N {
            scales[n] = [0, 1].map(|which| Avx512(_mm512_load_ps(parameters[n][which].as_ptr())));
        }
        for m in 0..M {
            let [step, sum] = *steps.add(m);
            let (step, sum) = (Avx512::splat(step), Avx512::splat(sum));
            for n in 0..N {
                let dots = _mm512_load_si512(sums[n].as_ptr().add(row + m).cast());
                let [scale, offset] = scales[n];
                let value = Avx512(_mm512_cvtepi32_ps(dots)).fma(scale, offset.mul(sum));
                values[m][n] = value.fma(step, values[m][n]);
            }
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
                let at = self.steps.add(group * self.count);
                add_group(&mut outputs, at, &self.chunk.parameters[group], &self.chunk.sums[0][group], self.row);
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
