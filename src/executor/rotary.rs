//! Cosines and sines of a pass's rows.
//!
//! **Invariant:** a row's angles depend on its position and its `rope_len` alone. Angles are formed in f32 as
//! transformers does (`position * inv_freq`), so that long contexts see the rotation the model was trained with.

use std::collections::HashMap;

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
            let class = rope.length_class(len as usize);
            if self.sets.len() > MAX_SETS {
                self.sets.clear();
            }
            let frequencies = self.sets.entry(class).or_insert_with(|| rope.inv_freq(len as usize));
            for frequency in frequencies.iter() {
                let (sin, cos) = libm::sincosf(position as f32 * frequency);
                cosines.push(cos * self.scale);
                sines.push(sin * self.scale);
            }
        }
        (cosines, sines)
    }
}
