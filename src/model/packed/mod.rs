//! Weights in the layout that devices compute from, and where they come from.
//!
//! **Invariant:** the bytes of a chunk are a function of the source's tensors and the layout alone, whether they are
//! packed on the fly or read from packed files.

pub mod layout;
pub mod pack;
pub mod panels;

use std::sync::Arc;

use crate::error::Result;
use crate::memory::disk::DirectFile;
use layout::{ModelLayout, StageId};

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

    /// Where the extent of `stage` lies in a file; none where weights are packed on the fly.
    fn extent(&self, stage: StageId) -> Option<Extent>;
}

/// A stage's extent in a file.
#[derive(Clone, Debug)]
pub struct Extent {
    /// The file.
    pub file: Arc<DirectFile>,
    /// Where chunk offsets count from.
    pub offset: u64,
}
