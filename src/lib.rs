//! Tidemill: bulk text generation with language models that are bigger than the GPU.
//!
//! JSONL prompts in, completions out. See ARCHITECTURE.md for how the modules fit together.

pub mod error;
pub mod job;
pub mod memory;
pub mod model;
pub mod rng;
