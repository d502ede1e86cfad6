//! A pass and a placement to a list of steps.
//!
//! Weights of the stages to come are brought in slices, spread over all blocks of the stage that computes, so that a
//! link never idles because one block is short. Pages and hidden states of the blocks to come are brought ahead as far
//! as there are slots. Places are used in turn over the whole job, not per pass, so the next pass's first stages load
//! while this one still samples.
//!
//! **Invariant:** taken one after the other, the steps are a correct program: whatever a step reads has been written
//! by an earlier one, and nothing is overwritten that a later one still needs. `check` holds the list to it.

use std::ops::Range;

use super::placement::Placement;
use super::shape::{BlockShape, Layers};
use super::step::{Lane, Op, Slot, Slots, Step};
use crate::error::Tier;

/// What one pass leaves to the next: how often each kind of place has been used.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Streamed stages that were computed.
    pub computed: u64,
    /// Streamed stages that were brought in, or are on their way.
    pub loaded: u64,
    /// Slices of weights between disk and device.
    pub staged: u64,
    /// Slices of compressed planes.
    pub planes: u64,
    /// Blocks times layers.
    pub items: u64,
    /// Transfers of pages between disk and device.
    pub kv_staged: u64,
    /// Transfers of hidden states between disk and device.
    pub hidden_staged: u64,
    /// Of every layer, which of the two places that stand for its pages in main memory, and on disk, was not stored into
    /// last.
    kv_homes: Vec<[u32; 2]>,
}

/// Lowers one pass of `blocks`.
pub fn lower<'a>(placement: &'a Placement, blocks: impl Into<Layers<'a>>, carried: &'a mut Carried) -> Vec<Step> {
    let blocks = blocks.into();
    let stages = placement.stages.iter().enumerate();
    let streamed = stages.filter(|(_, stage)| !stage.streamed().is_empty()).map(|(index, _)| index).collect();
    carried.kv_homes.resize(placement.num_layers, [0; 2]);
    let stored = vec![[false; 2]; placement.num_layers];
    let mut lowering = Lowering { placement, blocks, streamed, carried, stored, steps: Vec::new() };
    lowering.pass();
    lowering.steps
}

struct Lowering<'a> {
    placement: &'a Placement,
    blocks: Layers<'a>,
    /// Stages with streamed chunks, in order.
    streamed: Vec<usize>,
    carried: &'a mut Carried,
    /// Into which tiers pages of a layer were stored in this pass.
    stored: Vec<[bool; 2]>,
    steps: Vec<Step>,
}

/// Where a step belongs in the pass.
#[derive(Clone, Copy)]
struct Place {
    stage: usize,
    block: usize,
}

impl Lowering<'_> {
    fn pass(&mut self) {
        let count = self.count();
        let items = self.placement.num_layers * count;
        let ahead = self.kv_slots() - 1;
        self.catch_up(self.placement.policy.weight_slots as u64 - 1);
        (0..ahead.min(items)).for_each(|item| self.load_kv(item));
        for stage in 0..self.placement.num_layers {
            self.begin_stage(stage);
            for block in 0..count {
                let item = stage * count + block;
                if item + ahead < items {
                    self.load_kv(item + ahead);
                }
                let hidden = item + ahead.min(count - 1);
                if hidden >= count && hidden < items {
                    self.load_hidden(hidden);
                }
                self.bring_weights(stage, block, count);
                if stage == 0 {
                    self.embed(item);
                }
                self.layer(item);
                self.store_kv(item);
                if stage + 1 < self.placement.num_layers {
                    self.store_hidden(item);
                } else if self.blocks.at(stage)[block].outputs > 0 {
                    let reads = self.hidden_slot(item);
                    self.compute(Op::Gather, Place { stage, block }, reads, Slots::none());
                }
            }
            self.end_stage(stage);
        }
        self.head();
        self.carried.items += items as u64;
        for (homes, stored) in self.carried.kv_homes.iter_mut().zip(&self.stored) {
            homes.iter_mut().zip(stored).for_each(|(home, &stored)| *home ^= u32::from(stored));
        }
    }

    /// Logits, part by part where the head is streamed.
    fn head(&mut self) {
        let first = self.placement.num_layers;
        if self.placement.head_resident {
            if self.blocks.at(first).iter().any(|block| block.outputs > 0) {
                self.compute(Op::Head, Place { stage: first, block: 0 }, Slots::none(), Slots::none());
            }
            return;
        }
        for stage in first..self.placement.stages.len() {
            self.begin_stage(stage);
            self.bring_weights(stage, 0, 1);
            let reads = self.weights(stage);
            self.compute(Op::Head, Place { stage, block: 0 }, reads, Slots::none());
            self.end_stage(stage);
        }
    }

    // Weights

    /// Brings in whole stages until `ahead` are there or on their way beside those that were computed.
    fn catch_up(&mut self, ahead: u64) {
        while !self.streamed.is_empty() && self.carried.loaded < self.carried.computed + ahead {
            self.slices(0, 1);
            self.carried.loaded += 1;
        }
    }

    fn is_streamed(&self, stage: usize) -> bool {
        !self.placement.stages[stage].streamed().is_empty()
    }

    fn begin_stage(&mut self, stage: usize) {
        if self.is_streamed(stage) {
            // With a single slot nothing can come ahead.
            self.catch_up(1);
        }
    }

    /// Block `block`'s share of the weights that come while `stage` computes.
    fn bring_weights(&mut self, stage: usize, block: usize, blocks: usize) {
        let slots = self.placement.policy.weight_slots as u64;
        if self.is_streamed(stage) && self.carried.loaded < self.carried.computed + slots {
            self.slices(block, blocks);
            if block + 1 == blocks {
                self.carried.loaded += 1;
            }
        }
    }

    fn end_stage(&mut self, stage: usize) {
        if self.is_streamed(stage) {
            self.carried.computed += 1;
        }
    }

    /// The slot of the stage that computes.
    fn weights(&self, stage: usize) -> Slots {
        match self.is_streamed(stage) {
            true => Slot::Weights((self.carried.computed % self.placement.policy.weight_slots as u64) as u32).into(),
            false => Slots::none(),
        }
    }

    /// Part `part` of `parts` of the next stage to be brought in.
    fn slices(&mut self, part: usize, parts: usize) {
        let index = self.streamed[(self.carried.loaded % self.streamed.len() as u64) as usize];
        let stage = &self.placement.stages[index];
        let slot = Slot::Weights((self.carried.loaded % self.placement.policy.weight_slots as u64) as u32);
        let (all, place) = (stage.streamed(), Place { stage: index, block: part });
        let cut = |part: usize| all.start + part * all.len() / parts;
        let share = cut(part)..cut(part + 1);
        let within = |range: Range<usize>| share.start.max(range.start)..share.end.min(range.end);
        let from_cpu = within(stage.from_cpu());
        if !from_cpu.is_empty() {
            let bytes = stage.bytes(from_cpu.clone());
            self.step(Lane::H2d, load_weights(&from_cpu), place, Slots::none(), slot.into(), bytes);
        }
        let mut rest = within(stage.from_disk());
        while !rest.is_empty() {
            let slice = self.slice(index, &rest);
            rest.start = slice.end;
            self.slice_from_disk(slice, place, slot);
        }
    }

    /// As many of `chunks` as one step brings.
    fn slice(&self, stage: usize, chunks: &Range<usize>) -> Range<usize> {
        let staging = self.placement.weight_staging;
        let ring = if self.placement.policy.compressed { self.placement.planes } else { staging };
        if ring.count == 0 {
            return chunks.clone();
        }
        let sizes = &self.placement.stages[stage].chunks;
        let (mut end, mut bytes) = (chunks.start, 0);
        while end < chunks.end && (end == chunks.start || bytes + sizes[end] <= ring.bytes) {
            bytes += sizes[end];
            end += 1;
        }
        chunks.start..end
    }

    fn slice_from_disk(&mut self, slice: Range<usize>, place: Place, slot: Slot) {
        let bytes = self.placement.stages[place.stage].bytes(slice.clone());
        let (from, to) = (slice.start as u32, slice.end as u32);
        let read = Op::ReadWeights { from, to };
        let device = self.has_device();
        let target = match device {
            true => Slot::WeightsStaging(turn(&mut self.carried.staged, self.placement.weight_staging.count)),
            false => slot,
        };
        if self.placement.policy.compressed {
            let planes = Slot::Planes(turn(&mut self.carried.planes, self.placement.planes.count));
            self.step(Lane::DiskRead, read, place, Slots::none(), planes.into(), bytes);
            self.step(Lane::Cpu, Op::DecodeWeights { from, to }, place, planes.into(), target.into(), bytes);
        } else {
            self.step(Lane::DiskRead, read, place, Slots::none(), target.into(), bytes);
        }
        if device {
            self.step(Lane::H2d, load_weights(&slice), place, target.into(), slot.into(), bytes);
        }
    }

    // Pages

    fn kv_slots(&self) -> usize {
        self.placement.policy.kv_slots.max(1)
    }

    /// Blocks of the pass.
    fn count(&self) -> usize {
        self.blocks.at(0).len()
    }

    fn place(&self, item: usize) -> Place {
        Place { stage: item / self.count(), block: item % self.count() }
    }

    fn block(&self, place: Place) -> &BlockShape {
        &self.blocks.at(place.stage)[place.block]
    }

    fn turn_of(&self, item: usize) -> u32 {
        ((self.carried.items + item as u64) % self.kv_slots() as u64) as u32
    }

    /// The pages of a layer in a tier as the last pass left them that stored any. A pass that stores none changes nothing:
    /// what an earlier one stored must still be waited for.
    fn kv_home(&self, tier: Tier, stage: usize) -> Slot {
        Slot::KvHome(tier, stage as u32, 1 - self.carried.kv_homes[stage][usize::from(tier == Tier::Disk)])
    }

    /// The pages of a layer in a tier as this pass leaves them.
    fn new_kv_home(&mut self, tier: Tier, stage: usize) -> Slot {
        let tier_index = usize::from(tier == Tier::Disk);
        self.stored[stage][tier_index] = true;
        Slot::KvHome(tier, stage as u32, self.carried.kv_homes[stage][tier_index])
    }

    fn kv_staging(&mut self) -> Slot {
        Slot::KvStaging(turn(&mut self.carried.kv_staged, self.placement.kv_staging.count))
    }

    fn load_kv(&mut self, item: usize) {
        let place = self.place(item);
        let (loads, slot) = (self.block(place).loads, Slot::Kv(self.turn_of(item)));
        let bytes = |pages: usize| pages as u64 * self.placement.frame;
        let (cpu, disk) = (bytes(loads.cpu), bytes(loads.disk));
        if cpu > 0 {
            let home = self.kv_home(Tier::Cpu, place.stage);
            self.step(Lane::H2d, Op::LoadKv, place, home.into(), slot.into(), cpu);
        }
        if disk > 0 {
            let home = self.kv_home(Tier::Disk, place.stage);
            let staging = self.has_device().then(|| self.kv_staging());
            self.bring((Op::ReadKv, Op::LoadKv), place, [home, slot], staging, disk);
        }
    }

    fn store_kv(&mut self, item: usize) {
        let place = self.place(item);
        let (stores, slot) = (self.block(place).stores, Slot::Kv(self.turn_of(item)));
        let bytes = |pages: usize| pages as u64 * self.placement.frame;
        let (cpu, disk) = (bytes(stores.cpu), bytes(stores.disk));
        if cpu > 0 {
            let home = self.new_kv_home(Tier::Cpu, place.stage);
            self.step(Lane::D2h, Op::StoreKv, place, slot.into(), home.into(), cpu);
        }
        if disk > 0 {
            let home = self.new_kv_home(Tier::Disk, place.stage);
            let staging = self.has_device().then(|| self.kv_staging());
            self.put_away((Op::StoreKv, Op::WriteKv), place, [slot, home], staging, disk);
        }
    }

    // Hidden states

    /// The slot of an item's hidden state; none where it stays with the device.
    fn hidden_slot(&self, item: usize) -> Slots {
        let elsewhere = self.placement.hidden[self.place(item).block] != self.placement.compute;
        if elsewhere { Slot::Hidden(self.turn_of(item)).into() } else { Slots::none() }
    }

    fn hidden_bytes(&self, place: Place) -> u64 {
        self.block(place).rows as u64 * self.placement.hidden_row
    }

    fn hidden_staging(&mut self) -> Slot {
        Slot::HiddenStaging(turn(&mut self.carried.hidden_staged, self.placement.hidden_staging.count))
    }

    fn load_hidden(&mut self, item: usize) {
        let place = self.place(item);
        let (home, slot) = (Slot::HiddenHome(place.block as u32), Slot::Hidden(self.turn_of(item)));
        let bytes = self.hidden_bytes(place);
        match self.placement.hidden[place.block] {
            tier if tier == self.placement.compute => {}
            Tier::Disk => {
                let staging = self.has_device().then(|| self.hidden_staging());
                self.bring((Op::ReadHidden, Op::LoadHidden), place, [home, slot], staging, bytes);
            }
            _ => self.step(Lane::H2d, Op::LoadHidden, place, home.into(), slot.into(), bytes),
        }
    }

    fn store_hidden(&mut self, item: usize) {
        let place = self.place(item);
        let (home, slot) = (Slot::HiddenHome(place.block as u32), Slot::Hidden(self.turn_of(item)));
        let bytes = self.hidden_bytes(place);
        match self.placement.hidden[place.block] {
            tier if tier == self.placement.compute => {}
            Tier::Disk => {
                let staging = self.has_device().then(|| self.hidden_staging());
                self.put_away((Op::StoreHidden, Op::WriteHidden), place, [slot, home], staging, bytes);
            }
            _ => self.step(Lane::D2h, Op::StoreHidden, place, slot.into(), home.into(), bytes),
        }
    }

    // The disk

    /// Whether things computed lie in a memory of their own, so that what goes between it and the disk passes through
    /// main memory.
    fn has_device(&self) -> bool {
        self.placement.compute == Tier::Gpu
    }

    fn bring(&mut self, ops: (Op, Op), place: Place, [from, to]: [Slot; 2], staging: Option<Slot>, bytes: u64) {
        let read = staging.unwrap_or(to);
        self.step(Lane::DiskRead, ops.0, place, from.into(), read.into(), bytes);
        if let Some(staging) = staging {
            self.step(Lane::H2d, ops.1, place, staging.into(), to.into(), bytes);
        }
    }

    fn put_away(&mut self, ops: (Op, Op), place: Place, [from, to]: [Slot; 2], staging: Option<Slot>, bytes: u64) {
        if let Some(staging) = staging {
            self.step(Lane::D2h, ops.0, place, from.into(), staging.into(), bytes);
        }
        self.step(Lane::DiskWrite, ops.1, place, staging.unwrap_or(from).into(), to.into(), bytes);
    }

    // Computation

    fn embed(&mut self, item: usize) {
        let place = self.place(item);
        let mut reads = Slots::none();
        if self.placement.embed != self.placement.compute {
            let lane = if self.placement.embed == Tier::Disk { Lane::DiskRead } else { Lane::H2d };
            let bytes = self.block(place).rows as u64 * self.placement.hidden_row;
            self.step(lane, Op::LoadEmbeddings, place, Slots::none(), Slot::Embeddings.into(), bytes);
            reads = Slot::Embeddings.into();
        }
        let writes = self.hidden_slot(item);
        self.compute(Op::Embed, place, reads, writes);
    }

    fn layer(&mut self, item: usize) {
        let place = self.place(item);
        let block = *self.block(place);
        let (mut reads, mut writes) = (self.weights(place.stage), Slots::none());
        if block.loads.total() > 0 {
            reads = reads.and(Slot::Kv(self.turn_of(item)));
        }
        if block.stores.total() > 0 {
            writes = writes.and(Slot::Kv(self.turn_of(item)));
        }
        for slot in self.hidden_slot(item).iter() {
            (reads, writes) = (reads.and(slot), writes.and(slot));
        }
        self.compute(Op::Layer, place, reads, writes);
    }

    fn compute(&mut self, op: Op, place: Place, reads: Slots, writes: Slots) {
        let lane = if self.placement.compute == Tier::Gpu { Lane::Gpu } else { Lane::Cpu };
        self.step(lane, op, place, reads, writes, 0);
    }

    fn step(&mut self, lane: Lane, op: Op, place: Place, reads: Slots, writes: Slots, bytes: u64) {
        let (stage, block) = (place.stage as u32, place.block as u32);
        self.steps.push(Step { lane, op, stage, block, reads, writes, bytes });
    }
}

fn load_weights(chunks: &Range<usize>) -> Op {
    Op::LoadWeights { from: chunks.start as u32, to: chunks.end as u32 }
}

/// The next place of a ring of `count`.
fn turn(used: &mut u64, count: usize) -> u32 {
    let place = *used % count as u64;
    *used += 1;
    place as u32
}
