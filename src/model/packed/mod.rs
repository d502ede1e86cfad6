//! Weights in the layout that devices compute from, and where they come from.
//!
//! **Invariant:** the bytes of a chunk are a function of the source's tensors and the layout alone, whether they are
//! packed on the fly or read from packed files.

pub mod cache;
mod files;
mod journal;
pub mod layout;
pub mod manifest;
pub mod pack;
pub mod panels;
pub mod planes;
pub mod read;
pub mod write;

use std::sync::Arc;

use crate::error::Result;
use crate::memory::disk::DirectFile;
use layout::{ModelLayout, StageId};
use planes::Planes;

/// Packed weights, chunk by chunk.
pub trait Packed: Send + Sync {
    /// Which chunks there are.
    fn layout(&self) -> &ModelLayout;

    /// Writes chunk `chunk` of `stage` to `out`, which is exactly as long.
    ///
    /// # Errors
    /// Whatever reading the source gives.
    fn chunk(&self, stage: StageId, chunk: usize, out: &mut [u8]) -> Result<()>;

    /// Writes the small tensor `index` of the layout to `out`, which is exactly as long.
    ///
    /// # Errors
    /// Whatever reading the source gives.
    fn small(&self, index: usize, out: &mut [u8]) -> Result<()>;

    /// Where `stage` lies in a file; none where weights are packed on the fly.
    ///
    /// # Errors
    /// Whatever opening the file gives.
    fn extent(&self, stage: StageId) -> Result<Option<Extent>>;

    /// The compressed planes of `stage`; none where there are none.
    ///
    /// # Errors
    /// Whatever opening their file gives.
    fn planes(&self, stage: StageId) -> Result<Option<Planes>>;
}

/// A stage's chunks in a file, at the layout's offsets.
pub struct Extent {
    /// Where chunk offsets count from; a multiple of the chunks' alignment.
    pub offset: u64,
    packed: Arc<read::PackedFile>,
}

impl Extent {
    /// The file.
    pub fn file(&self) -> &DirectFile {
        self.packed.direct()
    }

    /// Compares the bytes read of a chunk with what was packed.
    ///
    /// # Errors
    /// `Error::Model` naming file and offset.
    pub fn check(&self, chunk: usize, bytes: &[u8]) -> Result<()> {
        self.packed.check(chunk, bytes)
    }
}
