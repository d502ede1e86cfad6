//! Matrix products of small integers: groups of weights by activations of 8 bits.
//!
//! Activations are rounded per row and group of 64 inputs: `x ~ s * a`, `s = max |x| / 127`. For a group of output n,
//! `sum_k w[n, k] x[m, k] ~ s * (scale * sum_k c a + offset * sum_k a)` with integer codes c and a; groups are added in
//! ascending order, each with one fused multiply-add.
//!
//! **Invariant:** integer sums are exact and the rest is one chain of f32 operations per output element, so its bits
//! depend on its row of x and its column of w alone, on every instruction set.
//!
//! Limit: 2 * rows * inputs * outputs operations at the rate of byte dot products. With 512-bit ones, each 16 come with
//! 3 multiplications of f32 and a conversion on the same units, which leaves 80 %; for tiles see `amx.rs`. What is
//! reached is printed by `cargo bench --bench products`.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{PARALLEL_WORK, Panels, for_panels};
use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, Portable, fold};
use super::shared::SharedMut;
use crate::model::dtype::DType;
use crate::model::packed::panels::{TILE_INPUTS, code_bytes, tile_bytes};

/// Groups that all rows go through at a time: those of a tile's panels stay in the second cache, and outputs are read
/// and written once for all of them.
const BLOCK_GROUPS: usize = 32;

/// Rows whose codes lie together: those that are computed together at most.
fn tile_rows(isa: Isa, rows: usize) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if rows >= AMX_ROWS => amx::ROWS,
        _ => 12,
    }
}

/// Fewer rows do not fill a tile: vectors are as fast then.
#[cfg(target_arch = "x86_64")]
const AMX_ROWS: usize = amx::ROWS;

/// Groups with nothing above it count as zeros.
const LEAST: f32 = 1e-30;

/// Rows of activations as small integers, in tiles of some rows (the last may have fewer).
pub struct IntegerRows<'a> {
    /// Codes, each tile (groups, rows of the tile, 64).
    codes: &'a [i8],
    /// What a step is worth, and the sum of the codes, each tile (groups, rows of the tile).
    scales: &'a [[f32; 2]],
    rows: usize,
    tile_rows: usize,
    groups: usize,
}

impl<'a> IntegerRows<'a> {
    /// Rounds `x` (rows, inputs) into `scratch`, of at least `rows * inputs` elements and 64 for each row beyond.
    pub fn round(isa: Isa, x: &[f32], rows: usize, inputs: usize, scratch: &'a mut [f32]) -> Self {
        let groups = inputs.div_ceil(TILE_INPUTS);
        let (scales, rest) = scratch.split_at_mut(rows * groups * 2);
        let scales: &mut [[f32; 2]] = bytemuck::cast_slice_mut(scales);
        let codes: &mut [i8] = &mut bytemuck::cast_slice_mut(rest)[..rows * groups * TILE_INPUTS];
        let tile_rows = tile_rows(isa, rows);
        let tile = tile_rows * groups;
        let round =
            |codes: &mut [i8], scales: &mut [[f32; 2]], x: &[f32]| isa.run(RoundTile { x, inputs, codes, scales });
        let x = &x[..rows * inputs];
        if rows * inputs < PARALLEL_WORK {
            let all =
                codes.chunks_mut(tile * TILE_INPUTS).zip(scales.chunks_mut(tile)).zip(x.chunks(tile_rows * inputs));
            all.for_each(|((codes, scales), x)| round(codes, scales, x));
        } else {
            let all = codes.par_chunks_mut(tile * TILE_INPUTS).zip(scales.par_chunks_mut(tile));
            all.zip(x.par_chunks(tile_rows * inputs)).for_each(|((codes, scales), x)| round(codes, scales, x));
        }
        IntegerRows { codes, scales, rows, tile_rows, groups }
    }
}

/// A tile's rows of activations, and where their codes go.
struct RoundTile<'a> {
    x: &'a [f32],
    inputs: usize,
    codes: &'a mut [i8],
    scales: &'a mut [[f32; 2]],
}

impl Kernel for RoundTile<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        let (rows, (all, _)) = (self.x.len() / self.inputs, self.codes.as_chunks_mut::<TILE_INPUTS>());
        for (row, x) in self.x.chunks_exact(self.inputs).enumerate() {
            for (group, x) in x.chunks(TILE_INPUTS).enumerate() {
                let mut values = <[f32; TILE_INPUTS]>::try_from(x).unwrap_or_else(|_| {
                    let mut padded = [0f32; TILE_INPUTS];
                    padded[..x.len()].copy_from_slice(x);
                    padded
                });
                // SAFETY: four vectors lie in `values`; the set is the caller's.
                let scale = unsafe { round_group::<V>(&mut values) };
                let place = group * rows + row;
                self.scales[place] = scale;
                all[place] = values.map(|value| value.to_bits() as i8);
            }
        }
    }
}

/// Rounds a group; gives what a step is worth and the sum of the codes, which are left in the last bits of `values`.
///
/// # Safety
/// The set of `V` exists.
#[inline(always)]
unsafe fn round_group<V: Lanes>(values: &mut [f32; TILE_INPUTS]) -> [f32; 2] {
    let vectors = values.as_mut_ptr();
    // SAFETY: four vectors lie in `values`; the set is the caller's.
    unsafe {
        let at = |v: usize| vectors.add(v * LANES);
        let mut most = V::splat(0.0);
        for v in 0..TILE_INPUTS / LANES {
            most = V::load(at(v)).abs().max(most);
        }
        // What is not negative is ordered as its bits are.
        let most = f32::from_bits(most.to_array().map(f32::to_bits).into_iter().fold(0, u32::max));
        // The inverse of less might be infinite.
        let inverse = V::splat(if most > LEAST { 127.0 / most } else { 0.0 });
        let mut sum = V::splat(0.0);
        for v in 0..TILE_INPUTS / LANES {
            let rounded = V::load(at(v)).mul(inverse).round();
            sum = sum.add(rounded);
            // Adding 1.5 * 2^23 leaves a small integer in the last bits.
            rounded.add(V::splat(12_582_912.0)).store(at(v));
        }
        // Sums of integers this small are exact. What is not finite must not become something that is: a NaN reaches
        // the sum, and an infinite value times its inverse, 0, is one.
        [most / 127.0, fold(sum.to_array())]
    }
}

/// `y = x w^T + bias`, as [`super::gemm::linear`] for weights in groups.
pub fn linear(isa: Isa, x: &IntegerRows<'_>, w: &Panels<'_>, bias: Option<&[f32]>, y: &mut [f32], stride: usize) {
    assert_eq!(x.groups, w.inputs.div_ceil(TILE_INPUTS));
    for_panels(x.rows, w, bias, y, stride, |y, panels| run(isa, Task { x, w, bias, y, stride, panels }));
}

/// How a set of instructions multiplies bytes.
trait Dots {
    /// Rows that are computed together at most.
    const ROWS: usize;
    /// Panels that are: 1 or 2.
    const PANELS: usize;

    /// Adds what a group gives to `y`: of each of `M` rows with the 16 outputs of `N` panels.
    ///
    /// # Safety
    /// The set exists, whole tiles of weights and `M` rows are there.
    unsafe fn add_group<const M: usize, const N: usize>(group: Group<N>, y: &mut [[[f32; LANES]; N]; M]);
}

/// A group of inputs: of some panels, and of some rows.
#[derive(Clone, Copy)]
struct Group<const N: usize> {
    tiles: [*const u8; N],
    /// Weights have 8 bits, not 4.
    wide: bool,
    /// 64 codes of each row.
    codes: *const i8,
    /// What a step of a row is worth, and the sum of its codes.
    steps: *const [f32; 2],
}

impl<const N: usize> Group<N> {
    fn dtype(&self) -> DType {
        if self.wide { DType::Int8 } else { DType::Int4 }
    }

    /// The scales of a panel's weights, and behind them their offsets, in f16.
    fn scales(&self, n: usize) -> *const u16 {
        self.tiles[n].wrapping_add(code_bytes(self.dtype())).cast()
    }

    /// Adds `sums`, the products of the codes, times what they are worth.
    ///
    /// # Safety
    /// As [`Dots::add_group`].
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn scale<V: Lanes, const M: usize>(&self, sums: [[V; N]; M], y: &mut [[[f32; LANES]; N]; M]) {
        for n in 0..N {
            // SAFETY: 16 scales and 16 offsets end a tile; the rest is the caller's.
            unsafe {
                let (scale, offset) = (V::load_f16(self.scales(n)), V::load_f16(self.scales(n).add(LANES)));
                for m in 0..M {
                    let [step, sum] = *self.steps.add(m);
                    let value = sums[m][n].fma(scale, offset.mul(V::splat(sum)));
                    let y = y[m][n].as_mut_ptr();
                    value.fma(V::splat(step), V::load(y)).store(y);
                }
            }
        }
    }
}

/// Some panels, all rows.
struct Task<'a> {
    x: &'a IntegerRows<'a>,
    w: &'a Panels<'a>,
    bias: Option<&'a [f32]>,
    y: &'a SharedMut<'a, f32>,
    stride: usize,
    panels: Range<usize>,
}

impl Task<'_> {
    /// # Safety
    /// The set of `D` exists, and this function is compiled with it.
    #[inline(always)]
    unsafe fn run<D: Dots>(self) {
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let left = self.panels.end - panel;
            // SAFETY: the panels exist; the set is the caller's.
            panel += unsafe {
                match D::PANELS.min(left) {
                    2.. => self.all_rows::<D, 2>(panel),
                    _ => self.all_rows::<D, 1>(panel),
                }
            };
        }
    }

    /// All rows of `N` panels; gives `N`.
    ///
    /// # Safety
    /// As [`Task::run`]; the panels exist.
    #[inline(always)]
    unsafe fn all_rows<D: Dots, const N: usize>(&self, panel: usize) -> usize {
        let panels = std::array::from_fn(|n| self.w.panel(panel + n).as_ptr());
        for start in (0..self.x.groups).step_by(BLOCK_GROUPS) {
            let groups = start..self.x.groups.min(start + BLOCK_GROUPS);
            for first in (0..self.x.rows).step_by(self.x.tile_rows) {
                let count = self.x.tile_rows.min(self.x.rows - first);
                let mut row = 0;
                while row < count {
                    let tile = Tile { first, count, row, panel, groups: groups.clone() };
                    // SAFETY: the rows exist; the set is the caller's.
                    row += unsafe {
                        match D::ROWS.min(count - row) {
                            12.. => self.tile::<D, 12, N>(tile, panels),
                            8..12 => self.tile::<D, 8, N>(tile, panels),
                            4..8 => self.tile::<D, 4, N>(tile, panels),
                            2..4 => self.tile::<D, 2, N>(tile, panels),
                            _ => self.tile::<D, 1, N>(tile, panels),
                        }
                    };
                }
            }
        }
        N
    }

    /// `M` rows with some groups of `N` panels; gives `M`.
    ///
    /// # Safety
    /// As [`Task::run`]; the rows exist.
    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn tile<D: Dots, const M: usize, const N: usize>(&self, tile: Tile, panels: [*const u8; N]) -> usize {
        let dtype = self.w.dtype;
        let column = tile.panel * LANES;
        let width = (self.w.outputs - column).min(N * LANES);
        let place = |m: usize| self.y.at((tile.first + tile.row + m) * self.stride + column);
        let mut y = [[[0f32; LANES]; N]; M];
        for m in 0..M {
            if tile.groups.start > 0 {
                // SAFETY: the columns of the output belong to this task alone.
                unsafe { copy::<N>(place(m), y[m].as_mut_ptr().cast(), width) };
            } else if let Some(bias) = self.bias {
                y[m].as_flattened_mut()[..width].copy_from_slice(&bias[column..column + width]);
            }
        }
        for group in tile.groups {
            // SAFETY: codes of these rows and groups exist; the set is the caller's.
            unsafe {
                let place = tile.first * self.x.groups + group * tile.count + tile.row;
                let group = Group {
                    tiles: panels.map(|panel| panel.add(group * tile_bytes(dtype))),
                    wide: dtype == DType::Int8,
                    codes: self.x.codes.as_ptr().add(place * TILE_INPUTS),
                    steps: self.x.scales.as_ptr().add(place),
                };
                D::add_group::<M, N>(group, &mut y);
            }
        }
        for m in 0..M {
            // SAFETY: as above.
            unsafe { copy::<N>(y[m].as_ptr().cast(), place(m), width) };
        }
        M
    }
}

/// Some rows of a tile, and what they are multiplied with.
struct Tile {
    /// The tile's first row, and how many it has.
    first: usize,
    count: usize,
    /// The first of these, within the tile.
    row: usize,
    /// The first panel.
    panel: usize,
    groups: Range<usize>,
}

/// Copies `width` of the lanes of `N` vectors.
///
/// # Safety
/// Both places have as many.
#[inline(always)]
unsafe fn copy<const N: usize>(from: *const f32, to: *mut f32, width: usize) {
    // SAFETY: passed on from the caller.
    unsafe {
        if width == N * LANES {
            // Of a known size it is no call.
            to.cast::<[[f32; LANES]; N]>().write_unaligned(from.cast::<[[f32; LANES]; N]>().read_unaligned());
        } else {
            std::ptr::copy_nonoverlapping(from, to, width);
        }
    }
}

/// Plain code.
struct Plain;

impl Dots for Plain {
    const ROWS: usize = 1;
    const PANELS: usize = 1;

    #[inline(always)]
    unsafe fn add_group<const M: usize, const N: usize>(group: Group<N>, y: &mut [[[f32; LANES]; N]; M]) {
        let dot = |row: *const i8, tile: *const u8| {
            // SAFETY: the caller passes that many bytes.
            let (codes, row) = unsafe {
                let codes = std::slice::from_raw_parts(tile, code_bytes(group.dtype()));
                (codes, std::slice::from_raw_parts(row, TILE_INPUTS))
            };
            let mut sums = [0i32; LANES];
            for (quad, codes) in codes.chunks_exact(4 * LANES).enumerate() {
                for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(4)) {
                    for (k, &code) in (4 * quad..).zip(codes) {
                        *sum += if group.wide {
                            i32::from(code) * i32::from(row[k])
                        } else {
                            i32::from(code & 15) * i32::from(row[k]) + i32::from(code >> 4) * i32::from(row[k + 32])
                        };
                    }
                }
            }
            let sums = sums.map(|sum| sum as f32);
            // SAFETY: plain code runs everywhere.
            unsafe { Portable::load(sums.as_ptr()) }
        };
        let row = |m: usize| group.codes.wrapping_add(m * TILE_INPUTS);
        let sums: [[Portable; N]; M] = std::array::from_fn(|m| group.tiles.map(|tile| dot(row(m), tile)));
        // SAFETY: passed on from the caller.
        unsafe { group.scale(sums, y) }
    }
}

/// Whether the processor multiplies bytes in vectors of 512 bits.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_vnni() -> bool {
    Isa::Avx512.is_available() && is_x86_feature_detected!("avx512vnni")
}

/// Runs a task with the best that `isa` and the processor have.
fn run(isa: Isa, task: Task<'_>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor and the system were asked; rows were laid out for tiles.
        Isa::Amx if isa.is_available() && task.x.tile_rows == amx::ROWS => unsafe { amx::run(&task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor was asked.
        Isa::Amx | Isa::Avx512 if has_vnni() => unsafe { x86::run_vnni(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor was asked.
        Isa::Amx | Isa::Avx512 | Isa::Avx2Vnni if Isa::Avx2Vnni.is_available() => unsafe { x86::run_avx2_vnni(task) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: who has AVX-512 has AVX2, and `isa` was chosen among those that the processor has.
        Isa::Amx | Isa::Avx512 | Isa::Avx2Vnni | Isa::Avx2 if isa.is_available() => unsafe { x86::run_avx2(task) },
        // SAFETY: plain code runs everywhere.
        _ => unsafe { task.run::<Plain>() },
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::needless_range_loop)]
mod x86 {
    use std::arch::x86_64::*;

    use super::super::lanes::{Avx512, LANES};
    use super::{Dots, Group, TILE_INPUTS, Task};

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub unsafe fn run_vnni(task: Task<'_>) {
        // SAFETY: this function is only entered where the set exists.
        unsafe { task.run::<Vnni>() }
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    pub unsafe fn run_avx2_vnni(task: Task<'_>) {
        // SAFETY: this function is only entered where the set exists.
        unsafe { task.run::<Halves<ShortVnni>>() }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run_avx2(task: Task<'_>) {
        // SAFETY: this function is only entered where the set exists.
        unsafe { task.run::<Halves<Maddubs>>() }
    }

    /// Four products and their sum for each of 16 outputs in one instruction.
    struct Vnni;

    impl Dots for Vnni {
        const ROWS: usize = 12;
        const PANELS: usize = 2;

        #[inline(always)]
        unsafe fn add_group<const M: usize, const N: usize>(group: Group<N>, y: &mut [[[f32; LANES]; N]; M]) {
            // SAFETY: passed on from the caller.
            unsafe {
                let mut sums = [[_mm512_setzero_si512(); N]; M];
                if group.wide {
                    for quad in 0..16 {
                        add_quad(&mut sums, load(group.tiles, quad), group.codes.add(4 * quad));
                    }
                } else {
                    let mask = _mm512_set1_epi8(15);
                    for quad in 0..8 {
                        let codes = load(group.tiles, quad);
                        let (mut low, mut high) = (codes, codes);
                        for n in 0..N {
                            low[n] = _mm512_and_si512(codes[n], mask);
                            high[n] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes[n]), mask);
                        }
                        add_quad(&mut sums, low, group.codes.add(4 * quad));
                        add_quad(&mut sums, high, group.codes.add(TILE_INPUTS / 2 + 4 * quad));
                    }
                }
                let mut values = [[Avx512(_mm512_setzero_ps()); N]; M];
                for m in 0..M {
                    for n in 0..N {
                        values[m][n] = Avx512(_mm512_cvtepi32_ps(sums[m][n]));
                    }
                }
                group.scale(values, y);
            }
        }
    }

    /// Four codes of 16 outputs of each panel.
    #[inline(always)]
    unsafe fn load<const N: usize>(tiles: [*const u8; N], quad: usize) -> [__m512i; N] {
        // SAFETY: passed on from the caller.
        unsafe {
            let mut w = [_mm512_setzero_si512(); N];
            for n in 0..N {
                w[n] = _mm512_loadu_si512(tiles[n].add(64 * quad).cast());
            }
            w
        }
    }

    /// Four inputs of each row with those of the panels.
    #[inline(always)]
    unsafe fn add_quad<const M: usize, const N: usize>(sums: &mut [[__m512i; N]; M], w: [__m512i; N], rows: *const i8) {
        // SAFETY: passed on from the caller.
        unsafe {
            for m in 0..M {
                let four = _mm512_set1_epi32(rows.add(m * TILE_INPUTS).cast::<i32>().read_unaligned());
                for n in 0..N {
                    sums[m][n] = _mm512_dpbusd_epi32(sums[m][n], w[n], four);
                }
            }
        }
    }

    /// Byte products of 256 bits.
    trait ShortDots {
        /// The products of a group with half of a panel's outputs, whose codes begin at `codes`.
        unsafe fn half<const M: usize>(codes: *const u8, rows: *const i8, wide: bool) -> [__m256i; M];
    }

    /// Goes through a panel by halves: 12 rows keep their sums in registers then, so that codes are unpacked once for
    /// as many, and what a sum is worth follows before anything of it is put away.
    struct Halves<D>(D);

    impl<D: ShortDots> Dots for Halves<D> {
        const ROWS: usize = 12;
        const PANELS: usize = 1;

        #[inline(always)]
        unsafe fn add_group<const M: usize, const N: usize>(group: Group<N>, y: &mut [[[f32; LANES]; N]; M]) {
            // SAFETY: passed on from the caller.
            unsafe {
                let widen = |halves: *const u16| _mm256_cvtph_ps(_mm_loadu_si128(halves.cast()));
                for n in 0..N {
                    for part in 0..2 {
                        let sums = D::half::<M>(group.tiles[n].add(32 * part), group.codes, group.wide);
                        let scales = group.scales(n).add(8 * part);
                        let (scale, offset) = (widen(scales), widen(scales.add(LANES)));
                        for m in 0..M {
                            let [step, sum] = *group.steps.add(m);
                            let offset = _mm256_mul_ps(offset, _mm256_set1_ps(sum));
                            let value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m]), scale, offset);
                            let y = y[m][n].as_mut_ptr().add(8 * part);
                            let value = _mm256_fmadd_ps(value, _mm256_set1_ps(step), _mm256_loadu_ps(y));
                            _mm256_storeu_ps(y, value);
                        }
                    }
                }
            }
        }
    }

    /// Quads of a group's half. Where the compiler knows the number it unrolls loops over them and runs out of
    /// registers.
    #[inline(always)]
    fn quads() -> usize {
        std::hint::black_box(8)
    }

    /// Four codes of 8 outputs; `high` takes those of each byte's upper half.
    #[inline(always)]
    unsafe fn unpack(codes: *const u8, high: bool) -> __m256i {
        // SAFETY: passed on from the caller.
        unsafe {
            let codes = _mm256_loadu_si256(codes.cast());
            _mm256_and_si256(if high { _mm256_srli_epi16::<4>(codes) } else { codes }, _mm256_set1_epi8(15))
        }
    }

    /// Four inputs of a row, again and again.
    #[inline(always)]
    unsafe fn four(rows: *const i8, m: usize, quad: usize) -> __m256i {
        // SAFETY: passed on from the caller.
        unsafe { _mm256_set1_epi32(rows.add(m * TILE_INPUTS + 4 * quad).cast::<i32>().read_unaligned()) }
    }

    /// Four products and their sum for each of 8 outputs in one instruction (AVX-VNNI).
    struct ShortVnni;

    impl ShortDots for ShortVnni {
        #[inline(always)]
        unsafe fn half<const M: usize>(codes: *const u8, rows: *const i8, wide: bool) -> [__m256i; M] {
            // SAFETY: passed on from the caller.
            unsafe {
                let mut sums = [_mm256_setzero_si256(); M];
                let (second, half) = (rows.add(TILE_INPUTS / 2), quads());
                for quad in 0..half {
                    let codes = codes.add(64 * quad);
                    let w = if wide { _mm256_loadu_si256(codes.cast()) } else { unpack(codes, false) };
                    for m in 0..M {
                        sums[m] = _mm256_dpbusd_avx_epi32(sums[m], w, four(rows, m, quad));
                    }
                }
                for quad in 0..half {
                    let w = if wide {
                        _mm256_loadu_si256(codes.add(64 * (half + quad)).cast())
                    } else {
                        unpack(codes.add(64 * quad), true)
                    };
                    for m in 0..M {
                        sums[m] = _mm256_dpbusd_avx_epi32(sums[m], w, four(second, m, quad));
                    }
                }
                sums
            }
        }
    }

    /// Two products and their sum in 16 bits at a time. Of codes of 4 bits, 8 such sums stay below
    /// 8 * 2 * 15 * 127 < 2^15; wider codes are taken as two of 4 bits.
    struct Maddubs;

    impl Maddubs {
        /// Adds the products of half a group, of codes of 4 bits, `factor` times.
        #[inline(always)]
        unsafe fn add<const M: usize>(
            sums: &mut [__m256i; M],
            (codes, rows): (*const u8, *const i8),
            high: bool,
            factor: i16,
        ) {
            // SAFETY: passed on from the caller.
            unsafe {
                let mut w = unpack(codes, high);
                let mut pairs = [w; M];
                for m in 0..M {
                    pairs[m] = _mm256_maddubs_epi16(w, four(rows, m, 0));
                }
                for quad in 1..quads() {
                    w = unpack(codes.add(64 * quad), high);
                    for m in 0..M {
                        pairs[m] = _mm256_add_epi16(pairs[m], _mm256_maddubs_epi16(w, four(rows, m, quad)));
                    }
                }
                for m in 0..M {
                    sums[m] = _mm256_add_epi32(sums[m], _mm256_madd_epi16(pairs[m], _mm256_set1_epi16(factor)));
                }
            }
        }
    }

    impl ShortDots for Maddubs {
        #[inline(always)]
        unsafe fn half<const M: usize>(codes: *const u8, rows: *const i8, wide: bool) -> [__m256i; M] {
            // SAFETY: passed on from the caller.
            unsafe {
                let second = rows.add(TILE_INPUTS / 2);
                let mut sums = [_mm256_setzero_si256(); M];
                Maddubs::add(&mut sums, (codes, rows), false, 1);
                if wide {
                    Maddubs::add(&mut sums, (codes, rows), true, 16);
                    Maddubs::add(&mut sums, (codes.add(512), second), false, 1);
                    Maddubs::add(&mut sums, (codes.add(512), second), true, 16);
                } else {
                    Maddubs::add(&mut sums, (codes, second), true, 1);
                }
                sums
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::gemm::tests::{normals, pack, rough_products};
    use super::*;
    use crate::model::packed::panels::panel_bytes;

    /// The definition, in f64 but for the operations that the module says are f32.
    fn expected(x: &[f32], (w, dtype): (&[u8], DType), bias: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
        let panel = panel_bytes(inputs, dtype);
        let mut y = Vec::new();
        for x in x.chunks_exact(inputs) {
            for n in 0..outputs {
                let tiles = w[n / LANES * panel..][..panel].chunks_exact(tile_bytes(dtype));
                y.push(tiles.zip(x.chunks(TILE_INPUTS)).fold(bias[n], |y, (tile, x)| {
                    let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let inverse = if most > LEAST { 127.0 / most } else { 0.0 };
                    let codes: Vec<i32> = x.iter().map(|x| (x * inverse).round_ties_even() as i32).collect();
                    let parameter = |at: usize| {
                        let bytes = &tile[code_bytes(dtype) + 2 * at..];
                        half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
                    };
                    let weight = |k: usize| match dtype {
                        DType::Int8 => i32::from(tile[k / 4 * 64 + n % LANES * 4 + k % 4]),
                        _ => i32::from(tile[k % 32 / 4 * 64 + n % LANES * 4 + k % 4] >> (4 * (k / 32)) & 15),
                    };
                    let sum: i32 = codes.iter().sum();
                    let dot: i32 = codes.iter().enumerate().map(|(k, code)| code * weight(k)).sum();
                    let value = (dot as f32).mul_add(parameter(n % LANES), parameter(LANES + n % LANES) * sum as f32);
                    value.mul_add(most / 127.0, y)
                }));
            }
        }
        y
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Whatever numbers there are.
        #[test]
        fn rough_numbers_give_the_bits_of_the_definition(
            ([rows, inputs, outputs], [x, w, bias]) in rough_products(),
            dtype in prop::sample::select(&[DType::Int8, DType::Int4][..]),
        ) {
            let (data, _) = pack(&w, inputs, outputs, dtype);
            let expected = expected(&x, (&data, dtype), &bias, inputs, outputs);
            for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                let mut scratch = vec![0.0; rows * (inputs + TILE_INPUTS)];
                let integers = IntegerRows::round(isa, &x, rows, inputs, &mut scratch);
                let mut y = vec![f32::NAN; rows * outputs];
                let panels = Panels { pieces: vec![&data], dtype, inputs, outputs };
                linear(isa, &integers, &panels, Some(&bias), &mut y, outputs);
                for (got, wanted) in y.iter().zip(&expected) {
                    prop_assert_eq!(got.to_bits(), wanted.to_bits(), "{:?} {}: {} {}", isa, dtype, got, wanted);
                }
            }
        }
    }

    #[test]
    fn every_set_gives_the_bits_of_the_definition() {
        for (inputs, outputs) in [(20, 17), (64, 16), (130, 48), (2100, 33)] {
            for dtype in [DType::Int8, DType::Int4] {
                let rows = 150;
                let (mut x, mut w) = (normals(1, rows * inputs), normals(2, outputs * inputs));
                // An outlier, a row of zeros, one of nearly nothing, weights all alike.
                x[5] = 4000.0;
                x[inputs..2 * inputs].fill(0.0);
                x[2 * inputs..3 * inputs].fill(1e-40);
                w[..inputs].fill(0.25);
                let bias = normals(3, outputs);
                let (data, _) = pack(&w, inputs, outputs, dtype);
                let expected = expected(&x, (&data, dtype), &bias, inputs, outputs);
                assert!(expected.iter().all(|y| y.is_finite()));
                for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                    for some in [1, 2, 4, 5, 11, 12, 13, 16, 31, 150] {
                        let mut scratch = vec![0.0; some * (inputs + TILE_INPUTS)];
                        let integers = IntegerRows::round(isa, &x[..some * inputs], some, inputs, &mut scratch);
                        let mut y = vec![f32::NAN; some * outputs];
                        let panels = Panels { pieces: vec![&data], dtype, inputs, outputs };
                        linear(isa, &integers, &panels, Some(&bias), &mut y, outputs);
                        for (at, (got, wanted)) in y.iter().zip(&expected).enumerate() {
                            let place = format!("{isa:?} {dtype} {some} rows, {inputs} x {outputs}, at {at}");
                            assert!(got.to_bits() == wanted.to_bits(), "{place}: {got} {wanted}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn codes_at_their_limits_do_not_overflow() {
        let (inputs, outputs) = (128, 16);
        for dtype in [DType::Int8, DType::Int4] {
            // Codes at their greatest but for one weight of a group, which spans the range.
            let mut w = vec![1.0; inputs * outputs];
            w.chunks_exact_mut(TILE_INPUTS).for_each(|group| group[0] = 0.0);
            let (data, w) = pack(&w, inputs, outputs, dtype);
            for (sign, rows) in [(1.0, 1), (-1.0, 1), (1.0, 16), (-1.0, 16)] {
                let x = vec![sign * 3.0; rows * inputs];
                let exact: f64 = w[..inputs].iter().map(|&w| f64::from(w) * f64::from(sign) * 3.0).sum();
                for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                    let mut scratch = vec![0.0; rows * inputs];
                    let integers = IntegerRows::round(isa, &x, rows, inputs, &mut scratch);
                    let mut y = vec![0.0; rows * outputs];
                    let panels = Panels { pieces: vec![&data], dtype, inputs, outputs };
                    linear(isa, &integers, &panels, None, &mut y, outputs);
                    let near = |y: &f32| (f64::from(*y) - exact).abs() < 1e-3 * exact.abs();
                    assert!(y.iter().all(near), "{isa:?} {dtype}: {y:?} {exact}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let (data, _) = pack(&normals(4, 64 * 16), 64, 16, DType::Int4);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (rows, isa) in [1, 16].into_iter().flat_map(|rows| Isa::all().map(|isa| (rows, isa))) {
                if !isa.is_available() {
                    continue;
                }
                let mut x = normals(5, rows * 64);
                x.chunks_exact_mut(64).for_each(|x| x[9] = wrong);
                let mut scratch = vec![0.0; rows * 128];
                let integers = IntegerRows::round(isa, &x, rows, 64, &mut scratch);
                let mut y = vec![0.0; rows * 16];
                let panels = Panels { pieces: vec![&data], dtype: DType::Int4, inputs: 64, outputs: 16 };
                linear(isa, &integers, &panels, None, &mut y, 16);
                assert!(y.iter().all(|y| y.is_nan()), "{isa:?} {wrong}: {y:?}");
            }
        }
    }
}
