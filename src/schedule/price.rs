//! What steps and whole passes cost.
//!
//! **Invariant:** the demand of a pass is linear in what is streamed, and at the amounts of a lowered schedule it is
//! the sum over its steps, but for what rounding and latencies of copies add: both are made of the same formulas.

use super::placement::Placement;
use super::shape::BlockShape;
use super::step::{Lane, Op, Slot, Step};
use crate::cost::{Costs, LayerLoad, ModelCost, Scalar, Work};
use crate::hardware::{Hardware, Link};

/// What the lanes of a machine share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Resources {
    /// Cores.
    pub cores: f64,
    /// Bytes/s of main memory.
    pub dram_bytes_per_s: f64,
}

impl Resources {
    /// Those of a machine.
    pub fn of(hardware: &Hardware) -> Self {
        Resources { cores: hardware.cpu.cores, dram_bytes_per_s: hardware.cpu.dram_bytes_per_s }
    }

    /// Seconds that a piece of work keeps each shared resource busy: cores, main memory, link, disk.
    pub fn secs<S: Scalar>(&self, work: &Work<S>) -> [S; 4] {
        [
            work.core_secs.clone() * (1.0 / self.cores),
            work.dram_bytes.clone() * (1.0 / self.dram_bytes_per_s),
            work.link_secs.clone(),
            work.disk_secs.clone(),
        ]
    }
}

/// What a pass can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bottleneck {
    /// A lane.
    Lane(Lane),
    /// Cores that several lanes share.
    Cores,
    /// Main memory's bandwidth.
    Dram,
    /// The link between main memory and device, both directions together.
    Link,
    /// The disk, reading and writing together.
    Disk,
}

impl Bottleneck {
    /// In the order of [`Demand::secs`].
    pub const ALL: [Bottleneck; 10] = [
        Bottleneck::Lane(Lane::DiskRead),
        Bottleneck::Lane(Lane::DiskWrite),
        Bottleneck::Lane(Lane::H2d),
        Bottleneck::Lane(Lane::D2h),
        Bottleneck::Lane(Lane::Gpu),
        Bottleneck::Lane(Lane::Cpu),
        Bottleneck::Cores,
        Bottleneck::Dram,
        Bottleneck::Link,
        Bottleneck::Disk,
    ];

    /// Its name in plans.
    pub fn name(self) -> &'static str {
        match self {
            Bottleneck::Lane(lane) => lane.name(),
            Bottleneck::Cores => "cores",
            Bottleneck::Dram => "dram",
            Bottleneck::Link => "link",
            Bottleneck::Disk => "disk",
        }
    }
}

/// What a pass takes of every lane and of everything shared.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand<S = f64> {
    /// Seconds per lane.
    pub lanes: [S; Lane::ALL.len()],
    /// Shared work; its `lane_secs` are meaningless.
    pub shared: Work<S>,
}

impl<S: Scalar> Demand<S> {
    /// Nothing.
    pub fn none() -> Self {
        Demand { lanes: std::array::from_fn(|_| S::from(0.0)), shared: Work::none() }
    }

    /// One more piece of work.
    pub fn add(&mut self, lane: Lane, work: Work<S>) {
        let index = lane.index();
        self.lanes[index] = self.lanes[index].clone() + work.lane_secs.clone();
        self.shared = self.shared.clone() + work;
    }

    /// Seconds that everything is busy, in the order of [`Bottleneck::ALL`]: a pass takes at least the largest.
    pub fn secs(&self, resources: &Resources) -> [S; Bottleneck::ALL.len()] {
        let shared = resources.secs(&self.shared);
        std::array::from_fn(|index| match index.checked_sub(Lane::ALL.len()) {
            None => self.lanes[index].clone(),
            Some(index) => shared[index].clone(),
        })
    }
}

impl Demand {
    /// What binds, and the seconds that a pass takes at least.
    pub fn bottleneck(&self, resources: &Resources) -> (Bottleneck, f64) {
        let secs = self.secs(resources);
        let all = Bottleneck::ALL.into_iter().zip(secs);
        all.max_by(|a, b| a.1.total_cmp(&b.1)).expect("there are bottlenecks")
    }
}

/// The link that a lane is, if it copies.
fn link(lane: Lane) -> Option<Link> {
    match lane {
        Lane::DiskRead => Some(Link::DiskRead),
        Lane::DiskWrite => Some(Link::DiskWrite),
        Lane::H2d => Some(Link::H2d),
        Lane::D2h => Some(Link::D2h),
        Lane::Gpu | Lane::Cpu => None,
    }
}

/// Prices `model` on `hardware` as it is placed.
pub fn placed<'a>(model: &'a ModelCost, hardware: &'a Hardware, placement: &Placement) -> Costs<'a> {
    let head_parts = (placement.stages.len() - placement.num_layers).max(1);
    Costs { head_parts, logit_rows: placement.logit_rows, ..Costs::new(model, hardware) }
}

/// What a block computes in a layer.
pub fn load(block: &BlockShape) -> LayerLoad {
    LayerLoad {
        rows: block.rows as f64,
        segments: block.segments as f64,
        keys: block.keys as f64,
        pages: block.pages as f64,
        scored: block.upkeep.scored as f64,
        sifted: block.upkeep.sifted as f64,
        evicted: block.upkeep.evicted as f64,
        turned: block.upkeep.turned as f64,
    }
}

/// What one step of a pass takes. Steps count weights by the bytes they have when decoded.
pub fn step_work(step: &Step, blocks: &[BlockShape], costs: &Costs<'_>) -> Work {
    if let Some(link) = link(step.lane) {
        let compressed = step.writes.iter().any(|slot| matches!(slot, Slot::Planes(_)));
        let ratio = if compressed { costs.model.compressed_ratio } else { 1.0 };
        return costs.transfer(link, step.bytes as f64 * ratio, 1.0);
    }
    let block = blocks.get(step.block as usize).copied().unwrap_or_default();
    match step.op {
        Op::DecodeWeights { .. } => costs.decode(step.bytes as f64, 1.0),
        Op::Embed => costs.embed(block.rows as f64),
        Op::Layer => costs.layer(&load(&block)),
        Op::Gather => costs.gather(block.outputs as f64),
        Op::Head => {
            let outputs: usize = blocks.iter().map(|block| block.outputs).sum();
            costs.head(outputs as f64)
        }
        // Bytes that another lane than a link's moves: a copy by one core.
        _ => {
            let secs = step.bytes as f64 / costs.hardware.cpu.copy_bytes_per_core_s;
            Work { lane_secs: secs, core_secs: secs, dram_bytes: 2.0 * step.bytes as f64, ..Work::default() }
        }
    }
}

/// Bytes that a pass streams.
#[derive(Clone, Debug, PartialEq)]
pub struct Traffic<S = f64> {
    /// Weights from main memory; 0 where main memory is the compute tier.
    pub weights_cpu: S,
    /// Weights from the disk, as they are when decoded.
    pub weights_disk: S,
    /// KV pages from main memory, all layers.
    pub kv_load_cpu: S,
    /// KV pages from the disk.
    pub kv_load_disk: S,
    /// KV pages that go back to main memory.
    pub kv_store_cpu: S,
    /// KV pages that go back to the disk.
    pub kv_store_disk: S,
    /// Hidden states to and from main memory, each way.
    pub hidden_cpu: S,
    /// Hidden states to and from the disk, each way.
    pub hidden_disk: S,
    /// Embeddings from a table in main memory.
    pub embeddings_cpu: S,
    /// Embeddings from a table on disk.
    pub embeddings_disk: S,
    /// The share of attention that the CPU does for a device, over pages in main memory.
    pub attended: S,
}

impl<S: Scalar> Traffic<S> {
    /// Everything stays where it is computed.
    pub fn none() -> Self {
        let zero = || S::from(0.0);
        Traffic {
            weights_cpu: zero(),
            weights_disk: zero(),
            kv_load_cpu: zero(),
            kv_load_disk: zero(),
            kv_store_cpu: zero(),
            kv_store_disk: zero(),
            hidden_cpu: zero(),
            hidden_disk: zero(),
            embeddings_cpu: zero(),
            embeddings_disk: zero(),
            attended: zero(),
        }
    }
}

/// What a pass of `blocks` takes that streams `traffic`; weights on disk are `compressed` planes or plain.
pub fn pass_demand<S: Scalar>(
    traffic: &Traffic<S>,
    blocks: &[BlockShape],
    compressed: bool,
    costs: &Costs<'_>,
) -> Demand<S> {
    let mut demand = Demand::none();
    let device = costs.hardware.gpu.is_some();
    let compute = if device { Lane::Gpu } else { Lane::Cpu };
    let mut move_bytes = |link: Link, lane: Lane, bytes: S| demand.add(lane, costs.transfer(link, bytes, 0.0));
    let both = |a: &S, b: &S| a.clone() + b.clone();
    let ratio = if compressed { costs.model.compressed_ratio } else { 1.0 };
    let read = traffic.weights_disk.clone() * ratio + traffic.embeddings_disk.clone();
    move_bytes(Link::DiskRead, Lane::DiskRead, read + both(&traffic.kv_load_disk, &traffic.hidden_disk));
    move_bytes(Link::DiskWrite, Lane::DiskWrite, both(&traffic.kv_store_disk, &traffic.hidden_disk));
    if device {
        let weights = both(&traffic.weights_cpu, &traffic.weights_disk);
        let hidden = both(&traffic.hidden_cpu, &traffic.hidden_disk);
        let loads = both(&traffic.kv_load_cpu, &traffic.kv_load_disk);
        let stores = both(&traffic.kv_store_cpu, &traffic.kv_store_disk);
        move_bytes(Link::H2d, Lane::H2d, weights + loads + hidden.clone() + traffic.embeddings_cpu.clone());
        move_bytes(Link::D2h, Lane::D2h, stores + hidden);
    }
    if compressed {
        demand.add(Lane::Cpu, costs.decode(traffic.weights_disk.clone(), 0.0));
    }
    let layers = costs.model.num_layers as f64;
    let (mut work, mut attention, mut rows, mut outputs) = (Work::default(), Work::default(), 0.0, 0.0);
    for block in blocks {
        work = work + costs.layer(&load(block)) * layers + costs.embed(block.rows as f64);
        if block.outputs > 0 {
            work = work + costs.gather(block.outputs as f64);
        }
        attention = attention + costs.cpu_attention(&load(block)) * layers;
        rows += block.rows as f64;
        outputs += block.outputs as f64;
    }
    work = work + costs.head(outputs) * costs.head_parts as f64;
    demand.add(compute, Work::constant(work));
    if device {
        demand.add(Lane::Cpu, scaled(&attention, &traffic.attended));
        let row = |elements: usize| traffic.attended.clone() * (elements as f64 * 2.0 * rows * layers);
        let (queries, results) = (costs.model.query_width + 2 * costs.model.kv_width, costs.model.query_width);
        demand.add(Lane::D2h, costs.transfer(Link::D2h, row(queries), 0.0));
        demand.add(Lane::H2d, costs.transfer(Link::H2d, row(results), 0.0));
    }
    demand
}

/// `work` times a share.
fn scaled<S: Scalar>(work: &Work, share: &S) -> Work<S> {
    Work {
        lane_secs: share.clone() * work.lane_secs,
        core_secs: share.clone() * work.core_secs,
        dram_bytes: share.clone() * work.dram_bytes,
        ..Work::none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::tests::config;
    use crate::hardware::tests::example;
    use crate::model::dtype::DType;
    use crate::schedule::step::Slots;

    fn block(rows: usize) -> BlockShape {
        BlockShape {
            rows,
            segments: rows,
            keys: 100 * rows as u64,
            pages: 2 * rows as u64,
            outputs: rows,
            ..Default::default()
        }
    }

    fn step(lane: Lane, op: Op, block: u32, bytes: u64) -> Step {
        Step { lane, op, stage: 0, block, reads: Slots::none(), writes: Slots::none(), bytes }
    }

    #[test]
    fn a_pass_takes_what_its_steps_take() {
        let (model, mut hardware) = (ModelCost::new(&config(), None, DType::Bf16, DType::F16), example());
        hardware.links.as_mut().unwrap().step_secs = 0.0;
        hardware.disk.as_mut().unwrap().step_secs = 0.0;
        let costs = Costs::new(&model, &hardware);
        let blocks = [block(10), block(33)];
        let mut sum = Demand::none();
        let mut add = |step: Step| sum.add(step.lane, step_work(&step, &blocks, &costs));
        for layer in 0..4 {
            add(step(Lane::DiskRead, Op::ReadWeights { from: 0, to: 9 }, 0, 1000));
            add(step(Lane::H2d, Op::LoadWeights { from: 0, to: 9 }, 0, 4000));
            for index in 0..2 {
                add(step(Lane::H2d, Op::LoadKv, index, 700));
                add(step(Lane::Gpu, Op::Layer, index, 0));
                add(step(Lane::D2h, Op::StoreKv, index, 200));
                if layer == 0 {
                    add(step(Lane::Gpu, Op::Embed, index, 0));
                    add(step(Lane::Gpu, Op::Gather, index, 0));
                }
            }
        }
        add(step(Lane::Gpu, Op::Head, 0, 0));
        let traffic = Traffic {
            weights_cpu: 12000.0,
            weights_disk: 4000.0,
            kv_load_cpu: 5600.0,
            kv_store_cpu: 1600.0,
            ..Traffic::none()
        };
        let demand = pass_demand(&traffic, &blocks, false, &costs);
        let resources = Resources::of(&hardware);
        for (a, b) in demand.secs(&resources).into_iter().zip(sum.secs(&resources)) {
            assert!((a - b).abs() <= 1e-9 * a.abs().max(1e-9), "{a} {b}");
        }
    }

    #[test]
    fn the_busiest_binds() {
        let mut demand = Demand::none();
        demand.add(Lane::H2d, Work { lane_secs: 2.0, core_secs: 1.0, ..Work::default() });
        demand.add(Lane::Cpu, Work { lane_secs: 1.0, core_secs: 9.0, ..Work::default() });
        let resources = Resources { cores: 4.0, dram_bytes_per_s: 1.0 };
        assert_eq!(demand.bottleneck(&resources), (Bottleneck::Cores, 2.5));
        assert_eq!(demand.bottleneck(&Resources { cores: 16.0, ..resources }).0, Bottleneck::Lane(Lane::H2d));
    }
}
