//! The processor's own ceilings, to compare kernels with.
//!
//! **Invariant:** measured with register arithmetic alone, never with a kernel of ours.

use std::time::Instant;

use super::isa::{Isa, Kernel, Registers};
use super::lanes::{LANES, Lanes, fold};

/// Independent chains: enough to cover the latency of two units.
const CHAINS: usize = 12;
const ROUNDS: usize = 2_000_000;

/// Fused multiply-adds of one core, in 1e9 operations per second (two per multiply-add).
pub fn raw_fma_gflops(isa: Isa) -> f64 {
    let started = Instant::now();
    let sum = isa.run(Chains);
    std::hint::black_box(sum);
    2.0 * (CHAINS * ROUNDS * LANES) as f64 / started.elapsed().as_secs_f64() / 1e9
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
