//! The job as files: JSONL lines in, result lines out, the journal between them.
//!
//! A job with an output file keeps side files whose names begin with the output's:
//!
//! | name | holds | kept |
//! |---|---|---|
//! | `OUTPUT.run.json` | fingerprint, then the result | yes |
//! | `OUTPUT.journal` | results ahead of the output, tokens of unfinished samples | until finished |
//! | `OUTPUT.lock` | the process at work | while it runs |
//! | `OUTPUT.input` | a copy of standard input | until finished |
//! | `OUTPUT.partial` | a retry's new output | until finished |
//!
//! **Invariant:** this module knows neither models nor devices; what it writes is complete and in input order
//! whatever order results arrive in, and survives a kill at any moment.

mod disk;
mod files;
mod ids;
mod journal;
mod lines;
mod merge;
mod open;
mod options;
mod parse;
mod paths;
mod reader;
mod record;
mod render;
pub mod request;
mod runs;
mod spool;
mod state;
mod worker;
mod writer;

pub use journal::PartialSample;
pub use merge::merge;
pub use open::{Job, Opening, begun, open};
pub use options::{Defaults, Fingerprint, Input, JobOptions, Limits, Output, Shard, Summary};
pub use parse::check_defaults;
pub use reader::{Event, Item, Reader};
pub use request::ItemHeader;
pub use worker::worker;
pub use writer::Writer;
