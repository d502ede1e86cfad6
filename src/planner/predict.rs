//! How long a job takes under a placement that is given.
//!
//! The job is followed pass by pass as the engine composes it. Every pass is priced by what it demands; of passes that
//! are nearly alike one is lowered and simulated, between two of its like, and how much longer it takes than its demand
//! goes for all of them.
//!
//! **Invariant:** the schedule that is simulated is the one that the executor runs, made by the same functions.

use std::collections::BTreeMap;

use super::job::Job;
use super::model::PlanModel;
use super::passes::{PlannedPass, passes};
use super::search::rehearse;
use crate::error::Tier;
use crate::hardware::Hardware;
use crate::schedule::placement::Placement;
use crate::schedule::price::{Resources, Traffic, pass_demand, placed};
use crate::schedule::shape::BlockShape;

/// Steps that may be simulated.
const STEPS: usize = 40_000;

/// What is expected of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds from the first pass to the last.
    pub secs: f64,
    /// Passes.
    pub passes: f64,
    /// Prompt and generated tokens per second.
    pub total_tokens_per_s: f64,
    /// Generated tokens per second.
    pub generated_tokens_per_s: f64,
}

/// Predicts `job` on `hardware` under `placement`.
pub fn predict(model: &PlanModel, hardware: &Hardware, placement: &Placement, job: &Job) -> Prediction {
    let costs = placed(&model.cost, hardware, placement);
    let all = passes(job, placement);
    let resources = Resources::of(hardware);
    let demanded = |pass: &PlannedPass| {
        let traffic = traffic(placement, &pass.blocks);
        pass_demand(&traffic, &pass.blocks, placement.policy.compressed, &costs).bottleneck(&resources).1
    };
    let (mut secs, mut apart) = (0.0, 0.02);
    let mut groups = alike(&all, apart);
    let steps = |pass: &PlannedPass| 3 * placement.stages.len() * (2 + 4 * pass.blocks.len());
    while groups.iter().map(|group| steps(group[0])).sum::<usize>() > STEPS && apart < 1e3 {
        apart *= 4.0;
        groups = alike(&all, apart);
    }
    for group in groups {
        let middle = group[group.len() / 2];
        let ends = rehearse(placement, &middle.blocks, &costs, 3).ends;
        let longer = (ends[1] - ends[0]) / demanded(middle);
        secs += longer * group.iter().map(|pass| pass.times * demanded(pass)).sum::<f64>();
    }
    // Nothing runs if no sequence fits.
    let per_sec = |tokens: f64| if secs > 0.0 { tokens / secs } else { 0.0 };
    Prediction {
        secs,
        passes: all.iter().map(|pass| pass.times).sum(),
        total_tokens_per_s: per_sec(job.tokens()),
        generated_tokens_per_s: per_sec(job.requests as f64 * job.gen_len),
    }
}

/// What a pass streams.
fn traffic(placement: &Placement, blocks: &[BlockShape]) -> Traffic {
    let layers = placement.num_layers as f64;
    let frames = |count: &dyn Fn(&BlockShape) -> usize| {
        blocks.iter().map(count).sum::<usize>() as f64 * layers * placement.frame as f64
    };
    let hidden = |tier: Tier| {
        let there =
            blocks.iter().zip(&placement.hidden).filter(|(_, home)| **home == tier && tier != placement.compute);
        there.map(|(block, _)| block.rows as f64).sum::<f64>() * layers * placement.hidden_row as f64
    };
    let (cpu, disk) = placement.streamed_bytes();
    Traffic {
        weights_cpu: cpu as f64,
        weights_disk: disk as f64,
        kv_load_cpu: frames(&|block| block.loads.cpu),
        kv_load_disk: frames(&|block| block.loads.disk),
        kv_store_cpu: frames(&|block| block.stores.cpu),
        kv_store_disk: frames(&|block| block.stores.disk),
        hidden_cpu: hidden(Tier::Cpu),
        hidden_disk: hidden(Tier::Disk),
        ..Traffic::none()
    }
}

/// Passes whose rows, keys and pages are equal but for the share `apart`.
fn alike(passes: &[PlannedPass], apart: f64) -> Vec<Vec<&PlannedPass>> {
    let step = apart.ln_1p();
    let coarse = |value: u64| ((value as f64).ln_1p() / step).round() as u64;
    let mut groups: BTreeMap<[u64; 7], Vec<&PlannedPass>> = BTreeMap::new();
    for pass in passes {
        let sum = |value: &dyn Fn(&BlockShape) -> u64| coarse(pass.blocks.iter().map(value).sum());
        let key = [
            pass.blocks.len() as u64,
            sum(&|block| block.rows as u64),
            sum(&|block| block.segments as u64),
            sum(&|block| block.keys),
            sum(&|block| block.pages),
            sum(&|block| block.loads.total() as u64),
            sum(&|block| block.stores.total() as u64),
        ];
        groups.entry(key).or_default().push(pass);
    }
    groups.into_values().collect()
}
