//! Points as they really run: `generate`, in a process of its own, over prompts made for it.
//!
//! **Invariant:** what is run is the plan of the prediction, through the same command that a user would type; nothing
//! of a run is kept but its numbers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::predict::Planned;
use crate::bench::sweep::{Failure, Point, Rates, Run, digits};
use crate::error::{Error, Result, Tier};
use crate::rng::Philox;

/// How long it takes to notice the end of a run: next to nothing of the shortest.
const POLL: Duration = Duration::from_millis(5);

/// What directories of runs begin with.
const WORK: &str = "work-";

/// A directory below the sweep's for the runs of this process: one that was killed may have left a run that still
/// writes into its own.
pub fn work_directory(sweep: &Path) -> PathBuf {
    sweep.join(format!("{WORK}{}", std::process::id()))
}

/// Removes what runs have left, as far as that is possible.
pub fn clear(sweep: &Path) {
    let entries = std::fs::read_dir(sweep).into_iter().flatten().flatten();
    let left = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(WORK));
    left.for_each(|entry| {
        // Somebody may still be writing there; it goes another time.
        let _ = fs::remove_dir_all(entry.path());
    });
}

/// Runs points.
pub struct Bench<'a> {
    /// The model, as typed.
    pub model: &'a str,
    /// Where inputs and outputs are while a point runs.
    pub directory: PathBuf,
    /// Flags of every run.
    pub flags: &'a BTreeMap<String, String>,
    /// Keys the prompts.
    pub seed: i64,
    /// Runs of a point.
    pub repetitions: usize,
    /// The number of the signal that came, or 0.
    pub signal: &'a AtomicUsize,
}

/// What came of a point.
pub enum Outcome {
    /// All runs.
    Runs(Vec<Run>),
    /// A run that could not be finished.
    Failed(Failure),
    /// A signal came.
    Stopped,
}

impl Bench<'_> {
    /// Runs a point as it is planned.
    ///
    /// # Errors
    /// [`Error::Io`] when files or the process cannot be made.
    pub fn measure(&self, point: &Point, planned: &Planned<'_>) -> Result<Outcome> {
        self.clear()?;
        fs::create_dir_all(&self.directory).map_err(Error::io("create", &self.directory))?;
        let write = |name: &str, text: String| {
            let path = self.directory.join(name);
            fs::write(&path, text).map_err(Error::io("write", &path))
        };
        write("input.jsonl", prompts(point, self.seed, planned.model.config.vocab_size))?;
        write("policy.toml", toml::to_string(&planned.plan.policy).expect("a policy is plain data"))?;
        let mut runs = Vec::new();
        let outcome = loop {
            if runs.len() == self.repetitions {
                break Outcome::Runs(runs);
            }
            match self.run(point, planned)? {
                Outcome::Runs(more) => runs.extend(more),
                other => break other,
            }
        };
        self.clear()?;
        Ok(outcome)
    }

    /// Removes what a point leaves.
    fn clear(&self) -> Result<()> {
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", &self.directory)(error))
            }
            _ => Ok(()),
        }
    }

    fn run(&self, point: &Point, planned: &Planned<'_>) -> Result<Outcome> {
        let path = |name: &str| self.directory.join(name);
        let (output, stats, said) = (path("output.jsonl"), path("stats.json"), path("said"));
        for old in [&output, &path("output.jsonl.run.json"), &stats] {
            // The first run finds nothing.
            let _ = fs::remove_file(old);
        }
        let program = std::env::current_exe().map_err(Error::io("find", "this program"))?;
        let mut command = Command::new(&program);
        command.args(["generate", "--model", self.model, "--progress", "none"]);
        command.arg("--input").arg(path("input.jsonl")).arg("--output").arg(&output);
        command.arg("--stats").arg(&stats).arg("--policy").arg(path("policy.toml"));
        let sizes = [(Tier::Gpu, "gpu-memory"), (Tier::Cpu, "cpu-memory"), (Tier::Disk, "disk-space")];
        let flags = self.flags.iter().chain(&point.settings);
        for (name, value) in flags.filter(|(name, _)| sizes.iter().all(|(_, size)| size != name)) {
            command.arg(format!("--{name}={value}"));
        }
        // As they were planned with: what is free may have changed.
        for (tier, name) in sizes {
            let bytes = planned.budgets.0[tier as usize] as u64;
            if bytes > 0 {
                command.arg(format!("--{name}={bytes}"));
            }
        }
        // Its flags are among ours already.
        command.env_remove("TIDEMILL_CONFIG");
        let errors = File::create(&said).map_err(Error::io("create", &said))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        let mut child = command.spawn().map_err(Error::io("start", &program))?;
        let mut told = false;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(Error::io("wait for", &program))? {
                break status;
            }
            if self.signal.load(Ordering::Relaxed) != 0 && !told {
                told = true;
                // It may have ended by itself.
                let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            }
            std::thread::sleep(POLL);
        };
        if self.signal.load(Ordering::Relaxed) != 0 {
            return Ok(Outcome::Stopped);
        }
        if !status.success() {
            return Ok(Outcome::Failed(reason(&said, &output, status)));
        }
        Ok(Outcome::Runs(vec![read_stats(&stats)?]))
    }
}

/// A line for each prompt: random tokens, as many answers as asked for whatever the model says.
fn prompts(point: &Point, seed: i64, vocab_size: usize) -> String {
    let mut text = String::new();
    for line in 0..point.num_prompts as u64 {
        let random = Philox::new(seed as u64, line);
        let token = |index: usize| random.words(index as u64)[0] as usize % vocab_size;
        let tokens: Vec<usize> = (0..point.prompt_len).map(token).collect();
        let _ = writeln!(
            text,
            "{{\"prompt\":{},\"max_tokens\":{},\"ignore_eos\":true,\"temperature\":0}}",
            Value::from(tokens),
            point.gen_len
        );
    }
    text
}

/// Why a run failed: what it said, or the first line that it could not answer.
fn reason(said: &Path, output: &Path, status: std::process::ExitStatus) -> Failure {
    let said = fs::read_to_string(said).unwrap_or_default();
    let after = |word: &str| said.lines().rev().find_map(|line| line.strip_prefix(word)).map(str::to_owned);
    if let Some(what) = after("error: ") {
        return Failure { what, hint: after("hint: ") };
    }
    let answers = fs::read_to_string(output).unwrap_or_default();
    let error = |line: &str| {
        let answer: Value = serde_json::from_str(line).ok()?;
        Some(answer.get("error")?.get("message")?.as_str()?.to_owned())
    };
    let what = answers.lines().find_map(error).unwrap_or_else(|| format!("the run ended with {status}"));
    Failure { what, hint: None }
}

fn read_stats(file: &Path) -> Result<Run> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    let stats: Value = serde_json::from_str(&text).expect("this program wrote it");
    let number = |name: &str| digits(stats[name].as_f64().unwrap_or(0.0));
    let lanes = stats["lanes"].as_object().into_iter().flatten();
    let busy = lanes.filter_map(|(name, lane)| Some((name.clone(), digits(lane["busy_s"].as_f64()?))));
    Ok(Run {
        rates: Rates {
            generated_tokens_per_s: number("generated_tokens_per_s"),
            total_tokens_per_s: number("total_tokens_per_s"),
            wall_s: number("wall_s"),
        },
        load_s: number("load_s"),
        passes: stats["passes"].as_u64().unwrap_or(0),
        busy_s: busy.collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_their_lengths_and_begin_apart() {
        let point = Point { batch: 2, prompt_len: 5, gen_len: 3, num_prompts: 4, settings: BTreeMap::new() };
        let lines: Vec<Value> =
            prompts(&point, -1, 100).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4);
        let tokens = |line: &Value| -> Vec<u64> {
            line["prompt"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap()).collect()
        };
        assert!(lines.iter().all(|line| tokens(line).len() == 5 && tokens(line).iter().all(|&token| token < 100)));
        assert_ne!(tokens(&lines[0]), tokens(&lines[1]));
        assert_eq!(prompts(&point, -1, 100), prompts(&point, -1, 100));
        assert_ne!(prompts(&point, -1, 100), prompts(&point, 0, 100));
    }
}
