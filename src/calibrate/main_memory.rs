//! What the processor and main memory do on their own: arithmetic, reading, copying, decoding.
//!
//! **Invariant:** arrays are walked from end to end, so that what a pass over them finds in the caches is little.

use std::hint::black_box;
use std::time::Duration;

use super::measure::{repeated, timed};
use crate::error::{Result, Tier};
use crate::memory::arena::{Arena, Region};
use crate::quant::planes;
use crate::rng::Philox;

/// Bytes of a copy, about those of a chunk of weights on its way to a device.
const COPY_BYTES: usize = 8 << 20;

/// Weights of a piece of compressed planes.
const PLANE_WEIGHTS: usize = 1 << 20;
/// Places of the piece: more than the caches hold.
const PLANE_COPIES: usize = 24;

/// Large arrays in main memory.
pub struct MainMemory {
    arrays: [Region; 3],
    copied: usize,
}

impl MainMemory {
    /// Arrays of `bytes` in all, touched.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(bytes: usize) -> Result<Self> {
        let each = (bytes / 3).next_multiple_of(COPY_BYTES).max(2 * COPY_BYTES);
        let mut arena = Arena::new("calibration", Tier::Cpu, 3 * each)?;
        let mut arrays = [arena.carve(each), arena.carve(each), arena.carve(each)];
        // Main memory is given out when it is written.
        rayon::scope(|scope| {
            for array in &mut arrays {
                for piece in array.bytes_mut().chunks_mut(COPY_BYTES) {
                    scope.spawn(|_| piece.fill(1));
                }
            }
        });
        Ok(MainMemory { arrays, copied: 0 })
    }

    /// Bytes/s that all threads read.
    pub fn read(&self) -> f64 {
        let words: usize = self.arrays.iter().map(|array| array.len() / 8).sum();
        let (secs, sums) = timed(|| {
            rayon::broadcast(|thread| {
                let part = |array: &Region| {
                    let words = array.as_slice::<u64>();
                    let each = words.len().div_ceil(thread.num_threads());
                    let part = words.chunks(each).nth(thread.index()).unwrap_or_default();
                    part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word))
                };
                self.arrays.iter().map(part).fold(0, u64::wrapping_add)
            })
        });
        black_box(sums);
        8.0 * words as f64 / secs
    }

    /// Bytes/s of `a = b + 3 c` by all threads, counted as STREAM does: two arrays read, one written.
    pub fn triad(&mut self) -> f64 {
        let [a, b, c] = &mut self.arrays;
        let bytes = 3 * a.len();
        let (a, b, c) = (a.as_mut_slice::<f32>(), b.as_slice::<f32>(), c.as_slice::<f32>());
        let each = a.len().div_ceil(rayon::current_num_threads());
        let (secs, ()) = timed(|| {
            rayon::scope(|scope| {
                for ((a, b), c) in a.chunks_mut(each).zip(b.chunks(each)).zip(c.chunks(each)) {
                    scope.spawn(move |_| a.iter_mut().zip(b).zip(c).for_each(|((a, b), c)| *a = b + 3.0 * c));
                }
            });
        });
        bytes as f64 / secs
    }

    /// Bytes/s that one core copies.
    pub fn copy(&mut self) -> f64 {
        let [to, from, _] = &mut self.arrays;
        let pieces = to.len() / COPY_BYTES;
        let secs = repeated(Duration::from_millis(6), || {
            let at = self.copied % pieces * COPY_BYTES;
            to.bytes_mut()[at..at + COPY_BYTES].copy_from_slice(&from.bytes()[at..at + COPY_BYTES]);
            self.copied += 1;
        });
        COPY_BYTES as f64 / secs
    }

    /// Bytes/s that each of two cores copies while the other does.
    pub fn copy_together(&mut self) -> f64 {
        let [to, from, _] = &mut self.arrays;
        let half = to.len() / 2 / COPY_BYTES * COPY_BYTES;
        let (first, second) = to.bytes_mut()[..2 * half].split_at_mut(half);
        let copy = |to: &mut [u8], from: &[u8]| {
            for (to, from) in to.chunks_exact_mut(COPY_BYTES).zip(from.chunks_exact(COPY_BYTES)) {
                to.copy_from_slice(from);
            }
        };
        let from = &from.bytes()[..2 * half];
        let (secs, ()) = timed(|| {
            std::thread::scope(|scope| {
                scope.spawn(|| copy(first, &from[..half]));
                copy(second, &from[half..]);
            });
        });
        half as f64 / secs
    }
}

/// Weights as they may lie on disk, compressed; one piece of them in many places, so that decoding goes from main
/// memory to main memory, as it does in a pass.
pub struct Planes {
    piece: Vec<u8>,
    codes: Vec<u8>,
    weights: Vec<u8>,
    at: usize,
}

impl Planes {
    /// Gaussian weights.
    pub fn new() -> Self {
        let random = Philox::new(1, 0);
        let values = (0..PLANE_WEIGHTS as u64 / 4).flat_map(|index| random.normals(index));
        let piece: Vec<u8> = values.flat_map(|value| half::bf16::from_f32(0.02 * value).to_le_bytes()).collect();
        let codes = planes::encode(&piece).repeat(PLANE_COPIES);
        // Main memory is given out when it is written.
        let weights = piece.repeat(PLANE_COPIES);
        Planes { piece, codes, weights, at: 0 }
    }

    /// Bytes/s of weights that each core puts together again while all do.
    pub fn decode(&mut self) -> f64 {
        let Planes { piece, codes, weights, at } = self;
        let code_bytes = codes.len() / PLANE_COPIES;
        let secs = repeated(Duration::from_millis(6), || {
            let code = &codes[*at * code_bytes..][..code_bytes];
            let weights = &mut weights[*at * piece.len()..][..piece.len()];
            planes::decode(code, weights).expect("it has just been encoded");
            *at = (*at + 1) % PLANE_COPIES;
        });
        piece.len() as f64 / secs / rayon::current_num_threads() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_give_the_weights_again() {
        let mut planes = Planes::new();
        planes.weights.fill(0);
        assert!(planes.decode() > 0.0);
        assert_eq!(planes.weights[..planes.piece.len()], planes.piece);
        assert!(planes.codes.len() < planes.weights.len() * 3 / 4);
    }

    #[test]
    fn memory_has_rates() {
        let mut memory = MainMemory::new(1 << 20).unwrap();
        for rate in [memory.read(), memory.triad(), memory.copy(), memory.copy_together()] {
            assert!(rate.is_finite() && rate > 0.0);
        }
    }
}
