//! The processor's own ceilings, to compare kernels with.
//!
//! **Invariant:** measured with register arithmetic alone, never with a kernel of ours.

use std::time::Instant;

#[cfg(target_arch = "x86_64")]
use super::dot::amx;
use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold};
use crate::model::dtype::DType;

/// Independent chains: enough to cover the latency of two units.
const CHAINS: usize = 12;
const ROUNDS: usize = 2_000_000;
/// Rounds of 8-bit chains.
#[cfg(target_arch = "x86_64")]
const INT8_ROUNDS: usize = 1_000_000;

/// Fused multiply-adds of one core, in 1e9 operations per second (two per multiply-add).
pub fn raw_fma_gflops(isa: Isa) -> f64 {
    let started = Instant::now();
    let sum = isa.run(Chains);
    std::hint::black_box(sum);
    2.0 * (CHAINS * ROUNDS * LANES) as f64 / started.elapsed().as_secs_f64() / 1e9
}

/// Elements that one core widens to f32, in 1e9 per second, from and to the first cache; those that are f32 cost
/// nothing.
pub fn raw_widen_rate(isa: Isa, dtype: DType) -> f64 {
    if dtype == DType::F32 {
        return f64::INFINITY;
    }
    let started = Instant::now();
    isa.run(Widen(dtype));
    (WIDEN_ROUNDS * WIDENED * LANES) as f64 / started.elapsed().as_secs_f64() / 1e9
}

/// Vectors that a round widens.
const WIDENED: usize = 8;
const WIDEN_ROUNDS: usize = 500_000;

struct Widen(DType);

impl Kernel for Widen {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        let (from, mut to) = ([0x3210_7654u32; WIDENED * LANES / 2], [0f32; WIDENED * LANES]);
        // SAFETY: there are eight vectors of 16 bits, so two of words as well, and as many of results; the set is the
        // caller's.
        unsafe {
            let (scale, offset) = (V::splat(std::hint::black_box(0.1)), V::splat(std::hint::black_box(-0.7)));
            for _ in 0..WIDEN_ROUNDS {
                let from = std::hint::black_box(&from).as_ptr();
                for v in 0..WIDENED {
                    let value = match self.0 {
                        DType::F32 => V::load(to.as_ptr()),
                        DType::Bf16 => V::load_bf16(from.cast::<u16>().add(v * LANES)),
                        DType::F16 => V::load_f16(from.cast::<u16>().add(v * LANES)),
                        DType::Int8 => {
                            let code = V::load_code(from.add(v / 4 * LANES), (v % 4 * 8) as u32, 255);
                            code.fma(scale, offset)
                        }
                        DType::Int4 => V::load_code(from, (v * 4) as u32, 15).fma(scale, offset),
                    };
                    value.store(to.as_mut_ptr().add(v * LANES));
                }
                std::hint::black_box(&mut to);
            }
        }
    }
}

struct Chains;

impl Kernel for Chains {
    type Output = f32;

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) -> f32 {
        // SAFETY: the instruction set is the caller's; no memory is touched.
        unsafe {
            let (factor, term) = (V::splat(std::hint::black_box(0.999_9)), V::splat(std::hint::black_box(1e-4)));
            let mut sums = [term; CHAINS];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = sum.fma(factor, term);
                }
            }
            let mut total = sums[0];
            for sum in &sums[1..] {
                total = total.add(*sum);
            }
            fold(total.to_array())
        }
    }
}

/// 8-bit multiply-adds of one core, in 1e9 operations per second (two per multiply-add); none where the set has no
/// instruction for them.
#[cfg(target_arch = "x86_64")]
pub fn raw_int8_gops(isa: Isa) -> Option<f64> {
    let started = Instant::now();
    let chains = CHAINS * INT8_ROUNDS;
    let products = match isa {
        Isa::Amx if isa.is_available() => {
            // A product of tiles is 256 of vectors: as many rounds would take long.
            let rounds = INT8_ROUNDS / 32;
            // SAFETY: the processor and the system were asked.
            unsafe { amx::repeat_products(rounds) };
            amx::PRODUCTS * rounds * 16 * 16 * 64
        }
        Isa::Avx512 if isa.is_available() && is_x86_feature_detected!("avx512vnni") => {
            // SAFETY: the instructions exist, as was asked above; no memory is touched.
            std::hint::black_box(unsafe { vnni_chains() });
            chains * 64
        }
        Isa::Avx2Vnni if isa.is_available() => {
            // SAFETY: as above.
            std::hint::black_box(unsafe { short_vnni_chains() });
            chains * 32
        }
        Isa::Avx2 if isa.is_available() => {
            // SAFETY: as above.
            std::hint::black_box(unsafe { maddubs_chains() });
            chains * 32
        }
        _ => return None,
    };
    Some(2.0 * products as f64 / started.elapsed().as_secs_f64() / 1e9)
}

/// 8-bit multiply-adds of one core; none where the processor has no instruction for them.
#[cfg(not(target_arch = "x86_64"))]
pub fn raw_int8_gops(_: Isa) -> Option<f64> {
    None
}

/// # Safety
/// The processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn vnni_chains() -> i32 {
    use std::arch::x86_64::{_mm512_add_epi32, _mm512_dpbusd_epi32, _mm512_reduce_add_epi32, _mm512_set1_epi32};
    let (a, b) = (_mm512_set1_epi32(std::hint::black_box(3)), _mm512_set1_epi32(std::hint::black_box(5)));
    let mut sums = [a; CHAINS];
    for _ in 0..INT8_ROUNDS {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, a, b);
        }
    }
    _mm512_reduce_add_epi32(sums.into_iter().fold(a, |total, sum| _mm512_add_epi32(total, sum)))
}

/// # Safety
/// The processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
unsafe fn short_vnni_chains() -> i32 {
    use std::arch::x86_64::{_mm256_add_epi32, _mm256_dpbusd_avx_epi32, _mm256_extract_epi32, _mm256_set1_epi32};
    let (a, b) = (_mm256_set1_epi32(std::hint::black_box(3)), _mm256_set1_epi32(std::hint::black_box(5)));
    let mut sums = [a; CHAINS];
    for _ in 0..INT8_ROUNDS {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
        }
    }
    _mm256_extract_epi32::<0>(sums.into_iter().fold(a, |total, sum| _mm256_add_epi32(total, sum)))
}

/// Products of bytes in pairs (`vpmaddubsw`), each with the addition to a sum of 16 bits (`vpaddw`) that it needs in
/// a dot product.
///
/// # Safety
/// The processor has the instructions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn maddubs_chains() -> i32 {
    use std::arch::x86_64::{_mm256_add_epi16, _mm256_extract_epi32, _mm256_maddubs_epi16, _mm256_set1_epi32};
    let (a, b) = (_mm256_set1_epi32(std::hint::black_box(3)), _mm256_set1_epi32(std::hint::black_box(5)));
    let mut sums = [a; CHAINS];
    for _ in 0..INT8_ROUNDS {
        for sum in &mut sums {
            *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*sum, b));
        }
    }
    _mm256_extract_epi32::<0>(sums.into_iter().fold(a, |total, sum| _mm256_add_epi16(total, sum)))
}
