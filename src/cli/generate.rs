//! `tidemill generate`.
//!
//! **Invariant:** whatever can be refused is refused before the model is loaded; the fingerprint holds everything
//! that changes a completion and nothing that does not.

mod choosing;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::config::{self, PolicyFile};
use super::exact::{Exact, Numerics};
use super::flags::{
    ActivationsChoice, DeviceChoice, KvChoice, ProgressChoice, ScheduleChoice, Size, Switch, WeightsChoice,
    choice_name, kv_policy,
};
use super::planning::{Decision, Situation};
use super::progress::Progress;
use super::replanning::{Replanner, lane};
use super::resources::{self, Budgets};
use super::signals::Signals;
use super::{devices, estimate, pack, say, stats};
use crate::bench::trace;
use crate::device::Device;
use crate::device::cuda::Cuda;
use crate::device::cuda::card::Card;
use crate::device::host::Host;
use crate::engine::{Advisor, Batch, Counts, Engine};
use crate::error::{Bytes, Error, Result, Tier};
use crate::executor::{Executor, Parts, Throttle};
use crate::hardware::{Link, Throttles};
use crate::job::{self, Defaults, Fingerprint, Input, JobOptions, Limits, Opening, Output, Shard};
use crate::kv::layout::KvLayout;
use crate::kv::policy::KvPolicy;
use crate::memory::arena::Arena;
use crate::memory::disk;
use crate::memory::limits;
use crate::model::Model;
use crate::model::dtype::DType;
use crate::model::packed::read::PackedModel;
use crate::model::packed::{Packed, cache};
use crate::planner::job::Job;
use crate::planner::model::PlanModel;
use crate::schedule::placement::Placement;
use crate::schedule::price::placed;

/// The version of the arithmetic: a change that alters bits raises it, so that no job mixes two.
const ARITHMETIC: &str = "4";

/// The arguments of `generate`, as typed.
#[derive(clap::Args, Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Arguments {
    /// A Hugging Face directory, a name in the local Hugging Face cache, `demo`, or `synth:CONFIG.json#SEED`.
    #[arg(long, env = "TIDEMILL_MODEL", value_name = "MODEL")]
    model: Option<String>,
    /// JSONL prompts; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// JSONL completions; `-` is standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Where failed lines go instead of the output.
    #[arg(long, value_name = "FILE")]
    error_file: Option<PathBuf>,
    /// Do the failed lines of an earlier run again.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    retry_failed: Option<bool>,
    /// Only lines with `(line - 1) mod n = i`.
    #[arg(long, value_name = "i/n")]
    shard: Option<String>,
    /// Flags in a TOML file.
    #[arg(long, env = "TIDEMILL_CONFIG", value_name = "FILE.toml")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Where things live and how much is computed together: a TOML file, as `plan --save` writes it.
    #[arg(long, env = "TIDEMILL_POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Write statistics of this run.
    #[arg(long, value_name = "FILE.json")]
    stats: Option<PathBuf>,
    /// Write what every lane did when, predicted beside measured, for Perfetto.
    #[arg(long, value_name = "FILE.json")]
    trace: Option<PathBuf>,
    /// How progress is shown.
    #[arg(long, env = "TIDEMILL_PROGRESS", value_name = "HOW")]
    progress: Option<ProgressChoice>,

    /// Tokens to generate at most [default: 256, 16 for /v1/completions].
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    max_tokens: Option<u32>,
    /// 0 is greedy [default: 1].
    #[arg(long, value_name = "T", help_heading = "Sampling")]
    temperature: Option<f32>,
    /// Keep the most probable tokens up to this mass.
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    top_p: Option<f32>,
    /// Keep this many tokens; 0 is off.
    #[arg(long, value_name = "K", help_heading = "Sampling")]
    top_k: Option<u32>,
    /// Keep tokens at least this probable relative to the best.
    #[arg(long, value_name = "P", help_heading = "Sampling")]
    min_p: Option<f32>,
    /// Samples per prompt.
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    n: Option<u32>,
    /// A text that ends a completion; may be repeated.
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    stop: Option<Vec<String>>,
    /// Keys the randomness [default: 0].
    #[arg(long, value_name = "N", help_heading = "Sampling", allow_negative_numbers = true)]
    seed: Option<i64>,
    /// Log-probabilities of sampled tokens, with this many alternatives.
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    logprobs: Option<u32>,

    /// What computes [default: auto].
    #[arg(long, env = "TIDEMILL_DEVICE", value_name = "DEVICE", help_heading = "Budgets and numerics")]
    device: Option<DeviceChoice>,
    /// Device memory to use [default: 90 % of what is free]. With `--device host`, main memory that stands for it: a
    /// rehearsal of all three tiers.
    #[arg(long, env = "TIDEMILL_GPU_MEMORY", value_name = "SIZE", help_heading = "Budgets and numerics")]
    gpu_memory: Option<Size>,
    /// Where files for what does not fit into memory are made [default: the cache directory].
    #[arg(long, env = "TIDEMILL_OFFLOAD_DIR", value_name = "DIR", help_heading = "Budgets and numerics")]
    offload_dir: Option<PathBuf>,
    /// Disk space to use there [default: 80 % of what is free].
    #[arg(long, env = "TIDEMILL_DISK_SPACE", value_name = "SIZE", help_heading = "Budgets and numerics")]
    disk_space: Option<Size>,
    /// Where packed models and offloaded files are kept [default: tidemill in the user's cache directory].
    #[arg(long, env = "TIDEMILL_CACHE_DIR", value_name = "DIR", help_heading = "Budgets and numerics")]
    cache_dir: Option<PathBuf>,
    /// Tokens that a sequence is expected to generate, where it may generate more.
    #[arg(long, value_name = "N", help_heading = "Budgets and numerics")]
    expect_output_len: Option<usize>,
    /// Hold links to a rate, such as `h2d=2GB/s,disk_read=300MB/s`.
    #[arg(long, env = "TIDEMILL_THROTTLE", value_name = "LINK=RATE,...", help_heading = "Budgets and numerics")]
    throttle: Option<String>,
    /// Main memory to use [default: 70 % of what is available].
    #[arg(long, env = "TIDEMILL_CPU_MEMORY", value_name = "SIZE", help_heading = "Budgets and numerics")]
    cpu_memory: Option<Size>,
    /// Threads that compute [default: one per core].
    #[arg(long, env = "TIDEMILL_THREADS", value_name = "N", help_heading = "Budgets and numerics")]
    threads: Option<usize>,
    /// Dtype that weights are computed from [default: native].
    #[arg(long, env = "TIDEMILL_WEIGHTS", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    weights: Option<WeightsChoice>,
    /// Let the program choose dtypes of weights and cache and the precision of activations, where they are not said:
    /// what rounds least of what is about as fast as the fastest. Changes tokens.
    #[arg(long, env = "TIDEMILL_ALLOW_LOSSY", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL",
        value_parser = clap::builder::BoolishValueParser::new(), help_heading = "Budgets and numerics")]
    allow_lossy: Option<bool>,
    /// What the KV cache keeps: full, h2o:heavy=H,recent=R or h2o:keep=K,recent=R (or pyramid, per-head), or
    /// sink:start=S,recent=R, in positions or as shares of a request's length; h2o with stretch=1.0 evicts when the
    /// prompt has been read [default: full].
    #[arg(long, env = "TIDEMILL_KV_POLICY", value_name = "POLICY", help_heading = "Budgets and numerics")]
    kv_policy: Option<String>,
    /// Precision of activations in products [default: f32].
    #[arg(long, env = "TIDEMILL_ACTIVATIONS", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    activations: Option<ActivationsChoice>,
    /// Whether samples of a prompt share it, and prompts that begin alike their beginnings [default: on]; changes no
    /// token.
    #[arg(long, env = "TIDEMILL_PREFIX_SHARING", value_name = "SWITCH", help_heading = "Budgets and numerics")]
    prefix_sharing: Option<Switch>,
    /// Whether prompts are computed beside answers, or all of a batch first [default: mixed]; changes no token.
    #[arg(long, env = "TIDEMILL_SCHEDULE", value_name = "SCHEDULE", help_heading = "Budgets and numerics")]
    schedule: Option<ScheduleChoice>,
    /// Dtype of the KV cache [default: auto, the checkpoint's].
    #[arg(long, env = "TIDEMILL_KV_DTYPE", value_name = "DTYPE", help_heading = "Budgets and numerics")]
    kv_dtype: Option<KvChoice>,
}

/// What the arguments came to.
pub struct Resolved {
    /// What computes: `host`, or a card's name.
    pub device: String,
    /// Bytes granted.
    pub budgets: Budgets,
    /// How much is computed together.
    pub batch: Batch,
    /// Where everything lies, and what is expected of it.
    pub decision: Decision,
    /// The model to price steps of.
    pub model: PlanModel,
    /// Rates that links are held to.
    pub throttles: Throttles,
    /// How pages are laid out.
    pub kv: KvLayout,
    /// What of a sequence is kept in it.
    pub kv_policy: Arc<dyn KvPolicy>,
    /// Store matrices in this dtype rather than the checkpoint's.
    pub weights: Option<DType>,
    /// What changes completions, by name.
    pub numerics: BTreeMap<&'static str, String>,
    /// Weights were generated from a seed.
    pub synthetic: bool,
}

/// Runs the command; gives the exit code.
///
/// # Errors
/// Whatever keeps the job from finishing; finished lines are saved.
pub fn run(arguments: Arguments) -> Result<u8> {
    let arguments = arguments.with_config()?;
    let signals = Signals::watch()?;
    let (model_spec, input, output) = arguments.required()?;
    arguments.check_paths()?;
    resources::use_threads(arguments.threads)?;
    let started = Instant::now();
    let card = devices::choose(arguments.device)?;
    let mut model = Model::open(&model_spec)?;
    let arguments = arguments.settled(&model, card.as_ref())?;
    let resolved = arguments.resolve(&model, card.as_ref())?;
    let options = arguments.job_options(input, output, &model, &resolved)?;
    match job::open(options)? {
        Opening::Finished(summary) => {
            say::line(&format!(
                "already finished: {} lines, {} failed",
                summary.succeeded + summary.failed,
                summary.failed
            ));
            Ok(summary.exit_code())
        }
        Opening::Run(job) => {
            model.set_time(job.started_secs);
            let (arguments, model, resolved) = (&arguments, &model, &resolved);
            Running { arguments, model, resolved, started, signals, standby: None }.run(job, card)
        }
    }
}

/// What a worker adds to a job.
struct Standby {
    /// What it says when it is ready.
    ready: String,
    /// How long it waits for a batch to fill.
    batch_wait: Duration,
}

/// Answers lines of standard input on standard output until there are no more; gives the exit code.
///
/// # Errors
/// Whatever keeps the worker from going on.
pub fn serve(arguments: Arguments, batch_wait: Duration) -> Result<u8> {
    let arguments = arguments.prepared("worker", &WORKER_FOREIGN)?;
    let signals = Signals::watch()?;
    let model_spec = arguments.model()?;
    arguments.check_paths()?;
    resources::use_threads(arguments.threads)?;
    let started = Instant::now();
    let card = devices::choose(arguments.device)?;
    let model = Model::open(&model_spec)?;
    let arguments = arguments.settled(&model, card.as_ref())?;
    let resolved = arguments.resolve(&model, card.as_ref())?;
    let options = arguments.job_options(Input::Stdin, Output::Stdout, &model, &resolved)?;
    let job = job::worker(&options, signals.number.clone());
    let special = |name: &str| model.tokenizer.special_texts().get(name);
    let ready = serde_json::json!({
        "type": "ready",
        "model": model.name,
        "max_batch": resolved.batch.sequences,
        "context_length": options.limits.context,
        "vocab_size": options.limits.vocab_size,
        "bos_token": special("bos_token"),
        "eos_token": special("eos_token"),
        "chat_template": model.chat.is_some(),
        "fingerprint": model.fingerprint,
        "version": env!("CARGO_PKG_VERSION"),
    });
    let standby = Some(Standby { ready: format!("{ready}\n"), batch_wait });
    let (arguments, model, resolved) = (&arguments, &model, &resolved);
    // Failed lines have said so: a worker that answered everything has succeeded.
    Running { arguments, model, resolved, started, signals, standby }.run(job, card).map(|_| 0)
}

/// Flags of a job with files, which a worker does not have.
pub const WORKER_FOREIGN: [&str; 5] = ["input", "output", "error_file", "retry_failed", "shard"];

impl Arguments {
    /// The flags over the file that `--config` names.
    fn with_config(self) -> Result<Self> {
        match &self.config {
            Some(file) => config::overlay(&self, file, |_| false),
            None => Ok(self),
        }
    }

    /// The flags that were given, by name.
    pub fn given(&self) -> toml::Table {
        toml::Table::try_from(self).expect("flags serialize as a table")
    }

    /// Refuses flags that another command does not have.
    fn refuse(&self, flags: &[&str], command: &str) -> Result<()> {
        let given = self.given();
        match flags.iter().map(|flag| flag.replace('_', "-")).find(|flag| given.contains_key(flag)) {
            None => Ok(()),
            Some(flag) => {
                let what = format!("`tidemill {command}` has no --{flag}");
                Err(Error::usage(what, format!("run `tidemill {command} --help`")))
            }
        }
    }

    /// The flags of another command, which has no `foreign` ones; the configuration file counts.
    ///
    /// # Errors
    /// [`Error::Usage`] for a flag that it does not have.
    pub fn prepared(self, command: &str, foreign: &[&str]) -> Result<Self> {
        let arguments = Arguments { config: None, ..self.with_config()? };
        arguments.refuse(foreign, command)?;
        Ok(arguments)
    }

    /// The directory that `--output` names.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is missing.
    pub fn output_directory(&self) -> Result<PathBuf> {
        let missing = || Error::usage("--output is missing", "name a directory for the results");
        self.output.clone().ok_or_else(missing)
    }

    /// The same flags for a job with these files.
    pub fn on_files(self, input: &Path, output: &Path) -> Self {
        Arguments { input: Some(input.to_owned()), output: Some(output.to_owned()), ..self }
    }

    /// The model that is named.
    ///
    /// # Errors
    /// [`Error::Usage`] when none is.
    pub fn model(&self) -> Result<String> {
        let missing = || Error::usage("--model is missing", "give a directory, a name in the cache, or `demo`");
        self.model.clone().ok_or_else(missing)
    }

    fn required(&self) -> Result<(String, Input, Output)> {
        let missing = |flag: &str| Error::usage(format!("{flag} is missing"), "run `tidemill generate --help`");
        let model = self.model()?;
        let input = self.input.clone().ok_or_else(|| missing("--input"))?;
        let output = self.output.clone().ok_or_else(|| missing("--output"))?;
        let input = if input.as_os_str() == "-" { Input::Stdin } else { Input::File(input) };
        let output = if output.as_os_str() == "-" { Output::Stdout } else { Output::File(output) };
        Ok((model, input, output))
    }

    /// Statistics and trace must not replace another file of the job, by whatever name.
    fn check_paths(&self) -> Result<()> {
        let inputs = [&self.input, &self.output, &self.error_file, &self.policy, &self.config];
        let mut taken: Vec<PathBuf> = inputs.into_iter().flatten().filter_map(|path| real_path(path)).collect();
        if let Some(output) = self.output.as_deref().and_then(real_path) {
            let side_file = |suffix: &&str| PathBuf::from(format!("{}.{suffix}", output.display()));
            taken.extend(["journal", "run.json", "lock", "input", "partial"].iter().map(side_file));
        }
        for (flag, path) in [("--stats", &self.stats), ("--trace", &self.trace)] {
            let Some(path) = path else { continue };
            let place = real_path(path).ok_or_else(|| {
                Error::usage(format!("{flag} {}: no such directory", path.display()), "create it first")
            })?;
            if taken.contains(&place) {
                let what = format!("{flag} {} is another file of the job", path.display());
                return Err(Error::usage(what, "name a file of its own"));
            }
            taken.push(place);
        }
        Ok(())
    }

    fn resolve(&self, model: &Model, card: Option<&Card>) -> Result<Resolved> {
        let mut policy = self.policy.as_deref().map(PolicyFile::read).transpose()?;
        let schedule = self.schedule.map(ScheduleChoice::order);
        if let Some(policy) = &mut policy {
            policy.schedule = schedule.or(policy.schedule);
        }
        let weights = self.weights.unwrap_or(WeightsChoice::Native);
        let config = &model.config;
        let budgets = self.budgets(card)?;
        let packed = model.packed(weights.dtype())?;
        let asked = Numerics {
            weights,
            kv: self.kv_dtype.unwrap_or(KvChoice::Auto),
            kv_policy: self.kv_policy.as_deref(),
            activations: self.activations,
        };
        let Exact { kv_policy, kv, element, model: plan_model } = Exact::new(model, &*packed, asked, card.is_some())?;
        let job = self.estimate(model, &*kv_policy);
        let throttles = self.throttles()?;
        let situation = self.situation(&plan_model, policy.as_ref(), (budgets, &throttles), &job, card)?;
        let decision = situation.decide(self.trace.is_some())?;
        resources::check_planes(&decision.placement, packed.layout(), model.packed.as_ref())?;
        let batch = resources::batch(&decision.placement, self.shares(), self.expect_output_len);
        let arithmetic = card.map(|card| devices::numerics(card, element, &*kv_policy, config)).transpose()?;
        let numerics = BTreeMap::from([
            ("weights", element.to_string()),
            ("kv_dtype", kv.dtype.to_string()),
            ("kv_policy", kv_policy.to_string()),
            ("activations", choice_name(self.activations.unwrap_or(ActivationsChoice::F32))),
            ("arithmetic", arithmetic.unwrap_or_else(|| ARITHMETIC.to_owned())),
        ]);
        let (weights, synthetic) = (weights.dtype(), model.config.synthetic);
        let model = plan_model;
        let device = card.map_or("host".to_owned(), |card| card.facts.name.clone());
        Ok(Resolved { device, budgets, batch, decision, model, throttles, kv, kv_policy, weights, numerics, synthetic })
    }

    fn situation<'a>(
        &self,
        model: &'a PlanModel,
        policy: Option<&'a PolicyFile>,
        (budgets, throttles): (Budgets, &'a Throttles),
        job: &'a Job,
        card: Option<&'a Card>,
    ) -> Result<Situation<'a>> {
        let cache = cache::directory(self.cache_dir.as_deref())?;
        let (offload, schedule) = (self.offload_directory()?, self.schedule.map(ScheduleChoice::order));
        let card = card.map(|card| &card.facts);
        Ok(Situation { model, policy, schedule, budgets, throttles, job, card, cache, offload })
    }

    fn throttles(&self) -> Result<Throttles> {
        let wrong =
            |what: String| Error::usage(format!("--throttle: {what}"), "write it as h2d=2GB/s,disk_read=300MB/s");
        self.throttle.as_deref().map_or(Ok(Throttles::default()), |text| text.parse().map_err(wrong))
    }

    /// Whether prompts that begin alike share what is computed of it.
    fn shares(&self) -> bool {
        self.prefix_sharing != Some(Switch::Off)
    }

    /// What the job will take, as far as its file says. A pipe can be read once only, and a file without prompts is the
    /// job's to judge: then prompts of middling length are assumed.
    fn estimate(&self, model: &Model, kv_policy: &dyn KvPolicy) -> Job {
        let context_len = model.config.sequence_len(kv_policy.outgrows_context());
        let max_tokens = self.max_tokens.or(model.generation.max_new_tokens).map(|count| count as usize);
        let counter = estimate::Counter::new(|text| model.tokenizer.encode(text, true).map_or(1, |ids| ids.len()));
        let reading = estimate::Reading {
            max_tokens,
            expected: self.expect_output_len,
            context_len,
            kv_policy,
            count: &|text| counter.count(text),
            shares: self.shares() && !model.config.positions.depend_on_length(),
        };
        let file = self.input.as_deref().filter(|file| file.is_file());
        let job = file.and_then(|file| estimate::job(file, &reading).ok());
        let prompt_len = (model.config.context_len / 4).clamp(1, 512);
        job.unwrap_or_else(|| Job::uniform(1000, prompt_len, max_tokens.unwrap_or(256)))
    }

    /// The budgets, compared with what there is.
    fn budgets(&self, card: Option<&Card>) -> Result<Budgets> {
        let available = limits::available_memory();
        let gpu = self.gpu_memory.map(|size| size.0);
        let cpu = self.cpu_memory.map_or_else(limits::default_cpu_memory, |size| size.0);
        let (gpu, rehearsed) = match card {
            Some(card) => (Some(devices::budget(card, gpu)?), 0),
            None => (gpu, gpu.unwrap_or(0)),
        };
        if cpu.saturating_add(rehearsed) > available {
            let what = if rehearsed > 0 { "--cpu-memory with the rehearsed --gpu-memory" } else { "--cpu-memory" };
            return Err(Error::OverBudget {
                what: what.into(),
                tier: Tier::Cpu,
                need: Bytes(cpu.saturating_add(rehearsed)),
                have: Bytes(available),
                hint: Some(format!("use --cpu-memory {}MiB or less", available.saturating_sub(rehearsed) >> 20)),
            });
        }
        let offload = self.offload_directory()?;
        // The directory need not exist yet.
        let existing = offload.ancestors().find(|directory| directory.is_dir()).unwrap_or(Path::new("."));
        let free = disk::free_space(existing)?;
        let disk = match self.disk_space {
            Some(size) if size.0 > free => {
                return Err(Error::OverBudget {
                    what: "--disk-space".into(),
                    tier: Tier::Disk,
                    need: Bytes(size.0),
                    have: Bytes(free),
                    hint: Some(format!("use --disk-space {}MiB or less", free >> 20)),
                });
            }
            Some(size) => size.0,
            None => free / 10 * 8,
        };
        Ok(Budgets { gpu, cpu, disk })
    }

    fn offload_directory(&self) -> Result<PathBuf> {
        resources::offload_directory(self.offload_dir.as_deref(), self.cache_dir.as_deref())
    }

    /// The packed model in the cache, made now if it is not there.
    fn pack(&self, model: &Model, weights: Option<DType>, planes: bool) -> Result<PackedModel> {
        let directory = cache::directory(self.cache_dir.as_deref())?;
        let what = format!("packing {} into {}", model.name, directory.display());
        let mut display = pack::Display::new(self.progress, what);
        let packed = cache::ensure(model, weights, &directory, planes, &mut |progress| display.show(progress))?;
        display.end();
        Ok(packed)
    }

    fn job_options(&self, input: Input, output: Output, model: &Model, resolved: &Resolved) -> Result<JobOptions> {
        let shard = match &self.shard {
            None => None,
            Some(text) => Some(text.parse::<Shard>().map_err(|what| {
                Error::usage(format!("--shard: {what}"), "write it as i/n with i from 0, such as 0/4")
            })?),
        };
        let flags = Defaults {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: None,
            n: self.n,
            stop: self.stop.clone(),
            seed: self.seed,
            logprobs: self.logprobs,
        };
        let mut fingerprint = Fingerprint::new().with("model", &model.fingerprint);
        for (name, value) in &resolved.numerics {
            fingerprint.set(*name, value);
        }
        for (name, value) in sampling_texts(&flags) {
            fingerprint.set(name, value);
        }
        let generation = &model.generation;
        let lower = Defaults {
            max_tokens: generation.max_new_tokens,
            temperature: generation.temperature,
            top_p: generation.top_p,
            top_k: generation.top_k,
            min_p: generation.min_p,
            repetition_penalty: generation.repetition_penalty,
            ..Defaults::default()
        };
        let outgrows = kv_policy(self.kv_policy.as_deref(), &model.config)?.outgrows_context();
        let context_len = model.config.sequence_len(outgrows);
        let limits = Limits::new(model.config.vocab_size as u32, context_len as u32);
        job::check_defaults(&flags, &limits).map_err(|(name, what)| {
            let flag = name.replace('_', "-");
            Error::usage(format!("--{flag}: {what}"), "run `tidemill generate --help`")
        })?;
        job::check_defaults(&lower, &limits)
            .map_err(|(_, what)| Error::model(&model.name, format!("generation_config.json: {what}")))?;
        Ok(JobOptions {
            input,
            output,
            error_file: self.error_file.clone(),
            retry_failed: self.retry_failed.unwrap_or(false),
            shard,
            fingerprint,
            defaults: flags.or(lower),
            limits,
            model_name: model.name.clone(),
        })
    }

    fn progress(&self) -> ProgressChoice {
        use std::io::IsTerminal;
        let default = if std::io::stderr().is_terminal() { ProgressChoice::Bar } else { ProgressChoice::Line };
        self.progress.unwrap_or(default)
    }
}

/// Why a job cannot go on.
fn lost_card(name: &str) -> Error {
    Error::Device { what: format!("{name} is not there any more") }
}

/// A path without links and detours; the file itself need not exist. None without its directory.
fn real_path(path: &Path) -> Option<PathBuf> {
    if let Ok(path) = path.canonicalize() {
        return Some(path);
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Some(parent.canonicalize().ok()?.join(path.file_name()?))
}

/// Throttles by lane.
fn lanes(throttles: &Throttles) -> Throttle {
    let mut lanes = Throttle::default();
    Link::ALL.into_iter().for_each(|link| lanes[lane(link).index()] = throttles.rate(link));
    lanes
}

/// The sampling flags that were given, by name.
fn sampling_texts(flags: &Defaults) -> Vec<(&'static str, String)> {
    let mut texts = Vec::new();
    let mut push = |name, value: Option<String>| texts.push((name, value.unwrap_or_else(|| "default".to_owned())));
    push("max_tokens", flags.max_tokens.map(|v| v.to_string()));
    push("temperature", flags.temperature.map(|v| v.to_string()));
    push("top_p", flags.top_p.map(|v| v.to_string()));
    push("top_k", flags.top_k.map(|v| v.to_string()));
    push("min_p", flags.min_p.map(|v| v.to_string()));
    push("n", flags.n.map(|v| v.to_string()));
    push("stop", flags.stop.as_ref().map(|v| format!("{v:?}")));
    push("seed", Some(flags.seed.unwrap_or(0).to_string()));
    push("logprobs", flags.logprobs.map(|v| v.to_string()));
    texts
}

/// A job that has work left, with everything resolved.
struct Running<'a> {
    arguments: &'a Arguments,
    model: &'a Model,
    resolved: &'a Resolved,
    started: Instant,
    signals: Signals,
    standby: Option<Standby>,
}

impl Running<'_> {
    fn run(self, job: job::Job, card: Option<Card>) -> Result<u8> {
        let Running { arguments, model, resolved, .. } = &self;
        say::line(&self.summary(&job));
        if let Some(said) = &resolved.decision.said {
            say::line(said);
        }
        let name = format!("model `{}`", model.name);
        let host = |placement: &Placement| Arena::new(&name, Tier::Cpu, placement.arenas().1 as usize);
        if let Some(card) = card {
            let cache = cache::directory(arguments.cache_dir.as_deref())?;
            let layout = model.packed(resolved.weights)?.layout().clone();
            let mut card = Some(card);
            let start = |placement: &Placement| {
                let compiling = || say::line("compiling kernels for this GPU, once");
                let needs = devices::needs(&model.config, &layout, placement, &cache, &compiling);
                // A card that was given back is taken again.
                let card = match card.take() {
                    Some(card) => card,
                    None => devices::choose(arguments.device)?.ok_or_else(|| lost_card(&resolved.device))?,
                };
                let mut host = host(placement)?;
                let mut device = Cuda::new(card, &needs, &mut host)?;
                device.round_activations(resolved.model.cost.integer_activations);
                Ok((device, host))
            };
            return self.run_on(start, job);
        }
        let start = |placement: &Placement| {
            let (device_bytes, _) = placement.arenas();
            let mut device = Host::new(Arena::new(&name, resolved.budgets.compute(), device_bytes as usize)?);
            device.round_activations(resolved.model.cost.integer_activations);
            let device = if resolved.budgets.gpu.is_some() { device.rehearsing() } else { device };
            Ok((device, host(placement)?))
        };
        self.run_on(start, job)
    }

    /// Runs the job on a device that `start` makes for a placement, with main memory beside it.
    fn run_on<D: Device>(&self, mut start: impl FnMut(&Placement) -> Result<(D, Arena)>, job: job::Job) -> Result<u8> {
        let Running { arguments, model, resolved, .. } = self;
        let made;
        let packed: Box<dyn Packed> = match model.packed {
            None if resolved.decision.placement.reads_weights() => {
                made = arguments.pack(model, resolved.weights, resolved.decision.placement.reads_planes())?;
                Box::new(&made)
            }
            _ => model.packed(resolved.weights)?,
        };
        let offload = arguments.offload_directory()?;
        let mut build = |placement: Placement| {
            let (device, host) = start(&placement)?;
            let parts = Parts {
                packed: &*packed,
                config: &model.config,
                placement,
                kv: resolved.kv,
                offload: Some(&offload),
                throttle: lanes(&resolved.throttles),
            };
            Executor::new(device, host, parts)
        };
        let decision = &resolved.decision;
        let building = Instant::now();
        let mut executor = build(decision.placement.clone())?;
        let build_secs = building.elapsed().as_secs_f64();
        if arguments.trace.is_some() {
            executor.trace();
        }
        let load_secs = self.started.elapsed().as_secs_f64();
        let mut engine = Engine::new(model, executor, resolved.kv_policy.clone(), resolved.batch);
        if let Some(Standby { ready, batch_wait }) = &self.standby {
            engine.serve(*batch_wait);
            say::data(ready)?;
        }
        let mut progress = Progress::new(arguments.progress(), job.total, job.resumed);
        // A trace is of one placement, and who waits for every answer is not kept waiting.
        let planned = decision.planning_secs.zip(decision.hardware.as_ref());
        let planned = planned.filter(|_| arguments.trace.is_none() && self.standby.is_none());
        let mut replanner = planned.map(|(planning_secs, hardware)| Replanner {
            model: &resolved.model,
            hardware: hardware.clone(),
            budgets: resolved.budgets,
            schedule: decision.placement.policy.schedule,
            lines: job.total.map(|lines| lines - job.resumed),
            readable: (model.packed.is_some() || decision.placement.reads_weights(), decision.placement.reads_planes()),
            build,
            build_secs,
            planning_secs,
            watched: Default::default(),
        });
        let advisor = replanner.as_mut().map(|replanner| replanner as &mut dyn Advisor<D>);
        let began = Instant::now();
        let job::Job { reader, mut writer, .. } = job;
        let mut counts = Counts::default();
        let deferred = self.signals.defer();
        let result = engine.run(reader, &mut writer, &self.signals.number, advisor, &mut |now| {
            counts = *now;
            progress.show(now);
        });
        drop(deferred);
        progress.finish();
        let wall_secs = began.elapsed().as_secs_f64();
        // A failing disk makes closing fail too; the first error is the one to show.
        let closed = writer.close(result.is_ok());
        let counts = result.as_ref().copied().unwrap_or(counts);
        let times = stats::Times { load_secs, wall_secs };
        let told = match (&arguments.stats, &closed) {
            (Some(path), Ok(summary)) => stats::write(path, resolved, &engine.used(), &counts, summary, &times),
            _ => Ok(()),
        };
        let traced = arguments.trace.as_ref().map_or(Ok(()), |path| self.write_trace(path, engine.executor_mut()));
        // What ended the run goes before what could not be told about it.
        result?;
        let summary = closed?;
        told.and(traced)?;
        say::line(&format!(
            "finished: {} lines, {} failed; {:.1} generated tokens/s, {:.1} tokens/s in all, {:.1} s after {:.1} s of loading",
            summary.succeeded + summary.failed,
            summary.failed,
            counts.generated_tokens as f64 / wall_secs.max(1e-9),
            (counts.prompt_tokens + counts.generated_tokens) as f64 / wall_secs.max(1e-9),
            wall_secs,
            load_secs,
        ));
        Ok(summary.exit_code())
    }

    fn write_trace<D: Device>(&self, path: &Path, executor: &mut Executor<D>) -> Result<()> {
        let (events, records) = executor.take_trace();
        let Resolved { decision, model, .. } = self.resolved;
        let costs = decision.hardware.as_ref().map(|hardware| placed(&model.cost, hardware, &decision.placement));
        let mut text = Vec::new();
        trace::write(&mut text, &events, &records, costs.as_ref()).expect("memory takes what is written");
        std::fs::write(path, text).map_err(Error::io("write", path))
    }

    /// The resolved configuration, in one line.
    fn summary(&self, job: &job::Job) -> String {
        let Resolved { budgets, batch, decision, numerics, synthetic, .. } = self.resolved;
        let placement = &decision.placement;
        let lines = job.total.map_or("lines as they come".to_owned(), |total| format!("{total} lines"));
        let resumed = if job.resumed > 0 { format!(", {} done before", job.resumed) } else { String::new() };
        let synthetic = if *synthetic { " (synthetic weights)" } else { "" };
        let tiers = Tier::ALL.into_iter().zip(placement.bytes.into_iter().zip(budgets.by_tier()));
        let granted: Vec<String> = tiers
            .filter(|(_, (used, _))| *used > 0)
            .map(|(tier, (used, granted))| format!("{} of {} on {tier}", Bytes(used), Bytes(granted)))
            .collect();
        format!(
            "model {}{synthetic}: {lines}{resumed}; weights {}, kv {}; {}, {} threads; {}; \
             up to {} sequences and {} prompt tokens a pass, {} pages of KV",
            self.model.name,
            numerics["weights"],
            numerics["kv_dtype"],
            self.resolved.device,
            rayon::current_num_threads(),
            granted.join(", "),
            batch.sequences,
            batch.chunk_tokens,
            placement.total_pages(),
        )
    }
}
