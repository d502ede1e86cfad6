//! The one source of randomness: a counter-based generator (Philox4x32-10, Salmon et al., SC 2011).
//!
//! **Invariant:** a number depends on its key and counter alone, never on how many were drawn before it,
//! so samples do not depend on batching, order, restarts or threads.

/// A Philox stream, named by a 64-bit key and the upper half of the counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
    stream: [u32; 2],
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

impl Philox {
    /// The stream `stream` of the generator keyed by `key`.
    pub fn new(key: u64, stream: u64) -> Self {
        Philox { key: split(key), stream: split(stream) }
    }

    /// Four independent uniform 32-bit words at `index` of this stream.
    pub fn words(&self, index: u64) -> [u32; 4] {
        let [low, high] = split(index);
        let mut counter = [low, high, self.stream[0], self.stream[1]];
        let mut key = self.key;
        for _ in 0..10 {
            let product0 = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
            let product1 = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
            counter = [
                (product1 >> 32) as u32 ^ counter[1] ^ key[0],
                product1 as u32,
                (product0 >> 32) as u32 ^ counter[3] ^ key[1],
                product0 as u32,
            ];
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        counter
    }

    /// A uniform number in [0, 1) with 53 random bits.
    pub fn uniform(&self, index: u64) -> f64 {
        let [a, b, ..] = self.words(index);
        let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
        bits as f64 / (1u64 << 53) as f64
    }

    /// Four standard normal numbers at `index` (Box-Muller, in f64 with portable functions).
    pub fn normals(&self, index: u64) -> [f32; 4] {
        let words = self.words(index).map(|word| (f64::from(word) + 0.5) / 4_294_967_296.0);
        let pair = |u: f64, v: f64| {
            let radius = libm::sqrt(-2.0 * libm::log(u));
            let angle = std::f64::consts::TAU * v;
            [(radius * libm::cos(angle)) as f32, (radius * libm::sin(angle)) as f32]
        };
        let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
        [a, b, c, d]
    }
}

fn split(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution (kat_vectors, philox4x32 10).
    #[test]
    fn known_answers() {
        assert_eq!(Philox::new(0, 0).words(0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox::new(u64::MAX, u64::MAX).words(u64::MAX);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let stream = Philox::new(7, 1);
        let values: Vec<f64> = (0..25_000).flat_map(|i| stream.normals(i)).map(f64::from).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
    }
}
