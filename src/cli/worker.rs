//! `tidemill worker`: a loaded model that answers lines as they come, for programs that start one.
//!
//! **Invariant:** standard output carries the ready line and answers, nothing else; every line is answered once.

use std::time::Duration;

use super::generate;
use crate::error::Result;

/// The arguments of `worker`, as typed.
#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Arguments {
    #[command(flatten)]
    job: generate::Arguments,
    /// How long an idle worker waits after a first line for others to be computed with it, in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(0..=3_600_000))]
    worker_batch_wait_ms: u64,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// Whatever keeps the worker from going on.
pub fn run(arguments: Arguments) -> Result<u8> {
    generate::serve(arguments.job, Duration::from_millis(arguments.worker_batch_wait_ms))
}
