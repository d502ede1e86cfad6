//! `tidemill eval`: HELM scenarios and task files, all in one job.
//!
//! **Invariant:** inputs are never edited; everything is asked in one resumable job in the output directory, and what
//! is computed from its answers is written anew every time.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{generate, say};
use crate::durable;
use crate::error::{Error, Result};
use crate::eval::metrics::{Evaluation, Plan, Report};
use crate::eval::results::{self, Outcome};
use crate::eval::stat::{Stat, Stats};
use crate::eval::state::ScenarioState;
use crate::eval::task::Task;
use crate::eval::tree;
use crate::model::Model;

/// Flags that an evaluation does not have: it asks what its scenarios say.
pub const FOREIGN: [&str; 12] = [
    "input",
    "error_file",
    "shard",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "stop",
    "seed",
    "logprobs",
];

/// The arguments of `eval`, as typed.
#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Arguments {
    #[command(flatten)]
    job: generate::Arguments,
    /// A scenario_state.json of HELM, or a task file (JSONL); several may be given.
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    scenario: Vec<PathBuf>,
}

/// What is evaluated.
struct Scenario {
    file: PathBuf,
    /// The folder of its results.
    name: String,
    content: Content,
}

enum Content {
    Helm { document: Value, state: ScenarioState, plan: Plan },
    Task(Task),
}

/// What the job's input and output are called in the directory.
const REQUESTS: &str = "requests.jsonl";
const ANSWERS: &str = "answers.jsonl";

/// Runs the command; gives the exit code.
///
/// # Errors
/// What is wrong with a scenario, or whatever keeps the job from finishing.
pub fn run(arguments: Arguments) -> Result<u8> {
    let job = arguments.job.prepared("eval", &FOREIGN)?;
    let directory = job.output_directory()?;
    let scenarios = arguments.scenario.iter().map(|file| Scenario::read(file)).collect::<Result<Vec<_>>>()?;
    check_places(&scenarios, &directory)?;
    let model = Model::open(&job.model()?)?;
    let bos = model.tokenizer.special_texts().get("bos_token").cloned();
    let requests = directory.join(REQUESTS);
    let answers = directory.join(ANSWERS);
    std::fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
    write_lines(&requests, &lines(&scenarios, bos.as_deref()))?;
    let code = generate::run(job.on_files(&requests, &answers))?;
    let answers = read_answers(&answers)?;
    let count_tokens = |text: &str| model.tokenizer.encode(text, false).map_or(1, |ids| ids.len());
    let mut rows = Vec::new();
    for scenario in scenarios {
        scenario.finish(&directory, &answers, &count_tokens, &mut rows)?;
    }
    say::data(&table(&rows))?;
    Ok(code)
}

impl Scenario {
    fn read(file: &Path) -> Result<Scenario> {
        let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
        let named = |part: Option<&std::ffi::OsStr>| part.map(|name| name.to_string_lossy().into_owned());
        let lines = file.extension().is_some_and(|extension| extension == "jsonl");
        let (name, content) = if lines {
            (named(file.file_stem()), Content::Task(Task::read(&text, file)?))
        } else {
            let document = tree::parse(&text, file)?;
            let state = ScenarioState::read(&document, file)?;
            let real = file.canonicalize().map_err(Error::io("find", file))?;
            let plan = plan(&real, &state)?;
            (named(real.parent().and_then(Path::file_name)), Content::Helm { document, state, plan })
        };
        let name = name.ok_or_else(|| {
            let what = format!("{} lies in no folder that its results could be named after", file.display());
            Error::usage(what, "move it into one, as HELM does")
        })?;
        Ok(Scenario { file: file.to_owned(), name, content })
    }

    /// Writes what came of it, and adds to the table.
    fn finish(
        self,
        directory: &Path,
        answers: &HashMap<String, Value>,
        count_tokens: &dyn Fn(&str) -> usize,
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        let place = directory.join(&self.name);
        std::fs::create_dir_all(&place).map_err(Error::io("create", &place))?;
        let (stats, instances, failed) = match self.content {
            Content::Helm { mut document, state, plan } => {
                let outcome = |name: &str| answers.get(name).expect("every request was asked");
                let states = state.states.iter();
                let outcomes: Vec<Outcome> =
                    states.map(|state| results::outcome(&state.request, outcome(&state.request.name()))).collect();
                let entries = document["request_states"].as_array_mut().expect("it was checked");
                for (entry, outcome) in entries.iter_mut().zip(&outcomes) {
                    entry["result"] = results::json(outcome);
                }
                write_json(&place.join("scenario_state.json"), &document)?;
                let evaluation = Evaluation { state: &state, outcomes: &outcomes, count_tokens };
                let report = evaluation.report(&plan);
                for name in &plan.left_out {
                    say::line(&format!("{}: {name} is not computed here", self.name));
                }
                helm_rows(&self.name, &plan, &report, rows);
                let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
                (report.stats_json(), report.instances_json(), failed)
            }
            Content::Task(task) => {
                let (measured, failed) = task.measure(&self.name, |id| answers.get(id));
                let mut stats = Stats::default();
                measured.iter().flat_map(|item| &item.stats).for_each(|stat| stats.merge(stat.clone()));
                let own =
                    task_rows(&self.name, &stats, &measured.iter().map(|item| &item.stats[..]).collect::<Vec<_>>());
                let mut list: Vec<Value> = stats.iter().map(Stat::json).collect();
                for row in &own {
                    let interval = row.interval.map(|(low, high)| json!([low, high]));
                    match list.iter_mut().find(|stat| stat["name"]["name"] == row.metric.as_str()) {
                        Some(stat) => stat["ci95"] = json!(interval),
                        None => {
                            let mut stat = Stat::new(&row.metric, row.value).json();
                            stat["ci95"] = json!(interval);
                            list.push(stat);
                        }
                    }
                }
                rows.extend(own);
                let instance = |item: &crate::eval::task::Measured| {
                    let stats: Vec<Value> = item.stats.iter().map(Stat::json).collect();
                    json!({"instance_id": item.id, "train_trial_index": 0, "stats": stats})
                };
                (Value::Array(list), measured.iter().map(instance).collect(), failed)
            }
        };
        if failed > 0 {
            let what = format!("{}: {failed} failed and are left out of the metrics", self.name);
            say::line(&format!("{what}; why is in {}", directory.join(ANSWERS).display()));
        }
        write_json(&place.join("stats.json"), &stats)?;
        write_json(&place.join("per_instance_stats.json"), &instances)
    }
}

/// The metrics of the `run_spec.json` beside a state, else those of its adapter's method.
fn plan(file: &Path, state: &ScenarioState) -> Result<Plan> {
    let beside = file.with_file_name("run_spec.json");
    match std::fs::read_to_string(&beside) {
        Ok(text) => Ok(Plan::of_run(&tree::parse(&text, &beside)?, state.adapter.method)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Plan::of_method(state.adapter.method)),
        Err(error) => Err(Error::io("read", &beside)(error)),
    }
}

/// Refuses results that would lie in one place, or on an input.
fn check_places(scenarios: &[Scenario], directory: &Path) -> Result<()> {
    let mut names: HashMap<&str, &Path> = HashMap::new();
    for scenario in scenarios {
        if let Some(other) = names.insert(&scenario.name, &scenario.file) {
            let (one, two) = (other.display(), scenario.file.display());
            let what = format!("{one} and {two} would both have their results in `{}`", scenario.name);
            return Err(Error::usage(what, "evaluate them into different directories"));
        }
        if [".", "..", REQUESTS, ANSWERS].contains(&&*scenario.name) {
            let what = format!("the results of {} cannot have the name `{}`", scenario.file.display(), scenario.name);
            return Err(Error::usage(what, "give the file another name"));
        }
        let own = [directory.join(REQUESTS), directory.join(ANSWERS)];
        let place = directory.join(&scenario.name).join("scenario_state.json");
        let places = own.into_iter().chain([place]);
        let is_input = |place: PathBuf| {
            place.canonicalize().is_ok_and(|place| scenario.file.canonicalize().is_ok_and(|file| file == place))
        };
        if places.into_iter().any(is_input) {
            let what = format!("the results of {} would replace it", scenario.file.display());
            return Err(Error::usage(what, "choose another --output"));
        }
    }
    Ok(())
}

/// Every line once, in order: equal requests have equal names.
fn lines(scenarios: &[Scenario], bos: Option<&str>) -> Vec<Value> {
    let mut seen = HashSet::new();
    let mut lines = Vec::new();
    for scenario in scenarios {
        match &scenario.content {
            Content::Helm { state, .. } => {
                let requests = state.states.iter().map(|state| &state.request);
                lines.extend(requests.filter(|request| seen.insert(request.name())).map(|request| request.line(bos)));
            }
            Content::Task(task) => lines.extend(task.lines(&scenario.name)),
        }
    }
    lines
}

/// Writes the job's input, unless it is there.
fn write_lines(file: &Path, lines: &[Value]) -> Result<()> {
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    match std::fs::read(file) {
        Ok(there) if there == text.as_bytes() => Ok(()),
        Ok(_) => {
            let what = format!("{} holds other requests than these scenarios make", file.display());
            Err(Error::usage(what, "choose another --output, or remove what is there"))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => keep(file, &text),
        Err(error) => Err(Error::io("read", file)(error)),
    }
}

fn write_json(file: &Path, value: &Value) -> Result<()> {
    keep(file, &serde_json::to_string_pretty(value).expect("a JSON value has a text"))
}

fn keep(file: &Path, text: &str) -> Result<()> {
    durable::replace(file, text.as_bytes())
}

fn read_answers(file: &Path) -> Result<HashMap<String, Value>> {
    let text = std::fs::read_to_string(file).map_err(Error::io("read", file))?;
    let answer = |line: &str| {
        let answer: Value = serde_json::from_str(line).expect("this program wrote it");
        (answer["custom_id"].as_str().unwrap_or_default().to_owned(), answer)
    };
    Ok(text.lines().map(answer).collect())
}

/// A line of the table.
struct Row {
    scenario: String,
    metric: String,
    value: f64,
    /// Of 95 %.
    interval: Option<(f64, f64)>,
    count: u64,
}

impl Row {
    /// A mean over instances.
    fn mean(scenario: &str, stat: &Stat) -> Row {
        let binary = stat.sum == stat.sum_squared && (stat.min == 0.0 || stat.min == 1.0);
        let interval = if binary && stat.max <= 1.0 { wilson(stat) } else { normal(stat) };
        let (scenario, metric) = (scenario.to_owned(), stat.name.name.clone());
        Row { scenario, metric, value: stat.mean(), interval: Some(interval), count: stat.count }
    }
}

/// The quantile of the normal distribution for 95 %.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's interval of a share.
fn wilson(stat: &Stat) -> (f64, f64) {
    let (n, p) = (stat.count as f64, stat.mean());
    let middle = p + Z * Z / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((middle - half) / scale).max(0.0), ((middle + half) / scale).min(1.0))
}

/// The interval of a mean.
fn normal(stat: &Stat) -> (f64, f64) {
    let n = stat.count as f64;
    let error = (stat.variance() / (n - 1.0).max(1.0)).sqrt();
    (stat.mean() - Z * error, stat.mean() + Z * error)
}

/// Scores of unperturbed instances with their intervals, and perplexities.
fn helm_rows(scenario: &str, plan: &Plan, report: &Report, rows: &mut Vec<Row>) {
    use crate::eval::metrics::Metric;
    let mut names: Vec<String> = Vec::new();
    for metric in &plan.metrics {
        match metric {
            Metric::Generation(scores) => {
                let shown = |name: &str| {
                    let at = format!("{name}@");
                    let stats = report.stats.iter().map(|stat| stat.name.name.clone());
                    stats.filter(|known| known == name || known.starts_with(&at)).collect::<Vec<_>>()
                };
                names.extend(scores.iter().flat_map(|(name, _)| shown(name)));
            }
            Metric::Reference => names.push("exact_match".into()),
            Metric::Summarization => names.extend(["rouge_1", "rouge_2", "rouge_l"].map(String::from)),
            Metric::LanguageModeling => names.extend(["perplexity", "bits_per_byte"].map(String::from)),
            Metric::Instances => {}
        }
    }
    let mut seen = HashSet::new();
    for name in names.into_iter().filter(|name| seen.insert(name.clone())) {
        let values = report.instances.iter().filter(|instance| instance.context.perturbation.is_none());
        let values = values.flat_map(|instance| &instance.stats).filter(|stat| stat.name.name == name);
        let sum = values.fold(None, |sum: Option<Stat>, stat| match sum {
            Some(mut sum) => {
                sum.merge(stat);
                Some(sum)
            }
            None => Some(stat.clone()),
        });
        let derived =
            report.stats.iter().find(|stat| stat.name.name == name && stat.name.context.perturbation.is_none());
        match (sum, derived) {
            (Some(sum), _) => rows.push(Row::mean(scenario, &sum)),
            (None, Some(stat)) => rows.push(Row {
                scenario: scenario.to_owned(),
                metric: name,
                value: stat.mean(),
                interval: None,
                count: report.instances.len() as u64,
            }),
            (None, None) => {}
        }
    }
}

fn task_rows(scenario: &str, stats: &Stats, items: &[&[Stat]]) -> Vec<Row> {
    let hidden = ["logprob", "num_perplexity_tokens", "num_bytes"];
    let means = stats.iter().filter(|stat| !hidden.contains(&stat.name.name.as_str()));
    let mut rows: Vec<Row> = means.map(|stat| Row::mean(scenario, stat)).collect();
    let per_token = ratio(items, "logprob", "num_perplexity_tokens");
    if let Some((mean, error, count)) = per_token {
        let interval = Some(((-mean - Z * error).exp(), (-mean + Z * error).exp()));
        rows.push(Row {
            scenario: scenario.into(),
            metric: "perplexity".into(),
            value: (-mean).exp(),
            interval,
            count,
        });
    }
    if let Some((mean, error, count)) = ratio(items, "logprob", "num_bytes") {
        let bits = |nats: f64| nats / std::f64::consts::LN_2;
        let interval = Some((bits(-mean - Z * error), bits(-mean + Z * error)));
        rows.push(Row {
            scenario: scenario.into(),
            metric: "bits_per_byte".into(),
            value: bits(-mean),
            interval,
            count,
        });
    }
    rows
}

/// The ratio of two sums over items, its standard error, and the number of items.
fn ratio(items: &[&[Stat]], over: &str, under: &str) -> Option<(f64, f64, u64)> {
    let value = |stats: &[Stat], name: &str| stats.iter().find(|stat| stat.name.name == name).map(|stat| stat.sum);
    let pairs: Vec<(f64, f64)> =
        items.iter().filter_map(|stats| Some((value(stats, over)?, value(stats, under)?))).collect();
    let (top, bottom) = pairs.iter().fold((0.0, 0.0), |(a, b), (x, y)| (a + x, b + y));
    if bottom <= 0.0 {
        return None;
    }
    let (mean, n) = (top / bottom, pairs.len() as f64);
    let squares: f64 = pairs.iter().map(|(x, y)| (x - mean * y).powi(2)).sum();
    Some((mean, (squares * n / (n - 1.0).max(1.0)).sqrt() / bottom, pairs.len() as u64))
}

/// The results, for people.
fn table(rows: &[Row]) -> String {
    let width = |text: fn(&Row) -> &str, title: &str| {
        rows.iter().map(|row| text(row).chars().count()).chain([title.len()]).max().unwrap_or(0)
    };
    let (scenario, metric) = (width(|row| &row.scenario, "scenario"), width(|row| &row.metric, "metric"));
    let mut text =
        format!("{:scenario$}  {:metric$}  {:>9}  {:^19}  {:>6}\n", "scenario", "metric", "value", "95 %", "n");
    for row in rows {
        let interval = row.interval.map_or(String::new(), |(low, high)| format!("{low:.4} .. {high:.4}"));
        let line = format!(
            "{:scenario$}  {:metric$}  {:>9.4}  {interval:^19}  {:>6}",
            row.scenario, row.metric, row.value, row.count
        );
        writeln!(text, "{}", line.trim_end()).expect("memory takes what is written");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_wilsons_and_the_normal_ones() {
        let mut stat = Stat::new("accuracy", 1.0);
        (0..9).for_each(|index| stat.merge(&Stat::new("accuracy", f64::from(u8::from(index < 7)))));
        let (low, high) = wilson(&stat);
        // 8 of 10.
        assert!((low - 0.4901625).abs() < 1e-6 && (high - 0.9433178).abs() < 1e-6, "{low} {high}");
        let values = [0.0, 0.5, 1.0, 0.5];
        let stat = values[1..].iter().fold(Stat::new("f1", values[0]), |mut sum, value| {
            sum.merge(&Stat::new("f1", *value));
            sum
        });
        let (low, high) = normal(&stat);
        assert!(((high - low) / 2.0 - Z * 0.408_248 / 2.0).abs() < 1e-5, "{low} {high}");
    }
}
