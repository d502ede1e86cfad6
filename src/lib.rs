//! Tidemill: bulk text generation with language models that are bigger than the GPU.
//!
//! JSONL prompts in, completions out. See ARCHITECTURE.md for how the modules fit together.

pub mod bench;
pub mod calibrate;
pub mod cli;
pub mod cost;
pub mod device;
pub mod durable;
pub mod engine;
pub mod error;
pub mod eval;
pub mod executor;
pub mod hardware;
pub mod job;
pub mod kv;
pub mod memory;
pub mod model;
pub mod planner;
pub mod policy;
pub mod quant;
pub mod rng;
pub mod schedule;
