//! The schedule as a value: what a pass carries, the steps that it takes, and what may be said about them before they
//! run.
//!
//! **Invariant:** everything here is pure: no I/O, no device, no clock. The list of steps, taken one after the other,
//! is a correct program; lanes may overlap them as far as [`fences`] allow.

pub mod check;
pub mod compose;
pub mod fences;
pub mod forecast;
pub mod lower;
pub mod pass;
pub mod placement;
pub mod price;
pub mod shape;
pub mod simulate;
pub mod step;

pub use pass::{Block, Pass, Run};
