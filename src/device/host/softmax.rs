//! Log-softmax over a vocabulary.
//!
//! **Invariant:** sums run in 16 lanes over ascending ids, in blocks that are added in f64: one order for all.

use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold, greatest};
use super::math;
use super::rows::load_padded;

/// Terms that one lane adds in f32 before the block goes into the f64 sum.
const BLOCK: usize = 64 * LANES;

/// `max + ln(sum exp(x - max))`: subtract it from a logit for the token's log-probability.
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
            for chunk in self.0.chunks(LANES) {
                max = load_padded::<V>(chunk, f32::NEG_INFINITY).max(max);
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
