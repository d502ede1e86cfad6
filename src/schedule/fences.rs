//! Which steps of other lanes a step waits for.
//!
//! A lane runs its steps in order, so "steps that must be over" is one count per lane: a fence. Read-after-write,
//! write-after-read and write-after-write all follow from the slots that steps name; the checker, the simulator and
//! the executor use the fences made here and know no other rule.
//!
//! **Invariant:** the fences of a step list make any interleaving of the lanes equivalent to the list itself.

use ahash::AHashMap;

use super::step::{Lane, Slot, Step};

/// How many steps of each lane (in the order of [`Lane::ALL`]) must be over before a step may start.
pub type Fence = [u64; Lane::ALL.len()];

/// Who used a slot: counts of steps per lane, one past the last user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Users {
    writers: Fence,
    readers: Fence,
}

/// Carries slot users from pass to pass.
#[derive(Clone, Debug, Default)]
pub struct Fences {
    slots: AHashMap<Slot, Users>,
    issued: Fence,
}

impl Fences {
    /// Nothing has run.
    pub fn new() -> Self {
        Fences::default()
    }

    /// Steps of each lane so far.
    pub fn issued(&self) -> Fence {
        self.issued
    }

    /// The fence of the next step of the list.
    pub fn next(&mut self, step: &Step) -> Fence {
        let mut fence = Fence::default();
        let mut wait = |users: Fence| fence.iter_mut().zip(users).for_each(|(fence, user)| *fence = user.max(*fence));
        for slot in step.reads.iter() {
            wait(self.slots.entry(slot).or_default().writers);
        }
        for slot in step.writes.iter() {
            let users = self.slots.entry(slot).or_default();
            wait(users.writers);
            wait(users.readers);
        }
        let lane = step.lane.index();
        // Its own lane runs in order anyway.
        fence[lane] = self.issued[lane];
        self.issued[lane] += 1;
        let done = self.issued[lane];
        for slot in step.reads.iter() {
            self.slots.entry(slot).or_default().readers[lane] = done;
        }
        for slot in step.writes.iter() {
            self.slots.entry(slot).or_default().writers[lane] = done;
        }
        fence
    }

    /// The fences of a list of steps.
    pub fn of(&mut self, steps: &[Step]) -> Vec<Fence> {
        steps.iter().map(|step| self.next(step)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::step::{Op, Slots};

    fn step(lane: Lane, reads: &[Slot], writes: &[Slot]) -> Step {
        let slots = |slots: &[Slot]| slots.iter().fold(Slots::none(), |all, &slot| all.and(slot));
        Step { lane, op: Op::Layer, stage: 0, block: 0, reads: slots(reads), writes: slots(writes), bytes: 0 }
    }

    #[test]
    fn all_three_hazards_make_fences() {
        let (w, kv) = (Slot::Weights(0), Slot::Kv(0));
        let steps = [
            step(Lane::H2d, &[], &[w]),
            step(Lane::Gpu, &[w], &[kv]),
            step(Lane::D2h, &[kv], &[]),
            step(Lane::H2d, &[], &[w]),
            step(Lane::DiskRead, &[], &[kv]),
        ];
        let fences = Fences::new().of(&steps);
        let waits = |index: usize, lane: Lane| fences[index][lane.index()];
        assert_eq!(fences[0], Fence::default());
        assert_eq!(waits(1, Lane::H2d), 1, "read after write");
        assert_eq!(waits(2, Lane::Gpu), 1, "read after write");
        assert_eq!((waits(3, Lane::Gpu), waits(3, Lane::H2d)), (1, 1), "write after read");
        assert_eq!((waits(4, Lane::Gpu), waits(4, Lane::D2h)), (1, 1), "write after write and after read");
    }
}
