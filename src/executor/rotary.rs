//! Cosines and sines of a pass's rows.
//!
//! **Invariant:** a row's angles depend on its position and its `rope_len` alone. Angles are formed in f32 as
//! transformers does (`position * inv_freq`), so that long contexts see the rotation the model was trained with.

use std::collections::HashMap;

use crate::kv::policy::Kept;
use crate::model::config::{ModelConfig, Positions};
use crate::model::rope::Rope;
use crate::schedule::Pass;

/// Frequencies that are kept before the cache starts again: dynamic scaling has a set per length.
const MAX_SETS: usize = 4096;

/// Frequencies by length.
pub struct RotaryTables {
    rope: Option<Rope>,
    scale: f32,
    sets: HashMap<usize, Vec<f32>>,
}

impl RotaryTables {
    /// The rotation of a model.
    pub fn new(config: &ModelConfig) -> Self {
        let rope = match &config.positions {
            Positions::Rotary(rope) => Some(rope.clone()),
            Positions::Learned { .. } => None,
        };
        let scale = rope.as_ref().map_or(1.0, Rope::attention_factor);
        RotaryTables { rope, scale, sets: HashMap::new() }
    }

    /// Leading dimensions of a head that rotate; 0 for models without rotary positions.
    pub fn rotary_dim(&self) -> usize {
        self.rope.as_ref().map_or(0, |rope| rope.rotary_dim)
    }

    /// Cosines and sines of a pass's rows, each (rows, rotary_dim / 2).
    pub fn angles(&mut self, pass: &Pass) -> (Vec<f32>, Vec<f32>) {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        let Some(rope) = &self.rope else { return (cosines, sines) };
        for (&position, &len) in pass.positions.iter().zip(&pass.rope_lens) {
            for frequency in frequencies(&mut self.sets, rope, len) {
                let (sin, cos) = libm::sincosf(position as f32 * frequency);
                cosines.push(cos * self.scale);
                sines.push(sin * self.scale);
            }
        }
        (cosines, sines)
    }

    /// As [`RotaryTables::angles`], without their scale: from a row's position back to where it stands among the
    /// positions that are kept, counted from the first one. Empty if no segment has lost its middle.
    pub fn sink_angles(&mut self, pass: &Pass) -> (Vec<f32>, Vec<f32>) {
        let (mut cosines, mut sines) = (Vec::new(), Vec::new());
        let Some(rope) = &self.rope else { return (cosines, sines) };
        if !pass.segments.iter().any(|segment| matches!(segment.kept, Kept::Window { .. })) {
            return (cosines, sines);
        }
        for segment in &pass.segments {
            for position in segment.start..segment.start + segment.len {
                let gone = segment.kept.evicted(position + 1);
                let gone = if let Kept::Window { .. } = segment.kept { gone } else { 0 };
                for frequency in frequencies(&mut self.sets, rope, 0) {
                    let (sin, cos) = libm::sincosf(-(gone as f32) * frequency);
                    cosines.push(cos);
                    sines.push(sin);
                }
            }
        }
        (cosines, sines)
    }
}

/// The frequencies of a length, made once.
fn frequencies<'a>(sets: &'a mut HashMap<usize, Vec<f32>>, rope: &Rope, len: u32) -> &'a [f32] {
    let class = rope.length_class(len as usize);
    if sets.len() > MAX_SETS {
        sets.clear();
    }
    sets.entry(class).or_insert_with(|| rope.inv_freq(len as usize))
}
