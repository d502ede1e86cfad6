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

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

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

    /// Copies pages to other ones, all layers, wherever they live.
    ///
    /// # Errors
    /// What the disk or the device gives.
    pub fn copy_pages(&mut self, pairs: &[(PageId, PageId)]) -> Result<()> {
        let placement = self.placement();
        let resident = |page: PageId| placement.page_tier(page as usize) == placement.compute;
        let (near, far): (Vec<_>, Vec<_>) = pairs.iter().partition(|(from, to)| resident(*from) && resident(*to));
        // What was stored must have arrived; nothing else touches pages between passes. Links are held to rates one
        // step at a time.
        self.lanes.wait(self.until(if far.is_empty() { &[Lane::D2h, Lane::DiskWrite] } else { &Lane::ALL }))?;
        let workshop = self.lanes.workshop();
        for (from, to) in near {
            self.computing().copy_page(&workshop.fixed.device, &workshop.fixed.placement, from as usize, to as usize);
        }
        workshop.fixed.device.finish()?;
        if far.is_empty() {
            return Ok(());
        }
        let mut queue = DiskQueue::new(DEPTH, How::Auto)?;
        let placement = &workshop.fixed.placement;
        let layers = 0..placement.num_layers;
        let frames: Vec<_> = far.iter().flat_map(|&(from, to)| layers.clone().map(move |at| (at, from, to))).collect();
        frames.chunks(placement.copied_frames()).try_for_each(|part| self.copy_far(part, &mut queue))
    }

    /// Copies layers of pages (a layer, from, to) through main memory, as many as there is room for.
    fn copy_far(&self, part: &[(usize, PageId, PageId)], queue: &mut DiskQueue) -> Result<()> {
        let Workshop { fixed, shared, .. } = self.lanes.workshop();
        let placement = &fixed.placement;
        let bytes = placement.frame as usize;
        let place = shared.frames.as_ref().expect("placements whose pages may be copied so have room for it");
        let mut place = memory::write(place);
        let place = &mut place.bytes_mut()[..part.len() * bytes];
        let link = (placement.compute == Tier::Gpu).then_some([Lane::D2h, Lane::H2d]);
        let offset = |layer: usize, page: PageId| bytes * placement.frame_of(layer, page as usize);
        let start = Instant::now();
        let (mut near, mut on_disk) = (Vec::new(), Vec::new());
        for (&(layer, from, _), to) in part.iter().zip(place.chunks_exact_mut(bytes)) {
            let offset = offset(layer, from);
            match placement.page_tier(from as usize) {
                tier if tier == placement.compute => near.push((offset, to)),
                Tier::Disk => on_disk.push((offset, to)),
                _ => to.copy_from_slice(memory::read(&shared.kv_cpu[offset / bytes]).bytes()),
            }
        }
        if !near.is_empty() {
            fixed.device.copy_out(&self.computing().frames().memory, &mut near)?;
            fixed.device.finish()?;
            link.into_iter().for_each(|[out, _]| self.lanes.moved(out, (near.len() * bytes) as u64, start));
        }
        if !on_disk.is_empty() {
            let (file, start) = (shared.kv_disk.as_ref().expect("pages on disk have a file"), Instant::now());
            let moved = (on_disk.len() * bytes) as u64;
            let read = |(offset, buffer)| Read { file, offset: offset as u64, buffer };
            queue.read(&mut on_disk.into_iter().map(read).collect::<Vec<_>>())?;
            self.lanes.moved(Lane::DiskRead, moved, start);
        }
        let start = Instant::now();
        // Of what goes to disk: bytes of the place, and where they go.
        let (mut near, mut on_disk) = (Vec::new(), Vec::<(Range<usize>, usize)>::new());
        for (index, &(layer, _, to)) in part.iter().enumerate() {
            let (offset, from) = (offset(layer, to), index * bytes);
            let buffer = &place[from..from + bytes];
            match placement.page_tier(to as usize) {
                tier if tier == placement.compute => near.push((buffer, offset)),
                // What is next to each other here and there is written at once: whole pages of who is paused.
                Tier::Disk => match on_disk.last_mut() {
                    Some((bytes, at)) if bytes.end == from && *at + bytes.len() == offset => bytes.end += buffer.len(),
                    _ => on_disk.push((from..from + buffer.len(), offset)),
                },
                _ => memory::write(&shared.kv_cpu[offset / bytes]).bytes_mut().copy_from_slice(buffer),
            }
        }
        if !near.is_empty() {
            fixed.device.copy_in(&near, &mut self.computing().frames().memory)?;
            fixed.device.finish()?;
            link.into_iter().for_each(|[_, into]| self.lanes.moved(into, (near.len() * bytes) as u64, start));
        }
        if !on_disk.is_empty() {
            let (file, start) = (shared.kv_disk.as_ref().expect("pages on disk have a file"), Instant::now());
            let moved = on_disk.iter().map(|(bytes, _)| bytes.len() as u64).sum();
            let write = |(bytes, offset)| Write { file, offset: offset as u64, buffer: &place[bytes] };
            queue.write(&on_disk.into_iter().map(write).collect::<Vec<_>>())?;
            self.lanes.moved(Lane::DiskWrite, moved, start);
        }
        Ok(())
    }
}
