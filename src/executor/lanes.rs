//! A thread per lane, and the fences between them.
//!
//! **Invariant:** a step starts when as many steps of every lane are over as its fence says. The first failure stops
//! all lanes; nothing runs after it.

use std::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pass::PassData;
use super::work::{Tools, Workshop};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::memory::disk::{DEPTH, DiskQueue, How};
use crate::schedule::fences::Fence;
use crate::schedule::step::{Lane, Step};

/// What a lane has done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneCount {
    /// Time within steps, waiting for other lanes excluded.
    pub busy: Duration,
    /// Bytes moved.
    pub bytes: u64,
}

/// A step that ran.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// The pass, from 0.
    pub pass: u64,
    /// The step.
    pub step: Step,
    /// Seconds since the lanes were made.
    pub start: f64,
    /// Likewise.
    pub end: f64,
}

/// Bytes per second that a lane may move; none for as fast as it can.
pub type Throttle = [Option<f64>; Lane::ALL.len()];

#[derive(Default)]
struct Progress {
    done: Fence,
    failure: Option<Failure>,
    counts: [LaneCount; Lane::ALL.len()],
    events: Vec<Event>,
}

enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
    /// Somebody has taken the reason.
    Told,
}

struct Common<D: Device> {
    workshop: Workshop<D>,
    progress: Mutex<Progress>,
    changed: Condvar,
    began: Instant,
    traces: AtomicBool,
    throttle: Throttle,
}

struct Batch {
    pass: u64,
    steps: Vec<(Step, Fence)>,
    data: Arc<PassData>,
}

/// The lanes of an executor.
pub struct Lanes<D: Device> {
    common: Arc<Common<D>>,
    senders: Vec<Option<Sender<Batch>>>,
    threads: Vec<JoinHandle<()>>,
    passes: u64,
}

impl<D: Device> Lanes<D> {
    /// Lanes over a workshop; threads start when a lane gets its first step.
    pub fn new(workshop: Workshop<D>, throttle: Throttle) -> Self {
        let common = Common {
            workshop,
            progress: Mutex::default(),
            changed: Condvar::new(),
            began: Instant::now(),
            traces: AtomicBool::new(false),
            throttle,
        };
        let senders = Lane::ALL.iter().map(|_| None).collect();
        Lanes { common: Arc::new(common), senders, threads: Vec::new(), passes: 0 }
    }

    /// What the lanes work on.
    pub fn workshop(&self) -> &Workshop<D> {
        &self.common.workshop
    }

    /// Notes every step from now on, or no more.
    pub fn trace(&self, on: bool) {
        self.common.traces.store(on, Ordering::Relaxed);
    }

    /// Takes the steps that were noted.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.common.lock().events)
    }

    /// What each lane has done so far.
    pub fn counts(&self) -> [LaneCount; Lane::ALL.len()] {
        self.common.lock().counts
    }

    /// Hands the steps of a pass to their lanes.
    ///
    /// # Errors
    /// When a disk queue cannot be made.
    pub fn issue(&mut self, steps: &[Step], fences: &[Fence], data: &Arc<PassData>) -> Result<()> {
        for lane in Lane::ALL {
            let of_lane = steps.iter().zip(fences).filter(|(step, _)| step.lane == lane);
            let steps: Vec<(Step, Fence)> = of_lane.map(|(step, fence)| (*step, *fence)).collect();
            if steps.is_empty() {
                continue;
            }
            if self.senders[lane.index()].is_none() {
                self.start(lane)?;
            }
            let batch = Batch { pass: self.passes, steps, data: data.clone() };
            let sender = self.senders[lane.index()].as_ref().expect("started above");
            // A lane that has ended left its reason, which whoever waits will find.
            let _ = sender.send(batch);
        }
        self.passes += 1;
        Ok(())
    }

    fn start(&mut self, lane: Lane) -> Result<()> {
        let uses_disk = matches!(lane, Lane::DiskRead | Lane::DiskWrite);
        let disk = if uses_disk { Some(DiskQueue::new(DEPTH, How::Auto)?) } else { None };
        let (sender, receiver) = channel();
        let common = self.common.clone();
        let thread = std::thread::Builder::new()
            .name(lane.name().into())
            .spawn(move || work(&common, lane, Tools { disk, ..Tools::default() }, &receiver))
            .map_err(Error::io("start a thread for", lane.name()))?;
        self.senders[lane.index()] = Some(sender);
        self.threads.push(thread);
        Ok(())
    }

    /// Waits until as many steps of some lanes are over.
    ///
    /// # Errors
    /// What a step gave.
    pub fn wait(&self, fence: Fence) -> Result<()> {
        let mut progress = self.common.wait(&fence);
        match progress.failure.as_mut().map(|failure| std::mem::replace(failure, Failure::Told)) {
            None => Ok(()),
            Some(Failure::Error(error)) => Err(error),
            Some(Failure::Panic(payload)) => {
                drop(progress);
                std::panic::resume_unwind(payload)
            }
            Some(Failure::Told) => panic!("the lanes have failed before"),
        }
    }
}

impl<D: Device> Drop for Lanes<D> {
    fn drop(&mut self) {
        // Lanes may wait for steps that will never come: tell them.
        self.common.lock().failure.get_or_insert(Failure::Told);
        self.common.changed.notify_all();
        self.senders.clear();
        for thread in self.threads.drain(..) {
            // Its panic, if it had one, has been kept.
            let _ = thread.join();
        }
    }
}

impl<D: Device> Common<D> {
    fn lock(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for a fence or a failure.
    fn wait(&self, fence: &Fence) -> std::sync::MutexGuard<'_, Progress> {
        let mut progress = self.lock();
        while progress.failure.is_none() && progress.done.iter().zip(fence).any(|(done, wanted)| done < wanted) {
            progress = self.changed.wait(progress).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        progress
    }
}

/// The life of a lane's thread.
fn work<D: Device>(common: &Common<D>, lane: Lane, mut tools: Tools, batches: &Receiver<Batch>) {
    // The moment until which a throttled link is taken.
    let mut taken = Instant::now();
    while let Ok(Batch { pass, steps, data }) = batches.recv() {
        for (step, fence) in steps {
            if common.wait(&fence).failure.is_some() {
                return;
            }
            let start = Instant::now();
            let run = std::panic::AssertUnwindSafe(|| match lane {
                // On a thread of the pool, so that a parallel loop begins without waking another thread first.
                Lane::Gpu | Lane::Cpu => rayon::scope(|_| common.workshop.run(&step, &data, &mut tools)),
                _ => common.workshop.run(&step, &data, &mut tools),
            });
            let result = std::panic::catch_unwind(run);
            let moved = if let Ok(Ok(bytes)) = result { bytes } else { 0 };
            if let Some(rate) = common.throttle[lane.index()].filter(|_| moved > 0) {
                taken = taken.max(start) + Duration::from_secs_f64(moved as f64 / rate);
                std::thread::sleep(taken.saturating_duration_since(Instant::now()));
            }
            let end = Instant::now();
            let mut progress = common.lock();
            match result {
                Ok(Ok(_)) => {
                    progress.done[lane.index()] += 1;
                    let count = &mut progress.counts[lane.index()];
                    count.busy += end - start;
                    count.bytes += moved;
                    if common.traces.load(Ordering::Relaxed) {
                        let secs = |at: Instant| (at - common.began).as_secs_f64();
                        progress.events.push(Event { pass, step, start: secs(start), end: secs(end) });
                    }
                }
                Ok(Err(error)) => drop(progress.failure.get_or_insert(Failure::Error(error))),
                Err(payload) => drop(progress.failure.get_or_insert(Failure::Panic(payload))),
            }
            drop(progress);
            common.changed.notify_all();
        }
    }
}
