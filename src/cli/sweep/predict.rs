//! What the planner says about points.
//!
//! **Invariant:** what points share, model and machine, is made once; points then depend on nothing else, so any number
//! of threads may predict them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use crate::bench::sweep::{Failure, Point, Predicted, digits};
use crate::cli::devices;
use crate::cli::exact::{Exact, Numerics, stored};
use crate::cli::flags::{
    ActivationsChoice, DeviceChoice, KvChoice, ScheduleChoice, Size, WeightsChoice, choice_name, kv_policy,
};
use crate::cli::lossy::{Choice, Said, choose};
use crate::cli::plan::{self, Configuration, Granted};
use crate::cli::planning::{Places, card_profile};
use crate::error::{Error, Result};
use crate::hardware::Hardware;
use crate::memory::limits;
use crate::model::Model;
use crate::planner::job::{Job, Request};
use crate::planner::lp::{Budgets, Capabilities};
use crate::planner::model::{self, PlanModel};
use crate::planner::search::{Plan, Question};
use crate::policy::Order;
use crate::schedule::price::{Bottleneck, Resources};

/// What is swept over.
pub enum Subject {
    /// A configuration, without weights.
    Configuration(Configuration),
    /// A model that can be run.
    Model(Box<Model>),
}

/// The machine that points are planned for.
pub enum Machine {
    /// One that a file describes.
    Stated(Hardware),
    /// This one.
    This {
        /// As it was measured, without a card.
        hardware: Hardware,
        /// The cache directory.
        cache: PathBuf,
        /// Where files for what does not fit are made.
        offload: PathBuf,
    },
}

/// Settings that a model, and those that a machine, depends on.
const OF_MODEL: [&str; 5] = ["device", "weights", "kv-dtype", "kv-policy", "activations"];
const OF_MACHINE: [&str; 4] = ["device", "gpu-memory", "cpu-memory", "disk-space"];

type Key = Vec<Option<String>>;

/// Plans points.
pub struct Planner {
    subject: Subject,
    machine: Machine,
    throttle: Option<String>,
    models: BTreeMap<Key, Result<PlanModel, Failure>>,
    machines: BTreeMap<Key, Result<Granting, Failure>>,
}

/// A machine as a point may use it.
struct Granting {
    hardware: Hardware,
    budgets: Budgets,
    /// The card that computes.
    card: Option<String>,
}

/// A plan for a point, and what was asked.
pub struct Planned<'a> {
    /// The model.
    pub model: &'a PlanModel,
    /// The machine as it may be used.
    pub hardware: &'a Hardware,
    /// What may be used of it.
    pub budgets: Budgets,
    /// What is to be generated.
    pub job: Job,
    /// The plan.
    pub plan: Plan,
}

fn key(point: &Point, names: &[&str]) -> Key {
    names.iter().map(|name| point.settings.get(*name).cloned()).collect()
}

/// A choice among names, which the grid or the command line have checked.
fn choice<T: ValueEnum>(point: &Point, name: &str) -> Option<T> {
    point.settings.get(name).and_then(|text| T::from_str(text, false).ok())
}

/// A point in these numerics.
fn with(point: &Point, choice: Choice) -> Point {
    let mut point = point.clone();
    let said = [
        ("weights", choice_name(WeightsChoice::of(choice.weights))),
        ("kv-dtype", choice_name(KvChoice::of(choice.kv))),
        ("activations", choice_name(choice.activations)),
    ];
    point.settings.extend(said.map(|(name, text)| (name.to_owned(), text)));
    point
}

impl Planner {
    /// A planner; `throttle` holds links back.
    pub fn new(subject: Subject, machine: Machine, throttle: Option<String>) -> Self {
        Planner { subject, machine, throttle, models: BTreeMap::new(), machines: BTreeMap::new() }
    }

    /// Makes what these points share.
    pub fn prepare<'a>(&mut self, points: impl Iterator<Item = &'a Point>) {
        for point in points {
            let machine = key(point, &OF_MACHINE);
            if !self.machines.contains_key(&machine) {
                let made = self.granted(point).map_err(|error| Failure::from(&error));
                self.machines.insert(machine.clone(), made);
            }
            let model = key(point, &OF_MODEL);
            if !self.models.contains_key(&model) {
                let card = matches!(&self.machines[&machine], Ok(Granting { card: Some(_), .. }));
                let made = self.model(point, card).map_err(|error| Failure::from(&error));
                self.models.insert(model, made);
            }
        }
    }

    /// Says the numerics that points leave open: each gets the choice that suits it.
    ///
    /// # Errors
    /// A model that cannot be planned with.
    pub fn settle(&mut self, points: Vec<Point>) -> Result<Vec<Point>> {
        let stored = match &self.subject {
            Subject::Configuration(configuration) => configuration.stored()?,
            Subject::Model(model) => stored(model),
        };
        let settled = points.into_iter().map(|point| {
            let said = Said::new(choice(&point, "weights"), choice(&point, "kv-dtype"), choice(&point, "activations"));
            let choices = said.choices(stored);
            let variants: Vec<Point> = choices.iter().map(|&choice| with(&point, choice)).collect();
            self.prepare(variants.iter());
            let chosen = choose(&choices, |choice| Some(self.plan(&with(&point, choice)).ok()?.plan.secs));
            chosen.map_or_else(|| point.clone(), |(choice, _)| with(&point, choice))
        });
        Ok(settled.collect())
    }

    /// The card that a point uses.
    pub fn card(&self) -> Option<String> {
        self.machines.values().flatten().find_map(|granted| granted.card.clone())
    }

    fn granted(&self, point: &Point) -> Result<Granting> {
        let size = |name: &str| point.settings.get(name).and_then(|text| Size::from_str(text).ok());
        let mut sizes = ["gpu-memory", "cpu-memory", "disk-space"].map(size);
        let device: Option<DeviceChoice> = choice(point, "device");
        let (hardware, card) = match &self.machine {
            Machine::Stated(hardware) => (hardware.clone(), None),
            Machine::This { hardware, cache, offload } => {
                sizes[1] = sizes[1].or_else(|| Some(Size(limits::default_cpu_memory())));
                match devices::choose(device)? {
                    None => (hardware.without_gpu(), None),
                    Some(card) => {
                        let bytes = devices::budget(&card, sizes[0].map(|size| size.0))?;
                        sizes[0] = Some(Size(bytes));
                        let facts = card.facts.clone();
                        // Runs need its memory.
                        drop(card);
                        let places = Places { cache, offload, machine: hardware };
                        let profile = card_profile(&places, &facts, bytes, true)?.expect("it was measured");
                        (profile, Some(facts.name))
                    }
                }
            }
        };
        let (hardware, budgets) = Granted { device, sizes, throttle: self.throttle.as_deref() }.of(hardware)?;
        Ok(Granting { hardware, budgets, card })
    }

    fn model(&self, point: &Point, card: bool) -> Result<PlanModel> {
        let text = |name: &str| point.settings.get(name).map(String::as_str);
        let activations: Option<ActivationsChoice> = choice(point, "activations");
        match &self.subject {
            Subject::Configuration(configuration) => {
                let numerics = model::Numerics {
                    weights: plan::dtype("--weights", text("weights"), "native")?,
                    kv: plan::dtype("--kv-dtype", text("kv-dtype"), "auto")?,
                };
                configuration.model(numerics, activations, text("kv-policy"))
            }
            Subject::Model(model) => {
                let numerics = Numerics {
                    weights: choice(point, "weights").unwrap_or(WeightsChoice::Native),
                    kv: choice(point, "kv-dtype").unwrap_or(KvChoice::Auto),
                    kv_policy: text("kv-policy"),
                    activations,
                };
                let packed = model.packed(numerics.weights.dtype())?;
                Ok(Exact::new(model, &*packed, numerics, card)?.model)
            }
        }
    }

    /// Plans a point that was prepared.
    ///
    /// # Errors
    /// Why it cannot be run.
    pub fn plan(&self, point: &Point) -> Result<Planned<'_>, Failure> {
        let model = self.models[&key(point, &OF_MODEL)].as_ref().map_err(Clone::clone)?;
        let granting = self.machines[&key(point, &OF_MACHINE)].as_ref().map_err(Clone::clone)?;
        let (hardware, budgets) = (&granting.hardware, granting.budgets);
        let job = job(point, &model.config).map_err(|error| Failure::from(&error))?;
        let schedule = choice(point, "schedule").map_or(Order::Mixed, ScheduleChoice::order);
        let capabilities = Capabilities::default();
        let question = Question { model, hardware, budgets, capabilities, job: &job, schedule };
        let plan = question.plan_with(point.batch).map_err(|error| Failure::from(&error))?;
        Ok(Planned { model, hardware, budgets, job, plan })
    }
}

/// The job of a point: equal sequences.
fn job(point: &Point, config: &crate::model::config::ModelConfig) -> Result<Job> {
    let Point { batch, prompt_len, gen_len, num_prompts, .. } = *point;
    let kv_policy = kv_policy(point.settings.get("kv-policy").map(String::as_str), config)?;
    let context_len = config.sequence_len(kv_policy.outgrows_context());
    if prompt_len + gen_len > context_len {
        let what =
            format!("{prompt_len} prompt and {gen_len} generated tokens are more than the context, {context_len}");
        return Err(Error::usage(what, "use a smaller prompt-len or gen-len"));
    }
    if num_prompts < batch {
        let what = format!("{num_prompts} prompts cannot be {batch} sequences in flight");
        return Err(Error::usage(what, "use a greater num-prompts, or leave it out"));
    }
    let job = Job::of(&[Request::new(prompt_len, gen_len, gen_len, &*kv_policy)]);
    Ok(Job { requests: num_prompts, ..job })
}

impl Planned<'_> {
    /// What was asked.
    pub fn question(&self) -> Question<'_> {
        let Planned { model, hardware, budgets, ref job, .. } = *self;
        let schedule = self.plan.policy.schedule;
        Question { model, hardware, budgets, capabilities: Capabilities::default(), job, schedule }
    }

    /// The plan in numbers.
    pub fn predicted(&self) -> Predicted {
        let Planned { plan, job, hardware, .. } = self;
        let generated = job.gen_len / (job.prompt_len + job.gen_len);
        let bound = self.question().bound_with(plan.outline.sequences);
        let secs = plan.solution.demand.secs(&Resources::of(hardware));
        let tokens = plan.steady.prompts * job.gen_len;
        let limits = Bottleneck::ALL.into_iter().zip(secs).filter(|(_, secs)| *secs > 0.0);
        let limits = limits.map(|(bottleneck, secs)| (bottleneck.name().to_owned(), digits(tokens / secs)));
        Predicted {
            generated_tokens_per_s: digits(plan.generated_tokens_per_s),
            total_tokens_per_s: digits(plan.total_tokens_per_s),
            secs: digits(plan.secs),
            pass_secs: digits(plan.pass_secs),
            binding: plan.bottleneck.name().to_owned(),
            bound: bound.map(|(rate, by)| (digits(generated * rate), by.name().to_owned())),
            limits: limits.collect(),
            bytes: plan.placement.bytes,
            policy: plan.policy.clone(),
        }
    }
}
