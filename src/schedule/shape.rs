//! A pass in numbers: what lowering and pricing need of it.
//!
//! **Invariant:** two passes of the same shape have the same schedule and the same price.

use crate::kv::policy::Upkeep;

/// What a block computes and moves, per layer where it says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockShape {
    /// Rows: new positions of its sequences.
    pub rows: usize,
    /// Segments: sequences with new positions.
    pub segments: usize,
    /// Keys that its rows attend to, summed over the rows.
    pub keys: u64,
    /// KV pages that its segments read, summed over the segments.
    pub pages: u64,
    /// What keeping part of its sequences takes, on average over the layers.
    pub upkeep: Upkeep,
    /// Pages of a layer that must come to the device before it computes, from main memory and from disk.
    pub loads: Pages,
    /// Pages of a layer that go back after it computed, to main memory and to disk.
    pub stores: Pages,
    /// Rows that are asked for logits.
    pub outputs: usize,
}

/// The blocks of a pass, where layers may differ in what they read and move.
#[derive(Clone, Copy, Debug)]
pub enum Layers<'a> {
    /// All layers are alike.
    Same(&'a [BlockShape]),
    /// The blocks of every layer.
    Each(&'a [Vec<BlockShape>]),
}

impl<'a> Layers<'a> {
    /// The blocks as stage `stage` of the pass has them; parts of the head are like the last layer.
    pub fn at(self, stage: usize) -> &'a [BlockShape] {
        match self {
            Layers::Same(blocks) => blocks,
            Layers::Each(layers) => &layers[stage.min(layers.len() - 1)],
        }
    }
}

impl<'a> From<&'a [BlockShape]> for Layers<'a> {
    fn from(blocks: &'a [BlockShape]) -> Self {
        Layers::Same(blocks)
    }
}

impl<'a, const N: usize> From<&'a [BlockShape; N]> for Layers<'a> {
    fn from(blocks: &'a [BlockShape; N]) -> Self {
        Layers::Same(blocks)
    }
}

impl<'a> From<&'a Vec<BlockShape>> for Layers<'a> {
    fn from(blocks: &'a Vec<BlockShape>) -> Self {
        Layers::Same(blocks)
    }
}

/// Numbers of pages by the tier they live in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// In main memory (0 where things are computed there).
    pub cpu: usize,
    /// On disk.
    pub disk: usize,
}

impl Pages {
    /// All of them.
    pub fn total(&self) -> usize {
        self.cpu + self.disk
    }
}
