//! Rotary position embeddings: frequencies of every scaling type (formats, section 4.3).
//!
//! **Invariant:** frequencies depend on the configuration and on one length alone, never on chunking.

/// Rotary embedding parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Leading dimensions of a head that rotate (rotate_half pairing: i with i + rotary_dim/2).
    pub rotary_dim: usize,
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
}
