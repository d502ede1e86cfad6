//! Evaluation: scenarios and task files to request lines, answers to metrics.
//!
//! | file | holds |
//! |---|---|
//! | `tree.rs` | JSON with the path of every value, for messages |
//! | `text.rs`, `rouge.rs`, `stem.rs` | what two texts have in common |
//! | `stat.rs` | sums of a metric, merged as HELM merges them |
//! | `state.rs` | a HELM scenario state and the requests in it |
//! | `results.rs` | answers as HELM's results |
//! | `metrics.rs` | a filled state's statistics |
//! | `task.rs` | task files |
//!
//! **Invariant:** nothing here runs a model or touches a file: lines go out, answers come in, and metrics are a pure
//! function of both.

pub mod metrics;
pub mod results;
pub mod rouge;
pub mod stat;
pub mod state;
pub mod stem;
pub mod task;
pub mod text;
pub mod tree;
