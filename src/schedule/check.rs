//! Whether a list of steps is a correct program, and stays one when lanes overlap.
//!
//! **Invariant:** nothing here is shared with the code that lowers or fences: contents of slots are followed one step
//! after the other, and orders are derived from the fences alone.

use std::collections::{BTreeMap, BTreeSet};

use super::fences::Fence;
use super::placement::Placement;
use super::shape::{BlockShape, Layers};
use super::step::{Lane, Op, Slot, Step};
use crate::error::Tier;

/// What a slot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    /// Chunks of a stage.
    Chunks(u32, BTreeSet<u32>),
    /// What a layer needs of a block.
    Before(u32, u32),
    /// What a layer made of a block.
    After(u32, u32),
}

/// Follows contents of slots over passes.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    slots: BTreeMap<Slot, Content>,
    /// Bytes of pages and hidden states in a slot, from each source.
    brought: BTreeMap<Slot, u64>,
    /// Where pages of a tier and a layer were stored last, and before this pass.
    homes: BTreeMap<(Tier, u32), Slot>,
    homes_before: BTreeMap<(Tier, u32), Slot>,
}

/// A step that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The step's place in the list.
    pub index: usize,
    /// What is wrong.
    pub what: String,
}

impl Checker {
    /// Nothing has run.
    pub fn new() -> Self {
        Checker::default()
    }

    /// Checks one pass.
    ///
    /// # Errors
    /// The first step that reads what is not there, overwrites what is still needed, or is missing.
    pub fn pass<'a>(
        &mut self,
        placement: &Placement,
        blocks: impl Into<Layers<'a>>,
        steps: &[Step],
    ) -> Result<(), Fault> {
        let (blocks, mut layers) = (blocks.into(), 0);
        // Only weights come ahead of the pass that needs them.
        self.slots.retain(|slot, _| !matches!(slot, Slot::Kv(_) | Slot::Hidden(_) | Slot::Embeddings));
        self.brought.clear();
        self.homes_before = self.homes.clone();
        for (index, step) in steps.iter().enumerate() {
            self.step(placement, blocks, step).map_err(|what| Fault { index, what: format!("{what} in `{step}`") })?;
            layers += usize::from(step.op == Op::Layer);
        }
        let wanted = placement.num_layers * blocks.at(0).len();
        match layers == wanted {
            true => Ok(()),
            false => Err(Fault { index: steps.len(), what: format!("{layers} layer steps of {wanted}") }),
        }
    }

    fn step(&mut self, placement: &Placement, blocks: Layers<'_>, step: &Step) -> Result<(), String> {
        let block = blocks.at(step.stage as usize).get(step.block as usize);
        match step.op {
            Op::ReadWeights { from, to } | Op::LoadWeights { from, to } | Op::DecodeWeights { from, to } => {
                let chunks: BTreeSet<u32> = (from..to).collect();
                for source in step.reads.iter() {
                    let expected = Content::Chunks(step.stage, chunks.clone());
                    if self.slots.get(&source) != Some(&expected) {
                        return Err(format!("{source} does not hold these chunks"));
                    }
                }
                let target = step.writes.iter().next().ok_or("nothing is written")?;
                let partial = matches!(target, Slot::Weights(_));
                match self.slots.get_mut(&target) {
                    Some(Content::Chunks(stage, held)) if partial && *stage == step.stage => held.extend(chunks),
                    _ => drop(self.slots.insert(target, Content::Chunks(step.stage, chunks))),
                }
            }
            Op::ReadKv | Op::LoadKv | Op::ReadHidden | Op::LoadHidden => {
                let target = step.writes.iter().next().ok_or("nothing is written")?;
                let content = Content::Before(step.stage, step.block);
                for source in step.reads.iter() {
                    let home = matches!(source, Slot::KvHome(..));
                    let expected = match source {
                        // The hidden state that the layer before left.
                        Slot::HiddenHome(_) => Content::After(step.stage - 1, step.block),
                        _ => content.clone(),
                    };
                    if home {
                        self.settled(source)?;
                    } else if self.slots.get(&source) != Some(&expected) {
                        return Err(format!("{source} holds {:?}", self.slots.get(&source)));
                    }
                }
                if self.slots.insert(target, content.clone()) != Some(content) {
                    self.brought.remove(&target);
                }
                *self.brought.entry(target).or_default() += step.bytes;
            }
            Op::LoadEmbeddings => {
                self.slots.insert(Slot::Embeddings, Content::Before(0, step.block));
            }
            Op::Embed => {
                let loaded = self.slots.get(&Slot::Embeddings) == Some(&Content::Before(0, step.block));
                if placement.embed != placement.compute && !loaded {
                    return Err("the embeddings are not there".into());
                }
                for target in step.writes.iter() {
                    self.slots.insert(target, Content::Before(0, step.block));
                }
            }
            Op::Layer => self.layer(placement, block.ok_or("no such block")?, step)?,
            Op::Head => self.weights(placement, step)?,
            Op::Gather | Op::StoreKv | Op::WriteKv | Op::StoreHidden | Op::WriteHidden => {
                for source in step.reads.iter() {
                    if self.slots.get(&source) != Some(&Content::After(step.stage, step.block)) {
                        return Err(format!("{source} holds {:?}", self.slots.get(&source)));
                    }
                }
                for target in step.writes.iter() {
                    self.slots.insert(target, Content::After(step.stage, step.block));
                    if let Slot::KvHome(tier, stage, _) = target {
                        if self.homes_before.get(&(tier, stage)) == Some(&target) {
                            return Err(format!("loads of the same pass wait for {target}"));
                        }
                        self.homes.insert((tier, stage), target);
                    }
                }
            }
        }
        Ok(())
    }

    /// Whoever waits for `home` waits for all that earlier passes stored there.
    fn settled(&self, home: Slot) -> Result<(), String> {
        let Slot::KvHome(tier, stage, _) = home else { return Err(format!("pages do not live in {home}")) };
        match self.homes_before.get(&(tier, stage)) {
            Some(&last) if last != home => Err(format!("pages were stored into {last} since {home}")),
            _ => Ok(()),
        }
    }

    fn layer(&mut self, placement: &Placement, block: &BlockShape, step: &Step) -> Result<(), String> {
        self.weights(placement, step)?;
        let here = Content::Before(step.stage, step.block);
        let streams = placement.hidden[step.block as usize] != placement.compute;
        let (mut pages, mut hidden) = (0, false);
        for slot in step.reads.iter() {
            match slot {
                Slot::Kv(_) => {
                    if self.slots.get(&slot) != Some(&here) {
                        return Err(format!("{slot} holds {:?}", self.slots.get(&slot)));
                    }
                    // Pages in a slot are good for one layer.
                    pages = self.brought.remove(&slot).unwrap_or(0);
                }
                Slot::Hidden(_) => hidden = self.slots.get(&slot) == Some(&here),
                _ => {}
            }
        }
        let wanted = block.loads.total() as u64 * placement.frame;
        if pages != wanted {
            return Err(format!("{pages} bytes of pages were brought, {wanted} are read"));
        }
        if streams && !hidden {
            return Err("the hidden state is not there".into());
        }
        for slot in step.writes.iter() {
            self.slots.insert(slot, Content::After(step.stage, step.block));
        }
        Ok(())
    }

    /// All streamed chunks of the step's stage are in the slot that it reads.
    fn weights(&mut self, placement: &Placement, step: &Step) -> Result<(), String> {
        let Some(stage) = placement.stages.get(step.stage as usize) else { return Ok(()) };
        let wanted: BTreeSet<u32> = stage.streamed().map(|chunk| chunk as u32).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let slot = step.reads.iter().find(|slot| matches!(slot, Slot::Weights(_)));
        let slot = slot.ok_or("no weights are named")?;
        match self.slots.get(&slot) {
            Some(Content::Chunks(held, chunks)) if *held == step.stage && *chunks == wanted => Ok(()),
            other => Err(format!("{slot} holds {other:?}")),
        }
    }
}

/// Checks that fences order every two steps of different lanes that share a slot which one of them writes.
///
/// # Errors
/// The later step of the first pair that may overlap.
pub fn check_fences(steps: &[Step], fences: &[Fence], before: Fence) -> Result<(), Fault> {
    // Everything that is over before a step starts, over all lanes.
    let mut clocks: Vec<Fence> = Vec::with_capacity(steps.len());
    let mut on_lane: [Vec<usize>; Lane::ALL.len()] = Default::default();
    for (index, (step, fence)) in steps.iter().zip(fences).enumerate() {
        let lane = step.lane.index();
        let mut clock = *fence;
        clock[lane] = clock[lane].max(before[lane] + on_lane[lane].len() as u64);
        for other in 0..Lane::ALL.len() {
            // What the last of the awaited steps had behind it.
            let awaited = clock[other].saturating_sub(before[other]) as usize;
            if let Some(last) = awaited.checked_sub(1).and_then(|last| on_lane[other].get(last)) {
                let inherited: Fence = clocks[*last];
                clock.iter_mut().zip(inherited).for_each(|(clock, other)| *clock = other.max(*clock));
            }
        }
        clocks.push(clock);
        on_lane[lane].push(index);
    }
    let mut users: BTreeMap<Slot, Vec<(usize, bool)>> = BTreeMap::new();
    let mut position = [0u64; Lane::ALL.len()];
    let mut positions = Vec::with_capacity(steps.len());
    for (index, step) in steps.iter().enumerate() {
        let lane = step.lane.index();
        position[lane] += 1;
        positions.push(before[lane] + position[lane]);
        let reads = step.reads.iter().map(|slot| (slot, false));
        for (slot, writes) in reads.chain(step.writes.iter().map(|slot| (slot, true))) {
            let earlier = users.entry(slot).or_default();
            for &(other, wrote) in earlier.iter().filter(|&&(other, wrote)| other != index && (wrote || writes)) {
                let lane = steps[other].lane.index();
                if clocks[index][lane] < positions[other] {
                    let kind = if wrote { "written" } else { "read" };
                    let what = format!("`{step}` may run while {slot} is still {kind} by `{}`", steps[other]);
                    return Err(Fault { index, what });
                }
            }
            earlier.push((index, writes));
        }
    }
    Ok(())
}

/// Bytes of each tier that a placement takes beyond `budget`, as (tier, needed, granted).
pub fn over_budget(placement: &Placement, budget: [u64; 3]) -> Option<(Tier, u64, u64)> {
    let tiers = Tier::ALL.into_iter().zip(placement.bytes.into_iter().zip(budget));
    tiers.map(|(tier, (need, have))| (tier, need, have)).find(|(_, need, have)| need > have)
}
