//! exp, erf and the activations, lane by lane.
//!
//! **Invariant:** fixed polynomials in fixed order over [`Lanes`] operations: the same bits on every instruction
//! set, and a lane's result depends on that lane alone.

use super::lanes::Lanes;

/// Below it [`exp`] is what it is here, 1e-30: next to 1 that is nothing, and products with it are no denormal numbers,
/// which cost a processor a hundred cycles each.
pub const EXP_LEAST: f32 = -69.077_55;

/// e^x, relative error below 3e-7, between e^[`EXP_LEAST`] and e^88: the argument is clamped.
///
/// Range reduction by ln 2 in two parts, then the degree-6 Taylor polynomial in Horner form.
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn exp<V: Lanes>(x: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe {
        let clamped = x.max(V::splat(EXP_LEAST)).min(V::splat(88.0));
        let n = clamped.mul(V::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fma(V::splat(-0.693_359_4), clamped);
        let r = n.fma(V::splat(2.121_944_4e-4), r);
        let mut p = V::splat(1.0 / 720.0);
        for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p.fma(r, V::splat(coefficient));
        }
        p.mul(n.exp2_integer())
    }
}

/// erf(x), absolute error below 2e-7 (Abramowitz and Stegun 7.1.26).
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn erf<V: Lanes>(x: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe {
        let a = x.abs();
        let t = V::splat(1.0).div(a.fma(V::splat(0.327_591_1), V::splat(1.0)));
        let mut p = V::splat(1.061_405_4);
        for coefficient in [-1.453_152, 1.421_413_8, -0.284_496_74, 0.254_829_6] {
            p = p.fma(t, V::splat(coefficient));
        }
        let tail = p.mul(t).mul(exp(V::splat(0.0).sub(a.mul(a))));
        V::splat(1.0).sub(tail).copysign(x)
    }
}

/// x * sigmoid(x).
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn silu<V: Lanes>(x: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe { x.div(V::splat(1.0).add(exp(V::splat(0.0).sub(x)))) }
}

/// x * Phi(x).
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn gelu<V: Lanes>(x: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe {
        let half = x.mul(V::splat(0.5));
        half.fma(erf(x.mul(V::splat(std::f32::consts::FRAC_1_SQRT_2))), half)
    }
}

/// GELU's tanh approximation: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
///
/// # Safety
/// `V`'s instruction set exists.
#[inline(always)]
pub unsafe fn gelu_tanh<V: Lanes>(x: V) -> V {
    // SAFETY: passed on from the caller.
    unsafe {
        let cube = x.mul(x).mul(x);
        let inner = cube.fma(V::splat(0.044_715), x).mul(V::splat(0.797_884_6));
        // 0.5 (1 + tanh u) = sigmoid(2u).
        let sigmoid = V::splat(1.0).div(V::splat(1.0).add(exp(inner.mul(V::splat(-2.0)))));
        x.mul(sigmoid)
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel, Registers};
    use super::super::lanes::LANES;
    use super::*;

    struct Apply<'a>(&'a [f32], &'a mut [f32], usize);

    impl Kernel for Apply<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<V: Lanes, R: Registers>(self) {
            for (from, to) in self.0.chunks_exact(LANES).zip(self.1.chunks_exact_mut(LANES)) {
                // SAFETY: chunks hold 16 values; the instruction set is the caller's.
                unsafe {
                    let x = V::load(from.as_ptr());
                    let y = match self.2 {
                        0 => exp(x),
                        1 => erf(x),
                        2 => silu(x),
                        3 => gelu(x),
                        _ => gelu_tanh(x),
                    };
                    y.store(to.as_mut_ptr());
                }
            }
        }
    }

    fn apply(isa: Isa, x: &[f32], which: usize) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        isa.run(Apply(x, &mut y, which));
        y
    }

    #[test]
    fn close_to_the_true_functions_and_equal_on_all_instruction_sets() {
        let x: Vec<f32> = (-16_000..16_000).map(|i| i as f32 / 177.0).collect();
        let truth: [fn(f64) -> f64; 5] = [
            |x| libm::exp(x.clamp(f64::from(EXP_LEAST), 88.0)),
            libm::erf,
            |x| x / (1.0 + libm::exp(-x)),
            |x| x * 0.5 * (1.0 + libm::erf(x / 2f64.sqrt())),
            |x| x * 0.5 * (1.0 + libm::tanh((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3)))),
        ];
        for (which, truth) in truth.iter().enumerate() {
            let portable = apply(Isa::Portable, &x, which);
            for (&x, &y) in x.iter().zip(&portable) {
                let t = truth(f64::from(x));
                let bound = if which == 0 { 4e-7 * t } else { 4e-7 * (1.0 + t.abs()) };
                assert!((f64::from(y) - t).abs() <= bound, "function {which} at {x}: {y} for {t}");
            }
            for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                let same = apply(isa, &x, which).iter().zip(&portable).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "function {which} differs on {isa:?}");
            }
        }
    }
}
