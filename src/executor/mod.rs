//! Runs passes: the only place where plan and metal meet.
//!
//! A pass is lowered to steps, the steps are checked in debug builds, fenced, and handed to a thread per lane.
//!
//! **Invariant:** all memory is allocated by [`Executor::new`]; a pass allocates nothing large.

mod compute;
mod lanes;
mod layer;
mod memory;
mod pass;
pub mod rotary;
pub mod size;
mod work;

use std::path::Path;
use std::sync::{Arc, Mutex};

pub use lanes::{Event, LaneCount, Throttle};
pub use memory::stage_ids;

use crate::device::Device;
use crate::device::sampling::{Draw, Drawn};
use crate::error::{Result, Tier};
use crate::kv::layout::KvLayout;
use crate::kv::pages::PageId;
use crate::memory::arena::Arena;
use crate::memory::disk::{DEPTH, DiskQueue, How, Read, Write};
use crate::model::config::ModelConfig;
use crate::model::packed::Packed;
use crate::schedule::check::Checker;
use crate::schedule::fences::{Fence, Fences};
use crate::schedule::lower::{Carried, lower};
use crate::schedule::pass::layer_shapes;
use crate::schedule::placement::Placement;
use crate::schedule::shape::{BlockShape, Layers};
use crate::schedule::step::{Lane, Step};
use crate::schedule::{Block, Pass};
use compute::{Compute, Fixed};
use lanes::Lanes;
use memory::{Memory, Source};
use pass::PassData;
use rotary::RotaryTables;
use work::Workshop;

/// A loaded model, its KV cache and the lanes that work on them.
pub struct Executor<D: Device> {
    lanes: Lanes<D>,
    rotary: RotaryTables,
    carried: Carried,
    fences: Fences,
    checker: Checker,
    host_bytes: usize,
    /// Passes since tracing began.
    records: Option<Vec<PassRecord>>,
    passes: u64,
}

/// A pass that was traced.
#[derive(Clone, Debug)]
pub struct PassRecord {
    /// The pass, from 0.
    pub pass: u64,
    /// Its blocks.
    pub blocks: Vec<BlockShape>,
    /// Its steps.
    pub steps: Vec<Step>,
}

/// Steps that a trace has at most: about 100 MB of text.
const TRACED_STEPS: usize = 250_000;

/// What an executor is made from.
pub struct Parts<'a> {
    /// The weights.
    pub packed: &'a dyn Packed,
    /// The model.
    pub config: &'a ModelConfig,
    /// Where things go; its budgets have been checked.
    pub placement: Placement,
    /// How pages are laid out.
    pub kv: KvLayout,
    /// Where files for pages and hidden states are made.
    pub offload: Option<&'a Path>,
    /// Rates that links are held to.
    pub throttle: Throttle,
}

impl<D: Device> Executor<D> {
    /// Allocates everything of the placement (see [`Placement::arenas`] for the sizes of the device's arena and of
    /// `host`) and loads the weights.
    ///
    /// # Errors
    /// Whatever reading the model's tensors or making files gives.
    pub fn new(mut device: D, mut host: Arena, parts: Parts<'_>) -> Result<Self> {
        let Parts { packed, config, placement, kv, offload, throttle } = parts;
        let source = Source { packed, config, placement: &placement, kv, offload };
        let Memory { own, shared } = memory::allocate(&mut device, &mut host, &source)?;
        let stages = memory::stage_ids(packed.layout(), &placement);
        let compute = Mutex::new(Compute::new(own, config));
        let layout = packed.layout().clone();
        let fixed = Fixed { device, config: config.clone(), layout, placement, stages };
        let lanes = Lanes::new(Workshop { fixed, shared, compute }, throttle);
        Ok(Executor {
            lanes,
            rotary: RotaryTables::new(config),
            carried: Carried::default(),
            fences: Fences::new(),
            checker: Checker::new(),
            host_bytes: host.used(),
            records: None,
            passes: 0,
        })
    }

    /// Where everything lies.
    pub fn placement(&self) -> &Placement {
        &self.lanes.workshop().fixed.placement
    }

    /// The device that it runs on.
    pub fn device(&self) -> &D {
        &self.lanes.workshop().fixed.device
    }

    /// Bytes of the device's memory and of main memory that were handed out.
    pub fn used_bytes(&self) -> (usize, usize) {
        (self.device().used_bytes(), self.host_bytes)
    }

    /// Notes every step from now on, until there are very many, for [`Executor::take_trace`].
    pub fn trace(&mut self) {
        self.lanes.trace(true);
        self.records = Some(Vec::new());
    }

    /// Takes the steps that ran since tracing began, and the passes that they belong to.
    pub fn take_trace(&mut self) -> (Vec<Event>, Vec<PassRecord>) {
        self.lanes.trace(false);
        (self.lanes.take_events(), self.records.take().unwrap_or_default())
    }

    /// What each lane has done so far.
    pub fn lane_counts(&self) -> [LaneCount; Lane::ALL.len()] {
        self.lanes.counts()
    }

    /// Computes a pass: appends its keys and values to their pages and answers `draws`, which are in ascending
    /// order of their rows.
    ///
    /// # Errors
    /// What the disk or the device gives. Nothing can be run after an error.
    pub fn run(&mut self, pass: &Pass, draws: &[Draw]) -> Result<Vec<Drawn>> {
        let placement = self.placement();
        assert!(pass.rows() <= placement.rows(), "{} rows in a pass of {}", pass.rows(), placement.rows());
        assert!(draws.is_sorted_by_key(|draw| draw.row));
        let mut outputs: Vec<usize> = draws.iter().map(|draw| draw.row).collect();
        outputs.dedup();
        assert!(outputs.len() <= placement.output_rows, "logits of {} rows", outputs.len());
        let blocks = Block::of(pass, placement, &outputs);
        let shapes: Vec<_> = blocks.iter().map(|block| block.shape).collect();
        let each = layer_shapes(&blocks, placement.num_layers);
        let layers = each.as_deref().map_or(Layers::Same(&shapes), Layers::Each);
        let placement = &self.lanes.workshop().fixed.placement;
        let steps = lower(placement, layers, &mut self.carried);
        if cfg!(debug_assertions) {
            let checked = self.checker.pass(placement, layers, &steps);
            assert!(checked.is_ok(), "{checked:?}");
        }
        let fences = self.fences.of(&steps);
        self.record(&shapes, &steps);
        let data = Arc::new(PassData {
            tokens: pass.tokens.clone(),
            positions: pass.positions.clone(),
            blocks,
            outputs,
            draws: draws.to_vec(),
            angles: self.rotary.angles(pass),
            sink_angles: self.rotary.sink_angles(pass),
            rotary_dim: self.rotary.rotary_dim(),
        });
        self.lanes.issue(&steps, &fences, &data)?;
        self.lanes.wait(self.until(&[Lane::Gpu, Lane::Cpu]))?;
        Ok(self.computing().take_drawn())
    }

    fn record(&mut self, blocks: &[BlockShape], steps: &[Step]) {
        let Some(records) = &mut self.records else { return };
        let recorded: usize = records.iter().map(|record| record.steps.len()).sum();
        if recorded < TRACED_STEPS {
            records.push(PassRecord { pass: self.passes, blocks: blocks.to_vec(), steps: steps.to_vec() });
        } else {
            self.lanes.trace(false);
        }
        self.passes += 1;
    }

    fn computing(&self) -> std::sync::MutexGuard<'_, Compute<D>> {
        self.lanes.workshop().compute.try_lock().expect("nothing is computed between passes")
    }

    /// Everything that was issued to some lanes.
    fn until(&self, lanes: &[Lane]) -> Fence {
        let mut fence = Fence::default();
        for lane in lanes {
            fence[lane.index()] = self.fences.issued()[lane.index()];
        }
        fence
    }

    /// Copies a page, all layers, wherever the two live.
    ///
    /// # Errors
    /// What the disk or the device gives.
    pub fn copy_page(&mut self, from: PageId, to: PageId) -> Result<()> {
        // What was stored must have arrived; nothing else touches pages between passes.
        self.lanes.wait(self.until(&[Lane::D2h, Lane::DiskWrite]))?;
        let (from, to) = (from as usize, to as usize);
        let workshop = self.lanes.workshop();
        let placement = &workshop.fixed.placement;
        let resident = |page: usize| placement.page_tier(page) == placement.compute;
        if resident(from) && resident(to) {
            self.computing().copy_page(&workshop.fixed.device, placement, from, to);
            return workshop.fixed.device.finish();
        }
        let mut queue = DiskQueue::new(DEPTH, How::Auto)?;
        (0..placement.num_layers).try_for_each(|layer| self.copy_frame(layer, from, to, &mut queue))
    }

    /// Copies one layer of a page through main memory.
    fn copy_frame(&self, layer: usize, from: usize, to: usize, queue: &mut DiskQueue) -> Result<()> {
        let Workshop { fixed, shared, .. } = self.lanes.workshop();
        let placement = &fixed.placement;
        let [gpu, cpu, disk] = placement.pages;
        let bytes = placement.frame as usize;
        // The tier of a page and its frame there.
        let home = |page: usize| {
            let tier = placement.page_tier(page);
            let before = [0, gpu, gpu + cpu][tier as usize];
            (tier, layer * [gpu, cpu, disk][tier as usize] + page - before)
        };
        let place = shared.frame.as_ref().expect("placements with streamed pages have room for a frame");
        let mut place = memory::write(place);
        match home(from) {
            (tier, frame) if tier == placement.compute => {
                let mut compute = self.computing();
                let to = &mut place.bytes_mut()[..bytes];
                fixed.device.copy_out(&compute.frames().memory, &mut [(frame * bytes, to)])?;
                fixed.device.finish()?;
            }
            (Tier::Disk, frame) => {
                let disk = shared.kv_disk.as_ref().expect("pages on disk have a file");
                let buffer = &mut place.bytes_mut()[..bytes];
                queue.read(&mut [Read { file: disk, offset: (frame * bytes) as u64, buffer }])?;
            }
            (_, frame) => place.bytes_mut().copy_from_slice(memory::read(&shared.kv_cpu[frame]).bytes()),
        }
        match home(to) {
            (tier, frame) if tier == placement.compute => {
                let mut compute = self.computing();
                fixed.device.copy_in(&[(&place.bytes()[..bytes], frame * bytes)], &mut compute.frames().memory)?;
                fixed.device.finish()?;
            }
            (Tier::Disk, frame) => {
                let disk = shared.kv_disk.as_ref().expect("pages on disk have a file");
                queue.write(&[Write {
                    file: disk,
                    offset: (frame * bytes) as u64,
                    buffer: &place.bytes()[..bytes],
                }])?;
            }
            (_, frame) => memory::write(&shared.kv_cpu[frame]).bytes_mut().copy_from_slice(place.bytes()),
        }
        Ok(())
    }
}
