//! Finds the fastest placement of a job on a machine, and says how fast and why.
//!
//! **Invariant:** pure: a plan depends on model, numerics, machine, budgets and job alone. A plan is never over budget
//! by its own accounting, which is that of `schedule::placement`.

pub mod job;
pub mod lp;
pub mod model;
pub mod passes;
pub mod predict;
pub mod rollout;
pub mod search;

pub mod draw;
pub mod explain;
