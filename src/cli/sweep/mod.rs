//! `tidemill sweep`: a grid of points, predicted and measured.
//!
//! **Invariant:** a point whose row is there is not done again, and a point that cannot be had is a row too: however
//! often a sweep is stopped, the same command ends with the same set of points.

mod environment;
mod grid;
mod measure;
mod predict;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use self::grid::Grid;
use self::measure::{Bench, Outcome};
use self::predict::{Machine, Planned, Planner, Subject};
use super::plan::{Configuration, read_hardware};
use super::planning::this_machine;
use super::signals::Signals;
use super::{generate, resources, say};
use crate::bench::given::{self, Published};
use crate::bench::report::Report;
use crate::bench::sweep::{Environment, Failure, Point, Rates, Results, Row};
use crate::durable::{self, Lock};
use crate::error::{Error, Result};
use crate::hardware::{Hardware, Throttles};
use crate::memory::limits;
use crate::model::Model;
use crate::model::packed::cache;
use crate::planner::draw;

/// Flags that a sweep does not have: it makes its own jobs.
pub const FOREIGN: [&str; 15] = [
    "input",
    "error_file",
    "retry_failed",
    "shard",
    "policy",
    "stats",
    "trace",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "logprobs",
];

/// Flags that say where and how, not what.
const OWN: [&str; 7] = ["model", "output", "seed", "cache-dir", "offload-dir", "progress", "allow-lossy"];
/// Points that are predicted before their rows are written.
const TOGETHER: usize = 64;
/// Runs of a point, if nothing else is said.
const REPETITIONS: usize = 3;

/// The arguments of `sweep`, as typed.
#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Arguments {
    #[command(flatten)]
    job: generate::Arguments,
    /// Axes and their values: batch (sequences in flight), prompt-len, gen-len and, if wanted, num-prompts [default: 4
    /// for each in flight], device, gpu-memory, cpu-memory, disk-space, weights, activations, kv-dtype, kv-policy,
    /// schedule.
    #[arg(long, value_name = "batch=1,8,64;prompt-len=128,512;...")]
    grid: String,
    /// Predict, and run nothing.
    #[arg(long)]
    predict_only: bool,
    /// Runs of a point [default: 3].
    #[arg(long, value_name = "N", conflicts_with = "predict_only")]
    repetitions: Option<usize>,
    /// The profile of another machine, to predict for.
    #[arg(long, env = "TIDEMILL_HARDWARE", value_name = "FILE", requires = "predict_only")]
    hardware: Option<PathBuf>,
    /// Published figures to draw beside the sweep's (bench_results/flexgen-published.json has some).
    #[arg(long, value_name = "FILE.json")]
    published: Option<PathBuf>,
    /// What KV policies cost in quality, to draw beside what they gain (bench_results/quality.json has the demo
    /// model's).
    #[arg(long, value_name = "FILE.json")]
    quality: Option<PathBuf>,
}

/// Flags that were given: those that can be axes, and those that all points share.
struct Flags {
    settings: BTreeMap<String, String>,
    shared: BTreeMap<String, String>,
}

impl Flags {
    fn of(given: &toml::Table) -> Flags {
        let text = |value: &toml::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let given = given.iter().filter(|(name, _)| !OWN.contains(&name.as_str()));
        let (settings, shared) =
            given.map(|(name, value)| (name.clone(), text(value))).partition(|(name, _)| grid::is_setting(name));
        Flags { settings, shared }
    }
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// What is wrong with a flag or the model, and what keeps rows from being written. What is wrong with a point is a row.
pub fn run(arguments: Arguments) -> Result<u8> {
    let grid: Grid = arguments.grid.parse()?;
    let job = arguments.job.clone().prepared("sweep", &FOREIGN)?;
    let repetitions = arguments.repetitions()?;
    let (spec, directory, given) = (job.model()?, job.output_directory()?, job.given());
    let text = |name: &str| given.get(name).and_then(toml::Value::as_str);
    let number = |name: &str| given.get(name).and_then(toml::Value::as_integer);
    resources::use_threads(number("threads").map(|threads| usize::try_from(threads).unwrap_or(0)))?;
    if let Some(throttle) = text("throttle") {
        let wrong = |what| Error::usage(format!("--throttle: {what}"), "write it as h2d=2GB/s,disk_read=300MB/s");
        throttle.parse::<Throttles>().map_err(wrong)?;
    }
    let signals = Signals::watch()?;
    let flags = Flags::of(&given);
    let (subject, synthetic) = arguments.subject(&spec)?;
    let cache = cache::directory(text("cache-dir").map(Path::new))?;
    let offload = text("offload-dir").map_or_else(|| cache.join("offload"), PathBuf::from);
    let stated = arguments.hardware.as_deref().map(read_hardware).transpose()?;
    let published = arguments.published.as_deref().map(Published::read).transpose()?;
    let qualities = arguments.quality.as_deref().map_or(Ok(Vec::new()), given::qualities)?;

    std::fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
    let lock = Lock::take(&directory.join("results.jsonl.lock"))?;
    let mut results = Results::open(&directory.join("results.jsonl"))?;
    let mut points = grid.points(&flags.settings);
    let is_this = stated.is_none();
    let found = match stated {
        Some(hardware) => hardware,
        None => this_machine(&cache, &offload, limits::default_cpu_memory(), true)?.expect("it was measured"),
    };
    // Measuring again gives other numbers: one file's predictions come from one profile.
    let known = results.environment.as_ref().filter(|_| is_this).map(|there| there.profile.clone());
    let known: Option<Hardware> = known.and_then(|profile| serde_json::from_value(profile).ok());
    let hardware = known.filter(|known| known.name == found.name).unwrap_or(found);
    let machine = match is_this {
        true => Machine::This { hardware: hardware.clone(), cache, offload: offload.clone() },
        false => Machine::Stated(hardware.clone()),
    };
    let mut planner = Planner::new(subject, machine, text("throttle").map(str::to_owned));
    if given.get("allow-lossy").and_then(toml::Value::as_bool) == Some(true) {
        points = planner.settle(points)?;
    }
    planner.prepare(points.iter());
    let seed = number("seed").unwrap_or(0);
    let mut program = (env!("CARGO_PKG_VERSION").to_owned(), environment::commit());
    // A newer program may draw what an older one has measured, but not add to it.
    if let Some(there) =
        results.environment.as_ref().filter(|_| points.iter().all(|point| results.row(point).is_some()))
    {
        program = (there.version.clone(), there.commit.clone());
    }
    results.begin(Environment {
        version: program.0,
        commit: program.1,
        model: spec.clone(),
        synthetic,
        measured: !arguments.predict_only,
        repetitions,
        seed,
        grid: arguments.grid.clone(),
        flags: flags.shared.clone(),
        machine: environment::machine(&hardware, planner.card(), is_this),
        profile: serde_json::to_value(&hardware).expect("a profile is plain data"),
    })?;
    tell_what_is_there(&results, &arguments.grid, &points);
    let quiet = text("progress") == Some("none");
    let mut flags = flags.shared;
    for place in ["cache-dir", "offload-dir"] {
        flags.extend(text(place).map(|value| (place.to_owned(), value.to_owned())));
    }
    let bench = (!arguments.predict_only).then(|| Bench {
        model: &spec,
        directory: measure::work_directory(&directory),
        flags: &flags,
        seed,
        repetitions,
        signal: &signals.number,
    });
    let mut sweep = Sweep { planner: &planner, results, signals: &signals, quiet };
    measure::clear(&directory);
    let deferred = signals.defer();
    let done = match &bench {
        Some(bench) => sweep.measure(&points, bench),
        None => sweep.predict(&points),
    };
    drop(deferred);
    measure::clear(&directory);
    done?;
    let report = Report {
        environment: sweep.results.environment.as_ref().expect("it was begun"),
        rows: &sweep.results.rows,
        published: published.as_ref(),
        qualities: &qualities,
        timeline: sweep.timeline(&points),
    };
    durable::replace(&directory.join("report.html"), report.html().as_bytes())?;
    if let Some(signal) = sweep.stopped() {
        return Err(Error::Stopped { signal });
    }
    lock.release()?;
    let failed = points.iter().filter_map(|point| sweep.results.row(point)).filter(|row| row.error.is_some()).count();
    let shown = directory.join("report.html");
    say::line(&format!("finished: {} points, {failed} of them impossible; {}", points.len(), shown.display()));
    Ok(if failed > 0 { 3 } else { 0 })
}

impl Arguments {
    fn repetitions(&self) -> Result<usize> {
        let repetitions = self.repetitions.unwrap_or(if self.predict_only { 0 } else { REPETITIONS });
        match self.predict_only || (1..=100).contains(&repetitions) {
            true => Ok(repetitions),
            false => Err(Error::usage(format!("--repetitions {repetitions} is not between 1 and 100"), "3 will do")),
        }
    }

    /// What is swept over, and whether its weights are random numbers, if it has any.
    fn subject(&self, spec: &str) -> Result<(Subject, Option<bool>)> {
        if self.predict_only
            && let Some(configuration) = Configuration::find(spec)?
        {
            return Ok((Subject::Configuration(configuration), None));
        }
        let model = Model::open(spec)?;
        let synthetic = model.config.synthetic;
        Ok((Subject::Model(Box::new(model)), Some(synthetic)))
    }
}

/// Says what of the file this grid does not ask for, and what it need not do again.
fn tell_what_is_there(results: &Results, grid: &str, points: &[Point]) {
    if results.rows.is_empty() {
        return;
    }
    let asked: std::collections::BTreeSet<&Point> = points.iter().collect();
    let there = results.rows.iter().filter(|row| asked.contains(&row.point)).count();
    say::line(&format!("{there} of {} points are there already", points.len()));
    let others = results.rows.len() - there;
    let before = results.environment.as_ref().map_or("", |environment| &environment.grid);
    if before != grid {
        say::line(&format!("the file was begun with --grid \"{before}\"; {others} points of it are not asked for now"));
    }
}

/// A sweep on its way.
struct Sweep<'a> {
    planner: &'a Planner,
    results: Results,
    signals: &'a Signals,
    quiet: bool,
}

impl Sweep<'_> {
    /// The signal that came.
    fn stopped(&self) -> Option<&'static str> {
        match self.signals.number.load(Ordering::Relaxed) {
            0 => None,
            number if number == signal_hook::consts::SIGTERM as usize => Some("SIGTERM"),
            _ => Some("SIGINT"),
        }
    }

    /// A pass of the fastest plan, lane by lane, and what it is.
    fn timeline(&self, points: &[Point]) -> Option<(String, String)> {
        let rows = points.iter().filter_map(|point| self.results.row(point)).filter(|row| row.error.is_none());
        let rated = rows.filter_map(|row| Some((row, row.generated_tokens_per_s()?)));
        let (best, _) = rated.max_by(|a, b| a.1.total_cmp(&b.1))?;
        let planned = self.planner.plan(&best.point).ok()?;
        let title = format!("A pass of the fastest point, simulated: {}", named(&best.point));
        let svg = draw::svg(&planned.question().rehearse(&planned.plan, 3), 1, &title);
        let pass = draw::duration(planned.plan.pass_secs);
        let caption = format!(
            "The mean pass of {:.0} rows, {pass}: what every lane does when. Below, three stages of it.",
            planned.plan.steady.rows()
        );
        Some((svg, caption))
    }

    fn missing(&self, points: &[Point]) -> Vec<Point> {
        let there: std::collections::BTreeSet<&Point> = self.results.rows.iter().map(|row| &row.point).collect();
        points.iter().filter(|point| !there.contains(point)).cloned().collect()
    }

    /// Predicts what is missing, on all cores.
    fn predict(&mut self, points: &[Point]) -> Result<()> {
        let missing = self.missing(points);
        let started = Instant::now();
        for points in missing.chunks(TOGETHER) {
            let row = |point: &Point| match self.planner.plan(point) {
                _ if self.stopped().is_some() => None,
                Ok(planned) => Some(predicted(point, &planned)),
                Err(failure) => Some(Row::failed(point.clone(), failure)),
            };
            let rows: Option<Vec<Row>> = points.into_par_iter().map(row).collect();
            let Some(rows) = rows else { return Ok(()) };
            self.results.append(rows)?;
        }
        self.say(|| format!("{} points predicted in {:.1} s", missing.len(), started.elapsed().as_secs_f64()));
        Ok(())
    }

    /// Predicts and runs what is missing.
    fn measure(&mut self, points: &[Point], bench: &Bench<'_>) -> Result<()> {
        let missing = self.missing(points);
        for (number, point) in (1..).zip(&missing) {
            let row = match self.planner.plan(point) {
                Err(failure) => Row::failed(point.clone(), failure),
                Ok(planned) => match bench.measure(point, &planned)? {
                    Outcome::Stopped => return Ok(()),
                    Outcome::Failed(failure) => failed_run(point, &planned, failure),
                    Outcome::Runs(runs) => {
                        let rates = || runs.iter().map(|run| run.rates.generated_tokens_per_s);
                        let spread = (rates().fold(f64::INFINITY, f64::min), rates().fold(0.0, f64::max));
                        let median = Rates::median(&runs);
                        Row { measured: true, median, spread: Some(spread), runs, ..predicted(point, &planned) }
                    }
                },
            };
            self.say(|| format!("{number}/{}: {}", missing.len(), told(&row)));
            self.results.append(vec![row])?;
            if self.stopped().is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn say(&self, text: impl FnOnce() -> String) {
        if !self.quiet {
            say::line(&text());
        }
    }
}

fn predicted(point: &Point, planned: &Planned<'_>) -> Row {
    Row {
        point: point.clone(),
        measured: false,
        predicted: Some(planned.predicted()),
        median: None,
        spread: None,
        runs: Vec::new(),
        error: None,
    }
}

fn failed_run(point: &Point, planned: &Planned<'_>, failure: Failure) -> Row {
    Row { error: Some(failure), ..predicted(point, planned) }
}

/// A point in a line.
fn named(point: &Point) -> String {
    let Point { batch, prompt_len, gen_len, settings, .. } = point;
    let mut text = format!("batch {batch}, {prompt_len} + {gen_len} tokens");
    settings.iter().for_each(|(name, value)| text += &format!(", {name} {value}"));
    text
}

/// A row in a line.
fn told(row: &Row) -> String {
    let text = named(&row.point);
    match (&row.error, row.generated_tokens_per_s(), &row.predicted) {
        (Some(failure), ..) => text + ": " + &failure.what,
        (None, Some(rate), Some(predicted)) => {
            format!("{text}: {rate:.2} generated tokens/s, {:.2} predicted", predicted.generated_tokens_per_s)
        }
        _ => text,
    }
}
