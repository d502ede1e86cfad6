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
    /// As `angles`, from where rows stand in their sequence to where they stand in its cache; empty where they all
    /// stand in the same place.
    pub sink_angles: (Vec<f32>, Vec<f32>),
    /// Leading dimensions of a head that rotate.
    pub rotary_dim: usize,
}

impl PassData {
    /// The rotation of some rows.
    pub fn rotation(&self, rows: &Range<usize>) -> Option<Rotation<'_>> {
        self.part_of(&self.angles, rows)
    }

    /// Their rotation to where they stand in the cache; none where nothing is missing.
    pub fn sinks(&self, rows: &Range<usize>) -> Option<Rotation<'_>> {
        self.part_of(&self.sink_angles, rows)
    }

    fn part_of<'a>(&self, (cos, sin): &'a (Vec<f32>, Vec<f32>), rows: &Range<usize>) -> Option<Rotation<'a>> {
        let half = self.rotary_dim / 2;
        let range = rows.start * half..rows.end * half;
        (!cos.is_empty()).then(|| Rotation { cos: &cos[range.clone()], sin: &sin[range], rotary_dim: self.rotary_dim })
    }
}
