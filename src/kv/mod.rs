//! The KV cache as pages of 64 positions.
//!
//! **Invariant:** what a page of a sequence holds follows from [`policy::Kept`] (64 aligned positions, where nothing is
//! evicted); a page with several holders is never written.

pub mod layout;
pub mod pages;
pub mod policies;
pub mod policy;
