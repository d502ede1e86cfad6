//! Rotary position embeddings: frequencies of every scaling type (formats, section 4.3).
//!
//! The arithmetic follows transformers' `modeling_rope_utils.py` step by step: where it computes with float32
//! tensors, so does this, with powers taken in f64 by portable functions and rounded once.
//!
//! **Invariant:** frequencies depend on the configuration and on one length alone, never on chunking.

use std::f64::consts::PI;

use super::fields::Fields;
use crate::error::Result;

/// Rotary embedding parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Leading dimensions of a head that rotate (rotate_half pairing: i with i + rotary_dim/2); even.
    pub rotary_dim: usize,
    /// Denominator of the exponents: `rotary_dim`, or one less where a fraction of a head is odd and was rounded up.
    pub exponent_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched for long contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware: the base grows with the length beyond `original_len`.
    Dynamic {
        /// How far the context is stretched.
        factor: f64,
        /// The trained context.
        original_len: usize,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// Wavelengths above `original_len / low` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_len / high` are kept.
        high_freq_factor: f64,
        /// The trained context.
        original_len: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Divides low frequencies.
        factor: f64,
        /// Rotations within the trained context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
        /// The trained context.
        original_len: usize,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
    /// LongRoPE (arXiv 2402.13753): a divisor per frequency, one list up to the trained context, one beyond.
    LongRope {
        /// Divisors for lengths up to `original_len`; `rotary_dim / 2` of them.
        short: Vec<f64>,
        /// Divisors for longer ones.
        long: Vec<f64>,
        /// The trained context.
        original_len: usize,
        /// Multiplies cosines and sines.
        attention_factor: f64,
    },
}

impl Rope {
    /// The frequencies for a sequence of total length `len`: `rotary_dim / 2` of them.
    pub fn inv_freq(&self, len: usize) -> Vec<f32> {
        let base = || self.powers(self.theta).map(|power| 1.0 / power);
        match &self.scaling {
            RopeScaling::Default => base().collect(),
            RopeScaling::Linear { factor } => base().map(|inv| inv / *factor as f32).collect(),
            RopeScaling::Dynamic { factor, original_len } => {
                let theta = self.dynamic_theta(*factor, *original_len, len);
                self.powers(theta).map(|power| 1.0 / power).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let ramp = Llama3Ramp {
                    factor: *factor as f32,
                    low: *low_freq_factor as f32,
                    high: *high_freq_factor as f32,
                    low_wavelen: (*original_len as f64 / low_freq_factor) as f32,
                    high_wavelen: (*original_len as f64 / high_freq_factor) as f32,
                    original_len: *original_len as f32,
                };
                base().map(|inv| ramp.apply(inv)).collect()
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_len, .. } => {
                let (low, high) = self.yarn_range(*beta_fast, *beta_slow, *original_len, *truncate);
                self.powers(self.theta)
                    .enumerate()
                    .map(|(i, power)| {
                        let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                        let keep = 1.0 - ramp;
                        (1.0 / (*factor as f32 * power)) * (1.0 - keep) + (1.0 / power) * keep
                    })
                    .collect()
            }
            RopeScaling::LongRope { short, long, original_len, .. } => {
                let divisors = if len > *original_len { long } else { short };
                self.powers(self.theta).zip(divisors).map(|(power, &d)| 1.0 / (d as f32 * power)).collect()
            }
        }
    }

    /// Multiplies cosines and sines (1 except for yarn and longrope).
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor as f32
            }
            _ => 1.0,
        }
    }

    /// A key for `len`: lengths with equal keys have equal frequencies.
    pub fn length_class(&self, len: usize) -> usize {
        match self.scaling {
            RopeScaling::Dynamic { original_len, .. } => len.max(original_len),
            RopeScaling::LongRope { original_len, .. } => usize::from(len > original_len),
            _ => 0,
        }
    }

    /// `theta ^ (2i / exponent_dim)`, the exponent rounded to f32 as in a float tensor.
    fn powers(&self, theta: f64) -> impl Iterator<Item = f32> {
        let dim = self.exponent_dim as f32;
        (0..self.rotary_dim / 2).map(move |i| {
            let exponent = (2 * i) as f32 / dim;
            libm::pow(theta, f64::from(exponent)) as f32
        })
    }

    /// In a forward pass the length is a tensor, so that transformers computes the new base in float32.
    fn dynamic_theta(&self, factor: f64, original_len: usize, len: usize) -> f64 {
        if len <= original_len {
            return self.theta;
        }
        let stretch = factor as f32 * len as f32 / original_len as f32 - (factor - 1.0) as f32;
        let dim = self.exponent_dim as f64;
        let power = libm::pow(f64::from(stretch), f64::from((dim / (dim - 2.0)) as f32)) as f32;
        f64::from(self.theta as f32 * power)
    }

    /// The dimensions between which yarn goes over from keeping to dividing.
    fn yarn_range(&self, beta_fast: f64, beta_slow: f64, original_len: usize, truncate: bool) -> (f64, f64) {
        let dim = self.exponent_dim as f64;
        let correction = |rotations: f64| {
            dim * libm::log(original_len as f64 / (rotations * 2.0 * PI)) / (2.0 * libm::log(self.theta))
        };
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        (low, high)
    }
}

struct Llama3Ramp {
    factor: f32,
    low: f32,
    high: f32,
    low_wavelen: f32,
    high_wavelen: f32,
    original_len: f32,
}

impl Llama3Ramp {
    fn apply(&self, inv: f32) -> f32 {
        let wavelen = (2.0 * PI) as f32 / inv;
        if wavelen > self.low_wavelen {
            inv / self.factor
        } else if wavelen < self.high_wavelen {
            inv
        } else {
            let smooth = (self.original_len / wavelen - self.low) / (self.high - self.low);
            (1.0 - smooth) * inv / self.factor + smooth * inv
        }
    }
}

/// What the scaling's defaults are taken from.
#[derive(Clone, Copy)]
pub(super) struct RopeContext {
    pub rotary_dim: usize,
    /// `max_position_embeddings`.
    pub max_len: usize,
    /// `original_max_position_embeddings` beside the rope parameters (Phi-3's place for it), which wins.
    pub outer_original_len: Option<usize>,
}

/// Reads `rope_scaling` (v4) or `rope_parameters` (v5).
pub(super) fn scaling(fields: Option<Fields<'_>>, context: RopeContext) -> Result<RopeScaling> {
    let Some(fields) = fields else { return Ok(RopeScaling::Default) };
    let kind = match fields.text("rope_type")? {
        Some(kind) => kind,
        None => fields.text("type")?.unwrap_or("default"),
    };
    let factor = || fields.required_number("factor", 1e-3..=1e6);
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        // Two rotary dimensions have the exponent 2/0: transformers divides by zero.
        "dynamic" if context.rotary_dim < 4 => Err(fields.error("dynamic rope scaling needs 4 rotary dimensions")),
        "dynamic" => Ok(RopeScaling::Dynamic { factor: factor()?, original_len: context.max_len }),
        "llama3" => llama3(fields, context),
        "yarn" => yarn(fields, context),
        "longrope" | "su" => longrope(fields, context),
        other => Err(fields.error(format!(
            "rope type `{other}` is not supported (default, linear, dynamic, llama3, yarn and longrope are)"
        ))),
    }
}

fn original_len(fields: Fields<'_>, context: RopeContext) -> Result<usize> {
    if let Some(outer) = context.outer_original_len {
        return Ok(outer);
    }
    Ok(fields.size("original_max_position_embeddings", 2..=MAX_LEN)?.unwrap_or(context.max_len))
}

const MAX_LEN: usize = 1 << 31;

fn llama3(fields: Fields<'_>, context: RopeContext) -> Result<RopeScaling> {
    let low_freq_factor = fields.required_number("low_freq_factor", 1e-3..=1e6)?;
    let high_freq_factor = fields.required_number("high_freq_factor", 1e-3..=1e6)?;
    if high_freq_factor <= low_freq_factor {
        return Err(fields.error(format!(
            "`high_freq_factor` {high_freq_factor} must be above `low_freq_factor` {low_freq_factor}"
        )));
    }
    let factor = fields.required_number("factor", 1e-3..=1e6)?;
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_len: original_len(fields, context)? })
}

fn yarn(fields: Fields<'_>, context: RopeContext) -> Result<RopeScaling> {
    let original_len = original_len(fields, context)?;
    let factor = match fields.number("factor", 1e-3..=1e6)? {
        Some(factor) => factor,
        None => context.max_len as f64 / original_len as f64,
    };
    // Zero counts as absent, as it does in Python's `or`.
    let nonzero = |key| Ok(fields.number(key, 0.0..=1e6)?.filter(|&number| number != 0.0));
    let mscale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::log(factor) + 1.0 };
    let attention_factor = match fields.number("attention_factor", 0.0..=1e3)? {
        Some(given) => given,
        None => match (nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(one), Some(all)) => mscale(one) / mscale(all),
            _ => mscale(1.0),
        },
    };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        truncate: fields.flag("truncate", true)?,
        original_len,
        attention_factor,
    })
}

fn longrope(fields: Fields<'_>, context: RopeContext) -> Result<RopeScaling> {
    let original_len = original_len(fields, context)?;
    let list = |key: &str| {
        let list = fields.numbers(key, 1e-6..=1e6)?;
        let (have, want) = (list.len(), context.rotary_dim / 2);
        if have != want {
            return Err(fields.error(format!("`{key}` has {have} numbers, the rotary dimension needs {want}")));
        }
        Ok(list)
    };
    let factor = match fields.number("factor", 1e-3..=1e6)? {
        Some(factor) => factor,
        None => context.max_len as f64 / original_len as f64,
    };
    let attention_factor = match fields.number("attention_factor", 0.0..=1e3)? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => libm::sqrt(1.0 + libm::log(factor) / libm::log(original_len as f64)),
    };
    Ok(RopeScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        original_len,
        attention_factor,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f32, wanted: f64) {
        assert!((f64::from(found) / wanted - 1.0).abs() < 1e-6, "{found} is not {wanted}");
    }

    #[test]
    fn llama3_frequencies() {
        let scaling =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 8192 };
        let inv = Rope { rotary_dim: 128, exponent_dim: 128, theta: 5e5, scaling }.inv_freq(1);
        for (i, wanted) in [(28, 3.211446e-3), (29, 2.166571e-3), (32, 5.248462e-4), (36, 7.784655e-5)] {
            close(inv[i], wanted);
        }
        close(inv[63], 3.068926e-7);
    }

    #[test]
    fn yarn_frequencies_of_gpt_oss() {
        let value = serde_json::json!({"rope_type": "yarn", "factor": 32.0, "truncate": false,
            "original_max_position_embeddings": 4096});
        let path = std::path::Path::new("config.json");
        let context = RopeContext { rotary_dim: 64, max_len: 131072, outer_original_len: None };
        let scaling = scaling(Some(Fields::new(&value, path).unwrap()), context).unwrap();
        let rope = Rope { rotary_dim: 64, exponent_dim: 64, theta: 150_000.0, scaling };
        close(rope.inv_freq(1)[12], 6.794959e-3);
        close(rope.inv_freq(1)[17], 1.293187e-4);
        close(rope.attention_factor(), 1.3465736);
    }

    #[test]
    fn equal_classes_have_equal_frequencies() {
        let dynamic = RopeScaling::Dynamic { factor: 2.0, original_len: 64 };
        let long =
            RopeScaling::LongRope { short: vec![1.0; 4], long: vec![2.0; 4], original_len: 64, attention_factor: 1.2 };
        for scaling in [RopeScaling::Default, RopeScaling::Linear { factor: 4.0 }, dynamic, long] {
            let rope = Rope { rotary_dim: 8, exponent_dim: 8, theta: 1e4, scaling };
            for (a, b) in [(1, 64), (10, 65), (64, 65), (65, 66), (100, 200)] {
                let same_class = rope.length_class(a) == rope.length_class(b);
                assert!(!same_class || rope.inv_freq(a) == rope.inv_freq(b), "{rope:?} {a} {b}");
            }
        }
    }
}
