//! Sixteen f32 lanes on every instruction set, with the same bits on each.
//!
//! **Invariant:** an operation here is one IEEE operation per lane (fused multiply-add included) with the same
//! result on AVX-512, AVX2 and plain code; kernels written over [`Lanes`] therefore compute the same bits
//! everywhere. Reductions across lanes go through [`fold`], which has one order.

/// Lanes in a vector: the output width of a weight tile.
pub const LANES: usize = 16;

/// Sixteen f32 values.
///
/// The methods are unsafe because an implementation may only run where its instruction set exists:
/// [`super::isa::Isa::run`] is the one place that establishes it. Pointers need no alignment.
#[allow(missing_docs)]
pub trait Lanes: Copy {
    unsafe fn splat(value: f32) -> Self;
    /// Reads 16 values from `from`.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads 16 bf16 values and widens them.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Reads 16 f16 values and widens them.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Reads 16 integers of 32 bits; of each the bits above `shift` that `mask` leaves, as a value.
    unsafe fn load_code(from: *const u32, shift: u32, mask: u32) -> Self;
    /// Writes 16 values to `to`.
    unsafe fn store(self, to: *mut f32);
    /// `self * b + c`, rounded once.
    unsafe fn fma(self, b: Self, c: Self) -> Self;
    unsafe fn add(self, b: Self) -> Self;
    unsafe fn sub(self, b: Self) -> Self;
    unsafe fn mul(self, b: Self) -> Self;
    unsafe fn div(self, b: Self) -> Self;
    /// `if self > b { self } else { b }`: the second operand where either is NaN.
    unsafe fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`: the second operand where either is NaN.
    unsafe fn min(self, b: Self) -> Self;
    /// Nearest integer, ties to even.
    unsafe fn round(self) -> Self;
    /// 2^self for integral values in -126..=127.
    unsafe fn exp2_integer(self) -> Self;
    /// Absolute value.
    unsafe fn abs(self) -> Self;
    /// The magnitude of self with the sign of `b`.
    unsafe fn copysign(self, b: Self) -> Self;
    unsafe fn to_array(self) -> [f32; LANES];
    /// As [`fold`] of its lanes.
    unsafe fn fold(self) -> f32;
    /// As [`greatest`] of its lanes, but for the sign of a zero.
    unsafe fn greatest(self) -> f32;
}

/// Sums the lanes as a balanced tree: lane i with lane i + 8, then + 4, + 2, + 1.
#[inline(always)]
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

/// The greatest lane.
#[inline(always)]
pub fn greatest(lanes: [f32; LANES]) -> f32 {
    lanes.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Plain code: the reference for the other two.
#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

#[inline(always)]
fn zip(a: Portable, b: Portable, f: impl Fn(f32, f32) -> f32) -> Portable {
    Portable(std::array::from_fn(|i| f(a.0[i], b.0[i])))
}

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller passes a pointer to 16 readable values.
        Portable(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: as in `load`.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: as in `load`.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(bits.map(|bits| half::f16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_code(from: *const u32, shift: u32, mask: u32) -> Self {
        // SAFETY: as in `load`.
        let words = unsafe { from.cast::<[u32; LANES]>().read_unaligned() };
        Portable(words.map(|word| (word >> shift & mask) as f32))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller passes a pointer to 16 writable values.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn fma(self, b: Self, c: Self) -> Self {
        Portable(std::array::from_fn(|i| self.0[i].mul_add(b.0[i], c.0[i])))
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        zip(self, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        zip(self, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        zip(self, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        zip(self, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        zip(self, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        zip(self, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        Portable(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    unsafe fn exp2_integer(self) -> Self {
        Portable(self.0.map(|v| f32::from_bits(((v as i32 + 127) << 23) as u32)))
    }
    #[inline(always)]
    unsafe fn abs(self) -> Self {
        Portable(self.0.map(f32::abs))
    }
    #[inline(always)]
    unsafe fn copysign(self, b: Self) -> Self {
        zip(self, b, f32::copysign)
    }
    #[inline(always)]
    unsafe fn to_array(self) -> [f32; LANES] {
        self.0
    }
    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        fold(self.0)
    }
    #[inline(always)]
    unsafe fn greatest(self) -> f32 {
        greatest(self.0)
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes};

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub struct Avx512(pub __m512);

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub struct Avx2(pub __m256, pub __m256);

    /// Every body is one intrinsic (or a few) of the set that `Isa::run` has established. Closures would be
    /// compiled without that set, so there are none.
    macro_rules! lanes {
        ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)? $body:block)*) => {
            $(#[inline(always)]
            unsafe fn $name($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller runs under `Isa::run`, which checked the instruction set; pointers are
                // valid for 16 elements by the trait's contract.
                unsafe { $body }
            })*
        };
    }

    impl Lanes for Avx512 {
        lanes! {
            fn splat(value: f32) -> Self { Avx512(_mm512_set1_ps(value)) }
            fn load(from: *const f32) -> Self { Avx512(_mm512_loadu_ps(from)) }
            fn load_bf16(from: *const u16) -> Self {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
            }
            fn load_f16(from: *const u16) -> Self { Avx512(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))) }
            fn load_code(from: *const u32, shift: u32, mask: u32) -> Self {
                let words = _mm512_srl_epi32(_mm512_loadu_si512(from.cast()), _mm_cvtsi32_si128(shift as i32));
                if mask == 15 {
                    // A look-up masks and converts at once, on a unit that multiplications leave free.
                    let values = _mm512_setr_ps(
                        0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
                    );
                    return Avx512(_mm512_permutexvar_ps(words, values));
                }
                Avx512(_mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(mask as i32))))
            }
            fn store(self: Self, to: *mut f32) { _mm512_storeu_ps(to, self.0) }
            fn fma(self: Self, b: Self, c: Self) -> Self { Avx512(_mm512_fmadd_ps(self.0, b.0, c.0)) }
            fn add(self: Self, b: Self) -> Self { Avx512(_mm512_add_ps(self.0, b.0)) }
            fn sub(self: Self, b: Self) -> Self { Avx512(_mm512_sub_ps(self.0, b.0)) }
            fn mul(self: Self, b: Self) -> Self { Avx512(_mm512_mul_ps(self.0, b.0)) }
            fn div(self: Self, b: Self) -> Self { Avx512(_mm512_div_ps(self.0, b.0)) }
            fn max(self: Self, b: Self) -> Self { Avx512(_mm512_max_ps(self.0, b.0)) }
            fn min(self: Self, b: Self) -> Self { Avx512(_mm512_min_ps(self.0, b.0)) }
            fn round(self: Self) -> Self {
                Avx512(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0))
            }
            fn exp2_integer(self: Self) -> Self {
                let biased = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
                Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased)))
            }
            fn abs(self: Self) -> Self { Avx512(_mm512_abs_ps(self.0)) }
            fn copysign(self: Self, b: Self) -> Self {
                let sign = _mm512_set1_epi32(i32::MIN);
                let magnitude = _mm512_andnot_si512(sign, _mm512_castps_si512(self.0));
                let sign = _mm512_and_si512(sign, _mm512_castps_si512(b.0));
                Avx512(_mm512_castsi512_ps(_mm512_or_si512(magnitude, sign)))
            }
            fn to_array(self: Self) -> [f32; LANES] { std::mem::transmute(self.0) }
            fn fold(self: Self) -> f32 {
                halves::fold(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))
            }
            fn greatest(self: Self) -> f32 {
                halves::greatest(_mm512_castps512_ps256(self.0), _mm512_extractf32x8_ps::<1>(self.0))
            }
        }
    }

    /// One half of [`Avx2`], so that each operation is written once.
    mod halves {
        use std::arch::x86_64::*;

        macro_rules! halves {
            ($(fn $name:ident($($arg:ident: $type:ty),*) -> $ret:ty $body:block)*) => {
                $(#[inline(always)]
                pub unsafe fn $name($($arg: $type),*) -> $ret {
                    // SAFETY: as in `lanes!`.
                    unsafe { $body }
                })*
            };
        }

        halves! {
            fn load_bf16(from: *const u16) -> __m256 {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
            fn load_f16(from: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
            fn load_code(from: *const u32, shift: u32, mask: u32) -> __m256 {
                let words = _mm256_srl_epi32(_mm256_loadu_si256(from.cast()), _mm_cvtsi32_si128(shift as i32));
                _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(mask as i32)))
            }
            fn round(a: __m256) -> __m256 {
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
            }
            fn exp2_integer(a: __m256) -> __m256 {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            }
            fn abs(a: __m256) -> __m256 { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
            fn copysign(a: __m256, b: __m256) -> __m256 {
                let sign = _mm256_set1_ps(-0.0);
                _mm256_or_ps(_mm256_andnot_ps(sign, a), _mm256_and_ps(sign, b))
            }
            fn fold(a: __m256, b: __m256) -> f32 {
                let eight = _mm256_add_ps(a, b);
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
            fn greatest(a: __m256, b: __m256) -> f32 {
                // The second operand where one is NaN.
                let least = _mm256_set1_ps(f32::NEG_INFINITY);
                let eight = _mm256_max_ps(_mm256_max_ps(a, least), _mm256_max_ps(b, least));
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }
    }

    impl Lanes for Avx2 {
        lanes! {
            fn splat(value: f32) -> Self { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
            fn load(from: *const f32) -> Self { Avx2(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
            fn load_bf16(from: *const u16) -> Self { Avx2(halves::load_bf16(from), halves::load_bf16(from.add(8))) }
            fn load_f16(from: *const u16) -> Self { Avx2(halves::load_f16(from), halves::load_f16(from.add(8))) }
            fn load_code(from: *const u32, shift: u32, mask: u32) -> Self {
                Avx2(halves::load_code(from, shift, mask), halves::load_code(from.add(8), shift, mask))
            }
            fn store(self: Self, to: *mut f32) {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
            fn fma(self: Self, b: Self, c: Self) -> Self {
                Avx2(_mm256_fmadd_ps(self.0, b.0, c.0), _mm256_fmadd_ps(self.1, b.1, c.1))
            }
            fn add(self: Self, b: Self) -> Self { Avx2(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
            fn sub(self: Self, b: Self) -> Self { Avx2(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
            fn mul(self: Self, b: Self) -> Self { Avx2(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
            fn div(self: Self, b: Self) -> Self { Avx2(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
            fn max(self: Self, b: Self) -> Self { Avx2(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
            fn min(self: Self, b: Self) -> Self { Avx2(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
            fn round(self: Self) -> Self { Avx2(halves::round(self.0), halves::round(self.1)) }
            fn exp2_integer(self: Self) -> Self { Avx2(halves::exp2_integer(self.0), halves::exp2_integer(self.1)) }
            fn abs(self: Self) -> Self { Avx2(halves::abs(self.0), halves::abs(self.1)) }
            fn copysign(self: Self, b: Self) -> Self {
                Avx2(halves::copysign(self.0, b.0), halves::copysign(self.1, b.1))
            }
            fn to_array(self: Self) -> [f32; LANES] { std::mem::transmute([self.0, self.1]) }
            fn fold(self: Self) -> f32 { halves::fold(self.0, self.1) }
            fn greatest(self: Self) -> f32 { halves::greatest(self.0, self.1) }
        }
    }
}
