//! The KV cache as pages of 64 positions.
//!
//! **Invariant:** a page belongs to positions `64 i .. 64 i + 64` of the sequences that hold it; a page with several
//! holders is never written.

pub mod layout;
pub mod pages;
