//! What `generate` runs when nobody gave a policy: everything where it is computed if it fits, else a plan for this
//! machine.
//!
//! **Invariant:** a plan is placement alone; whatever is decided here changes no token.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::config::PolicyFile;
use super::resources::{self, Budgets, Wishes};
use super::say;
use crate::calibrate::{CardOptions, METHOD, Options, calibrate, with_card};
use crate::device::cuda::card::Facts;
use crate::durable;
use crate::error::{Error, Result, Tier};
use crate::hardware::{Hardware, Throttles};
use crate::memory::disk::free_space;
use crate::planner::job::Job;
use crate::planner::lp::{self, Capabilities};
use crate::planner::model::PlanModel;
use crate::planner::predict::{Prediction, predict};
use crate::planner::search::{Plan, Question};
use crate::policy::{Order, Split};
use crate::schedule::placement::Placement;

/// Main memory that measuring takes at most.
const CALIBRATION_BYTES: u64 = 1 << 30;

/// What is known before anything is placed.
pub struct Situation<'a> {
    /// The model, with its exact bytes.
    pub model: &'a PlanModel,
    /// What the policy file says; none if there is no file.
    pub policy: Option<&'a PolicyFile>,
    /// Whether prompts and answers share passes, where somebody said so.
    pub schedule: Option<Order>,
    /// Bytes granted.
    pub budgets: Budgets,
    /// Rates that links are held to.
    pub throttles: &'a Throttles,
    /// What the job is expected to take.
    pub job: &'a Job,
    /// The card that computes; none where the CPU does.
    pub card: Option<&'a Facts>,
    /// Where the machine's profile is kept.
    pub cache: PathBuf,
    /// Where files for what does not fit are made.
    pub offload: PathBuf,
}

/// A placement, and what is expected of it.
pub struct Decision {
    /// Where everything goes.
    pub placement: Placement,
    /// What the job will take, if the machine has been measured.
    pub prediction: Option<Prediction>,
    /// Prompt and generated tokens/s that the hardware allows, likewise.
    pub bound_tokens_per_s: Option<f64>,
    /// The machine as it was planned for, likewise.
    pub hardware: Option<Hardware>,
    /// What to say about it.
    pub said: Option<String>,
    /// Seconds that planning took; none where nothing was planned.
    pub planning_secs: Option<f64>,
}

impl Situation<'_> {
    /// Decides.
    ///
    /// # Errors
    /// [`Error::OverBudget`] when nothing fits.
    pub fn decide(&self, measure: bool) -> Result<Decision> {
        let empty = PolicyFile { schedule: self.schedule, ..PolicyFile::default() };
        let wishes = Wishes {
            config: &self.model.config,
            bytes: &self.model.bytes,
            policy: self.policy.unwrap_or(&empty),
            budgets: self.budgets,
            name: &self.model.name,
        };
        match resources::fit(&wishes) {
            Ok(placement) if self.policy.is_some() || self.is_roomy(&placement) => {
                let hardware = self.profile(measure)?;
                Ok(self.expect(placement, hardware, None))
            }
            Err(error) if self.policy.is_some() => Err(error),
            _ => self.plan(),
        }
    }

    fn question<'a>(&'a self, hardware: &'a Hardware) -> Question<'a> {
        Question {
            model: self.model,
            hardware,
            budgets: lp::Budgets(self.budgets.by_tier().map(|bytes| bytes as f64)),
            capabilities: Capabilities { cpu_attention: false },
            job: self.job,
            schedule: self.schedule.unwrap_or_default(),
        }
    }

    /// Whether the cache holds as many sequences as are worth having.
    fn is_roomy(&self, placement: &Placement) -> bool {
        let policy = &placement.policy;
        let wanted = self.job.pages_of(policy.sequences.min(self.job.requests).min(64) as f64, policy.chunk_tokens);
        placement.total_pages() as f64 >= wanted && placement.total_pages() >= self.job.most_pages
    }

    /// Seconds that a good plan is expected to take, by the linear program alone; none if nothing fits.
    ///
    /// # Errors
    /// What measuring the machine gives.
    pub fn rough_secs(&self) -> Result<Option<f64>> {
        let hardware = self.profile(true)?.expect("it was measured");
        Ok(self.question(&hardware).rough_secs())
    }

    fn plan(&self) -> Result<Decision> {
        let hardware = self.profile(true)?.expect("it was measured");
        let started = Instant::now();
        let plan = self.question(&hardware).plan()?;
        let said = words_of(&plan);
        let planned = Decision {
            planning_secs: Some(started.elapsed().as_secs_f64()),
            ..self.expect(plan.placement, Some(hardware), Some(said))
        };
        Ok(planned)
    }

    /// The decision for a placement, with what is expected of it where the machine is known.
    fn expect(&self, placement: Placement, hardware: Option<Hardware>, said: Option<String>) -> Decision {
        let prediction = hardware.as_ref().map(|hardware| predict(self.model, hardware, &placement, self.job));
        let bound = hardware.as_ref().and_then(|hardware| self.question(hardware).bound());
        let expected = prediction.map(|prediction| {
            let bound = bound.map_or(String::new(), |(rate, by)| format!(", bound {rate:.1} by {}", by.name()));
            format!("expected {:.1} tokens/s in all{bound}", prediction.total_tokens_per_s)
        });
        let said = match (said, expected) {
            (Some(said), Some(expected)) => Some(format!("{said}; {expected}")),
            (said, expected) => said.or(expected),
        };
        let bound_tokens_per_s = bound.map(|(rate, _)| rate);
        Decision { placement, prediction, bound_tokens_per_s, hardware, said, planning_secs: None }
    }

    /// This machine as the budgets and throttles make it, if it has been measured or is to be.
    fn profile(&self, measure: bool) -> Result<Option<Hardware>> {
        let Some(measured) = this_machine(&self.cache, &self.offload, self.budgets.cpu, measure)? else {
            return Ok(None);
        };
        let places = Places { cache: &self.cache, offload: &self.offload, machine: &measured };
        let hardware = match (self.card, self.budgets.gpu) {
            (Some(facts), Some(bytes)) => match card_profile(&places, facts, bytes, measure)? {
                Some(hardware) => hardware,
                None => return Ok(None),
            },
            (_, Some(bytes)) => measured.without_gpu().rehearsed(bytes),
            (_, None) => measured.without_gpu(),
        };
        Ok(Some(hardware.throttled(self.throttles)))
    }
}

/// What a plan is, in a line.
pub fn words_of(plan: &Plan) -> String {
    let share = |split: &Split| {
        let tiers = Tier::ALL.into_iter().filter(|&tier| split.share(tier) > 0.0005);
        let parts = tiers.map(|tier| format!("{:.0} % {tier}", 100.0 * split.share(tier)));
        parts.collect::<Vec<_>>().join(" ")
    };
    let policy = &plan.policy;
    format!(
        "planned: weights {}, kv {}, {} sequences in {} blocks, {} prompt tokens a pass{}{}; {} binds",
        share(&policy.weights),
        share(&policy.kv),
        policy.sequences,
        policy.blocks,
        policy.chunk_tokens,
        if policy.compressed { ", compressed planes" } else { "" },
        if policy.paused_pages > 0 { ", files for whoever is paused" } else { "" },
        plan.bottleneck.name(),
    )
}

/// Where a card's profile is kept, and what it is a part of.
pub struct Places<'a> {
    /// The cache directory.
    pub cache: &'a Path,
    /// Where files for what does not fit are made.
    pub offload: &'a Path,
    /// The machine without the card.
    pub machine: &'a Hardware,
}

/// This machine, as measured before; measured now if `measure` says so, in at most `memory_bytes`.
///
/// # Errors
/// What measuring gives, or keeping the result in `cache`.
pub fn this_machine(cache: &Path, offload: &Path, memory_bytes: u64, measure: bool) -> Result<Option<Hardware>> {
    let file = cache.join("calibration").join(format!("{}-{METHOD}.toml", machine_name(offload)));
    let known = std::fs::read_to_string(&file).ok();
    let known = known.and_then(|text| Hardware::from_toml(&text, &file.display().to_string()).ok());
    if let Some(mut hardware) = known {
        // Rates stay; what is free on a disk does not.
        if let (Some(disk), Some(place)) = (&mut hardware.disk, existing(offload)) {
            disk.capacity_bytes = free_space(&place)?;
        }
        return Ok(Some(hardware));
    }
    if !measure {
        return Ok(None);
    }
    say::line("measuring this machine, once: up to ten seconds");
    let memory_bytes = memory_bytes.min(CALIBRATION_BYTES);
    let options = Options { quick: false, disk: Some(offload.to_owned()), memory_bytes };
    let hardware = calibrate(&options, &mut |_| {})?;
    keep(&file, &hardware)?;
    Ok(Some(hardware))
}

/// The machine with the card that computes, if the card has been measured or is to be; `bytes` of its memory.
///
/// # Errors
/// What measuring gives, or keeping the result in the cache.
pub fn card_profile(places: &Places<'_>, card: &Facts, bytes: u64, measure: bool) -> Result<Option<Hardware>> {
    let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = card.name.chars().map(word).collect();
    let machine_name = machine_name(places.offload);
    let file = places.cache.join("calibration").join(format!("{machine_name}-{name}-{METHOD}.toml"));
    let known = std::fs::read_to_string(&file).ok();
    let known = known.and_then(|text| Hardware::from_toml(&text, &file.display().to_string()).ok());
    let mut hardware = match known {
        Some(known) => known,
        None if !measure => return Ok(None),
        None => {
            say::line(&format!("measuring {}, once: up to ten seconds", card.name));
            let options = CardOptions { quick: false, memory_bytes: bytes, cache: places.cache };
            let hardware = with_card(places.machine, &options)?;
            keep(&file, &hardware)?;
            hardware
        }
    };
    if let Some(gpu) = &mut hardware.gpu {
        gpu.memory_bytes = bytes;
    }
    Ok(Some(hardware))
}

/// The nearest directory above a place that exists; the place need not, yet.
fn existing(place: &Path) -> Option<PathBuf> {
    // A relative path's last ancestor is the empty path.
    let named = |directory: &Path| if directory.as_os_str().is_empty() { PathBuf::from(".") } else { directory.into() };
    place.ancestors().map(named).find(|directory| directory.is_dir())
}

/// A name for what is measured: the machine, its threads, and the disk.
fn machine_name(offload: &Path) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let existing = existing(offload).and_then(|directory| std::fs::metadata(directory).ok());
    let disk = existing.map_or(0, |directory| directory.dev());
    format!("{}-{}-threads-disk-{disk:x}", host.trim(), rayon::current_num_threads())
}

/// Writes a profile so that it is there as a whole or not at all.
fn keep(file: &Path, hardware: &Hardware) -> Result<()> {
    let directory = file.parent().expect("it lies in the cache");
    std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    durable::replace(file, hardware.to_toml().as_bytes())
}
