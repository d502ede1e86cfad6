//! Keys and values as they are stored, in pages, and back as f32.
//!
//! Integers: `x ~ scale * code + offset` with one scale and offset in f16 for the key, and for the value, of a position
//! and head. The least element is code 0, the greatest the last (FlexGen's choice, arXiv 2303.06865, section 5, but per
//! token and head): nothing is known yet of what else the page will hold, and appending must not cost.
//!
//! **Invariant:** what is stored of a position depends on its own key and value alone, and is read the same by every
//! instruction set.

use half::f16;
use rayon::prelude::*;

use super::HostFrames;
use super::gemm::widen;
use super::lanes::{LANES, Lanes};
use crate::device::Heads;
use crate::kv::layout::{KvLayout, PAGE_POSITIONS};
use crate::kv::pages::Segment;
use crate::kv::policy::Kept;
use crate::model::dtype::DType;

/// Stores keys and values of every segment's rows, of segments whose positions have a place of their own.
pub fn append(frames: &HostFrames<'_>, segments: &[Segment], qkv: &[f32], heads: Heads) {
    let fixed = segments.iter().filter(|segment| !matches!(segment.kept, Kept::Heavy { .. }));
    let tasks: Vec<(&Segment, usize)> =
        fixed.flat_map(|segment| (0..heads.num_kv_heads).map(move |head| (segment, head))).collect();
    tasks.into_par_iter().with_min_len(TASKS).for_each(|(segment, head)| {
        for (row, position) in (segment.first_row..).zip(segment.start..segment.start + segment.len) {
            let page = segment.pages[segment.kept.page(position / PAGE_POSITIONS)];
            // SAFETY: no other segment writes to a page that this one writes to, and no other task to this head.
            let part = unsafe { frames.head_mut(page, head) };
            let (key, value) = key_and_value(qkv, row, head, heads);
            store_slot(&frames.layout, part, position % PAGE_POSITIONS, key, value);
        }
    });
}

/// Tasks that are worth another thread.
const TASKS: usize = 16;

/// The key and the value of a row's head.
pub fn key_and_value(qkv: &[f32], row: usize, head: usize, heads: Heads) -> (&[f32], &[f32]) {
    let (keys, values) = qkv[row * heads.qkv_width()..][..heads.qkv_width()][heads.query_width()..]
        .split_at(heads.num_kv_heads * heads.head_dim);
    let within = head * heads.head_dim..(head + 1) * heads.head_dim;
    (&keys[within.clone()], &values[within])
}

/// Stores one position's key and value in a slot of a head of a page.
pub fn store_slot(layout: &KvLayout, part: &mut [u8], slot: usize, key: &[f32], value: &[f32]) {
    let dtype = layout.dtype;
    if layout.codes_per_word().is_some() {
        store_codes(&mut part[layout.keys()], dtype, slot, key, |dim| layout.key_code(slot, dim));
        store_codes(&mut part[layout.values()], dtype, slot, value, |dim| layout.value_code(slot, dim));
    } else {
        store(&mut part[layout.keys()], dtype, key, |dim| layout.key_element(slot, dim));
        store(&mut part[layout.values()], dtype, value, |dim| layout.value_element(slot, dim));
    }
}

/// What a slot of a head of a page holds, bit by bit: its key's and value's elements or codes, scales and offsets.
pub fn take_slot(layout: &KvLayout, part: &[u8], slot: usize) -> Vec<u32> {
    let mut bits = Vec::with_capacity(2 * layout.head_dim + 4);
    each_place(layout, slot, |start, width, shift| {
        let bytes = &part[start..][..width];
        let word = bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
        bits.push(match shift {
            Some(shift) => word >> shift & 15,
            None => word,
        });
    });
    bits
}

/// Puts into a slot what [`take_slot`] took from another.
pub fn put_slot(layout: &KvLayout, part: &mut [u8], slot: usize, bits: &[u32]) {
    let mut bits = bits.iter();
    each_place(layout, slot, |start, width, shift| {
        let word = *bits.next().expect("as many as were taken");
        match shift {
            Some(shift) => part[start] = part[start] & !(15 << shift) | (word as u8) << shift,
            None => part[start..][..width].copy_from_slice(&word.to_le_bytes()[..width]),
        }
    });
}

/// Calls `visit` with the first byte, the width in bytes and, of half a byte, the shift of all that a slot consists of.
fn each_place(layout: &KvLayout, slot: usize, mut visit: impl FnMut(usize, usize, Option<u32>)) {
    for (part, is_key) in [(layout.keys(), true), (layout.values(), false)] {
        for dim in 0..layout.head_dim {
            let Some(codes) = layout.codes_per_word() else {
                let element = if is_key { layout.key_element(slot, dim) } else { layout.value_element(slot, dim) };
                let size = layout.dtype.size();
                visit(part.start + element * size, size, None);
                continue;
            };
            let (word, within) = if is_key { layout.key_code(slot, dim) } else { layout.value_code(slot, dim) };
            match codes {
                8 => visit(part.start + 4 * word + within / 2, 1, Some(4 * (within % 2) as u32)),
                _ => visit(part.start + 4 * word + within, 1, None),
            }
        }
        if layout.codes_per_word().is_some() {
            let grid = part.end - 4 * PAGE_POSITIONS;
            visit(grid + 2 * slot, 2, None);
            visit(grid + 2 * (PAGE_POSITIONS + slot), 2, None);
        }
    }
}

fn store(to: &mut [u8], dtype: DType, from: &[f32], element: impl Fn(usize) -> usize) {
    match dtype {
        DType::F32 => {
            let to: &mut [f32] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = value);
        }
        DType::Bf16 => {
            let to: &mut [half::bf16] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = half::bf16::from_f32(value));
        }
        DType::F16 => {
            let to: &mut [f16] = bytemuck::cast_slice_mut(to);
            from.iter().enumerate().for_each(|(dim, &value)| to[element(dim)] = to_f16(value));
        }
        DType::Int8 | DType::Int4 => unreachable!("integers are stored with their scales"),
    }
}

/// Saturates: an infinite value would reach other queries of its tile, as zero times infinity.
fn to_f16(value: f32) -> f16 {
    f16::from_f32(value.clamp(-65_504.0, 65_504.0))
}

/// Stores a key or a value as integers; `place` is of the layout.
fn store_codes(to: &mut [u8], dtype: DType, slot: usize, from: &[f32], place: impl Fn(usize) -> (usize, usize)) {
    let (bits, most) = if dtype == DType::Int4 { (4, 15.0) } else { (8, 255.0) };
    let (mut low, mut high, mut poison) = (f32::INFINITY, f32::NEG_INFINITY, 0.0);
    for &value in from {
        low = low.min(value);
        high = high.max(value);
        // What is not finite must not be rounded to something that is.
        poison += 0.0 * value;
    }
    let (scale, offset) = (to_f16((high - low) / most + poison), to_f16(low + poison));
    let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    let (codes, grid) = to.split_at_mut(to.len() - 4 * PAGE_POSITIONS);
    let words: &mut [u32] = bytemuck::cast_slice_mut(codes);
    for (dim, value) in from.iter().enumerate() {
        let code = ((value - offset.to_f32()) * inverse).clamp(0.0, most).round_ties_even();
        let (word, within) = place(dim);
        let shift = (bits * within) as u32;
        words[word] = words[word] & !(((1 << bits) - 1) << shift) | (code as u32) << shift;
    }
    let grid: &mut [f16] = bytemuck::cast_slice_mut(grid);
    (grid[slot], grid[PAGE_POSITIONS + slot]) = (scale, offset);
}

/// The keys of a head of a page: (64 / 16 groups, head_dim, 16 positions), in `to` or where they are
/// stored so.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn widen_keys<V: Lanes>(part: &[u8], layout: &KvLayout, to: &mut [f32]) -> *const f32 {
    let (from, to) = (&part[layout.keys()], &mut to[..]);
    // SAFETY: passed on from the caller.
    unsafe {
        match layout.dtype {
            DType::F32 => return bytemuck::cast_slice::<u8, f32>(from).as_ptr(),
            DType::Bf16 | DType::F16 => widen::<V>(from, layout.dtype, to),
            DType::Int8 => widen_key_codes::<V, 4>(from, layout.head_dim, to),
            DType::Int4 => widen_key_codes::<V, 8>(from, layout.head_dim, to),
        }
    }
    to.as_ptr()
}

/// The values of a head of a page: (head_dim / 16 groups, 64 positions, 16 dimensions); otherwise as [`widen_keys`].
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn widen_values<V: Lanes>(part: &[u8], layout: &KvLayout, to: &mut [f32]) -> *const f32 {
    let (from, to) = (&part[layout.values()], &mut to[..]);
    // SAFETY: passed on from the caller.
    unsafe {
        match layout.dtype {
            DType::F32 => return bytemuck::cast_slice::<u8, f32>(from).as_ptr(),
            DType::Bf16 | DType::F16 => widen::<V>(from, layout.dtype, to),
            DType::Int8 => widen_value_codes::<V, 4>(from, to),
            DType::Int4 => widen_value_codes::<V, 8>(from, to),
        }
    }
    to.as_ptr()
}

/// Keys as codes, `PER_WORD` in a word.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
unsafe fn widen_key_codes<V: Lanes, const PER_WORD: usize>(from: &[u8], head_dim: usize, to: &mut [f32]) {
    let (words, grid) = parts(from);
    let (bits, mask) = code_bits(PER_WORD);
    let depth = head_dim.div_ceil(PER_WORD);
    for (group, to) in to.chunks_exact_mut(head_dim * LANES).enumerate() {
        let words = &words[group * depth * LANES..][..depth * LANES];
        // SAFETY: a group has 16 scales and 16 offsets, and 16 words for every few dimensions; the set is the caller's.
        unsafe {
            let scale = V::load_f16(grid[group * LANES..].as_ptr());
            let offset = V::load_f16(grid[PAGE_POSITIONS + group * LANES..].as_ptr());
            let (whole, rest) = to.as_chunks_mut::<LANES>().0.as_chunks_mut::<PER_WORD>();
            let words = words.as_chunks::<LANES>().0;
            for (words, to) in words.iter().zip(whole) {
                for (within, to) in to.iter_mut().enumerate() {
                    let code = V::load_code(words.as_ptr(), (within * bits) as u32, mask);
                    code.fma(scale, offset).store(to.as_mut_ptr());
                }
            }
            for (within, to) in rest.iter_mut().enumerate() {
                let code = V::load_code(words[depth - 1].as_ptr(), (within * bits) as u32, mask);
                code.fma(scale, offset).store(to.as_mut_ptr());
            }
        }
    }
}

/// Values as codes, `PER_WORD` in a word.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
unsafe fn widen_value_codes<V: Lanes, const PER_WORD: usize>(from: &[u8], to: &mut [f32]) {
    let (words, grid) = parts(from);
    let (bits, mask) = code_bits(PER_WORD);
    let mut wide = [0f32; 2 * PAGE_POSITIONS];
    // SAFETY: there are 64 scales and 64 offsets; a group of dimensions has 16 words for every few positions; the set
    // is the caller's.
    unsafe {
        for (from, to) in grid.chunks_exact(LANES).zip(wide.chunks_exact_mut(LANES)) {
            V::load_f16(from.as_ptr()).store(to.as_mut_ptr());
        }
        let (scales, offsets) = wide.split_at(PAGE_POSITIONS);
        let (scales, offsets) = (scales.as_chunks::<PER_WORD>().0, offsets.as_chunks::<PER_WORD>().0);
        let words = words.as_chunks::<LANES>().0.chunks_exact(PAGE_POSITIONS / PER_WORD);
        let to = to.as_chunks_mut::<LANES>().0.as_chunks_mut::<PER_WORD>().0;
        for (words, to) in words.zip(to.chunks_exact_mut(PAGE_POSITIONS / PER_WORD)) {
            for (((words, to), scales), offsets) in words.iter().zip(to).zip(scales).zip(offsets) {
                for within in 0..PER_WORD {
                    let code = V::load_code(words.as_ptr(), (within * bits) as u32, mask);
                    let (scale, offset) = (V::splat(scales[within]), V::splat(offsets[within]));
                    code.fma(scale, offset).store(to[within].as_mut_ptr());
                }
            }
        }
    }
}

/// Words of codes, then scales and offsets.
fn parts(from: &[u8]) -> (&[u32], &[u16]) {
    let (codes, grid) = from.split_at(from.len() - 4 * PAGE_POSITIONS);
    (bytemuck::cast_slice(codes), bytemuck::cast_slice(grid))
}

/// Bits of a code, and a mask of as many.
fn code_bits(per_word: usize) -> (usize, u32) {
    let bits = 32 / per_word;
    (bits, (1 << bits) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::isa::{Isa, Kernel, Registers};
    use super::*;
    use crate::rng::Philox;

    /// What a head of a page holds: keys by position, then values by position.
    struct ReadBack<'a>(&'a [u8], &'a KvLayout);

    impl Kernel for ReadBack<'_> {
        type Output = [Vec<Vec<f32>>; 2];

        #[inline(always)]
        unsafe fn run<V: Lanes, R: Registers>(self) -> Self::Output {
            let ReadBack(part, layout) = self;
            let (dim, padded) = (layout.head_dim, layout.head_dim.next_multiple_of(LANES));
            let (mut keys, mut values) = (vec![0f32; PAGE_POSITIONS * dim], vec![0f32; PAGE_POSITIONS * padded]);
            // SAFETY: the set is the caller's.
            unsafe {
                let wide = widen_keys::<V>(part, layout, &mut keys);
                let wide = std::slice::from_raw_parts(wide, keys.len()).to_vec();
                keys.copy_from_slice(&wide);
                let wide = widen_values::<V>(part, layout, &mut values);
                let wide = std::slice::from_raw_parts(wide, values.len()).to_vec();
                values.copy_from_slice(&wide);
            }
            let by_position = |at: &dyn Fn(usize, usize) -> f32| -> Vec<Vec<f32>> {
                (0..PAGE_POSITIONS).map(|slot| (0..dim).map(|d| at(slot, d)).collect()).collect()
            };
            [
                by_position(&|slot, d| keys[(slot / LANES * dim + d) * LANES + slot % LANES]),
                by_position(&|slot, d| values[(d / LANES * PAGE_POSITIONS + slot) * LANES + d % LANES]),
            ]
        }
    }

    /// The definition, slowly: what a key or value becomes.
    fn rounded(x: &[f32], dtype: DType) -> Vec<f32> {
        let most = match dtype {
            DType::F32 => return x.to_vec(),
            DType::Bf16 => return x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
            DType::F16 => return x.iter().map(|&x| to_f16(x).to_f32()).collect(),
            DType::Int8 => 255.0,
            DType::Int4 => 15.0,
        };
        if x.iter().any(|x| !x.is_finite()) {
            return vec![f32::NAN; x.len()];
        }
        let (low, high) = x.iter().fold((f32::MAX, f32::MIN), |(low, high), &x| (x.min(low), x.max(high)));
        let (scale, offset) = (to_f16((high - low) / most).to_f32(), to_f16(low).to_f32());
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let code = |x: f32| ((x - offset) * inverse).clamp(0.0, most).round_ties_even();
        x.iter().map(|&x| code(x).mul_add(scale, offset)).collect()
    }

    proptest! {
        #[test]
        fn what_is_stored_is_read_back_by_every_set(
            seed in 0u64..1000, dtype in 0usize..5, head_dim in 1usize..150, odd in 0usize..6,
        ) {
            let dtype = DType::ALL[dtype];
            let layout = KvLayout { num_layers: 1, num_kv_heads: 1, head_dim, dtype, scored: false };
            // A page that was used before: what is overwritten must not shine through.
            let mut page: Vec<u32> =
                (0..layout.layer_bytes() as u32 / 4 + 1).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
            let mut moved = page.clone();
            let page: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut page)[..layout.layer_bytes()];
            let moved: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut moved)[..layout.layer_bytes()];
            let width = 2 * head_dim;
            let random = Philox::new(seed, 0);
            let mut rows: Vec<Vec<f32>> = (0..PAGE_POSITIONS as u64)
                .map(|slot| (0..width as u64).map(|i| random.normals(slot << 32 | i)[0]).collect())
                .collect();
            match odd {
                0 => rows[3][0] = 3e4,
                1 => rows[5].fill(-0.75),
                2 => rows[9].iter_mut().for_each(|x| *x *= 1e-41),
                3 => rows[11][width - 1] = f32::NAN,
                4 => rows[13][0] = f32::INFINITY,
                _ => rows[15].iter_mut().for_each(|x| *x *= 1e6),
            }
            for (slot, row) in rows.iter().enumerate() {
                store_slot(&layout, page, slot, &row[..head_dim], &row[head_dim..]);
            }
            // Moved to other slots and back.
            for slot in 0..PAGE_POSITIONS {
                put_slot(&layout, moved, PAGE_POSITIONS - 1 - slot, &take_slot(&layout, page, slot));
            }
            for slot in 0..PAGE_POSITIONS {
                put_slot(&layout, page, slot, &take_slot(&layout, moved, PAGE_POSITIONS - 1 - slot));
            }
            for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                let read = isa.run(ReadBack(page, &layout));
                for (slot, row) in rows.iter().enumerate() {
                    for (part, read) in read.iter().enumerate() {
                        let wanted = rounded(&row[part * head_dim..][..head_dim], dtype);
                        let same = |(a, b): (&f32, &f32)| a == b || (a.is_nan() && b.is_nan());
                        let got = &read[slot];
                        let place = format!("{isa:?} {dtype} slot {slot}, part {part}: {got:?}, not {wanted:?}");
                        prop_assert!(got.iter().zip(&wanted).all(same), "{}", place);
                    }
                }
            }
        }
    }
}
