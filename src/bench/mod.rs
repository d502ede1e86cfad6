//! What was measured, for people to look at.
//!
//! **Invariant:** nothing here decides anything; it shows what others did.

pub mod chart;
pub mod given;
pub mod pictures;
pub mod report;
pub mod sweep;
pub mod trace;
