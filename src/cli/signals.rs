//! SIGINT and SIGTERM.
//!
//! **Invariant:** before passes run a signal ends the process at once; while they run the first asks the engine to stop
//! after its pass, a second one ends the process at once. What is on disk is good in every case.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use super::say;
use crate::error::{Error, Result};

/// A pass may take minutes: who stops it is told.
const TOLD_AFTER: Duration = Duration::from_millis(300);

/// What signals do now.
pub struct Signals {
    /// The number of the signal that came, or 0.
    pub number: Arc<AtomicUsize>,
    /// The next one ends the process.
    at_once: Arc<AtomicBool>,
}

impl Signals {
    /// Handles signals from now on: they end the process, with exit code 1.
    ///
    /// # Errors
    /// [`Error::Io`] when handlers cannot be installed.
    pub fn watch() -> Result<Signals> {
        let signals = Signals { number: Arc::default(), at_once: Arc::new(AtomicBool::new(true)) };
        for signal in [SIGINT, SIGTERM] {
            // Order matters: the conditional shutdown sees the flag of an earlier signal, not of this one.
            flag::register_conditional_shutdown(signal, 1, signals.at_once.clone()).map_err(failed)?;
            flag::register(signal, signals.at_once.clone()).map_err(failed)?;
            flag::register_usize(signal, signals.number.clone(), signal as usize).map_err(failed)?;
        }
        Ok(signals)
    }

    /// From now on the first signal is only noted, until the guard is dropped.
    pub fn defer(&self) -> Deferred {
        self.at_once.store(false, Ordering::SeqCst);
        let over = Arc::new(AtomicBool::new(false));
        let (number, ended) = (self.number.clone(), over.clone());
        let teller = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                std::thread::park_timeout(TOLD_AFTER);
                if number.load(Ordering::Relaxed) != 0 {
                    std::thread::park_timeout(TOLD_AFTER);
                    if !ended.load(Ordering::Relaxed) {
                        say::line("stopping when this pass ends; once more to stop at once");
                    }
                    return;
                }
            }
        });
        Deferred { over, teller: Some(teller) }
    }
}

/// While it lives, the first signal waits for the end of a pass.
pub struct Deferred {
    over: Arc<AtomicBool>,
    teller: Option<JoinHandle<()>>,
}

impl Drop for Deferred {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(teller) = self.teller.take() {
            teller.thread().unpark();
            // It says a line at most; there is nothing to learn from how it ended.
            let _ = teller.join();
        }
    }
}

fn failed(source: std::io::Error) -> Error {
    Error::Io { action: "install handlers of", path: "signals".into(), source }
}
