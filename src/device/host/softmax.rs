//! Log-softmax over a vocabulary.
//!
//! **Invariant:** sums run in 16 lanes over ascending ids, in blocks that are added in f64: one order for all.

use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold, greatest};
use super::math;
use super::rows::load_padded;

/// Terms that one lane adds in f32 before the block goes into the f64 sum.
const BLOCK: usize = 64 * LANES;

/// `max + ln(sum exp(x - max))`: subtract it from a logit for the token's log-probability. NaN when a logit is
/// not finite.
pub fn log_normalizer(isa: Isa, logits: &[f32]) -> f64 {
    isa.run(LogNormalizer(logits))
}

struct LogNormalizer<'a>(&'a [f32]);

impl Kernel for LogNormalizer<'_> {
    type Output = f64;

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) -> f64 {
        // SAFETY: the instruction set is the caller's; partial chunks are padded.
        unsafe {
            let mut max = V::splat(f32::NEG_INFINITY);
            // 0 * x is 0 for finite x and NaN for the others.
            let mut finite = V::splat(0.0);
            for chunk in self.0.chunks(LANES) {
                let x = load_padded::<V>(chunk, f32::MIN);
                max = x.max(max);
                finite = x.fma(V::splat(0.0), finite);
            }
            if fold(finite.to_array()).is_nan() {
                return f64::NAN;
            }
            let max = greatest(max.to_array());
            let mut total = 0f64;
            for block in self.0.chunks(BLOCK) {
                let mut sum = V::splat(0.0);
                for chunk in block.chunks(LANES) {
                    sum = sum.add(math::exp(load_padded::<V>(chunk, f32::NEG_INFINITY).sub(V::splat(max))));
                }
                total += f64::from(fold(sum.to_array()));
            }
            f64::from(max) + libm::log(total)
        }
    }
}

/// `out[i] = exp((x[i] - max) * scale)`.
pub fn exponentials(isa: Isa, x: &[f32], max: f32, scale: f32, out: &mut [f32]) {
    isa.run(Exponentials { x, max, scale, out });
}

struct Exponentials<'a> {
    x: &'a [f32],
    max: f32,
    scale: f32,
    out: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<V: Lanes, R: Registers>(self) {
        for (x, out) in self.x.chunks(LANES).zip(self.out.chunks_mut(LANES)) {
            // SAFETY: the instruction set is the caller's; partial chunks are padded.
            unsafe {
                let x = load_padded::<V>(x, f32::NEG_INFINITY).sub(V::splat(self.max)).mul(V::splat(self.scale));
                let weights = math::exp(x).to_array();
                // exp clamps its argument; a masked token weighs exactly nothing.
                let masked = x.to_array().map(|x| x < math::EXP_LEAST);
                for (out, (weight, masked)) in out.iter_mut().zip(weights.into_iter().zip(masked)) {
                    *out = if masked { 0.0 } else { weight };
                }
            }
        }
    }
}
