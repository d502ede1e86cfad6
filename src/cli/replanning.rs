//! Another plan on the way: what the engine is told when it asks.
//!
//! **Invariant:** a plan that is given promises a tenth less time than going on, the change itself counted.

use std::time::Instant;

use super::planning::words_of;
use super::resources::Budgets;
use super::say;
use crate::device::Device;
use crate::engine::{Advisor, Left, Used};
use crate::error::Result;
use crate::executor::Executor;
use crate::hardware::{Hardware, Link, Throttles};
use crate::planner::job::Job;
use crate::planner::lp::{self, Capabilities};
use crate::planner::model::PlanModel;
use crate::planner::predict::predict;
use crate::planner::search::Question;
use crate::policy::Order;
use crate::schedule::placement::Placement;
use crate::schedule::step::Lane;

/// What a change must leave of the time, itself included.
const WORTH: f64 = 0.9;
/// Planning may take this part of what is left of the job.
const PLANNING: f64 = 0.02;
/// A link that does less than this part of what was planned is slow.
const SLOW: f64 = 0.75;
/// So many looks in a row, each at so many seconds of its work.
const SLOW_TIMES: u32 = 3;
const WATCHED_SECS: f64 = 0.5;
/// Sequences to come for each that is known, where nobody knows how many lines there are.
const UNKNOWN: usize = 4;

/// Plans for what is left.
pub struct Replanner<'a, F> {
    /// The model.
    pub model: &'a PlanModel,
    /// The machine as it was planned for.
    pub hardware: Hardware,
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
    /// What had been done when links were looked at last, and how often each was slow since it was not.
    pub watched: (Used, [u32; Link::ALL.len()]),
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
        let going_on = predict(self.model, &self.hardware, placement, &job);
        if going_on.secs * PLANNING < self.planning_secs {
            return None;
        }
        let started = Instant::now();
        let question = Question {
            model: self.model,
            hardware: &self.hardware,
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

    fn is_slow(&mut self, used: &Used) -> bool {
        let (before, times) = &mut self.watched;
        let mut slow = Throttles::default();
        for (index, link) in Link::ALL.into_iter().enumerate() {
            let lane = lane(link).index();
            let secs = (used.lanes[lane].busy - before.lanes[lane].busy).as_secs_f64();
            if secs < WATCHED_SECS {
                continue;
            }
            let rate = (used.lanes[lane].bytes - before.lanes[lane].bytes) as f64 / secs;
            before.lanes[lane] = used.lanes[lane];
            let planned = self.hardware.link_together_bytes_per_s(link).unwrap_or(0.0);
            times[index] = if rate < SLOW * planned { times[index] + 1 } else { 0 };
            if times[index] == SLOW_TIMES {
                say::line(&format!("{} does {:.0} MB/s, planned were {:.0}", link.name(), rate / 1e6, planned / 1e6));
                times[index] = 0;
                slow.0.insert(link, rate);
            }
        }
        self.hardware = self.hardware.throttled(&slow);
        !slow.0.is_empty()
    }

    fn build(&mut self, placement: Placement) -> Result<Executor<D>> {
        let started = Instant::now();
        let executor = (self.build)(placement)?;
        self.build_secs = started.elapsed().as_secs_f64();
        Ok(executor)
    }
}

/// The lane that uses a link.
pub fn lane(link: Link) -> Lane {
    match link {
        Link::DiskRead => Lane::DiskRead,
        Link::DiskWrite => Lane::DiskWrite,
        Link::H2d => Lane::H2d,
        Link::D2h => Lane::D2h,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cost::tests::config;
    use crate::device::host::Host;
    use crate::executor::LaneCount;
    use crate::hardware::tests::example;
    use crate::kv::policy::Kept;
    use crate::model::dtype::DType;
    use crate::planner::job::Request;

    type Build = fn(Placement) -> Result<Executor<Host>>;

    fn replanner(model: &PlanModel, gpu: u64) -> Replanner<'_, Build> {
        Replanner {
            model,
            hardware: example().throttled(&"h2d=20MB/s".parse().unwrap()),
            budgets: Budgets { gpu: Some(gpu), cpu: 1 << 30, disk: 1 << 30 },
            schedule: Order::Mixed,
            lines: None,
            readable: (true, true),
            build: |_| unreachable!("nothing is built here"),
            build_secs: 0.0,
            planning_secs: 0.0,
            watched: (Used::default(), [0; Link::ALL.len()]),
        }
    }

    #[test]
    fn a_link_is_slow_that_was_so_three_times_in_a_row_and_then_planned_with_as_it_is() {
        let model = PlanModel::new("m", config(), None, DType::Bf16, DType::Bf16);
        let mut replanner = replanner(&model, 1 << 26);
        let planned = replanner.hardware.link_together_bytes_per_s(Link::H2d).unwrap();
        let mut used = Used::default();
        let mut work = |share: f64, secs: f64| {
            let LaneCount { busy, bytes } = &mut used.lanes[Lane::H2d.index()];
            *busy += Duration::from_secs_f64(secs);
            *bytes += (share * planned * secs) as u64;
            replanner.is_slow(&used)
        };
        // Near enough; slow, but not for long enough; slow, but not again.
        let looks = [(0.8, 1.0), (0.4, 1.0), (0.4, 1.0), (0.9, 1.0), (0.4, 0.1), (0.4, 0.1), (0.4, 0.1), (0.4, 1.0)];
        for (at, (share, secs)) in looks.into_iter().enumerate() {
            assert!(!work(share, secs), "look {at}");
        }
        assert!(!work(0.4, 1.0) && work(0.4, 1.0), "the third in a row");
        // It is known now.
        assert!((0..9).all(|_| !work(0.4, 1.0)));
        let known = replanner.hardware.link_together_bytes_per_s(Link::H2d).unwrap();
        assert!((known / planned / 0.4 - 1.0).abs() < 0.05, "{known} of {planned}");
    }

    #[test]
    fn the_end_of_a_job_is_planned_anew_if_that_is_worth_the_change() {
        let model = PlanModel::new("m", config(), None, DType::Bf16, DType::Bf16);
        // Room for half of the weights, or for many sequences that share the way of the others.
        let gpu = model.weight_bytes() * 3 / 4;
        let plan = |job: &Job| {
            let replanner = replanner(&model, gpu);
            let question = Question {
                model: &model,
                hardware: &replanner.hardware,
                budgets: lp::Budgets(replanner.budgets.by_tier().map(|bytes| bytes as f64)),
                capabilities: Capabilities { cpu_attention: false },
                job,
                schedule: Order::Mixed,
            };
            question.plan().unwrap().placement
        };
        let whole = plan(&Job::uniform(2000, 200, 100));
        let left = || Left {
            requests: vec![Request { prompt_len: 200, shared: 0, gen_len: 100, max_tokens: 100, kept: Kept::All }; 2],
            lines: 2000,
            is_all: true,
            again: 20,
            longest: 5,
        };
        let secs = |placement: &Placement| {
            predict(&model, &replanner(&model, gpu).hardware, placement, &Job::of(&left().requests)).secs
        };
        let going_on = secs(&whole);
        let new = replanner(&model, gpu).advise(left(), &whole).expect("another placement");
        assert!(new.policy.weights.gpu > whole.policy.weights.gpu, "{:?}, was {:?}", new.policy, whole.policy);
        assert!(secs(&new) < WORTH * going_on, "{} of {going_on} s", secs(&new));
        // Not if the change takes what it brings, thinking about it too long, or there is nothing better.
        assert!(Replanner { build_secs: going_on, ..replanner(&model, gpu) }.advise(left(), &whole).is_none());
        assert!(Replanner { planning_secs: going_on, ..replanner(&model, gpu) }.advise(left(), &whole).is_none());
        assert!(replanner(&model, gpu).advise(left(), &new).is_none());
        for worse in [Left { longest: new.total_pages() + 1, ..left() }, Left { again: 2000, ..left() }] {
            assert!(replanner(&model, gpu).advise(worse, &whole).is_none());
        }
    }
}
