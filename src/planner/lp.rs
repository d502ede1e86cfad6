//! The linear program: where bytes live, given what is computed together.
//!
//! Variables are the shares of weights, KV pages and hidden states per tier. A pass takes at least the time of each
//! lane and of everything that lanes share; what a tier holds at its peak is within its budget. Demand comes from
//! `schedule::price`, memory is what `schedule::placement` counts, both linear in the shares.
//!
//! **Invariant:** memory here is never more than a placement of the same shares takes, so the solution bounds every
//! placement from below.

use good_lp::{Expression, ProblemVariables, Solution as _, SolverModel, Variable, constraint, variable};

use super::job::Block;
use super::model::PlanModel;
use crate::cost::{Costs, Scalar};
use crate::error::Tier;
use crate::hardware::Hardware;
use crate::policy::Split;
use crate::schedule::price::{Bottleneck, Demand, Resources, Traffic, pass_demand};
use crate::schedule::shape::BlockShape;

/// Weights on the disk's side of a device come in slices of this many bytes, four of them.
const STAGING_BYTES: f64 = 4.0 * 33_554_432.0;
/// How much worse a farther tier is when time does not tell, in shares of the computing time.
const NEARER: f64 = 1e-5;

/// Bytes granted per tier: gpu, cpu, disk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budgets(pub [f64; 3]);

/// What the executor can do beyond the basics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// The CPU can attend to pages in main memory for a device.
    pub cpu_attention: bool,
}

/// What is decided before the shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outline {
    /// Sequences in flight.
    pub sequences: usize,
    /// Prompt tokens of a pass.
    pub chunk_tokens: usize,
    /// Blocks of a pass.
    pub blocks: usize,
    /// Rows of a block, at most.
    pub block_rows: usize,
    /// Pages of the KV cache, and how many of them sequences share.
    pub pages: usize,
    /// As for `pages`.
    pub common_pages: f64,
    /// Pages that the layer with most of them works with, for each page that a sequence holds.
    pub widest_layer: f64,
    /// Stages of streamed weights with the device.
    pub weight_slots: usize,
    /// Blocks of streamed pages with the device.
    pub kv_slots: usize,
    /// Where the embedding table lies.
    pub embed: Tier,
    /// Where the head lies.
    pub head: Tier,
    /// Weights on disk are compressed planes.
    pub compressed: bool,
}

impl Outline {
    /// Pages that a block may touch in a layer: its share of all, and a few more, because sequences are whole; and what
    /// all of them share.
    pub fn block_pages(&self) -> f64 {
        let own = self.pages as f64 - self.common_pages;
        1.06 * self.widest_layer * own / self.blocks as f64 + self.common_pages
    }
}

/// One linear program.
#[derive(Clone, Copy)]
pub struct Problem<'a> {
    /// The model.
    pub model: &'a PlanModel,
    /// The machine.
    pub hardware: &'a Hardware,
    /// What may be used.
    pub budgets: Budgets,
    /// What can be used.
    pub capabilities: Capabilities,
    /// What is decided.
    pub outline: Outline,
    /// The blocks of a pass.
    pub blocks: &'a [Block],
}

/// Shares of everything, as numbers or as variables.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares<S = f64> {
    /// Decoder layers per tier.
    pub weights: [S; 3],
    /// KV pages per tier.
    pub kv: [S; 3],
    /// Pages in main memory that the CPU attends to, of all pages.
    pub attended: S,
    /// Hidden states per tier.
    pub hidden: [S; 3],
}

/// What the program found.
#[derive(Clone, Debug, PartialEq)]
pub struct Solution {
    /// The shares.
    pub shares: Shares,
    /// Seconds of a pass.
    pub secs: f64,
    /// What takes them.
    pub bottleneck: Bottleneck,
    /// What a pass takes of everything.
    pub demand: Demand,
}

impl Shares {
    /// As splits: weights, KV pages, hidden states.
    pub fn splits(&self) -> [Split; 3] {
        [&self.weights, &self.kv, &self.hidden].map(|shares| {
            let clean = shares.map(|share| if share < 1e-9 { 0.0 } else { share });
            let sum: f64 = clean.iter().sum();
            Split { gpu: clean[0] / sum, cpu: clean[1] / sum, disk: clean[2] / sum }
        })
    }
}

/// `sum(factor * value)`.
fn combine<S: Scalar>(terms: &[(f64, &S)]) -> S {
    terms.iter().fold(S::from(0.0), |sum, (factor, value)| sum + (*value).clone() * *factor)
}

impl Problem<'_> {
    /// Prices work of this problem.
    pub fn costs(&self) -> Costs<'_> {
        let costs = Costs::new(&self.model.cost, self.hardware);
        match self.head_resident() {
            true => Costs { logit_rows: self.model.bytes.logit_rows(), ..costs },
            false => Costs { head_parts: self.model.bytes.head.len(), ..costs },
        }
    }

    /// Whether the head stays where it is used.
    pub fn head_resident(&self) -> bool {
        let compute = self.hardware.compute_tier();
        self.outline.head == compute || (self.model.bytes.tied && self.outline.embed == compute)
    }

    /// The blocks' shapes.
    pub fn shapes(&self) -> Vec<BlockShape> {
        self.blocks.iter().map(|block| block.shape).collect()
    }

    fn layer_bytes(&self) -> f64 {
        self.model.bytes.layers.iter().flatten().sum::<u64>() as f64
    }

    fn head_bytes(&self) -> f64 {
        self.model.bytes.head.iter().flatten().sum::<u64>() as f64
    }

    /// Bytes that a pass streams.
    pub fn traffic<S: Scalar>(&self, shares: &Shares<S>) -> Traffic<S> {
        let device = self.hardware.compute_tier() == Tier::Gpu;
        let (layers, model) = (self.model.cost.num_layers as f64, &self.model.bytes);
        let weights = self.layer_bytes();
        let head = if self.head_resident() { 0.0 } else { self.head_bytes() };
        let head_in = |tier: Tier| S::from(if self.outline.head == tier { head } else { 0.0 });
        let frames =
            |pages: &dyn Fn(&Block) -> f64| self.blocks.iter().map(pages).sum::<f64>() * layers * model.frame as f64;
        let (old, written) = (frames(&|block| block.old_pages), frames(&|block| block.written_pages));
        let rows: usize = self.blocks.iter().map(|block| block.shape.rows).sum();
        let hidden = rows as f64 * model.hidden_row as f64 * (layers - 1.0);
        let embed = if model.tied { self.outline.head } else { self.outline.embed };
        let away = !(model.tied && self.head_resident());
        let embeddings = rows as f64 * model.hidden_row as f64;
        let embedded_in = |tier: Tier| S::from(if away && embed == tier { embeddings } else { 0.0 });
        let on_device = |share: S| if device { share } else { S::from(0.0) };
        let streamed = on_device(combine(&[(1.0, &shares.kv[1]), (-1.0, &shares.attended)]));
        Traffic {
            weights_cpu: on_device(shares.weights[1].clone() * weights + head_in(Tier::Cpu)),
            weights_disk: shares.weights[2].clone() * weights + head_in(Tier::Disk),
            kv_load_cpu: streamed.clone() * old,
            kv_load_disk: shares.kv[2].clone() * old,
            kv_store_cpu: streamed * written,
            kv_store_disk: shares.kv[2].clone() * written,
            hidden_cpu: on_device(shares.hidden[1].clone() * hidden),
            hidden_disk: shares.hidden[2].clone() * hidden,
            embeddings_cpu: on_device(embedded_in(Tier::Cpu)),
            embeddings_disk: embedded_in(Tier::Disk),
            attended: on_device(shares.attended.clone()),
        }
    }

    /// What a pass takes.
    pub fn demand<S: Scalar>(&self, shares: &Shares<S>) -> Demand<S> {
        pass_demand(&self.traffic(shares), &self.shapes(), self.outline.compressed, &self.costs())
    }

    /// Bytes that each tier holds; `ring` are those of the slots of streamed weights.
    fn memory<S: Scalar>(&self, shares: &Shares<S>, ring: &S) -> [S; 3] {
        let (model, outline) = (&self.model.bytes, &self.outline);
        let compute = self.hardware.compute_tier();
        let device = compute == Tier::Gpu;
        let layer = self.layer_bytes() / self.model.cost.num_layers as f64;
        let pages = outline.pages as f64 * self.model.cost.num_layers as f64 * model.frame as f64;
        let block_rows = outline.block_rows as f64;
        let hidden = outline.blocks as f64 * block_rows * model.hidden_row as f64;
        let most = outline.block_pages();
        let block_frames = outline.kv_slots as f64 * most * model.frame as f64;
        let block_hidden = outline.kv_slots as f64 * block_rows * model.hidden_row as f64;
        let tiers: [S; 3] = Tier::ALL.map(|tier| {
            let index = tier as usize;
            let mut bytes = combine(&[(pages, &shares.kv[index]), (hidden, &shares.hidden[index])]);
            if tier != Tier::Disk {
                let mut whole = 0.0;
                let head_here = if self.head_resident() { tier == compute } else { tier == outline.head };
                let table_here = if model.tied { head_here } else { tier == outline.embed };
                if table_here {
                    whole += model.table as f64;
                }
                if head_here && !model.tied {
                    whole += self.head_bytes();
                }
                bytes = bytes + shares.weights[index].clone() * self.layer_bytes() + S::from(whole);
            }
            if tier == compute {
                let away = if device { [&shares.kv[1], &shares.kv[2]] } else { [&shares.kv[2], &shares.kv[2]] };
                let half = if device { 1.0 } else { 0.5 };
                let slots = [(half * block_frames, away[0]), (half * block_frames, away[1])];
                let minus_attended = if device { -block_frames } else { 0.0 };
                bytes = bytes + combine(&slots) + shares.attended.clone() * minus_attended + ring.clone();
                let away = combine(&[(block_hidden, &shares.hidden[1]), (block_hidden, &shares.hidden[2])]);
                bytes = bytes + if device { away } else { shares.hidden[2].clone() * block_hidden };
                bytes = bytes + S::from(self.fixed_bytes());
            }
            if tier == Tier::Cpu && device {
                let staging = STAGING_BYTES.min(4.0 * layer);
                bytes = bytes + combine(&[(staging, &shares.weights[2]), (block_frames, &shares.kv[2])]);
                bytes = bytes + shares.hidden[2].clone() * block_hidden;
            }
            if tier == Tier::Cpu && outline.compressed {
                bytes = bytes + shares.weights[2].clone() * (1.5 * layer);
            }
            bytes
        });
        tiers
    }

    /// Bytes of activations and of what always stays with the device.
    fn fixed_bytes(&self) -> f64 {
        let (model, outline) = (&self.model.bytes, &self.outline);
        let rows = outline.block_rows as f64;
        let activations = rows * model.activations.iter().sum::<u64>() as f64;
        let outputs = (outline.blocks * outline.block_rows).min(outline.sequences.max(64)) as f64;
        let affordable = ((64 << 20) / model.logit_row.max(1)).clamp(1, 64) as f64;
        let logits = if self.head_resident() { outputs.min(affordable) } else { outputs };
        let elsewhere = outline.embed != self.hardware.compute_tier() && !(model.tied && self.head_resident());
        let embeddings = if elsewhere { rows * model.embedding_row as f64 } else { 0.0 };
        let rest = 2.0 * outputs * model.hidden_row as f64 + logits * model.logit_row as f64 + embeddings;
        activations + rest + model.small as f64
    }

    /// Bytes of streamed weights that the compute tier holds, at least: of layers by share, of a streamed head whole.
    fn rings<S: Scalar>(&self, shares: &Shares<S>) -> [S; 2] {
        let slots = self.outline.weight_slots as f64;
        let layer = slots * self.layer_bytes() / self.model.cost.num_layers as f64;
        let device = if self.hardware.compute_tier() == Tier::Gpu { layer } else { 0.0 };
        let parts = self.model.bytes.head.iter().map(|part| part.iter().sum::<u64>());
        let head = if self.head_resident() { 0.0 } else { slots * parts.max().unwrap_or(0) as f64 };
        [combine(&[(device, &shares.weights[1]), (layer, &shares.weights[2])]), S::from(head)]
    }

    /// Whether shares are within the budgets, by the linear count.
    pub fn fits(&self, shares: &Shares, slack: [f64; 3]) -> bool {
        let ring = self.rings(shares).into_iter().fold(0.0, f64::max);
        let bytes = self.memory(shares, &ring);
        (0..3).all(|tier| bytes[tier] <= self.budgets.0[tier] + slack[tier])
    }

    /// What a pass takes with given shares.
    pub fn evaluate(&self, shares: Shares) -> Solution {
        let demand = self.demand(&shares);
        let (bottleneck, secs) = demand.bottleneck(&Resources::of(self.hardware));
        Solution { shares, secs, bottleneck, demand }
    }

    /// The shares that make a pass fastest; none if it cannot fit.
    pub fn solve(&self) -> Option<Solution> {
        let compute = self.hardware.compute_tier();
        let mut variables = ProblemVariables::new();
        let mut tiers = || -> [Variable; 3] {
            Tier::ALL.map(|tier| {
                let absent = self.hardware.capacity_bytes(tier) == 0 || self.budgets.0[tier as usize] <= 0.0;
                let upper = if absent { 0.0 } else { 1.0 };
                variables.add(variable().min(0.0).max(upper))
            })
        };
        let (weights, kv, hidden) = (tiers(), tiers(), tiers());
        let can_attend = self.capabilities.cpu_attention && compute == Tier::Gpu;
        let attended = variables.add(variable().min(0.0).max(if can_attend { 1.0 } else { 0.0 }));
        // Seconds in units of the computing time, bytes in units of the budget: numbers near 1.
        let secs = variables.add(variable().min(0.0));
        let ring = variables.add(variable().min(0.0));
        let shares = Shares {
            weights: weights.map(Expression::from),
            kv: kv.map(Expression::from),
            attended: Expression::from(attended),
            hidden: hidden.map(Expression::from),
        };
        let demand = self.demand(&shares).secs(&Resources::of(self.hardware));
        let still = Shares { weights: [0.0; 3], kv: [0.0; 3], attended: 0.0, hidden: [0.0; 3] };
        let unit = self.evaluate(still).secs.max(1e-12);
        let compute_index = compute as usize;
        let budget = |tier: usize| self.budgets.0[tier].max(1e6);
        let ring_bytes = Expression::from(ring) * budget(compute_index);
        let far = [&weights, &kv, &hidden].into_iter().fold(Expression::from(0.0), |sum, tiers| {
            sum + Expression::from(tiers[1]) + 3.0 * Expression::from(tiers[2])
        });
        let mut program = variables.minimise(Expression::from(secs) + NEARER * far).using(good_lp::microlp);
        for busy in demand {
            program = program.with(constraint!(busy * (1.0 / unit) <= secs));
        }
        for need in self.rings(&shares) {
            program = program.with(constraint!(need * (1.0 / budget(compute_index)) <= ring));
        }
        for (tier, bytes) in self.memory(&shares, &ring_bytes).into_iter().enumerate() {
            // Of an absent tier only what can never fit is left.
            if tier != 0 || compute == Tier::Gpu {
                program =
                    program.with(constraint!(bytes * (1.0 / budget(tier)) <= self.budgets.0[tier] / budget(tier)));
            }
        }
        for tiers in [&weights, &kv, &hidden] {
            program = program.with(constraint!(tiers[0] + tiers[1] + tiers[2] == 1.0));
        }
        program = program.with(constraint!(attended <= kv[1]));
        let solution = program.solve().ok()?;
        let value = |variable: Variable| solution.value(variable).clamp(0.0, 1.0);
        let shares = Shares {
            weights: weights.map(value),
            kv: kv.map(value),
            attended: value(attended),
            hidden: hidden.map(value),
        };
        Some(self.evaluate(shares))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::tests::config;
    use crate::hardware::tests::example;
    use crate::model::dtype::DType;
    use crate::planner::job::Job;
    use crate::rng::Philox;

    /// All ways to share out something over the tiers in steps.
    fn grid(steps: usize, without_gpu: bool) -> Vec<[f64; 3]> {
        let most = if without_gpu { 0 } else { steps };
        let all = (0..=most).flat_map(|gpu| (0..=steps - gpu).map(move |cpu| [gpu, cpu, steps - gpu - cpu]));
        all.map(|counts| counts.map(|count| count as f64 / steps as f64)).collect()
    }

    #[test]
    fn the_program_finds_what_a_grid_finds() {
        const STEPS: usize = 16;
        let model = PlanModel::new("m", config(), None, DType::Bf16, DType::F16);
        let (mut solved, mut bound_by) = (0, std::collections::BTreeSet::new());
        for case in 0..60 {
            let rng = Philox::new(case, 3);
            let between = |index: u64, low: f64, high: f64| low * (high / low).powf(rng.uniform(index));
            let mut hardware = example();
            let host = case % 4 == 3;
            if host {
                hardware = hardware.without_gpu();
            }
            if let Some(links) = &mut hardware.links {
                links.h2d_bytes_per_s = between(0, 1e7, 1e10);
                links.d2h_bytes_per_s = between(1, 1e7, 1e10);
                links.h2d_together_bytes_per_s = links.h2d_bytes_per_s * 0.7;
                links.d2h_together_bytes_per_s = links.d2h_bytes_per_s * 0.7;
            }
            let disk = hardware.disk.as_mut().unwrap();
            disk.read_bytes_per_s = between(2, 1e7, 5e9);
            hardware.cpu.dram_bytes_per_s = between(3, 1e8, 2e10);
            let job = Job::uniform(1000, 100, 40);
            let sequences = between(4, 40.0, 400.0) as usize;
            let blocks = job.steady(sequences, job.balanced_chunk(sequences)).blocks(&job, 1 + case as usize % 3);
            let bytes = model.weight_bytes() as f64;
            let pages = sequences * 3;
            let cache = pages as f64 * 4.0 * model.bytes.frame as f64;
            let budgets = Budgets([between(5, 1.5, 9.0) * bytes, between(6, 0.5, 3.0) * (bytes + cache), 1e12]);
            let outline = Outline {
                sequences,
                chunk_tokens: 100,
                blocks: blocks.len(),
                block_rows: blocks.iter().map(|block| block.shape.rows).max().unwrap(),
                pages,
                common_pages: 0.0,
                widest_layer: 1.0,
                weight_slots: 2,
                kv_slots: 2,
                embed: Tier::Cpu,
                head: if case % 2 == 0 { Tier::Cpu } else { hardware.compute_tier() },
                compressed: case % 5 == 0,
            };
            let capabilities = Capabilities::default();
            let problem =
                Problem { model: &model, hardware: &hardware, budgets, capabilities, outline, blocks: &blocks };
            let near = if host { [0.0, 1.0, 0.0] } else { [1.0, 0.0, 0.0] };
            let step = 1.0 / STEPS as f64;
            let slack = [2.0, 2.0, 2.0].map(|tiers| tiers * step * (bytes + cache) * 1.5);
            let (mut exact, mut relaxed) = (f64::INFINITY, f64::INFINITY);
            for weights in grid(STEPS, host) {
                for kv in grid(STEPS, host) {
                    for hidden in [near, [0.0, 1.0, 0.0]] {
                        let shares = Shares { weights, kv, attended: 0.0, hidden };
                        if problem.fits(&shares, slack) {
                            let fits = problem.fits(&shares, [0.0; 3]);
                            let secs = problem.evaluate(shares).secs;
                            relaxed = relaxed.min(secs);
                            exact = if fits { exact.min(secs) } else { exact };
                        }
                    }
                }
            }
            let Some(solution) = problem.solve() else {
                assert!(exact.is_infinite(), "case {case}: a placement that the program did not find");
                continue;
            };
            solved += 1;
            bound_by.insert(solution.bottleneck.name());
            assert!(problem.fits(&solution.shares, [1e3; 3]), "case {case}: {:?}", solution.shares);
            assert!(solution.secs <= exact * (1.0 + 1e-4), "case {case}: {} {exact}", solution.secs);
            // A step of every share changes no lane by more than all that it moves.
            let all = Shares { weights: [0.0, 1.0, 1.0], kv: [0.0, 1.0, 1.0], attended: 0.0, hidden: [0.0, 1.0, 1.0] };
            let least = Shares { weights: near, kv: near, attended: 0.0, hidden: near };
            let tolerance = 2.0 * step * (problem.evaluate(all).secs - problem.evaluate(least).secs).max(0.0);
            assert!(relaxed <= solution.secs + tolerance + 1e-12, "case {case}: {} {relaxed}", solution.secs);
        }
        assert!(solved > 30 && bound_by.len() >= 4, "{solved} {bound_by:?}");
    }

    #[test]
    fn attention_by_the_cpu_saves_the_link() {
        let model = PlanModel::new("m", config(), None, DType::Bf16, DType::F16);
        let mut hardware = example();
        hardware.links.as_mut().unwrap().h2d_bytes_per_s = 2e8;
        hardware.links.as_mut().unwrap().h2d_together_bytes_per_s = 2e8;
        let job = Job::uniform(1000, 100, 40);
        let blocks = job.steady(200, job.balanced_chunk(200)).blocks(&job, 2);
        let outline = Outline {
            sequences: 200,
            chunk_tokens: 500,
            blocks: 2,
            block_rows: blocks[0].shape.rows,
            pages: 600,
            common_pages: 0.0,
            widest_layer: 1.0,
            weight_slots: 2,
            kv_slots: 2,
            embed: Tier::Gpu,
            head: Tier::Gpu,
            compressed: false,
        };
        let budgets = Budgets([model.weight_bytes() as f64 + 5e7, 1e12, 0.0]);
        let plain = Problem {
            model: &model,
            hardware: &hardware,
            budgets,
            capabilities: Capabilities::default(),
            outline,
            blocks: &blocks,
        };
        let able = Problem { capabilities: Capabilities { cpu_attention: true }, ..plain };
        let (plain, able) = (plain.solve().unwrap(), able.solve().unwrap());
        assert_eq!(plain.bottleneck, Bottleneck::Lane(crate::schedule::step::Lane::H2d));
        assert!(able.secs < plain.secs && able.shares.attended > 0.0);
        let impossible = Budgets([1e5, 1e12, 0.0]);
        let none = Problem {
            budgets: impossible,
            capabilities: Capabilities::default(),
            ..plain_of(&model, &hardware, outline, &blocks)
        };
        assert!(none.solve().is_none());
    }

    fn plain_of<'a>(
        model: &'a PlanModel,
        hardware: &'a Hardware,
        outline: Outline,
        blocks: &'a [Block],
    ) -> Problem<'a> {
        let (budgets, capabilities) = (Budgets([0.0; 3]), Capabilities::default());
        Problem { model, hardware, budgets, capabilities, outline, blocks }
    }
}
