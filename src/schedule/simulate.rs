//! A schedule in time, before it runs.
//!
//! Lanes run in order; a step starts when its fence is met. Running steps share cores, main memory, the link and the
//! disk as a fluid: all go equally fast until something is used up, what uses it stays at that speed, the others go on
//! (progressive filling), and nobody goes faster than alone.
//!
//! **Invariant:** the result is never below what any lane or shared resource takes in total, and no step waits for
//! anything but its lane, its fence and shares of what is used up.

use super::fences::Fence;
use super::price::Resources;
use super::step::{Lane, Step};
use crate::cost::Work;

const LANES: usize = Lane::ALL.len();
const SHARED: usize = 4;

/// When a step runs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// Seconds after the first step could start.
    pub start_secs: f64,
    /// When it is over.
    pub end_secs: f64,
}

/// A schedule in time.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// For each step of the list.
    pub spans: Vec<Span>,
    /// Seconds that each lane has a running step.
    pub busy_secs: [f64; LANES],
    /// When everything is over.
    pub secs: f64,
}

/// A step that runs.
#[derive(Clone, Copy)]
struct Running {
    step: usize,
    /// Seconds left at full speed.
    left: f64,
    /// Shares of each resource that it uses at full speed.
    uses: [f64; SHARED],
}

/// The timeline of steps that all become known at once. `fences` are those of [`super::fences::Fences::of`] from the
/// beginning; `works` what each step takes.
///
/// # Panics
/// If a fence waits for steps that the list does not have.
pub fn simulate(steps: &[Step], fences: &[Fence], works: &[Work], resources: &Resources) -> Timeline {
    assert!(steps.len() == fences.len() && steps.len() == works.len());
    let mut queues: [Vec<usize>; LANES] = Default::default();
    for (index, step) in steps.iter().enumerate() {
        queues[step.lane.index()].push(index);
    }
    let mut timeline = Timeline { spans: vec![Span::default(); steps.len()], busy_secs: [0.0; LANES], secs: 0.0 };
    let mut running: [Option<Running>; LANES] = [None; LANES];
    let mut done = Fence::default();
    let mut now = 0.0;
    loop {
        for (lane, queue) in queues.iter().enumerate() {
            let Some(&step) = queue.get(done[lane] as usize) else { continue };
            if running[lane].is_none() && fences[step].iter().zip(&done).all(|(fence, done)| fence <= done) {
                running[lane] = Some(start(step, &works[step], resources));
                timeline.spans[step].start_secs = now;
            }
        }
        if running.iter().all(Option::is_none) {
            break;
        }
        let speeds = speeds(&running);
        let times = running.iter().zip(speeds).filter_map(|(step, speed)| step.map(|step| step.left / speed));
        let time = times.fold(f64::INFINITY, f64::min);
        now += time;
        for lane in 0..LANES {
            let Some(step) = &mut running[lane] else { continue };
            timeline.busy_secs[lane] += time;
            let over = step.left / speeds[lane] <= time * (1.0 + 1e-12);
            step.left -= time * speeds[lane];
            if over {
                timeline.spans[step.step].end_secs = now;
                running[lane] = None;
                done[lane] += 1;
            }
        }
    }
    assert!(queues.iter().zip(done).all(|(queue, done)| queue.len() as u64 == done), "a fence that nothing meets");
    timeline.secs = now;
    timeline
}

fn start(step: usize, work: &Work, resources: &Resources) -> Running {
    let shared = resources.secs(work);
    // Alone, a step cannot use more of anything than there is.
    let left = shared.into_iter().fold(work.lane_secs, f64::max);
    let uses = shared.map(|secs| if left > 0.0 { secs / left } else { 0.0 });
    Running { step, left, uses }
}

/// The speed of every running step, 1 being that of the step alone.
fn speeds(running: &[Option<Running>; LANES]) -> [f64; LANES] {
    let mut speeds = [1.0; LANES];
    let mut open = running.map(|step| step.is_some());
    let mut free = [1.0; SHARED];
    loop {
        let mut wanted = [0.0; SHARED];
        for (step, open) in running.iter().zip(open) {
            if let (Some(step), true) = (step, open) {
                wanted.iter_mut().zip(step.uses).for_each(|(wanted, uses)| *wanted += uses);
            }
        }
        let tight = (0..SHARED)
            .filter(|&index| wanted[index] > free[index] * (1.0 + 1e-12))
            .min_by(|&a, &b| (free[a] / wanted[a]).total_cmp(&(free[b] / wanted[b])));
        let Some(tight) = tight else { return speeds };
        let speed = free[tight] / wanted[tight];
        for lane in 0..LANES {
            let Some(step) = running[lane].filter(|step| open[lane] && step.uses[tight] > 0.0) else { continue };
            speeds[lane] = speed;
            open[lane] = false;
            free.iter_mut().zip(step.uses).for_each(|(free, uses)| *free = (*free - uses * speed).max(0.0));
        }
        // What is used up stays so; whoever still needs it has been slowed down.
        free[tight] = free[tight].max(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;
    use crate::schedule::fences::Fences;
    use crate::schedule::step::{Op, Slot, Slots};

    const RESOURCES: Resources = Resources { cores: 2.0, dram_bytes_per_s: 10.0 };

    fn step(lane: Lane, reads: &[Slot], writes: &[Slot]) -> Step {
        let slots = |slots: &[Slot]| slots.iter().fold(Slots::none(), |all, &slot| all.and(slot));
        Step { lane, op: Op::Layer, stage: 0, block: 0, reads: slots(reads), writes: slots(writes), bytes: 0 }
    }

    fn lane_work(lane_secs: f64) -> Work {
        Work { lane_secs, ..Work::default() }
    }

    fn run(steps: &[Step], works: &[Work]) -> Timeline {
        simulate(steps, &Fences::new().of(steps), works, &RESOURCES)
    }

    #[test]
    fn lanes_overlap_and_fences_hold() {
        let w = |index: u32| Slot::Weights(index);
        let steps = [
            step(Lane::H2d, &[], &[w(0)]),
            step(Lane::Gpu, &[w(0)], &[]),
            step(Lane::H2d, &[], &[w(1)]),
            step(Lane::Gpu, &[w(1)], &[]),
            step(Lane::H2d, &[], &[w(0)]),
            step(Lane::Gpu, &[w(0)], &[]),
        ];
        let timeline = run(&steps, &[2.0, 3.0, 2.0, 3.0, 2.0, 3.0].map(lane_work));
        let starts: Vec<f64> = timeline.spans.iter().map(|span| span.start_secs).collect();
        // The third load waits for the first slot's reader.
        assert_eq!(starts, [0.0, 2.0, 2.0, 5.0, 5.0, 8.0]);
        assert_eq!((timeline.secs, timeline.busy_secs[Lane::H2d.index()]), (11.0, 6.0));
    }

    #[test]
    fn what_is_shared_slows_those_that_use_it() {
        // Two cores are wanted by one lane and one by another: both go at 2/3 until the copy is over.
        let steps = [step(Lane::Gpu, &[], &[]), step(Lane::H2d, &[], &[]), step(Lane::DiskRead, &[], &[])];
        let works = [
            Work { lane_secs: 3.0, core_secs: 6.0, ..Work::default() },
            Work { lane_secs: 1.0, core_secs: 1.0, ..Work::default() },
            Work { lane_secs: 1.0, dram_bytes: 5.0, ..Work::default() },
        ];
        let timeline = run(&steps, &works);
        let ends: Vec<f64> = timeline.spans.iter().map(|span| span.end_secs).collect();
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(ends[1], 1.5) && near(ends[2], 1.0) && near(ends[0], 3.5), "{ends:?}");
    }

    #[test]
    fn everything_dependent_takes_the_sum() {
        let slot = Slot::Embeddings;
        let lanes = [Lane::Gpu, Lane::H2d, Lane::Cpu, Lane::DiskRead, Lane::Gpu];
        let steps = lanes.map(|lane| step(lane, &[slot], &[slot]));
        let works = [1.0, 2.0, 3.0, 4.0, 5.0].map(lane_work);
        assert!((run(&steps, &works).secs - 15.0).abs() < 1e-9);
    }

    #[test]
    fn steps_without_work_take_no_time() {
        let steps =
            [step(Lane::Gpu, &[], &[]), step(Lane::Gpu, &[], &[Slot::Kv(0)]), step(Lane::Cpu, &[Slot::Kv(0)], &[])];
        assert_eq!(run(&steps, &[0.0, 0.0, 1.0].map(lane_work)).secs, 1.0);
    }

    #[test]
    fn never_below_a_lane_or_a_resource_and_never_idle_for_nothing() {
        for case in 0..300 {
            let rng = Philox::new(case, 7);
            let draw = |index: u64| rng.uniform(index);
            let count = 5 + (draw(0) * 60.0) as u64;
            let mut steps = Vec::new();
            let mut works = Vec::new();
            for index in 0..count {
                let at = 1 + index * 10;
                let slot = |offset: u64| Slot::Kv((draw(at + offset) * 5.0) as u32);
                let lane = Lane::ALL[(draw(at) * 6.0) as usize];
                steps.push(step(lane, &[slot(1)], &[slot(2)]));
                let some = |offset: u64, scale: f64| (draw(at + offset) - 0.4).max(0.0) * scale;
                let dram_bytes = some(5, 20.0);
                works.push(Work {
                    lane_secs: some(3, 2.0),
                    core_secs: some(4, 4.0),
                    dram_bytes,
                    link_secs: some(6, 1.0),
                    disk_secs: some(7, 1.0),
                });
            }
            let timeline = run(&steps, &works);
            let alone = |index: usize| start(index, &works[index], &RESOURCES).left;
            let mut lanes = [0.0; LANES];
            let mut shared = [0.0; SHARED];
            for (index, step) in steps.iter().enumerate() {
                lanes[step.lane.index()] += alone(index);
                shared.iter_mut().zip(RESOURCES.secs(&works[index])).for_each(|(sum, secs)| *sum += secs);
                let span = timeline.spans[index];
                assert!(span.end_secs - span.start_secs >= alone(index) - 1e-9);
            }
            let least = lanes.into_iter().chain(shared).fold(0.0, f64::max);
            let sum: f64 = (0..steps.len()).map(alone).sum();
            assert!(timeline.secs >= least - 1e-9, "case {case}");
            assert!(timeline.secs <= sum + 1e-9, "case {case}: sharing is never slower than one after the other");
        }
    }
}
