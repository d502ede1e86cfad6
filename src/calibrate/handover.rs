//! What it takes to begin and end a step.
//!
//! **Invariant:** threads meet as lanes do: through a condition variable, and through the pool that computes.

use std::sync::{Condvar, Mutex};

use super::measure::timed;

/// Steps of a sample.
const STEPS: usize = 200;

/// Seconds of a step that does nothing, on a lane that computes and waits for another lane's step each time.
pub fn step_secs() -> f64 {
    let done = Mutex::new(0usize);
    let changed = Condvar::new();
    let finish = || {
        *done.lock().expect("nobody panics with it") += 1;
        changed.notify_all();
    };
    let wait = |steps: usize| {
        let waiting = changed.wait_while(done.lock().expect("nobody panics with it"), |done| *done < steps);
        drop(waiting.expect("nobody panics with it"));
    };
    let (secs, ()) = timed(|| {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for step in 0..STEPS {
                    wait(2 * step + 1);
                    rayon::scope(|_| ());
                    finish();
                }
            });
            for step in 0..STEPS {
                finish();
                wait(2 * step + 2);
            }
        });
    });
    // Both lanes' steps lie in a round.
    secs / (2 * STEPS) as f64
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_step_takes_time() {
        let secs = super::step_secs();
        assert!(secs > 0.0 && secs < 1.0);
    }
}
