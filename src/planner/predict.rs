//! How long a job takes under a placement that is given.
//!
//! The job is followed pass by pass as the engine composes it; every kind of pass is lowered, priced and simulated once
//! between two of its like.
//!
//! **Invariant:** the schedule that is simulated is the one that the executor runs, made by the same function.

use std::collections::HashMap;

use super::job::{Job, PassLoad};
use super::model::PlanModel;
use super::rollout::rollout;
use super::search::{place, rehearse};
use crate::cost::Costs;
use crate::hardware::Hardware;
use crate::schedule::placement::Placement;

/// Kinds of passes that are simulated; further ones are taken for their nearest.
const KINDS: usize = 400;

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
    let mut costs = Costs::new(&model.cost, hardware);
    costs.head_parts = (placement.stages.len() - placement.num_layers).max(1);
    let mut known: HashMap<[u64; 3], f64> = HashMap::new();
    let mut price = |load: &PassLoad| {
        let fine = [load.prompt_tokens, load.prompts, load.decodes].map(|value| value.round() as u64);
        // When there are very many kinds, a few percent of rows more or less are the same kind.
        let coarse = |value: u64| {
            if value < 32 { value } else { value >> (60 - value.leading_zeros()) << (60 - value.leading_zeros()) }
        };
        let key = if known.len() < KINDS { fine } else { fine.map(coarse) };
        if let Some(secs) = known.get(&key) {
            return *secs;
        }
        let policy = &placement.policy;
        let blocks = (load.rows() / policy.block_rows as f64).ceil().clamp(1.0, policy.blocks as f64) as usize;
        let shapes = place(&load.blocks(job, blocks), placement);
        let ends = rehearse(placement, &shapes, &costs, 3).ends;
        let secs = ends[1] - ends[0];
        known.insert(key, secs);
        secs
    };
    let policy = &placement.policy;
    let rollout = rollout(job, policy.sequences, policy.chunk_tokens, &mut price);
    Prediction {
        secs: rollout.secs,
        passes: rollout.passes,
        total_tokens_per_s: job.tokens() / rollout.secs,
        generated_tokens_per_s: job.requests as f64 * job.gen_len / rollout.secs,
    }
}
