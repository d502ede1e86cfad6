//! The job as files: JSONL lines in, result lines out, the journal between them.
//!
//! **Invariant:** this module knows neither models nor devices; what it writes is complete and in input order
//! whatever order results arrive in, and survives a kill at any moment.

pub mod request;
