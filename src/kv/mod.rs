//! The KV cache as pages of 64 positions.
//!
//! **Invariant:** a page belongs to positions `64 i .. 64 i + 64` of the sequences that hold it; only pages whose
//! 64 positions are all written are shared.

pub mod layout;
pub mod pages;
