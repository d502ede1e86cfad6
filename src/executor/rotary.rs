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

/// The tables of the current pass.
pub struct RotaryTables {
    rope: Option<Rope>,
    scale: f32,
    sets: HashMap<usize, Vec<f32>>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTables {
    /// Empty tables for a model.
    pub fn new(config: &ModelConfig) -> Self {
        let rope = match &config.positions {
            Positions::Rotary(rope) => Some(rope.clone()),
            Positions::Learned { .. } => None,
        };
        let scale = rope.as_ref().map_or(1.0, Rope::attention_factor);
        RotaryTables { rope, scale, sets: HashMap::new(), cos: Vec::new(), sin: Vec::new() }
    }

    /// Fills the tables for a pass.
    pub fn prepare(&mut self, pass: &Pass) {
        let Some(rope) = &self.rope else { return };
        self.cos.clear();
        self.sin.clear();
        for (&position, &len) in pass.positions.iter().zip(&pass.rope_lens) {
            let class = rope.length_class(len as usize);
            if self.sets.len() > MAX_SETS {
                self.sets.clear();
            }
            let frequencies = self.sets.entry(class).or_insert_with(|| rope.inv_freq(len as usize));
            for frequency in frequencies.iter() {
                let (sin, cos) = libm::sincosf(position as f32 * frequency);
                self.cos.push(cos * self.scale);
                self.sin.push(sin * self.scale);
            }
        }
    }

    /// The rotation of the prepared pass; none for models without rotary positions.
    pub fn rotation(&self) -> Option<crate::device::Rotation<'_>> {
        let rope = self.rope.as_ref()?;
        Some(crate::device::Rotation { cos: &self.cos, sin: &self.sin, rotary_dim: rope.rotary_dim })
    }
}
