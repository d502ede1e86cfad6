//! `tidemill plan`: what a job would take on a machine.
//!
//! **Invariant:** neither weights nor a GPU are needed; the plan goes to standard output, everything else to standard
//! error.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::estimate::{self, Reading};
use super::flags::{ActivationsChoice, DeviceChoice, ScheduleChoice, Size, Switch, kv_policy, rounds_activations};
use super::lossy::{Choice, Said, Stored, choose};
use super::planning::this_machine;
use super::{config, generate, resources, say};
use crate::error::{Bytes, Error, Result, Tier};
use crate::hardware::{Hardware, Throttles};
use crate::memory::limits;
use crate::model::dtype::DType;
use crate::model::packed::cache;
use crate::planner::draw;
use crate::planner::explain::{Change, Explanation, explain, words};
use crate::planner::job::{Job, Request};
use crate::planner::lp::{Budgets, Capabilities};
use crate::planner::model::{Numerics, PlanModel};
use crate::planner::search::{Plan, Question};
use crate::policy::{Order, Split};
use crate::schedule::price::Bottleneck;

/// Sequences of a job of which only lengths are given.
const NUM_PROMPTS: usize = 1000;
/// Tokens that a line may generate when nothing says otherwise.
const GEN_LEN: usize = 256;

/// The arguments of `plan`, as typed.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Arguments {
    /// A config.json, or a directory with one.
    #[arg(long, env = "TIDEMILL_MODEL", value_name = "MODEL|CONFIG.json")]
    model: Option<String>,
    /// JSONL prompts; text is counted as a token per 4 bytes.
    #[arg(long, value_name = "FILE", conflicts_with = "prompt_len")]
    input: Option<PathBuf>,
    /// Prompt tokens of every sequence.
    #[arg(long, value_name = "N")]
    prompt_len: Option<usize>,
    /// Tokens that every sequence generates; with --input, where a line does not say [default: 256].
    #[arg(long, value_name = "N")]
    gen_len: Option<usize>,
    /// Sequences of the job [default: 1000].
    #[arg(long, value_name = "N", conflicts_with = "input")]
    num_prompts: Option<usize>,
    /// Tokens that a sequence is expected to generate, where it may generate more.
    #[arg(long, value_name = "N")]
    expect_output_len: Option<usize>,
    /// A hardware profile [default: this machine, measured once].
    #[arg(long, env = "TIDEMILL_HARDWARE", value_name = "FILE")]
    hardware: Option<PathBuf>,
    /// Flags in a TOML file; those of `generate` that a plan does not depend on may be there too.
    #[arg(long, env = "TIDEMILL_CONFIG", value_name = "FILE.toml")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// What computes.
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "DEVICE", help_heading = "Budgets and numerics")]
    device: Option<DeviceChoice>,
    /// Device memory to use; of a machine without a device, main memory that plays one [default: 90 %].
    #[arg(long, env = "TIDEMILL_GPU_MEMORY", value_name = "SIZE", help_heading = "Budgets and numerics")]
    gpu_memory: Option<Size>,
    /// Main memory to use [default: 70 %].
    #[arg(long, env = "TIDEMILL_CPU_MEMORY", value_name = "SIZE", help_heading = "Budgets and numerics")]
    cpu_memory: Option<Size>,
    /// Where the measurement of this machine is kept [default: tidemill in the user's cache directory].
    #[arg(long, env = "TIDEMILL_CACHE_DIR", value_name = "DIR", help_heading = "Budgets and numerics")]
    cache_dir: Option<PathBuf>,
    /// Where files would be made, on the disk to plan with [default: the cache directory].
    #[arg(long, env = "TIDEMILL_OFFLOAD_DIR", value_name = "DIR", help_heading = "Budgets and numerics")]
    offload_dir: Option<PathBuf>,
    /// Disk space to use [default: 80 %].
    #[arg(long, env = "TIDEMILL_DISK_SPACE", value_name = "SIZE", help_heading = "Budgets and numerics")]
    disk_space: Option<Size>,
    /// Dtype of the weights: native, f32, bf16, f16, int8, int4 [default: native].
    #[arg(long, env = "TIDEMILL_WEIGHTS", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    weights: Option<String>,
    /// Precision of activations in products [default: f32].
    #[arg(long, env = "TIDEMILL_ACTIVATIONS", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    activations: Option<ActivationsChoice>,
    /// Dtype of the KV cache: auto, f32, bf16, f16, int8, int4 [default: auto, the checkpoint's].
    #[arg(long, env = "TIDEMILL_KV_DTYPE", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    kv_dtype: Option<String>,
    /// Let the program choose dtypes of weights and cache and the precision of activations, where they are not said.
    #[arg(long, env = "TIDEMILL_ALLOW_LOSSY", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
        value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Budgets and numerics")]
    allow_lossy: Option<bool>,
    /// What the KV cache keeps: full, h2o:heavy=H,recent=R or h2o:keep=K,recent=R (or pyramid, per-head), or
    /// sink:start=S,recent=R, in positions or as shares of a request's length; h2o with stretch=1.0 evicts when the
    /// prompt has been read [default: full].
    #[arg(long, env = "TIDEMILL_KV_POLICY", value_name = "POLICY", help_heading = "Budgets and numerics")]
    kv_policy: Option<String>,
    /// Whether prompts of --input that begin alike share their beginnings [default: on].
    #[arg(long, env = "TIDEMILL_PREFIX_SHARING", value_name = "SWITCH", help_heading = "Budgets and numerics")]
    prefix_sharing: Option<Switch>,
    /// Threads that compute, of this machine [default: one per core].
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N", help_heading = "Budgets and numerics")]
    threads: Option<usize>,
    /// Whether prompts are computed beside answers, or all of a batch first [default: mixed].
    #[arg(long, env = "TIDEMILL_SCHEDULE", value_name = "SCHEDULE", help_heading = "Budgets and numerics")]
    schedule: Option<ScheduleChoice>,
    /// Links that are held back, such as h2d=2GB/s,disk_read=300MB/s.
    #[arg(long, env = "TIDEMILL_THROTTLE", value_name = "LINK=RATE", help_heading = "Budgets and numerics")]
    throttle: Option<String>,
    /// Say why, and what would help.
    #[serde(skip)]
    #[arg(long)]
    explain: bool,
    /// Write the policy.
    #[serde(skip)]
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// Draw one pass.
    #[serde(skip)]
    #[arg(long, value_name = "FILE.svg")]
    draw: Option<PathBuf>,
    /// Write the plan as JSON.
    #[serde(skip)]
    #[arg(long)]
    json: bool,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// A model, profile, input or flag that cannot be used; [`Error::OverBudget`] when nothing fits.
pub fn run(arguments: Arguments) -> Result<u8> {
    let arguments = &arguments.with_config()?;
    resources::use_threads(arguments.threads)?;
    let configuration = arguments.configuration()?;
    let said = arguments.said()?;
    let mut choice = Choice {
        weights: said.weights.flatten(),
        kv: said.kv.flatten(),
        activations: said.activations.unwrap_or(ActivationsChoice::F32),
    };
    let model_of = |choice: Choice| {
        let numerics = Numerics { weights: choice.weights, kv: choice.kv };
        configuration.model(numerics, Some(choice.activations), arguments.kv_policy.as_deref())
    };
    let (hardware, budgets) = arguments.hardware()?;
    let job = arguments.job(&configuration.model(Numerics::default(), None, arguments.kv_policy.as_deref())?)?;
    let capabilities = Capabilities::default();
    let schedule = arguments.schedule.map_or(Order::Mixed, ScheduleChoice::order);
    let chooses = arguments.allow_lossy == Some(true) && !said.is_all();
    if chooses {
        let secs = |choice: Choice| {
            let (model, hardware, job) = (&model_of(choice).ok()?, &hardware, &job);
            Question { model, hardware, budgets, capabilities, job, schedule }.rough_secs()
        };
        choice = choose(&said.choices(configuration.stored()?), secs).map_or(choice, |(choice, _)| choice);
    }
    let model = model_of(choice)?;
    if chooses {
        say::line(&format!("--allow-lossy chose {}", choice.words()));
    }
    let question = Question { model: &model, hardware: &hardware, budgets, capabilities, job: &job, schedule };
    let started = Instant::now();
    let plan = question.plan()?;
    let planning_secs = started.elapsed().as_secs_f64();
    let explanation = arguments.explain.then(|| explain(&question, &plan));
    let bound = match &explanation {
        Some(explanation) => Some((explanation.bound_tokens_per_s, explanation.bound_by)),
        None => question.bound(),
    };
    let report = Report { model: &model, hardware: &hardware, budgets, job: &job, plan: &plan, bound, planning_secs };
    if let Some(file) = &arguments.save {
        write(file, &report.policy_file())?;
    }
    if let Some(file) = &arguments.draw {
        write(file, &draw::svg(&question.rehearse(&plan, 3), 1, &report.title()))?;
    }
    let text = if arguments.json { report.json(explanation.as_ref()) } else { report.text(explanation.as_ref()) };
    say::data(&text)?;
    Ok(0)
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).map_err(Error::io("write", file))
}

fn read_json(file: &Path) -> Result<Value> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    serde_json::from_str(&text).map_err(|error| Error::model(file, format!("is no JSON: {error}")))
}

/// The dtype that a flag names; none for `native`.
///
/// # Errors
/// [`Error::Usage`] when there is no such dtype.
pub fn dtype(flag: &str, text: Option<&str>, native: &str) -> Result<Option<DType>> {
    let Some(text) = text.filter(|text| *text != native) else { return Ok(None) };
    let known = DType::ALL.map(DType::name).join(", ");
    let found = DType::ALL.into_iter().find(|element| element.name() == text);
    found
        .map(Some)
        .ok_or_else(|| Error::usage(format!("{flag} {text}: no such dtype"), format!("use {native}, {known}")))
}

/// A configuration to plan with, without weights.
pub struct Configuration {
    name: String,
    value: Value,
    file: PathBuf,
}

impl Configuration {
    /// The configuration that `--model` names: a config.json, a directory with one, or `synth:CONFIG.json#SEED`; none
    /// if there is no such file.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn find(spec: &str) -> Result<Option<Configuration>> {
        let place =
            spec.strip_prefix("synth:").map_or(spec, |rest| rest.rsplit_once('#').map_or(rest, |parts| parts.0));
        let path = Path::new(place);
        let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        if !file.is_file() {
            return Ok(None);
        }
        let name = match path.is_dir() {
            true => path.file_name(),
            false => path.file_stem(),
        };
        let name = name.map_or_else(|| spec.to_owned(), |name| name.to_string_lossy().into_owned());
        Ok(Some(Configuration { name, value: read_json(&file)?, file }))
    }

    /// The dtypes that it names.
    ///
    /// # Errors
    /// As [`Configuration::model`].
    pub fn stored(&self) -> Result<Stored> {
        let cost = self.model(Numerics::default(), None, None)?.cost;
        Ok(Stored { weights: cost.weights, is_packed: false, kv: cost.kv })
    }

    /// The model in these numerics.
    ///
    /// # Errors
    /// [`Error::Model`] when it is no configuration that can be planned with, [`Error::Usage`] for numerics that do not
    /// go with it.
    pub fn model(
        &self,
        numerics: Numerics,
        activations: Option<ActivationsChoice>,
        policy: Option<&str>,
    ) -> Result<PlanModel> {
        let mut model = PlanModel::from_json(&self.name, &self.value, &self.file, numerics)?;
        model.cost.integer_activations = rounds_activations(activations, model.cost.weights)?;
        let scored = kv_policy(policy, &model.config)?.needs_scores();
        Ok(model.with_scores(scored))
    }
}

/// Reads a profile.
///
/// # Errors
/// When it cannot be read, or is none.
pub fn read_hardware(file: &Path) -> Result<Hardware> {
    let text = fs::read_to_string(file).map_err(Error::io("read", file))?;
    Hardware::from_toml(&text, &file.display().to_string())
}

/// What of a machine may be used, as typed.
#[derive(Clone, Copy, Debug)]
pub struct Granted<'a> {
    /// `--device`.
    pub device: Option<DeviceChoice>,
    /// `--gpu-memory`, `--cpu-memory`, `--disk-space`.
    pub sizes: [Option<Size>; 3],
    /// `--throttle`.
    pub throttle: Option<&'a str>,
}

impl Granted<'_> {
    /// The machine as it may be used, and the budgets; what is not said is a share of what there is.
    ///
    /// # Errors
    /// [`Error::OverBudget`] for more than there is.
    pub fn of(&self, mut hardware: Hardware) -> Result<(Hardware, Budgets)> {
        if self.device == Some(DeviceChoice::Host) {
            hardware = hardware.without_gpu();
        }
        if let (None, Some(size)) = (&hardware.gpu, self.sizes[Tier::Gpu as usize]) {
            hardware = hardware.rehearsed(size.0);
        }
        if let Some(throttle) = self.throttle {
            let throttles: Throttles = throttle
                .parse()
                .map_err(|what: String| Error::usage(format!("--throttle: {what}"), "write it as h2d=2GB/s"))?;
            hardware = hardware.throttled(&throttles);
        }
        let flags =
            [("--gpu-memory", 0.9, Tier::Gpu), ("--cpu-memory", 0.7, Tier::Cpu), ("--disk-space", 0.8, Tier::Disk)];
        let mut budgets = [0.0; 3];
        for (flag, share, tier) in flags {
            let capacity = hardware.capacity_bytes(tier);
            let size = self.sizes[tier as usize];
            budgets[tier as usize] = size.map_or(share * capacity as f64, |size| size.0 as f64);
            if budgets[tier as usize] > capacity as f64 {
                return Err(Error::OverBudget {
                    what: flag.into(),
                    tier,
                    need: Bytes(budgets[tier as usize] as u64),
                    have: Bytes(capacity),
                    hint: Some(format!("use {flag} {}MiB or less", capacity >> 20)),
                });
            }
        }
        Ok((hardware, Budgets(budgets)))
    }
}

impl Arguments {
    /// The flags over the file that `--config` names, and whether the job is known.
    fn with_config(self) -> Result<Self> {
        let arguments = match &self.config {
            None => self,
            Some(file) => {
                let plan = Self::augment_args(clap::Command::new("plan"));
                let generate = generate::Arguments::augment_args(clap::Command::new("generate"));
                let knows = |command: &clap::Command, key: &str| {
                    command.get_arguments().any(|argument| argument.get_long() == Some(key))
                };
                // The output and its like; a file is for a job, not for a command.
                let overlaid = config::overlay(&self, file, |key| knows(&generate, key) && !knows(&plan, key))?;
                let Arguments { explain, save, draw, json, .. } = self;
                Arguments { explain, save, draw, json, ..overlaid }
            }
        };
        let usage = |what: &str| Err(Error::usage(what, "run `tidemill plan --help`"));
        match (&arguments.model, &arguments.input, arguments.prompt_len) {
            (None, _, _) => usage("--model is missing"),
            (_, None, None) => usage("neither --input nor --prompt-len says what prompts there are"),
            (_, Some(_), Some(_)) => {
                usage("--input and --prompt-len are given: one of them says what prompts there are")
            }
            _ => Ok(arguments),
        }
    }

    fn configuration(&self) -> Result<Configuration> {
        let hint = "name a config.json (policies/models/ has some) or a model directory";
        let model = self.model.as_deref().unwrap_or_default();
        let missing = || Error::usage(format!("--model {model}: no such configuration"), hint);
        Configuration::find(model)?.ok_or_else(missing)
    }

    fn said(&self) -> Result<Said> {
        let (weights, kv) = (self.weights.as_deref(), self.kv_dtype.as_deref());
        let weights = weights.map(|text| dtype("--weights", Some(text), "native")).transpose()?;
        let kv = kv.map(|text| dtype("--kv-dtype", Some(text), "auto")).transpose()?;
        Ok(Said { weights, kv, activations: self.activations })
    }

    fn hardware(&self) -> Result<(Hardware, Budgets)> {
        let hardware = match &self.hardware {
            Some(file) => read_hardware(file)?,
            None => {
                let cache = cache::directory(self.cache_dir.as_deref())?;
                let offload = self.offload_dir.clone().unwrap_or_else(|| cache.join("offload"));
                let memory = limits::default_cpu_memory();
                this_machine(&cache, &offload, memory, true)?.expect("it was measured")
            }
        };
        let granted = Granted {
            device: self.device,
            sizes: [self.gpu_memory, self.cpu_memory, self.disk_space],
            throttle: self.throttle.as_deref(),
        };
        granted.of(hardware)
    }

    fn job(&self, model: &PlanModel) -> Result<Job> {
        let kv_policy = kv_policy(self.kv_policy.as_deref(), &model.config)?;
        let context_len = model.config.sequence_len(kv_policy.outgrows_context());
        let gen_len = self.gen_len.unwrap_or(GEN_LEN).max(1);
        if let Some(file) = &self.input {
            // Without a tokenizer: a token per 4 bytes.
            let count = |text: &str| text.len().div_ceil(4);
            let reading = Reading {
                max_tokens: Some(gen_len),
                expected: self.expect_output_len,
                context_len,
                kv_policy: &*kv_policy,
                count: &count,
                shares: self.prefix_sharing != Some(Switch::Off) && !model.config.positions.depend_on_length(),
            };
            return estimate::job(file, &reading);
        }
        let prompt_len = self.prompt_len.unwrap_or(1).max(1);
        if prompt_len >= context_len {
            let what = format!("--prompt-len {prompt_len} leaves no room in a context of {context_len}");
            return Err(Error::usage(what, format!("use at most {}", context_len.saturating_sub(1))));
        }
        let max_tokens = gen_len.min(context_len - prompt_len);
        let gen_len = self.expect_output_len.unwrap_or(max_tokens).clamp(1, max_tokens);
        let job = Job::of(&[Request::new(prompt_len, gen_len, max_tokens, &*kv_policy)]);
        Ok(Job { requests: self.num_prompts.unwrap_or(NUM_PROMPTS).max(1), ..job })
    }
}

/// Everything that is said about a plan.
struct Report<'a> {
    model: &'a PlanModel,
    hardware: &'a Hardware,
    budgets: Budgets,
    job: &'a Job,
    plan: &'a Plan,
    bound: Option<(f64, Bottleneck)>,
    planning_secs: f64,
}

fn percent(split: &Split) -> String {
    Tier::ALL
        .into_iter()
        .filter(|&tier| split.share(tier) > 0.0)
        .map(|tier| format!("{:.1} % {tier}", 100.0 * split.share(tier)))
        .collect::<Vec<_>>()
        .join(", ")
}

impl Report<'_> {
    fn title(&self) -> String {
        let (model, cost) = (self.model, &self.model.cost);
        format!(
            "{} ({} weights, {} KV) on {}: one pass of {:.0} rows in {}",
            model.name,
            cost.weights,
            cost.kv,
            self.hardware.name,
            self.plan.steady.rows(),
            draw::duration(self.plan.pass_secs)
        )
    }

    fn text(&self, explanation: Option<&Explanation>) -> String {
        let Report { model, job, plan, .. } = self;
        let policy = &plan.policy;
        let mut text = String::new();
        let (total, active) = model.parameters();
        let bytes = Bytes(model.weight_bytes());
        let _ = writeln!(
            text,
            "model       {}: {:.1} B parameters ({:.1} B active), {} weights {bytes}, {} KV {} a token",
            model.name,
            total / 1e9,
            active / 1e9,
            model.cost.weights,
            model.cost.kv,
            Bytes((model.cost.frame_bytes / 64.0) as u64 * model.cost.num_layers as u64),
        );
        let _ = writeln!(text, "machine     {}", self.hardware.name);
        let shared = match job.prompt_len - job.fresh_len {
            shared if shared >= 0.5 => format!(" ({shared:.0} of the prompt shared)"),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "job         {} sequences, {:.0} prompt and {:.0} generated tokens each{shared}",
            job.requests, job.prompt_len, job.gen_len
        );
        let _ = writeln!(
            text,
            "batch       {} sequences in flight, {} prompt tokens a pass, {} blocks of up to {} rows",
            policy.sequences, policy.chunk_tokens, policy.blocks, policy.block_rows
        );
        let _ = writeln!(text, "weights     {}", percent(&policy.weights));
        let _ = writeln!(text, "kv          {}, {} pages", percent(&policy.kv), policy.pages);
        let _ = writeln!(text, "hidden      {}", percent(&policy.hidden));
        let compressed = if policy.compressed { "; weights on disk compressed" } else { "" };
        let _ = writeln!(text, "embed, head {}, {}{compressed}", policy.embed, policy.head);
        for tier in Tier::ALL {
            let (need, have) = (plan.placement.bytes[tier as usize], self.budgets.0[tier as usize]);
            if have > 0.0 {
                let _ = writeln!(text, "{:<11} {} of {}", tier.to_string(), Bytes(need), Bytes(have as u64));
            }
        }
        let _ = writeln!(
            text,
            "pass        {:.0} rows in {} (at least {}): {}",
            plan.steady.rows(),
            draw::duration(plan.pass_secs),
            draw::duration(plan.pass_bound_secs),
            words(plan.bottleneck)
        );
        let _ = writeln!(
            text,
            "predicted   {:.2} generated tokens/s, {:.2} in all; {} for the job",
            plan.generated_tokens_per_s,
            plan.total_tokens_per_s,
            draw::duration(plan.secs)
        );
        if let Some((bound, by)) = self.bound {
            let generated = bound * job.gen_len / (job.prompt_len + job.gen_len);
            let _ = writeln!(
                text,
                "bound       {generated:.2} generated tokens/s, {bound:.2} in all, set by {}; {:.0} % of it planned",
                words(by),
                100.0 * plan.total_tokens_per_s / bound
            );
        }
        for change in explanation.map_or(&[][..], |explanation| &explanation.changes) {
            let lossy = if change.lossy { " (changes tokens)" } else { "" };
            let _ = writeln!(text, "would help  {:.2} times as fast with {}{lossy}", change.gain, change.what);
        }
        text
    }

    fn json(&self, explanation: Option<&Explanation>) -> String {
        let Report { model, job, plan, .. } = self;
        let (total, active) = model.parameters();
        let mut value = json!({
            "model": {
                "name": model.name, "parameters": total, "active_parameters": active,
                "weight_bytes": model.weight_bytes(),
            },
            "numerics": {
                "weights": model.cost.weights, "kv_dtype": model.cost.kv,
                "activations": if model.cost.integer_activations { "int8" } else { "f32" },
            },
            "hardware": self.hardware.name,
            "job": {
                "requests": job.requests, "prompt_len": job.prompt_len, "shared_len": job.prompt_len - job.fresh_len,
                "gen_len": job.gen_len,
            },
            "policy": plan.policy,
            "bytes": {
                "gpu": plan.placement.bytes[0], "cpu": plan.placement.bytes[1], "disk": plan.placement.bytes[2],
            },
            "budget_bytes": {
                "gpu": self.budgets.0[0], "cpu": self.budgets.0[1], "disk": self.budgets.0[2],
            },
            "predicted": {
                "secs": plan.secs, "passes": plan.passes, "total_tokens_per_s": plan.total_tokens_per_s,
                "generated_tokens_per_s": plan.generated_tokens_per_s,
                "pass_secs": plan.pass_secs, "pass_bound_secs": plan.pass_bound_secs,
            },
            "binding": plan.bottleneck.name(),
            "bound_tokens_per_s": self.bound.map(|bound| bound.0),
            "bound_by": self.bound.map(|bound| bound.1.name()),
            "planning_secs": self.planning_secs,
        });
        if let Some(explanation) = explanation {
            let change = |change: &Change| json!({"what": change.what, "gain": change.gain, "lossy": change.lossy});
            value["would_help"] = explanation.changes.iter().map(change).collect();
        }
        format!("{value:#}\n")
    }

    fn policy_file(&self) -> String {
        let plan = self.plan;
        let policy = toml::to_string(&plan.policy).expect("a policy is plain data");
        format!(
            "# {}\n# {:.2} generated tokens/s predicted for {} sequences of {:.0} + {:.0} tokens.\n{policy}",
            self.title(),
            plan.generated_tokens_per_s,
            self.job.requests,
            self.job.prompt_len,
            self.job.gen_len
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_named_or_refused() {
        assert_eq!(dtype("--weights", Some("native"), "native").unwrap(), None);
        assert_eq!(dtype("--weights", Some("int4"), "native").unwrap(), Some(DType::Int4));
        assert!(dtype("--kv-dtype", Some("int3"), "auto").unwrap_err().hint().unwrap().contains("int4"));
    }
}
