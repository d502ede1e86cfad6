//! Models as they lie on disk: configuration, weight names, tensors, tokenizer, chat template.
//!
//! **Invariant:** nothing here computes with weights; files are untrusted and every extent is checked
//! before it is used.

pub mod config;
pub mod dtype;
pub mod fields;
pub mod names;
pub mod rope;
pub mod source;
