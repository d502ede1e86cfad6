//! SIGINT and SIGTERM.
//!
//! **Invariant:** the first signal asks the engine to stop after its pass, a second one ends the process at once;
//! the journal is good in both cases.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// The number of the signal that came, or 0.
pub fn watch() -> Result<Arc<AtomicUsize>> {
    let number = Arc::new(AtomicUsize::new(0));
    let again = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // Order matters: the conditional shutdown sees the flag of an earlier signal, not of this one.
        flag::register_conditional_shutdown(signal, 1, again.clone()).map_err(failed)?;
        flag::register(signal, again.clone()).map_err(failed)?;
        flag::register_usize(signal, number.clone(), signal as usize).map_err(failed)?;
    }
    Ok(number)
}

fn failed(source: std::io::Error) -> Error {
    Error::Io { action: "install handlers of", path: "signals".into(), source }
}
