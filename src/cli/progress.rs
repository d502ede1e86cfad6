//! How far the job is, on standard error.
//!
//! **Invariant:** rates are over the whole time since the first pass; nothing here slows a pass down.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::flags::ProgressChoice;
use super::say;
use crate::engine::Counts;

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(5);

/// The display.
pub struct Progress {
    choice: ProgressChoice,
    bar: Option<ProgressBar>,
    total: Option<u64>,
    resumed: u64,
    started: Instant,
    shown: Instant,
}

impl Progress {
    /// A display for a job of `total` lines, `resumed` of which are done.
    pub fn new(choice: ProgressChoice, total: Option<u64>, resumed: u64) -> Self {
        let bar = (choice == ProgressChoice::Bar).then(|| {
            let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(4));
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len} lines {elapsed} left {eta} {msg}");
            bar.set_style(style.expect("the template is valid"));
            bar.set_position(resumed);
            bar
        });
        Progress { choice, bar, total, resumed, started: Instant::now(), shown: Instant::now() }
    }

    /// Shows the counts if it is time.
    pub fn show(&mut self, counts: &Counts) {
        let done = self.resumed + counts.succeeded + counts.failed;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(self.rates(counts));
        } else if self.shown.elapsed() >= INTERVAL && self.choice != ProgressChoice::None {
            self.shown = Instant::now();
            match self.choice {
                ProgressChoice::Json => say::line(&self.json(done, counts)),
                _ => say::line(&self.text(done, counts)),
            }
        }
    }

    /// Ends the display.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn elapsed_secs(&self) -> f64 {
        self.started.elapsed().as_secs_f64().max(1e-9)
    }

    fn eta_secs(&self, done: u64) -> Option<f64> {
        let here = done.checked_sub(self.resumed).filter(|&here| here > 0)?;
        Some(self.elapsed_secs() / here as f64 * self.total?.checked_sub(done)? as f64)
    }

    fn rates(&self, counts: &Counts) -> String {
        let secs = self.elapsed_secs();
        let (input, output) = (counts.prompt_tokens as f64 / secs, counts.generated_tokens as f64 / secs);
        let busy = 100.0 * counts.busy.as_secs_f64() / secs;
        format!("in {input:.1} tok/s, out {output:.1} tok/s, {} in flight, cpu {busy:.0} %", counts.in_flight)
    }

    fn text(&self, done: u64, counts: &Counts) -> String {
        let total = self.total.map_or(String::new(), |total| format!("/{total}"));
        let eta = self.eta_secs(done).map_or(String::new(), |secs| format!(", about {} left", duration(secs)));
        format!("{done}{total} lines, {}{eta}", self.rates(counts))
    }

    fn json(&self, done: u64, counts: &Counts) -> String {
        let secs = self.elapsed_secs();
        serde_json::json!({
            "done": done,
            "total": self.total,
            "failed": counts.failed,
            "in_flight": counts.in_flight,
            "lanes": {"cpu": {"busy_s": counts.busy.as_secs_f64()}},
            "elapsed_s": secs,
            "eta_s": self.eta_secs(done),
            "prompt_tokens_per_s": counts.prompt_tokens as f64 / secs,
            "generated_tokens_per_s": counts.generated_tokens as f64 / secs,
        })
        .to_string()
    }
}

/// `1h02m`, `3m04s` or `5s`.
pub fn duration(secs: f64) -> String {
    let secs = secs.round() as u64;
    match (secs / 3600, secs / 60 % 60, secs % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(4.6), "5s");
        assert_eq!(duration(184.0), "3m04s");
        assert_eq!(duration(3725.0), "1h02m");
    }

    #[test]
    fn a_line_names_what_is_left() {
        let progress = Progress::new(ProgressChoice::Line, Some(10), 2);
        let counts = Counts { succeeded: 3, failed: 1, in_flight: 4, ..Counts::default() };
        let text = progress.text(6, &counts);
        assert!(text.starts_with("6/10 lines") && text.contains("4 in flight") && text.ends_with("left"), "{text}");
        let json: serde_json::Value = serde_json::from_str(&progress.json(6, &counts)).unwrap();
        assert_eq!(json["total"], 10);
    }
}
