//! Products of a tile of attention: some rows by vectors of 16 outputs, all sums in registers.
//!
//! **Invariant:** an output is one chain of fused multiply-adds from zero in the order of its terms, whatever is
//! computed beside it.
//!
//! Limit: the multiply-add rate. With 14 rows and 2 vectors a term takes 28 multiply-adds and 16 loads; few rows take
//! more vectors at a time, since a chain waits 4 cycles for its last term.

use super::gemm::register_rows;
use super::isa::Registers;
use super::lanes::{LANES, Lanes};

/// Where sums go.
#[derive(Clone, Copy)]
pub struct Sums {
    /// The first row.
    pub to: *mut f32,
    /// Elements from row to row.
    pub stride: usize,
}

/// The left operand: element (k, row) lies at `start + k * step + row * ROW`.
#[derive(Clone, Copy)]
pub struct Left<const ROW: usize> {
    /// Element (0, 0).
    pub start: *const f32,
    /// Elements from one k to the next.
    pub step: usize,
}

/// The right operand: vectors of 16 outputs, each `depth` of them one after the other.
#[derive(Clone, Copy)]
pub struct Right {
    /// The first term of the first vector.
    pub start: *const f32,
    /// Elements from vector to vector.
    pub stride: usize,
    /// Terms of a sum.
    pub depth: usize,
}

/// `rows` rows by `vectors` vectors.
///
/// # Safety
/// The operands and the sums have that many; `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn multiply<V: Lanes, R: Registers, const ROW: usize>(
    (a, rows): (Left<ROW>, usize),
    (b, vectors): (Right, usize),
    c: Sums,
) {
    let mut row = 0;
    while row < rows {
        let some = register_rows(rows - row, R::ROWS);
        // SAFETY: passed on from the caller.
        unsafe {
            match some {
                14 if R::ROWS == 14 => across::<V, 14, 2, ROW>(a, row, (b, vectors), c),
                8 if R::ROWS == 14 => across::<V, 8, 2, ROW>(a, row, (b, vectors), c),
                4 if R::ROWS == 14 => across::<V, 4, 4, ROW>(a, row, (b, vectors), c),
                2 if R::ROWS == 14 => across::<V, 2, 4, ROW>(a, row, (b, vectors), c),
                6 if R::ROWS == 6 => across::<V, 6, 1, ROW>(a, row, (b, vectors), c),
                4 if R::ROWS == 6 => across::<V, 4, 1, ROW>(a, row, (b, vectors), c),
                2 if R::ROWS == 6 => across::<V, 2, 2, ROW>(a, row, (b, vectors), c),
                1 if R::ROWS > 1 => across::<V, 1, 4, ROW>(a, row, (b, vectors), c),
                1 => across::<V, 1, 1, ROW>(a, row, (b, vectors), c),
                _ => unreachable!("no register tile of {some} rows"),
            }
        }
        row += some;
    }
}

/// `M` rows by all vectors, at most `N` at a time.
#[inline(always)]
unsafe fn across<V: Lanes, const M: usize, const N: usize, const ROW: usize>(
    a: Left<ROW>,
    row: usize,
    (b, vectors): (Right, usize),
    c: Sums,
) {
    let mut vector = 0;
    // SAFETY: passed on from the caller.
    unsafe {
        while N >= 4 && vector + 4 <= vectors {
            tile::<V, M, 4, ROW>(a, b, (row, vector), c);
            vector += 4;
        }
        while N >= 2 && vector + 2 <= vectors {
            tile::<V, M, 2, ROW>(a, b, (row, vector), c);
            vector += 2;
        }
        while vector < vectors {
            tile::<V, M, 1, ROW>(a, b, (row, vector), c);
            vector += 1;
        }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)]
unsafe fn tile<V: Lanes, const M: usize, const N: usize, const ROW: usize>(
    a: Left<ROW>,
    b: Right,
    (row, vector): (usize, usize),
    c: Sums,
) {
    // SAFETY: passed on from the caller.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        let mut left = a.start.add(row * ROW);
        let mut right: [*const f32; N] = [b.start; N];
        for n in 0..N {
            right[n] = b.start.wrapping_add((vector + n) * b.stride);
        }
        // With indices, as in `gemm`: sums stay in registers.
        for _ in 0..b.depth {
            let mut w = [V::splat(0.0); N];
            for n in 0..N {
                w[n] = V::load(right[n]);
                right[n] = right[n].wrapping_add(LANES);
            }
            for m in 0..M {
                let x = V::splat(*left.add(m * ROW));
                for n in 0..N {
                    sums[m][n] = x.fma(w[n], sums[m][n]);
                }
            }
            left = left.wrapping_add(a.step);
        }
        for m in 0..M {
            for n in 0..N {
                sums[m][n].store(c.to.add((row + m) * c.stride + (vector + n) * LANES));
            }
        }
    }
}
