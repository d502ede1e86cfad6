//! `tidemill pack`.
//!
//! **Invariant:** the size is said before the first byte is written.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::flags::{ProgressChoice, WeightsChoice};
use super::say;
use crate::error::{Bytes, Result};
use crate::model::Model;
use crate::model::packed::planes::{self, Trust};
use crate::model::packed::read::PackedModel;
use crate::model::packed::write::{self, Outcome, Progress, Step};

const INTERVAL: Duration = Duration::from_secs(5);

/// The arguments of `pack`.
#[derive(clap::Args)]
pub struct Arguments {
    /// A Hugging Face directory, a name in the local Hugging Face cache, `demo`, or `synth:CONFIG.json#SEED`.
    #[arg(long, env = "TIDEMILL_MODEL", value_name = "MODEL")]
    model: String,
    /// The directory to make, to go on with, or to check and mend.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Dtype that matrices are stored in.
    #[arg(long, env = "TIDEMILL_WEIGHTS", value_name = "DTYPE", default_value = "native")]
    weights: WeightsChoice,
    /// Also write the planes that policies with `compressed` read from disk: bf16 weights in 0.7 of their bytes.
    #[arg(long)]
    planes: bool,
    /// How progress is shown.
    #[arg(long, env = "TIDEMILL_PROGRESS", value_name = "HOW")]
    progress: Option<ProgressChoice>,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// As [`write::pack`].
pub fn run(arguments: &Arguments) -> Result<u8> {
    let model = Model::open(&arguments.model)?;
    let shown = arguments.output.display();
    let mut display = Display::new(arguments.progress, format!("packing {} into {shown}", model.name));
    let weights = arguments.weights.dtype();
    // A packed directory gets planes where it is.
    let same = |packed: &PackedModel| same_directory(packed.directory(), &arguments.output);
    let in_place = model.packed.as_ref().filter(|packed| arguments.planes && same(packed));
    if in_place.is_none() {
        let outcome = write::pack(&model, weights, &arguments.output, &mut |progress| display.show(progress))?;
        display.end();
        say::line(&match outcome {
            Outcome::Unchanged => format!("{shown} is packed already, and intact"),
            Outcome::Written(files) => format!("packed {} into {shown}: {files} files written", model.name),
        });
    }
    if arguments.planes {
        let made = if in_place.is_none() { Some(Model::from_directory(&model.name, &arguments.output)?) } else { None };
        let packed = made.as_ref().and_then(|made| made.packed.as_ref()).or(in_place);
        let packed = packed.expect("a directory that was packed opens as one");
        let outcome = planes::ensure(packed, Trust::Verify, &mut |progress| display.show(progress))?;
        display.end();
        say::line(&match outcome {
            Outcome::Unchanged => format!("{shown} has its compressed planes, intact"),
            Outcome::Written(files) => format!("{shown} has compressed planes: {files} files written"),
        });
    }
    Ok(0)
}

fn same_directory(one: &Path, other: &Path) -> bool {
    let (one, other) = (one.canonicalize(), other.canonicalize());
    one.is_ok_and(|one| other.is_ok_and(|other| one == other))
}

/// Shows how far packing is; the first call says the size.
pub struct Display {
    choice: ProgressChoice,
    what: String,
    bar: Option<ProgressBar>,
    step: Option<Step>,
    started: Instant,
    shown: Instant,
    before: u64,
}

impl Display {
    /// A display that introduces itself with `what`.
    pub fn new(choice: Option<ProgressChoice>, what: String) -> Display {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let default = if terminal { ProgressChoice::Bar } else { ProgressChoice::Line };
        let now = Instant::now();
        let choice = choice.unwrap_or(default);
        Display { choice, what, bar: None, step: None, started: now, shown: now, before: 0 }
    }

    /// Takes note of progress and shows it, if it is time.
    pub fn show(&mut self, progress: Progress) {
        if self.step != Some(progress.step) {
            self.begin(progress);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(progress.done);
        }
        if self.shown.elapsed() < INTERVAL {
            return;
        }
        self.shown = Instant::now();
        let rate = (progress.done - self.before) as f64 / self.started.elapsed().as_secs_f64();
        match self.choice {
            ProgressChoice::Line => {
                let (done, total) = (Bytes(progress.done), Bytes(progress.total));
                say::line(&format!("{done} of {total}, {}/s", Bytes(rate as u64)));
            }
            ProgressChoice::Json => {
                say::line(&serde_json::json!({"done_bytes": progress.done, "total_bytes": progress.total}).to_string())
            }
            ProgressChoice::Bar | ProgressChoice::None => {}
        }
    }

    /// Clears what is on the screen.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn begin(&mut self, progress: Progress) {
        self.end();
        self.step = Some(progress.step);
        (self.started, self.shown, self.before) = (Instant::now(), Instant::now(), progress.done);
        if self.choice == ProgressChoice::None {
            return;
        }
        let total = Bytes(progress.total);
        say::line(&match progress.step {
            Step::Wait => format!("{}: waiting for another process that packs it", self.what),
            Step::Check => format!("{}: comparing {total} with their checksums", self.what),
            Step::Write if progress.done > 0 => {
                format!("{}: {total}, of which {} are there", self.what, Bytes(progress.done))
            }
            Step::Write => format!("{}: {total}", self.what),
            Step::Planes => format!("{}: compressing {total} into planes", self.what),
        });
        if self.choice == ProgressChoice::Bar {
            let bar = ProgressBar::with_draw_target(Some(progress.total), ProgressDrawTarget::stderr_with_hz(4));
            let template = "{bar:24} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} left {eta}";
            bar.set_style(ProgressStyle::with_template(template).expect("the template is valid"));
            self.bar = Some(bar);
        }
    }
}
