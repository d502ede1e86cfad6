//! Matrix products over packed weights.
//!
//! `y[m, n] = bias[n] + sum_k x[m, k] * w[n, k]`, the sum in ascending k, one fused multiply-add per term.
//!
//! **Invariant:** an output element is one chain of fused multiply-adds over k, so its bits depend on its row of
//! x, its column of w and the bias alone: not on how many rows are computed, on blocking, threads or the
//! instruction set.
//!
//! Limit: 2 * rows * inputs * outputs operations at the processor's fused multiply-add rate; the reached fraction is
//! what `cargo bench --bench job` prints.
use rayon::prelude::*;

use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes};
use super::shared::SharedMut;
use crate::model::dtype::DType;
use crate::model::packed::panels::{TILE_INPUTS, code_bytes, panel_bytes, tile_bytes};

/// Inputs whose weights are widened to f32 at a time: two panels of 16 outputs take 16 KiB of the first cache.
const BLOCK_INPUTS: usize = 2 * TILE_INPUTS;

/// Below this many multiply-adds a product runs on the calling thread.
pub const PARALLEL_WORK: usize = 1 << 16;

/// Stored elements of a packed matrix, borrowed: panels of 16 outputs, each (inputs padded to 64, 16).
#[derive(Clone)]
pub struct Panels<'a> {
    /// The panels' bytes, in pieces of whole panels.
    pub pieces: Vec<&'a [u8]>,
    /// Element type.
    pub dtype: DType,
    /// Input width (unpadded).
    pub inputs: usize,
    /// Output width (unpadded).
    pub outputs: usize,
}

impl Panels<'_> {
    /// The bytes of one panel.
    pub fn panel(&self, index: usize) -> &[u8] {
        let bytes = panel_bytes(self.inputs, self.dtype);
        let mut at = index * bytes;
        // A matrix has a few pieces at most: one where it is resident, and one per tier where it is not.
        for piece in &self.pieces {
            if at < piece.len() {
                return &piece[at..at + bytes];
            }
            at -= piece.len() / bytes * bytes;
        }
        panic!("panel {index} of {} outputs", self.outputs)
    }
}

/// Rows of activations in the order that the kernels read them: groups of `tile_rows` rows, each group
/// (inputs, rows in the group).
pub struct PackedRows<'a> {
    data: &'a [f32],
    rows: usize,
    inputs: usize,
    tile_rows: usize,
}

impl<'a> PackedRows<'a> {
    /// Packs `x` (rows, inputs) into `scratch`, which holds as many elements.
    pub fn pack(isa: Isa, x: &[f32], rows: usize, inputs: usize, scratch: &'a mut [f32]) -> Self {
        let tile_rows = isa.tile_rows();
        assert!(x.len() >= rows * inputs && scratch.len() >= rows * inputs);
        let scratch = &mut scratch[..rows * inputs];
        let pack = |(group, to): (usize, &mut [f32])| {
            let first = group * tile_rows;
            let count = tile_rows.min(rows - first);
            for row in 0..count {
                let from = &x[(first + row) * inputs..][..inputs];
                for (k, &value) in from.iter().enumerate() {
                    to[k * count + row] = value;
                }
            }
        };
        if rows * inputs < PARALLEL_WORK {
            scratch.chunks_mut(tile_rows * inputs).enumerate().for_each(pack);
        } else {
            scratch.par_chunks_mut(tile_rows * inputs).enumerate().for_each(pack);
        }
        PackedRows { data: scratch, rows, inputs, tile_rows }
    }
}

/// `y = x w^T + bias` for packed rows; row r of `y` begins at element `r * stride`.
pub fn linear(isa: Isa, x: &PackedRows<'_>, w: &Panels<'_>, bias: Option<&[f32]>, y: &mut [f32], stride: usize) {
    assert_eq!(x.inputs, w.inputs);
    for_panels(x.rows, w, bias, y, stride, |y, panels| isa.run(Linear { x, w, bias, y, stride, panels }));
}

/// Runs `task` for all panels of `w`, some at a time, each writing its own columns of `y`, whose rows are `stride`
/// apart.
pub fn for_panels(
    rows: usize,
    w: &Panels<'_>,
    bias: Option<&[f32]>,
    y: &mut [f32],
    stride: usize,
    task: impl Fn(&SharedMut<'_, f32>, std::ops::Range<usize>) + Sync,
) {
    let extent = rows.saturating_sub(1) * stride + w.outputs;
    assert!(stride >= w.outputs && y.len() >= extent, "output of {} for {rows} x {}", y.len(), w.outputs);
    assert!(bias.is_none_or(|bias| bias.len() >= w.outputs));
    let panels = w.outputs.div_ceil(LANES);
    let y = SharedMut::new(y);
    // Even, so that a task's panels pair up in the 512-bit tile.
    let chunk = 2 * panels.div_ceil(2).div_ceil(8 * rayon::current_num_threads()).clamp(1, 16);
    let some = |index: usize| task(&y, index * chunk..panels.min((index + 1) * chunk));
    let tasks = panels.div_ceil(chunk);
    if rows * w.inputs * w.outputs < PARALLEL_WORK {
        (0..tasks).for_each(some);
    } else {
        (0..tasks).into_par_iter().for_each(some);
    }
}

/// One task of [`linear`]: some panels, all rows.
struct Linear<'a> {
    x: &'a PackedRows<'a>,
    w: &'a Panels<'a>,
    bias: Option<&'a [f32]>,
    y: &'a SharedMut<'a, f32>,
    stride: usize,
    panels: std::ops::Range<usize>,
}

impl Kernel for Linear<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        assert_eq!(self.x.tile_rows, R::ROWS, "rows packed for another instruction set");
        let mut widened = [0f32; 2 * BLOCK_INPUTS * LANES];
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let vectors = R::VECTORS.min(self.panels.end - panel);
            let mut k = 0;
            while k < self.w.inputs {
                let depth = BLOCK_INPUTS.min(self.w.inputs - k);
                for v in 0..vectors {
                    let from = &self.w.panel(panel + v)[k / TILE_INPUTS * tile_bytes(self.w.dtype)..];
                    let to = &mut widened[v * BLOCK_INPUTS * LANES..][..depth * LANES];
                    // SAFETY: a panel holds at least `depth * LANES` elements from k on, which begins a tile; the set
                    // is the caller's.
                    unsafe {
                        match self.w.dtype {
                            DType::Int8 | DType::Int4 => widen_groups::<V>(from, self.w.dtype, to),
                            plain => widen::<V>(from, plain, to),
                        }
                    };
                }
                // SAFETY: `widened` holds `vectors` panels of `depth` inputs; the set is the caller's.
                unsafe {
                    if R::VECTORS == 2 && vectors == 2 {
                        self.block::<V, R, 2>(panel, k, depth, &widened);
                    } else {
                        self.block::<V, R, 1>(panel, k, depth, &widened);
                    }
                }
                k += depth;
            }
            panel += vectors;
        }
    }
}

impl Linear<'_> {
    /// All rows against `N` widened panels, inputs `k .. k + depth`.
    #[inline(always)]
    unsafe fn block<V: Lanes, R: Registers, const N: usize>(
        &self,
        panel: usize,
        k: usize,
        depth: usize,
        widened: &[f32],
    ) {
        let tile_rows = self.x.tile_rows;
        let outputs = self.w.outputs;
        let column = panel * LANES;
        let width = (outputs - column).min(N * LANES);
        // Bias first, then the terms: the chain starts at the bias.
        let mut start = [0f32; 2 * LANES];
        if let (Some(bias), 0) = (self.bias, k) {
            start[..width].copy_from_slice(&bias[column..column + width]);
        }
        let b: [*const f32; N] = std::array::from_fn(|v| widened[v * BLOCK_INPUTS * LANES..].as_ptr());
        let mut first = 0;
        while first < self.x.rows {
            let count = tile_rows.min(self.x.rows - first);
            let group = &self.x.data[first * self.x.inputs..][k * count..];
            let mut row = 0;
            while row < count {
                let rows = register_rows(count - row, tile_rows);
                let a = Strided { start: group[row..].as_ptr(), stride: count };
                let tile = Tile::<N> { depth, a, b, from_memory: k > 0, start: &start, width };
                // SAFETY: `a` reads elements row .. row + rows of `depth` groups of `count`; `b` `depth * 16`
                // elements each; the output rows lie in `y` and these columns belong to this task alone.
                unsafe {
                    let c = self.y.at((first + row) * self.stride + column);
                    tile.run::<V, R>(rows, c, self.stride);
                }
                row += rows;
            }
            first += count;
        }
    }
}

/// The largest register tile that `rows` rows fill; what is left is done in smaller ones.
#[inline(always)]
pub fn register_rows(rows: usize, tile_rows: usize) -> usize {
    let fills = |size: &usize| *size <= rows && *size <= tile_rows;
    if rows >= tile_rows { tile_rows } else { [8, 4, 2].into_iter().find(fills).unwrap_or(1) }
}

/// The left operand: element (k, m) at `start + k * stride + m * ROW`.
#[derive(Clone, Copy)]
pub struct Strided {
    /// Element (0, 0).
    pub start: *const f32,
    /// Elements from one k to the next.
    pub stride: usize,
}

/// A register tile: some rows, `ROW` elements apart in the left operand, by `N` vectors over `depth` inputs.
pub struct Tile<'a, const N: usize, const ROW: usize = 1> {
    /// Terms of the sum.
    pub depth: usize,
    /// Rows.
    pub a: Strided,
    /// Vectors: 16 consecutive outputs per input.
    pub b: [*const f32; N],
    /// Go on from what the output holds rather than from `start`.
    pub from_memory: bool,
    /// Where the sums start.
    pub start: &'a [f32; 2 * LANES],
    /// Outputs that exist, at most `16 * N`.
    pub width: usize,
}

impl<const N: usize, const ROW: usize> Tile<'_, N, ROW> {
    /// Computes `rows` rows into `c`, whose rows are `stride` apart. `rows` comes from [`register_rows`].
    ///
    /// # Safety
    /// `a`, `b` and `c` are valid for the extents that the fields name; `V`'s instruction set exists.
    #[inline(always)]
    pub unsafe fn run<V: Lanes, R: Registers>(&self, rows: usize, c: *mut f32, stride: usize) {
        // SAFETY: passed on from the caller.
        unsafe {
            if rows == 1 {
                self.rows::<V, 1>(c, stride);
            } else if R::ROWS > 1 && rows == 2 {
                self.rows::<V, 2>(c, stride);
            } else if R::ROWS > 1 && rows == 4 {
                self.rows::<V, 4>(c, stride);
            } else if R::ROWS == 6 && rows == 6 {
                self.rows::<V, 6>(c, stride);
            } else if R::ROWS == 14 && rows == 8 {
                self.rows::<V, 8>(c, stride);
            } else if R::ROWS == 14 && rows == 14 {
                self.rows::<V, 14>(c, stride);
            } else {
                unreachable!("no register tile of {rows} rows");
            }
        }
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop)]
    unsafe fn rows<V: Lanes, const M: usize>(&self, c: *mut f32, stride: usize) {
        // SAFETY: passed on from the caller; partial vectors go through a buffer of full width.
        unsafe {
            let full = self.width == N * LANES;
            // Beyond a partial tile's width there may be no memory: such an address is formed, never used.
            let at = |m: usize, v: usize| c.wrapping_add(m * stride + v * LANES);
            let count = |v: usize| self.width.saturating_sub(v * LANES).min(LANES);
            let mut sums = [[V::splat(0.0); N]; M];
            for (m, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = if !self.from_memory {
                        V::load(self.start.as_ptr().add(v * LANES))
                    } else if full {
                        V::load(at(m, v))
                    } else {
                        let mut buffer = [0f32; LANES];
                        std::ptr::copy_nonoverlapping(at(m, v), buffer.as_mut_ptr(), count(v));
                        V::load(buffer.as_ptr())
                    };
                }
            }
            let mut a = self.a.start;
            let mut b = self.b;
            // Written with indices: as iterators the accumulators of the largest tile leave their registers, and the
            // rate halves.
            for _ in 0..self.depth {
                let mut w = [V::splat(0.0); N];
                for v in 0..N {
                    w[v] = V::load(b[v]);
                    b[v] = b[v].wrapping_add(LANES);
                }
                for m in 0..M {
                    let x = V::splat(*a.add(m * ROW));
                    for v in 0..N {
                        sums[m][v] = x.fma(w[v], sums[m][v]);
                    }
                }
                a = a.wrapping_add(self.a.stride);
            }
            for (m, row) in sums.iter().enumerate() {
                for (v, sum) in row.iter().enumerate() {
                    if full {
                        sum.store(at(m, v));
                    } else {
                        let buffer = sum.to_array();
                        std::ptr::copy_nonoverlapping(buffer.as_ptr(), at(m, v), count(v));
                    }
                }
            }
        }
    }
}

/// Widens stored elements to f32; `to.len()` is a multiple of 16.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn widen<V: Lanes>(from: &[u8], dtype: DType, to: &mut [f32]) {
    assert!(from.len() >= to.len() * dtype.size() && to.len().is_multiple_of(LANES));
    let mut i = 0;
    while i < to.len() {
        // SAFETY: i + 16 <= to.len(), and `from` holds as many elements (asserted above).
        unsafe {
            let at = from.as_ptr().add(i * dtype.size());
            let values = match dtype {
                DType::F32 => V::load(at.cast()),
                DType::Bf16 => V::load_bf16(at.cast()),
                DType::F16 => V::load_f16(at.cast()),
                DType::Int8 | DType::Int4 => unreachable!("groups are widened by another function"),
            };
            values.store(to.as_mut_ptr().add(i));
        }
        i += LANES;
    }
}

/// Widens tiles of small integers to f32, as [`crate::quant::groups::Grid::decode`] does.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
unsafe fn widen_groups<V: Lanes>(from: &[u8], dtype: DType, to: &mut [f32]) {
    let (bits, codes) = if dtype == DType::Int4 { (4, 32) } else { (8, 64) };
    let tiles = from.chunks_exact(tile_bytes(dtype));
    for (tile, to) in tiles.zip(to.chunks_mut(TILE_INPUTS * LANES)) {
        let (bytes, parameters) = tile.split_at(code_bytes(dtype));
        let inputs = to.len() / LANES;
        // SAFETY: 16 scales, then 16 offsets of two bytes; a quad is 64 bytes and there are `codes / 4` of them; `to`
        // holds 16 values for each of its inputs.
        unsafe {
            let scale = V::load_f16(parameters.as_ptr().cast());
            let offset = V::load_f16(parameters.as_ptr().add(2 * LANES).cast());
            for quad in 0..codes / 4 {
                for part in 0..8 / bits * 4 {
                    // Four inputs from the low bits of each byte, then four from the high ones.
                    let (within, high) = (part % 4, part / 4);
                    let k = 4 * quad + within + codes * high;
                    if k < inputs {
                        let shift = (8 * within + bits * high) as u32;
                        let code = V::load_code(bytes.as_ptr().add(64 * quad).cast(), shift, (1 << bits) - 1);
                        code.fma(scale, offset).store(to.as_mut_ptr().add(k * LANES));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::packed::panels::{packed_bytes, panel_lane, put_group};
    use crate::quant::groups::encode;
    use crate::rng::Philox;

    /// Row-major (outputs, inputs) weights in panels, and what the panels stand for.
    pub fn pack(w: &[f32], inputs: usize, outputs: usize, dtype: DType) -> (Vec<u8>, Vec<f32>) {
        let mut data = vec![0u8; packed_bytes(inputs, outputs, dtype)];
        let mut values = w.to_vec();
        let panel = panel_bytes(inputs, dtype);
        for n in 0..outputs {
            for first in (0..inputs).step_by(TILE_INPUTS) {
                let tile =
                    &mut data[n / LANES * panel + first / TILE_INPUTS * tile_bytes(dtype)..][..tile_bytes(dtype)];
                let range = n * inputs + first..n * inputs + inputs.min(first + TILE_INPUTS);
                if let DType::Int8 | DType::Int4 = dtype {
                    let mut codes = [0; TILE_INPUTS];
                    let grid = encode(&w[range.clone()], if dtype == DType::Int4 { 15 } else { 255 }, &mut codes);
                    put_group(tile, dtype, n % LANES, &codes, grid.unwrap());
                    values[range].iter_mut().zip(codes).for_each(|(v, code)| *v = grid.unwrap().decode(code));
                    continue;
                }
                for (k, value) in values[range].iter_mut().enumerate() {
                    let at = &mut tile[(k * LANES + n % LANES) * dtype.size()..];
                    match dtype {
                        DType::Bf16 => {
                            let stored = half::bf16::from_f32(*value);
                            at[..2].copy_from_slice(&stored.to_le_bytes());
                            *value = stored.to_f32();
                        }
                        DType::F16 => {
                            let stored = half::f16::from_f32(*value);
                            at[..2].copy_from_slice(&stored.to_le_bytes());
                            *value = stored.to_f32();
                        }
                        _ => at[..4].copy_from_slice(&value.to_le_bytes()),
                    }
                }
            }
        }
        (data, values)
    }

    pub fn normals(seed: u64, count: usize) -> Vec<f32> {
        (0..count.div_ceil(4) as u64).flat_map(|i| Philox::new(seed, 0).normals(i)).take(count).collect()
    }

    /// Rows of numbers, each group of 64 of another kind: of any size, with an outlier, all alike, zero, subnormal.
    pub fn rough(rows: usize, width: usize) -> impl Strategy<Value = Vec<f32>> {
        let groups = width.div_ceil(TILE_INPUTS);
        let kinds = prop::collection::vec((0u8..6, -6i32..4), rows * groups);
        (kinds, any::<u64>()).prop_map(move |(kinds, seed)| {
            let mut values = normals(seed, rows * width);
            let mut kinds = kinds.into_iter();
            for group in values.chunks_mut(width).flat_map(|row| row.chunks_mut(TILE_INPUTS)) {
                let (kind, power) = kinds.next().expect("as many kinds as groups");
                group.iter_mut().for_each(|value| *value *= 10f32.powi(power));
                match kind {
                    0 => group[0] = 3e4,
                    1 => group.fill(group[0]),
                    2 => group.fill(0.0),
                    3 => group.iter_mut().for_each(|value| *value = value.signum() * 1e-41),
                    _ => {}
                }
            }
            values
        })
    }

    /// Shapes, and numbers of all kinds for rows, weights and bias.
    pub fn rough_products() -> impl Strategy<Value = ([usize; 3], [Vec<f32>; 3])> {
        (1usize..40, 1usize..200, 1usize..50).prop_flat_map(|(rows, inputs, outputs)| {
            let numbers = [rough(rows, inputs).boxed(), rough(outputs, inputs).boxed(), rough(1, outputs).boxed()];
            (Just([rows, inputs, outputs]), numbers)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Whatever numbers there are, every instruction set gives the bits of the plain chain.
        #[test]
        fn rough_numbers_give_the_bits_of_the_chain(
            ([rows, inputs, outputs], [x, w, bias]) in rough_products(), dtype in prop::sample::select(&DType::ALL[..]),
        ) {
            let (data, w) = pack(&w, inputs, outputs, dtype);
            for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                let mut scratch = vec![0.0; rows * inputs];
                let packed = PackedRows::pack(isa, &x, rows, inputs, &mut scratch);
                let mut y = vec![f32::NAN; rows * outputs];
                let panels = Panels { pieces: vec![&data], dtype, inputs, outputs };
                linear(isa, &packed, &panels, Some(&bias), &mut y, outputs);
                for (at, got) in y.into_iter().enumerate() {
                    let (m, n) = (at / outputs, at % outputs);
                    let terms = (0..inputs).map(|k| (x[m * inputs + k], w[n * inputs + k]));
                    let wanted = terms.fold(bias[n], |sum, (x, w)| x.mul_add(w, sum));
                    prop_assert_eq!(got.to_bits(), wanted.to_bits(), "{:?} {}: {} {}", isa, dtype, got, wanted);
                }
            }
        }
    }

    /// Every instruction set, dtype, row count and odd width gives the bits of the plain chain.
    #[test]
    fn equals_the_chain_of_fused_multiply_adds() {
        for (inputs, outputs) in [(1, 1), (20, 17), (64, 16), (130, 48), (300, 81)] {
            for dtype in DType::ALL {
                let rows = 31;
                let (x, w) = (normals(1, rows * inputs), normals(2, outputs * inputs));
                let bias = normals(3, outputs);
                let (data, w) = pack(&w, inputs, outputs, dtype);
                for n in 0..outputs {
                    let mut lane = vec![f32::NAN; inputs];
                    let panel = &data[n / LANES * panel_bytes(inputs, dtype)..][..panel_bytes(inputs, dtype)];
                    panel_lane(panel, dtype, n % LANES, &mut lane);
                    assert_eq!(lane, w[n * inputs..][..inputs], "{dtype}, output {n}");
                }
                let expected: Vec<f32> = (0..rows * outputs)
                    .map(|i| {
                        let (m, n) = (i / outputs, i % outputs);
                        let terms = (0..inputs).map(|k| (x[m * inputs + k], w[n * inputs + k]));
                        terms.fold(bias[n], |sum, (x, w)| x.mul_add(w, sum))
                    })
                    .collect();
                for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                    for some in [1, 2, 3, 5, 6, 7, 13, 14, 15, 31] {
                        let mut scratch = vec![0.0; some * inputs];
                        let packed = PackedRows::pack(isa, &x, some, inputs, &mut scratch);
                        let mut y = vec![f32::NAN; some * outputs];
                        let cut = outputs.div_ceil(LANES) / 2 * panel_bytes(inputs, dtype);
                        let pieces = vec![&data[..cut], &data[cut..]];
                        let panels = Panels { pieces, dtype, inputs, outputs };
                        linear(isa, &packed, &panels, Some(&bias), &mut y, outputs);
                        let same = y.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{isa:?} {dtype} {some} rows, {inputs} inputs, {outputs} outputs");
                    }
                }
            }
        }
    }
}
