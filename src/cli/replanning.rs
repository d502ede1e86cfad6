//! Another plan on the way: what the engine is told when it asks.
//!
//! **Invariant:** a plan that is given promises a tenth less time than going on, the change itself counted.

use std::time::Instant;

use super::planning::words_of;
use super::resources::Budgets;
use super::say;
use crate::device::Device;
use crate::engine::{Advisor, Left};
use crate::error::Result;
use crate::executor::Executor;
use crate::hardware::Hardware;
use crate::planner::job::Job;
use crate::planner::lp::{self, Capabilities};
use crate::planner::model::PlanModel;
use crate::planner::predict::predict;
use crate::planner::search::Question;
use crate::policy::Order;
use crate::schedule::placement::Placement;

/// What a change must leave of the time, itself included.
const WORTH: f64 = 0.9;
/// Planning may take this part of what is left of the job.
const PLANNING: f64 = 0.02;
/// Sequences to come for each that is known, where nobody knows how many lines there are.
const UNKNOWN: usize = 4;

/// Plans for what is left.
pub struct Replanner<'a, F> {
    /// The model.
    pub model: &'a PlanModel,
    /// The machine as it was planned for.
    pub hardware: &'a Hardware,
    /// What may be used.
    pub budgets: Budgets,
    /// Whether prompts and answers share passes.
    pub schedule: Order,
    /// Lines that this process has to answer, if it is known.
    pub lines: Option<u64>,
    /// Whether weights can be read from disk, and compressed planes.
    pub readable: (bool, bool),
    /// Makes an executor.
    pub build: F,
    /// Seconds that it took the last time.
    pub build_secs: f64,
    /// Seconds that planning took.
    pub planning_secs: f64,
}

impl<F> Replanner<'_, F> {
    fn job(&self, left: &Left) -> Job {
        let known = left.requests.len();
        let more = match (left.is_all, self.lines) {
            (true, _) => 0,
            (false, Some(lines)) => lines.saturating_sub(left.lines) as usize,
            (false, None) => UNKNOWN * known,
        };
        Job { requests: known + more, ..Job::of(&left.requests) }
    }
}

impl<D: Device, F: FnMut(Placement) -> Result<Executor<D>>> Advisor<D> for Replanner<'_, F> {
    fn advise(&mut self, left: Left, placement: &Placement) -> Option<Placement> {
        let job = self.job(&left);
        let going_on = predict(self.model, self.hardware, placement, &job);
        if going_on.secs * PLANNING < self.planning_secs {
            return None;
        }
        let started = Instant::now();
        let question = Question {
            model: self.model,
            hardware: self.hardware,
            budgets: lp::Budgets(self.budgets.by_tier().map(|bytes| bytes as f64)),
            capabilities: Capabilities { cpu_attention: false },
            job: &job,
            schedule: self.schedule,
        };
        let plan = question.plan().ok()?;
        self.planning_secs = started.elapsed().as_secs_f64();
        let (weights, planes) = self.readable;
        let readable = (weights || !plan.placement.reads_weights()) && (planes || !plan.placement.reads_planes());
        let fits = left.longest <= plan.placement.total_pages().min(plan.placement.most_block_pages());
        let secs = plan.secs + self.build_secs + left.again as f64 / plan.total_tokens_per_s;
        if !readable || !fits || secs > WORTH * going_on.secs {
            return None;
        }
        say::line(&format!(
            "{} anew for what is left: {:.0} s expected, {:.0} s as it was",
            words_of(&plan),
            secs,
            going_on.secs
        ));
        Some(plan.placement)
    }

    fn build(&mut self, placement: Placement) -> Result<Executor<D>> {
        let started = Instant::now();
        let executor = (self.build)(placement)?;
        self.build_secs = started.elapsed().as_secs_f64();
        Ok(executor)
    }
}
