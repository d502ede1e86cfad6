//! A thread per lane, and the fences between them.
//!
//! Lanes that have a stream of the device hand their steps over to it: there, fences are marks that streams follow. A
//! thread waits for the device where main memory is used that a copy has to do with, where a lane is far ahead of its
//! stream, and where the pass ends.
//!
//! **Invariant:** a step starts when as many steps of every lane are over as its fence says. The first failure stops
//! all lanes; nothing runs after it.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::pass::PassData;
use super::work::{Tools, Workshop};
use crate::device::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::disk::{DEPTH, DiskQueue, How};
use crate::schedule::fences::Fence;
use crate::schedule::step::{Lane, Step};

/// Steps that a lane may be ahead of its stream.
const AHEAD: usize = 512;

/// A step that begins so soon after the one before it on its lane has waited for nobody.
const AT_ONCE: Duration = Duration::from_micros(100);
/// What a thread may have overslept.
const OVERSLEPT: Duration = Duration::from_millis(2);

/// A link that is held to a rate.
struct ThrottledLink {
    /// Until when it is taken.
    taken: Instant,
    /// When its thread was done with the step before.
    free: Instant,
}

impl ThrottledLink {
    /// Begins at `start` to move what takes so many seconds; gives the moment at which it is there. What the thread
    /// overslept is no loss of the link: a step that waited for nobody begins when the one before it ended.
    fn take(&mut self, start: Instant, secs: f64) -> Instant {
        let overslept = if start - self.free < AT_ONCE { OVERSLEPT } else { Duration::ZERO };
        self.taken = self.taken.max(start - overslept) + Duration::from_secs_f64(secs);
        self.taken
    }
}

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

/// A step that was handed to a stream and may not be over.
struct Flying<M> {
    pass: u64,
    step: Step,
    moved: u64,
    start: M,
    end: M,
}

/// A lane's steps on their way through its stream.
struct Flight<M> {
    steps: VecDeque<Flying<M>>,
    /// A mark that was passed, and when: seconds since the lanes were made.
    clock: Option<(M, f64)>,
}

struct Progress<M> {
    /// Steps that have run, or were handed to the lane's stream.
    handed: Fence,
    /// Steps that are known to be over.
    over: Fence,
    flights: [Flight<M>; Lane::ALL.len()],
    failure: Option<Failure>,
    counts: [LaneCount; Lane::ALL.len()],
    events: Vec<Event>,
}

impl<M> Default for Progress<M> {
    fn default() -> Self {
        Progress {
            handed: Fence::default(),
            over: Fence::default(),
            flights: Lane::ALL.map(|_| Flight { steps: VecDeque::new(), clock: None }),
            failure: None,
            counts: Default::default(),
            events: Vec::new(),
        }
    }
}

enum Failure {
    Error(Error),
    Panic(Box<dyn Any + Send>),
    /// Somebody has taken the reason.
    Told,
}

struct Common<D: Device> {
    workshop: Workshop<D>,
    progress: Mutex<Progress<D::Mark>>,
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

/// The stream that a lane hands its steps to.
fn stream(lane: Lane) -> Option<Stream> {
    match lane {
        Lane::Gpu => Some(Stream::Compute),
        Lane::H2d => Some(Stream::In),
        Lane::D2h => Some(Stream::Out),
        Lane::DiskRead | Lane::DiskWrite | Lane::Cpu => None,
    }
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

    /// Takes the steps that were noted, when those are over that were handed over.
    pub fn take_events(&self) -> Vec<Event> {
        let flying = self.common.lock().handed;
        // What fails is told to whoever waits for the pass.
        let _ = self.common.reach(&flying);
        std::mem::take(&mut self.common.lock().events)
    }

    /// What each lane has done so far.
    pub fn counts(&self) -> [LaneCount; Lane::ALL.len()] {
        let mut progress = self.common.lock();
        self.common.settle(&mut progress);
        progress.counts
    }

    /// Counts what was moved over a lane's link since `start` while the lane was idle, and holds it to its rate.
    pub fn moved(&self, lane: Lane, bytes: u64, start: Instant) {
        if let Some(rate) = self.common.throttle[lane.index()] {
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / rate).saturating_sub(start.elapsed()));
        }
        let mut progress = self.common.lock();
        let count = &mut progress.counts[lane.index()];
        (count.busy, count.bytes) = (count.busy + start.elapsed(), count.bytes + bytes);
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
        let tools = Tools { disk, ..Tools::default() };
        if let Some(stream) = stream(lane) {
            let device = &self.common.workshop.fixed.device;
            let mark = device.mark(stream)?;
            device.wait(&mark)?;
            let now = self.common.began.elapsed().as_secs_f64();
            self.common.lock().flights[lane.index()].clock = Some((mark, now));
        }
        let (sender, receiver) = channel();
        let common = self.common.clone();
        let thread = std::thread::Builder::new()
            .name(lane.name().into())
            .spawn(move || Work { common: &common, lane, tools, followed: Fence::default() }.run(&receiver))
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
        drop(self.common.handed(&fence));
        let reached = self.common.reach(&fence);
        let mut progress = self.common.lock();
        if let Err(error) = reached {
            progress.failure.get_or_insert(Failure::Error(error));
        }
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
    fn lock(&self) -> MutexGuard<'_, Progress<D::Mark>> {
        self.progress.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn device(&self) -> &D {
        &self.workshop.fixed.device
    }

    /// Waits until the steps of a fence were handed over, or something has failed.
    fn handed(&self, fence: &Fence) -> MutexGuard<'_, Progress<D::Mark>> {
        let mut progress = self.lock();
        while progress.failure.is_none() && progress.handed.iter().zip(fence).any(|(handed, wanted)| handed < wanted) {
            progress = self.changed.wait(progress).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        progress
    }

    /// Waits until what was handed over of a fence's steps is over.
    fn reach(&self, fence: &Fence) -> Result<()> {
        let mut progress = self.lock();
        self.settle(&mut progress);
        let marks: Vec<D::Mark> = Lane::ALL.iter().filter_map(|&lane| progress.mark(lane, fence)).collect();
        drop(progress);
        marks.iter().try_for_each(|mark| self.device().wait(mark))?;
        self.settle(&mut self.lock());
        Ok(())
    }

    /// Counts the steps in flight that are over. A failure is kept.
    fn settle(&self, progress: &mut Progress<D::Mark>) {
        for lane in Lane::ALL {
            if let Err(error) = self.settle_lane(progress, lane) {
                progress.failure.get_or_insert(Failure::Error(error));
            }
        }
    }

    fn settle_lane(&self, progress: &mut Progress<D::Mark>, lane: Lane) -> Result<()> {
        let device = self.device();
        while let Some(first) = progress.flights[lane.index()].steps.front() {
            if !device.passed(&first.end)? {
                break;
            }
            let flight = &mut progress.flights[lane.index()];
            let Flying { pass, step, moved, start, end } = flight.steps.pop_front().expect("it was looked at");
            let (mark, secs) = flight.clock.as_ref().expect("the clock began with the lane");
            let (start, secs) = (secs + device.between(mark, &start)?, secs + device.between(mark, &end)?);
            flight.clock = Some((end, secs));
            progress.over[lane.index()] += 1;
            self.count(progress, Event { pass, step, start, end: secs }, moved);
        }
        Ok(())
    }

    /// Counts a step that is over.
    fn count(&self, progress: &mut Progress<D::Mark>, event: Event, moved: u64) {
        let count = &mut progress.counts[event.step.lane.index()];
        count.busy += Duration::from_secs_f64((event.end - event.start).max(0.0));
        count.bytes += moved;
        if self.traces.load(Ordering::Relaxed) {
            progress.events.push(event);
        }
    }
}

impl<M: Clone> Progress<M> {
    /// The mark behind the last step of a lane that a fence names; none if that is over.
    fn mark(&self, lane: Lane, fence: &Fence) -> Option<M> {
        let ahead = fence[lane.index()].checked_sub(self.over[lane.index()] + 1)?;
        self.flights[lane.index()].steps.get(ahead as usize).map(|step| step.end.clone())
    }
}

/// The life of a lane's thread.
struct Work<'a, D: Device> {
    common: &'a Common<D>,
    lane: Lane,
    tools: Tools,
    /// Steps of other lanes that the lane's stream comes after.
    followed: Fence,
}

impl<D: Device> Work<'_, D> {
    fn run(&mut self, batches: &Receiver<Batch>) {
        let now = Instant::now();
        let mut link = ThrottledLink { taken: now, free: now };
        while let Ok(Batch { pass, steps, data }) = batches.recv() {
            for (step, fence) in steps {
                let progress = self.common.handed(&fence);
                if progress.failure.is_some() {
                    return;
                }
                let run = std::panic::AssertUnwindSafe(|| match stream(self.lane) {
                    Some(stream) => self.hand_over(progress, stream, (step, fence), pass, &data, &mut link),
                    None => self.do_now(progress, (step, fence), pass, &data, &mut link),
                });
                let result = std::panic::catch_unwind(run);
                link.free = Instant::now();
                let failure = match result {
                    Ok(Ok(())) => None,
                    Ok(Err(error)) => Some(Failure::Error(error)),
                    Err(payload) => Some(Failure::Panic(payload)),
                };
                if let Some(failure) = failure {
                    self.common.lock().failure.get_or_insert(failure);
                }
                self.common.changed.notify_all();
            }
        }
    }

    /// Runs a step on the lane's own thread.
    fn do_now(
        &mut self,
        progress: MutexGuard<'_, Progress<D::Mark>>,
        (step, fence): (Step, Fence),
        pass: u64,
        data: &PassData,
        link: &mut ThrottledLink,
    ) -> Result<()> {
        drop(progress);
        self.common.reach(&fence)?;
        let start = Instant::now();
        let moved = self.step(&step, data)?;
        self.throttle(link, start, moved);
        let [start, end] = [start, Instant::now()].map(|at| (at - self.common.began).as_secs_f64());
        let mut progress = self.common.lock();
        progress.handed[self.lane.index()] += 1;
        progress.over[self.lane.index()] += 1;
        self.common.count(&mut progress, Event { pass, step, start, end }, moved);
        Ok(())
    }

    /// Hands a step to the lane's stream, behind what it has to wait for.
    fn hand_over(
        &mut self,
        mut progress: MutexGuard<'_, Progress<D::Mark>>,
        stream: Stream,
        (step, fence): (Step, Fence),
        pass: u64,
        data: &PassData,
        link: &mut ThrottledLink,
    ) -> Result<()> {
        let (device, own) = (self.common.device(), self.lane.index());
        self.common.settle(&mut progress);
        let others = Lane::ALL.iter().filter(|&&lane| lane != self.lane);
        let news = others.filter(|lane| fence[lane.index()] > self.followed[lane.index()]);
        let marks: Vec<D::Mark> = news.filter_map(|&lane| progress.mark(lane, &fence)).collect();
        drop(progress);
        marks.iter().try_for_each(|mark| device.follow(stream, mark))?;
        self.followed.iter_mut().zip(fence).for_each(|(followed, wanted)| *followed = wanted.max(*followed));
        let (began, start) = (Instant::now(), device.mark(stream)?);
        let moved = self.step(&step, data)?;
        if self.common.throttle[own].is_some() && moved > 0 {
            device.wait(&device.mark(stream)?)?;
            self.throttle(link, began, moved);
        }
        let end = device.mark(stream)?;
        let mut progress = self.common.lock();
        let steps = &mut progress.flights[own].steps;
        steps.push_back(Flying { pass, step, moved, start, end });
        let late = (steps.len() > AHEAD).then(|| steps[steps.len() - AHEAD].end.clone());
        progress.handed[own] += 1;
        self.common.settle(&mut progress);
        drop(progress);
        late.map_or(Ok(()), |mark| device.wait(&mark))
    }

    fn step(&mut self, step: &Step, data: &PassData) -> Result<u64> {
        let Work { common, lane, tools, .. } = self;
        match lane {
            // On a thread of the pool, so that a parallel loop begins without waking another thread first.
            Lane::Gpu | Lane::Cpu => rayon::scope(|_| common.workshop.run(step, data, tools)),
            _ => common.workshop.run(step, data, tools),
        }
    }

    fn throttle(&self, link: &mut ThrottledLink, start: Instant, moved: u64) {
        if let Some(rate) = self.common.throttle[self.lane.index()].filter(|_| moved > 0) {
            let there = link.take(start, moved as f64 / rate);
            std::thread::sleep(there.saturating_duration_since(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_throttled_link_loses_what_it_waits_for_but_not_what_its_thread_oversleeps() {
        let began = Instant::now() + Duration::from_secs(1);
        let at = |millis: f64| began + Duration::from_secs_f64(millis / 1e3);
        let secs = 0.010;
        let mut link = ThrottledLink { taken: at(0.0), free: at(0.0) };
        assert_eq!(link.take(at(5.0), secs), at(15.0), "it waited for 5 ms");
        link.free = at(15.3);
        assert_eq!(link.take(at(15.35), secs), at(25.0), "it overslept 0.3 ms");
        link.free = at(25.3);
        assert_eq!(link.take(at(26.0), secs), at(36.0), "it overslept, and then waited");
        link.free = at(90.0);
        assert_eq!(link.take(at(90.01), secs), at(98.01), "what moved was slower than the link");
    }
}
