//! A pass as lanes read it.
//!
//! **Invariant:** nothing changes once the first step of the pass may run.

use std::ops::Range;

use crate::device::Rotation;
use crate::device::sampling::Draw;
use crate::schedule::Block;

/// Everything that the steps of a pass refer to.
pub struct PassData {
    /// The token of every row.
    pub tokens: Vec<u32>,
    /// The position of every row.
    pub positions: Vec<u32>,
    /// Its blocks.
    pub blocks: Vec<Block>,
    /// Rows that are asked for logits, ascending.
    pub outputs: Vec<usize>,
    /// What they are asked, in the order of their rows.
    pub draws: Vec<Draw>,
    /// Cosines and sines of every row; empty for models without rotary positions.
    pub angles: (Vec<f32>, Vec<f32>),
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
}

impl PassData {
    /// The rotation of some rows.
    pub fn rotation(&self, rows: &Range<usize>) -> Option<Rotation<'_>> {
        let half = self.rotary_dim / 2;
        let range = rows.start * half..rows.end * half;
        let (cos, sin) = &self.angles;
        (half > 0).then(|| Rotation { cos: &cos[range.clone()], sin: &sin[range], rotary_dim: self.rotary_dim })
    }
}
