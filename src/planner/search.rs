//! The search over what is not linear: sequences, blocks, slots, compression, where embeddings and head lie.
//!
//! Every outline is bounded by its linear program; the best few are rounded to placements, lowered, simulated, and
//! compared by the time of the whole finite job.
//!
//! **Invariant:** a plan fits its budgets as `schedule::placement` counts, and its prediction is that of the rounded
//! placement, never of the program.

use super::job::{Block, Job, PassLoad};
use super::lp::{Budgets, Capabilities, Outline, Problem, Shares, Solution};
use super::model::PlanModel;
use super::predict::{Prediction, predict};
use super::rollout::rollout;
use crate::cost::Costs;
use crate::error::{Bytes, Error, Result, Tier};
use crate::hardware::Hardware;
use crate::kv::layout::PAGE_POSITIONS;
use crate::policy::{Order, Policy};
use crate::schedule::fences::Fences;
use crate::schedule::lower::{Carried, lower};
use crate::schedule::placement::Placement;
use crate::schedule::price::{Bottleneck, Resources, placed, step_work};
use crate::schedule::shape::{BlockShape, Pages};
use crate::schedule::simulate::{Timeline, simulate};
use crate::schedule::step::{Lane, Step};

/// Outlines whose neighbours are looked at.
const FINALISTS: usize = 10;
/// Outlines that are simulated.
const SIMULATED: usize = 24;
/// Of these, outlines of a kind, their numbers of sequences a tenth apart.
const OF_A_KIND: usize = 3;
/// Times that budgets are tightened until a rounded placement fits.
const ATTEMPTS: usize = 8;
/// Plans whose whole job is followed, pass by pass, at least and at most.
const FOLLOWED: usize = 3;
const MOST_FOLLOWED: usize = 12;
/// How much slower a plan may be that does without the disk.
const DISK_HANDICAP: f64 = 1.02;
/// Pages of the cache to a page in files for those who are paused.
const PAGES_TO_PAUSED: usize = 4;
/// Sequences in flight at most.
const MOST_SEQUENCES: usize = 1 << 15;
/// Numbers of sequences that tell models apart.
const ROUGH: usize = 6;
/// Blocks of a pass that are tried.
const BLOCKS: [usize; 14] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];

/// What is asked of the planner.
#[derive(Clone, Copy)]
pub struct Question<'a> {
    /// The model, its numerics resolved.
    pub model: &'a PlanModel,
    /// The machine.
    pub hardware: &'a Hardware,
    /// What may be used.
    pub budgets: Budgets,
    /// What the executor can do.
    pub capabilities: Capabilities,
    /// What is to be generated.
    pub job: &'a Job,
    /// Whether prompts and answers share passes.
    pub schedule: Order,
}

/// A placement and what is known about it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The policy.
    pub policy: Policy,
    /// The policy in whole numbers.
    pub placement: Placement,
    /// Seconds of the whole job.
    pub secs: f64,
    /// Passes of the whole job.
    pub passes: f64,
    /// Prompt and generated tokens per second over the whole job.
    pub total_tokens_per_s: f64,
    /// Generated tokens per second over the whole job.
    pub generated_tokens_per_s: f64,
    /// The mean pass of a long job.
    pub steady: PassLoad,
    /// Seconds of that pass, simulated: the middle one of three.
    pub pass_secs: f64,
    /// The program's bound on it.
    pub pass_bound_secs: f64,
    /// What the program says takes the time.
    pub bottleneck: Bottleneck,
    /// The program's solution.
    pub solution: Solution,
    /// The outline that the program was given.
    pub outline: Outline,
}

/// A few consecutive passes in time.
#[derive(Clone, Debug)]
pub struct Rehearsed {
    /// All steps.
    pub steps: Vec<Step>,
    /// The pass that each step belongs to.
    pub passes: Vec<usize>,
    /// When they run.
    pub timeline: Timeline,
    /// When each pass has computed its last.
    pub ends: Vec<f64>,
}

/// An outline with what its program says about a pass.
struct Solved {
    outline: Outline,
    load: PassLoad,
    solution: Solution,
}

/// An outline with its bound.
struct Candidate {
    solved: Solved,
    /// The job's seconds if every pass were as fast as the program says.
    secs: f64,
}

impl<'a> Question<'a> {
    fn problem<'b>(&'b self, outline: Outline, blocks: &'b [Block]) -> Problem<'b> {
        let Question { model, hardware, budgets, capabilities, .. } = *self;
        Problem { model, hardware, budgets, capabilities, outline, blocks }
    }

    /// The best plan.
    ///
    /// # Errors
    /// [`Error::OverBudget`] if nothing fits, with what would.
    pub fn plan(&self) -> Result<Plan> {
        self.best(&self.candidates()).ok_or_else(|| self.refusal(1))
    }

    /// The best plan with just so many sequences in flight.
    ///
    /// # Errors
    /// [`Error::OverBudget`] if they do not fit, with what would.
    pub fn plan_with(&self, sequences: usize) -> Result<Plan> {
        self.best(&self.candidates_with(sequences)).ok_or_else(|| self.refusal(sequences))
    }

    /// The best of candidates that are sorted by their bounds; none if nothing fits.
    fn best(&self, candidates: &[Candidate]) -> Option<Plan> {
        let mut plans: Vec<Plan> = Vec::new();
        // The program does not see how well blocks overlap, so a few outlines of each kind are simulated.
        let kind = |outline: &Outline| {
            let chunks = self.job.chunks(outline.sequences);
            let chunk = chunks.iter().position(|&chunk| chunk == outline.chunk_tokens);
            (outline.blocks, outline.head, outline.embed, outline.compressed, chunk)
        };
        let mut simulated: Vec<Outline> = Vec::new();
        for candidate in candidates {
            // Whatever is bounded above the best cannot win.
            let best = plans.iter().map(|plan| plan.secs).fold(f64::INFINITY, f64::min);
            if simulated.len() >= SIMULATED || candidate.secs > best {
                break;
            }
            let count = candidate.solved.outline.sequences as f64;
            let alike: Vec<f64> = simulated
                .iter()
                .filter(|outline| kind(outline) == kind(&candidate.solved.outline))
                .map(|outline| outline.sequences as f64)
                .collect();
            if alike.len() >= OF_A_KIND || alike.iter().any(|other| (count / other - 1.0).abs() < 0.1) {
                continue;
            }
            let Some(plan) = self.finish(candidate) else { continue };
            simulated.push(candidate.solved.outline);
            plans.push(plan);
        }
        // What is as fast without the disk leaves it alone.
        let secs = |plan: &Plan| plan.secs * if plan.placement.uses_disk() { DISK_HANDICAP } else { 1.0 };
        let by_secs = |a: &Plan, b: &Plan| secs(a).total_cmp(&secs(b));
        plans.sort_by(by_secs);
        let mut followed: Vec<Plan> = Vec::new();
        for plan in plans.into_iter().take(MOST_FOLLOWED) {
            // Whole jobs may hold more than a steady pass tells; what looks slower than the best whole one is left.
            let best = followed.iter().map(secs).fold(f64::INFINITY, f64::min);
            if followed.len() >= FOLLOWED && secs(&plan) >= best {
                break;
            }
            let Prediction { secs, passes, total_tokens_per_s, generated_tokens_per_s } =
                predict(self.model, self.hardware, &plan.placement, self.job);
            followed.push(Plan { secs, passes, total_tokens_per_s, generated_tokens_per_s, ..plan });
        }
        followed.into_iter().min_by(by_secs).map(|plan| self.keeping_paused(plan))
    }

    /// The plan with room in files for what sequences that are paused have computed, if bringing it there and back
    /// takes less than computing it again.
    fn keeping_paused(&self, plan: Plan) -> Plan {
        // Nobody is paused where lengths are certain, and more rows take no time where something else binds.
        let computes = matches!(plan.bottleneck, Bottleneck::Lane(Lane::Gpu | Lane::Cpu) | Bottleneck::Cores);
        let disk = self.hardware.disk.as_ref().filter(|_| computes && self.job.ends_early());
        let Some(disk) = disk else { return plan };
        let page_bytes = plan.placement.num_layers as f64 * plan.placement.frame as f64;
        let moved_secs = page_bytes / disk.write_bytes_per_s + page_bytes / disk.read_bytes_per_s;
        let computed_secs = PAGE_POSITIONS as f64 * plan.pass_secs / plan.steady.rows();
        let left = ((self.budgets.0[2] - plan.placement.bytes[2] as f64) / page_bytes) as usize;
        let paused_pages = plan.policy.pages.div_ceil(PAGES_TO_PAUSED).min(left);
        let policy = Policy { paused_pages, ..plan.policy.clone() };
        let placement = Placement::new(&self.model.bytes, &policy, plan.placement.compute);
        let fits = placement.bytes.iter().zip(self.budgets.0).all(|(&bytes, budget)| bytes as f64 <= budget);
        if paused_pages == 0 || moved_secs >= computed_secs || !fits {
            return plan;
        }
        let Prediction { secs, passes, total_tokens_per_s, generated_tokens_per_s } =
            predict(self.model, self.hardware, &placement, self.job);
        Plan { policy, placement, secs, passes, total_tokens_per_s, generated_tokens_per_s, ..plan }
    }

    /// The bound that the machine sets to this question whatever the program: the program's own at raw rates.
    pub fn bound(&self) -> Option<(f64, Bottleneck)> {
        self.bound_of(|question| question.candidates().into_iter().map(|candidate| candidate.solved).collect())
    }

    /// The same bound with just so many sequences in flight.
    pub fn bound_with(&self, sequences: usize) -> Option<(f64, Bottleneck)> {
        self.bound_of(|question| question.solve(&[sequences]))
    }

    fn bound_of(&self, solve: impl Fn(&Question<'_>) -> Vec<Solved>) -> Option<(f64, Bottleneck)> {
        let ideal = self.hardware.ideal();
        let capabilities = Capabilities { cpu_attention: self.hardware.gpu.is_some() };
        let solved = solve(&Question { hardware: &ideal, capabilities, ..*self });
        let tokens = self.job.prompt_len + self.job.gen_len;
        let rate = |solved: &Solved| solved.load.prompts * tokens / solved.solution.secs;
        let best = solved.into_iter().max_by(|a, b| rate(a).total_cmp(&rate(b)))?;
        Some((rate(&best), best.solution.bottleneck))
    }

    /// Seconds of the job if every pass were as fast as the best program says.
    pub fn best_program_secs(&self) -> Option<f64> {
        self.candidates().iter().map(|candidate| candidate.secs).min_by(f64::total_cmp)
    }

    /// The same from afar: a few numbers of sequences. It is for comparing models, whose best numbers differ.
    pub fn rough_secs(&self) -> Option<f64> {
        let all = self.sequences();
        let few: Vec<usize> = all.iter().copied().step_by(all.len().div_ceil(ROUGH)).collect();
        self.outlines(&few).iter().map(|candidate| candidate.secs).min_by(f64::total_cmp)
    }

    /// A plan's passes in time.
    pub fn rehearse(&self, plan: &Plan, passes: usize) -> Rehearsed {
        let shapes = place(&plan.steady.blocks(self.job, plan.outline.blocks), &plan.placement);
        let costs = placed(&self.model.cost, self.hardware, &plan.placement);
        rehearse(&plan.placement, &shapes, &costs, passes)
    }

    /// Outlines that the program finds room for, the best first; numbers of sequences are looked at closely where
    /// they look good from afar.
    fn candidates(&self) -> Vec<Candidate> {
        let mut tried = self.sequences();
        let mut candidates = self.outlines(&tried);
        let by_secs = |a: &Candidate, b: &Candidate| a.secs.total_cmp(&b.secs);
        for apart in [0.05, 0.015] {
            candidates.sort_by(by_secs);
            let mut near: Vec<usize> = Vec::new();
            for candidate in candidates.iter().take(FINALISTS) {
                let count = candidate.solved.outline.sequences as f64;
                near.extend([1.0 - apart, 1.0 + apart].map(|factor| (count * factor).round() as usize));
            }
            let most = tried.iter().copied().max().unwrap_or(1);
            near.retain(|count| (1..=most).contains(count) && !tried.contains(count));
            near.sort_unstable();
            near.dedup();
            candidates.extend(self.outlines(&near));
            tried.extend(near);
        }
        candidates.sort_by(by_secs);
        candidates
    }

    /// Outlines with just so many sequences in flight, the best first.
    fn candidates_with(&self, sequences: usize) -> Vec<Candidate> {
        let mut candidates = self.outlines(&[sequences]);
        candidates.sort_by(|a, b| a.secs.total_cmp(&b.secs));
        candidates
    }

    fn outlines(&self, sequences: &[usize]) -> Vec<Candidate> {
        let candidate = |solved: Solved| {
            let secs = self.job_secs(&solved.outline, &solved.solution.shares, 1.0).0;
            Candidate { solved, secs }
        };
        self.solve(sequences).into_iter().map(candidate).collect()
    }

    /// Outlines that the program finds room for.
    fn solve(&self, sequences: &[usize]) -> Vec<Solved> {
        let mut all = Vec::new();
        let compute = self.hardware.compute_tier();
        let mut places = vec![(compute, compute)];
        if compute == Tier::Gpu {
            places.push((Tier::Cpu, Tier::Cpu));
            if !self.model.bytes.tied {
                places.push((Tier::Cpu, Tier::Gpu));
            }
        }
        if self.budgets.0[2] > 0.0 {
            places.push((Tier::Disk, Tier::Disk));
        }
        let compression: &[bool] =
            if self.model.cost.compressed_ratio < 1.0 && self.budgets.0[2] > 0.0 { &[false, true] } else { &[false] };
        let pairs =
            sequences.iter().flat_map(|&count| self.job.chunks(count).into_iter().map(move |chunk| (count, chunk)));
        for (sequences, chunk_tokens) in pairs {
            let load = self.job.steady(sequences, chunk_tokens);
            for count in BLOCKS.into_iter().filter(|&count| count == 1 || count as f64 * 2.0 <= load.rows()) {
                let blocks = load.blocks(self.job, count);
                if blocks.len() != count {
                    continue;
                }
                for &(embed, head) in &places {
                    for &compressed in compression {
                        let outline = self.outline(sequences, chunk_tokens, &blocks, (embed, head), compressed);
                        // Fewer slots where there is no room for more.
                        let fewer = Outline { weight_slots: 2, kv_slots: 2, ..outline };
                        let solved = [outline, fewer].into_iter().find_map(|outline| {
                            self.problem(outline, &blocks).solve().map(|solution| (outline, solution))
                        });
                        let Some((outline, solution)) = solved else { continue };
                        if compressed && solution.shares.weights[2] < 1e-6 {
                            continue;
                        }
                        all.push(Solved { outline, load, solution });
                    }
                }
            }
        }
        all
    }

    /// Numbers of sequences to try: up to what memory holds, about a fifth apart.
    fn sequences(&self) -> Vec<usize> {
        let frames = self.model.cost.num_layers as f64 * self.model.bytes.frame as f64;
        let room: f64 = self.budgets.0.iter().sum();
        let room = room / frames;
        let most = ((room - self.job.sharing.1) / self.job.pages).max(room / self.job.whole_pages) as usize;
        let most = most.clamp(1, MOST_SEQUENCES).min(self.job.requests);
        let mut all: Vec<usize> = vec![most];
        let mut count = most as f64;
        while count > 1.0 && all.len() < 60 {
            count = (count / if count > 64.0 { 1.15 } else { 1.3 }).floor();
            all.push((count as usize).max(1));
        }
        all.dedup();
        all
    }

    fn outline(
        &self,
        sequences: usize,
        chunk_tokens: usize,
        blocks: &[Block],
        places: (Tier, Tier),
        compressed: bool,
    ) -> Outline {
        let rows = blocks.iter().map(|block| block.shape.rows).max().unwrap_or(1);
        // Passes of a real job carry a few rows more than the mean one.
        let spare = if blocks.len() == 1 { rows.max(sequences + chunk_tokens) } else { rows + rows.div_ceil(16) };
        let pages = self.job.pages_of(sequences as f64, chunk_tokens).ceil() as usize;
        let prompts = ((chunk_tokens as f64 / self.job.fresh_len) as usize).clamp(1, blocks.len());
        Outline {
            sequences,
            chunk_tokens,
            blocks: blocks.len(),
            // A prompt is in one block of a pass, so few prompts need larger ones.
            block_rows: spare.max(chunk_tokens.div_ceil(prompts) + sequences.div_ceil(blocks.len())),
            pages: pages.max(self.job.most_pages) + 1,
            common_pages: self.job.common_pages(sequences as f64).min(pages as f64),
            widest_layer: self.job.widest_layer as f64 / self.job.most_pages as f64,
            weight_slots: 3,
            kv_slots: if blocks.len() == 1 { 2 } else { 3 },
            embed: places.0,
            head: places.1,
            compressed,
        }
    }

    /// Seconds and passes of the job when a pass takes `factor` times what its demand says.
    fn job_secs(&self, outline: &Outline, shares: &Shares, factor: f64) -> (f64, f64) {
        let mut known: Vec<(PassLoad, f64)> = Vec::new();
        let mut price = |load: &PassLoad| {
            // Steady passes repeat.
            if let Some((_, secs)) = known.iter().rev().take(8).find(|(before, _)| before == load) {
                return *secs;
            }
            let count = outline.blocks.min(load.rows().ceil() as usize).max(1);
            let blocks = load.blocks(self.job, count);
            let secs = factor * self.problem(*outline, &blocks).evaluate(shares.clone()).secs;
            known.push((*load, secs));
            secs
        };
        let result = rollout(self.job, outline.sequences, outline.chunk_tokens, &mut price);
        (result.secs, result.passes)
    }

    /// Rounds, lowers and simulates a candidate; none if it does not fit when rounded.
    fn finish(&self, candidate: &Candidate) -> Option<Plan> {
        let blocks = candidate.solved.load.blocks(self.job, candidate.solved.outline.blocks);
        let (policy, placement, solution) = self.round(candidate, &blocks)?;
        let shapes = place(&blocks, &placement);
        let costs = placed(&self.model.cost, self.hardware, &placement);
        let rehearsed = rehearse(&placement, &shapes, &costs, 3);
        let pass_secs = rehearsed.ends[1] - rehearsed.ends[0];
        let (secs, passes) = self.job_secs(&candidate.solved.outline, &solution.shares, pass_secs / solution.secs);
        Some(Plan {
            total_tokens_per_s: self.job.tokens() / secs,
            generated_tokens_per_s: self.job.requests as f64 * self.job.gen_len / secs,
            steady: candidate.solved.load,
            pass_secs,
            pass_bound_secs: solution.secs,
            bottleneck: solution.bottleneck,
            outline: candidate.solved.outline,
            policy,
            placement,
            secs,
            passes,
            solution,
        })
    }

    /// The candidate's placement, with budgets tightened until the rounded one fits.
    fn round(&self, candidate: &Candidate, blocks: &[Block]) -> Option<(Policy, Placement, Solution)> {
        let mut budgets = self.budgets;
        let mut solution = candidate.solved.solution.clone();
        for _ in 0..ATTEMPTS {
            let compute = self.hardware.compute_tier();
            let policy = self.policy(&candidate.solved.outline, &solution.shares);
            let placement = Placement::new(&self.model.bytes, &policy, compute);
            let over: Vec<f64> = (0..3).map(|tier| placement.bytes[tier] as f64 - self.budgets.0[tier]).collect();
            if over.iter().all(|&over| over <= 0.0) {
                return Some((policy, placement, solution));
            }
            for (budget, over) in budgets.0.iter_mut().zip(over) {
                *budget -= if over > 0.0 { 1.1 * over + 1e-3 * *budget } else { 0.0 };
            }
            let question = Question { budgets, ..*self };
            solution = question.problem(candidate.solved.outline, blocks).solve()?;
        }
        None
    }

    /// The policy of an outline and shares.
    fn policy(&self, outline: &Outline, shares: &Shares) -> Policy {
        let [weights, kv, hidden] = shares.splits();
        let compute = self.hardware.compute_tier();
        let streamed = (outline.block_pages() * (1.0 - kv.share(compute))).ceil() as usize + 1;
        Policy {
            sequences: outline.sequences,
            chunk_tokens: outline.chunk_tokens,
            blocks: outline.blocks,
            block_rows: outline.block_rows,
            weight_slots: outline.weight_slots,
            kv_slots: outline.kv_slots,
            pages: outline.pages,
            // The longest sequence must fit into a block of its own.
            block_pages: streamed.max(self.job.widest_layer + 1),
            paused_pages: 0,
            weights,
            kv,
            hidden,
            embed: outline.embed,
            head: outline.head,
            compressed: outline.compressed,
            schedule: self.schedule,
        }
    }

    /// Why so many sequences do not fit.
    fn refusal(&self, sequences: usize) -> Error {
        // What they take with everything as far away as it may be.
        let load = self.job.steady(sequences, 16);
        let blocks = load.blocks(self.job, 1);
        let compute = self.hardware.compute_tier();
        let far = if self.budgets.0[2] > 0.0 { Tier::Disk } else { Tier::Cpu };
        let outline = self.outline(sequences, 16, &blocks, (far, far), false);
        let outline = Outline { weight_slots: 2, kv_slots: 2, ..outline };
        let mut shares = [0.0; 3];
        shares[far as usize] = 1.0;
        let home = Tier::ALL.map(|tier| f64::from(u8::from(tier == compute)));
        let shares = Shares { weights: shares, kv: shares, attended: 0.0, hidden: home };
        let placement = Placement::new(&self.model.bytes, &self.policy(&outline, &shares), compute);
        let tier = Tier::ALL
            .into_iter()
            .filter(|&tier| placement.bytes[tier as usize] as f64 > self.budgets.0[tier as usize])
            .max_by_key(|&tier| placement.bytes[tier as usize])
            .unwrap_or(compute);
        let need = (placement.bytes[tier as usize] as f64 * 1.1) as u64;
        let flag = match tier {
            Tier::Gpu => "--gpu-memory",
            Tier::Cpu => "--cpu-memory",
            Tier::Disk => "--disk-space",
        };
        let many = if sequences > 1 { format!(" with {sequences} sequences in flight") } else { String::new() };
        Error::OverBudget {
            what: format!("model `{}`{many}", self.model.name),
            tier,
            need: Bytes(need),
            have: Bytes(self.budgets.0[tier as usize] as u64),
            hint: Some(format!("use {flag} {}MiB or more", need.div_ceil(1 << 20))),
        }
    }
}

/// The blocks' shapes with what the placement makes them transfer.
pub fn place(blocks: &[Block], placement: &Placement) -> Vec<BlockShape> {
    let total = placement.total_pages().max(1) as f64;
    let share = |tier: Tier| placement.pages[tier as usize] as f64 / total;
    let cpu = if placement.compute == Tier::Gpu { share(Tier::Cpu) } else { 0.0 };
    let pages =
        |count: f64| Pages { cpu: (count * cpu).ceil() as usize, disk: (count * share(Tier::Disk)).ceil() as usize };
    blocks
        .iter()
        .map(|block| BlockShape { loads: pages(block.old_pages), stores: pages(block.written_pages), ..block.shape })
        .collect()
}

/// `passes` equal passes in time.
pub fn rehearse(placement: &Placement, shapes: &[BlockShape], costs: &Costs<'_>, passes: usize) -> Rehearsed {
    let (mut steps, mut numbers, mut carried) = (Vec::new(), Vec::new(), Carried::default());
    for pass in 0..passes {
        steps.extend(lower(placement, shapes, &mut carried));
        numbers.resize(steps.len(), pass);
    }
    let fences = Fences::new().of(&steps);
    let works: Vec<_> = steps.iter().map(|step| step_work(step, shapes, costs)).collect();
    let timeline = simulate(&steps, &fences, &works, &Resources::of(costs.hardware));
    let computes = |step: &Step| step.bytes == 0;
    let mut ends = vec![0.0; passes];
    for ((step, &pass), span) in steps.iter().zip(&numbers).zip(&timeline.spans) {
        if computes(step) {
            ends[pass] = span.end_secs.max(ends[pass]);
        }
    }
    Rehearsed { steps, passes: numbers, timeline, ends }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::tests::config;
    use crate::hardware::tests::example;
    use crate::model::config::ModelConfig;
    use crate::model::dtype::DType;
    use crate::rng::Philox;

    fn model() -> PlanModel {
        PlanModel::new("m", config(), None, DType::Bf16, DType::F16)
    }

    #[test]
    fn plans_fit_and_no_simulation_beats_its_program() {
        let model = model();
        let bytes = model.weight_bytes() as f64;
        let mut planned = 0;
        for case in 0..12 {
            let rng = Philox::new(case, 11);
            let between = |index: u64, low: f64, high: f64| low * (high / low).powf(rng.uniform(index));
            let mut hardware = example();
            if case % 3 == 2 {
                hardware = hardware.without_gpu();
            } else if case % 3 == 1 {
                hardware = hardware.without_gpu().rehearsed(1 << 30);
            }
            let throttles = format!("h2d={:.0}MB/s,disk_read={:.0}MB/s", between(0, 20.0, 9e3), between(1, 20.0, 2e3));
            let hardware = hardware.throttled(&throttles.parse().unwrap());
            let gpu = if case % 3 == 2 { 0.0 } else { between(2, 4.0, 12.0) * bytes };
            let budgets = Budgets([gpu, between(3, 4.0, 30.0) * bytes, 1e11]);
            let job = Job::uniform(200, 30 + (rng.uniform(4) * 300.0) as usize, 1 + (rng.uniform(5) * 60.0) as usize);
            let capabilities = Capabilities::default();
            let question = Question {
                model: &model,
                hardware: &hardware,
                budgets,
                capabilities,
                job: &job,
                schedule: Order::Mixed,
            };
            let Ok(plan) = question.plan() else { continue };
            planned += 1;
            for tier in 0..3 {
                assert!(plan.placement.bytes[tier] as f64 <= budgets.0[tier], "case {case}");
            }
            assert!(plan.pass_secs >= plan.pass_bound_secs * (1.0 - 1e-6), "case {case}: {plan:?}");
            assert!(plan.pass_secs <= plan.pass_bound_secs * 3.0, "case {case}: {plan:?}");
            let (bound, _) = question.bound().unwrap();
            assert!(plan.total_tokens_per_s <= bound * 1.001, "case {case}: {} {bound}", plan.total_tokens_per_s);
        }
        assert!(planned >= 8, "{planned}");
    }

    #[test]
    fn what_cannot_fit_is_refused_with_what_would() {
        let (model, hardware) = (model(), example());
        let job = Job::uniform(10, 64, 8);
        let capabilities = Capabilities::default();
        let budgets = Budgets([1e6, 1e9, 0.0]);
        let question =
            Question { model: &model, hardware: &hardware, budgets, capabilities, job: &job, schedule: Order::Mixed };
        let error = question.plan().unwrap_err();
        let Error::OverBudget { tier: Tier::Gpu, need, .. } = &error else { panic!("{error}") };
        let enough = Question { budgets: Budgets([need.0 as f64, 1e9, 0.0]), ..question };
        enough.plan().unwrap();
        assert!(error.hint().unwrap().contains("--gpu-memory"));
    }

    #[test]
    fn planes_are_chosen_where_the_disk_binds_and_declined_where_cores_do() {
        let deep = ModelConfig { num_layers: 40, ..config() };
        let model = PlanModel::new("deep", deep, None, DType::Bf16, DType::F16);
        let bytes = model.weight_bytes() as f64;
        let plan = |disk: &str, decode_bytes_per_core_s: f64| {
            let mut hardware = example().without_gpu().throttled(&disk.parse().unwrap());
            hardware.cpu.decode_bytes_per_core_s = decode_bytes_per_core_s;
            let job = Job::uniform(4, 100, 20);
            let budgets = Budgets([0.0, 0.6 * bytes, 1e12]);
            let capabilities = Capabilities::default();
            let question = Question {
                model: &model,
                hardware: &hardware,
                budgets,
                capabilities,
                job: &job,
                schedule: Order::Mixed,
            };
            question.plan().unwrap()
        };
        let slow_disk = plan("disk_read=20MB/s", 7e8);
        assert!(slow_disk.placement.reads_planes(), "{slow_disk:?}");
        assert_eq!(slow_disk.bottleneck, Bottleneck::Lane(crate::schedule::step::Lane::DiskRead));
        // Cores that are slower at decoding than the disk at reading.
        let slow_cores = plan("disk_read=900MB/s", 5e6);
        assert!(slow_cores.placement.reads_weights() && !slow_cores.placement.reads_planes(), "{slow_cores:?}");
    }

    #[test]
    fn more_of_anything_is_never_worse() {
        let (model, hardware) = (model(), example());
        let job = Job::uniform(500, 200, 30);
        let capabilities = Capabilities::default();
        let bytes = model.weight_bytes() as f64;
        let secs = |gpu: f64| {
            let budgets = Budgets([gpu * bytes, 20.0 * bytes, 0.0]);
            Question { model: &model, hardware: &hardware, budgets, capabilities, job: &job, schedule: Order::Mixed }
                .plan()
                .unwrap()
                .secs
        };
        let all = [3.0, 4.0, 6.0, 12.0, 40.0].map(secs);
        assert!(all.windows(2).all(|pair| pair[1] <= pair[0] * 1.02), "{all:?}");
    }
}
