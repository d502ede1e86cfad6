//! A policy in whole numbers: which chunk, page and block lives where, and what that takes.
//!
//! **Invariant:** this is the only place where shares become bytes; what the planner predicts, what is checked against
//! the budgets and what the executor allocates are the numbers made here.

use crate::error::Tier;
use crate::policy::Policy;

/// What a placement needs to know about a model: bytes of everything that is placed.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelBytes {
    /// Padded bytes of every chunk of every decoder layer.
    pub layers: Vec<Vec<u64>>,
    /// Padded bytes of every chunk of every part of the head (or of the table, where it serves).
    pub head: Vec<Vec<u64>>,
    /// Bytes of the embedding table.
    pub table: u64,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Bytes of what always stays with the device.
    pub small: u64,
    /// Bytes of one layer of one KV page, padded to 4 KiB.
    pub frame: u64,
    /// Bytes of the hidden state of a row.
    pub hidden_row: u64,
    /// Bytes of activations of `rows` rows of a block, of `outputs` rows that are asked for logits, and of `logit_rows`
    /// rows of logits.
    pub activations: ActivationBytes,
}

/// Bytes per row of what computing takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ActivationBytes {
    /// Per row of a block.
    pub row: u64,
    /// Per row that is asked for logits: its hidden state.
    pub output_row: u64,
    /// Per row of logits.
    pub logit_row: u64,
}

/// How a pass's weights lie: chunks of one stage. Resident chunks come first, then those in main memory, then those on
/// disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagePlacement {
    /// Chunks that stay with the device.
    pub resident: usize,
    /// Chunks in main memory; always 0 where main memory is where things are computed.
    pub cpu: usize,
    /// Chunks on disk.
    pub disk: usize,
    /// Padded bytes of every chunk.
    pub chunks: Vec<u64>,
}

/// Everything's place.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Where things are computed: `Gpu` (real or rehearsed) or `Cpu`.
    pub compute: Tier,
    /// Stages of a pass in order: decoder layers, then parts of the head if it is streamed.
    pub stages: Vec<StagePlacement>,
    /// How many of them are decoder layers.
    pub num_layers: usize,
    /// The policy that was rounded.
    pub policy: Policy,
    /// Pages with the device, in main memory (0 where that is the same), on disk.
    pub pages: [usize; 3],
    /// Where the hidden state of each block lives between layers.
    pub hidden: Vec<Tier>,
    /// Bytes of one layer of one KV page.
    pub frame: u64,
    /// Bytes of the hidden state of a row.
    pub hidden_row: u64,
    /// Slices of weights on their way from the disk to a device, and the bytes of each.
    pub staging: Ring,
    /// What it takes, by tier: gpu, cpu, disk.
    pub bytes: [u64; 3],
}

/// A few equal places that are used in turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// How many.
    pub count: usize,
    /// Bytes of each.
    pub bytes: u64,
}
