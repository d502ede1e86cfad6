//! The disk below a directory, past the page cache.
//!
//! **Invariant:** only blocks that were written before are read, since a file system answers for others without the
//! disk; the scratch file has no name any more once it is open, so nothing is left behind.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::measure::{median, rounds, timed};
use crate::error::{Error, Result, Tier};
use crate::hardware::Disk;
use crate::memory::arena::{Arena, Region};
use crate::memory::disk::{self, DEPTH, DirectFile, DiskQueue, How, Read, Write, raw_read_rate};

/// Bytes that a step of a streamed layer moves, about.
const STEP_BYTES: usize = 32 << 20;
/// Bytes of a small step, to tell what a step takes beyond its bytes.
const SMALL_BYTES: usize = 2 << 20;
/// Steps of a sample.
const STRETCH_STEPS: usize = 4;
/// Small steps of a sample.
const SMALL_STEPS: usize = 8;
/// Bytes that both directions together move before they look at the clock.
const TURN_BYTES: usize = 8 << 20;
/// The largest scratch file.
const FILE_BYTES: u64 = 1 << 30;
/// A step never costs more than this beyond its bytes; what looks like it is the disk's rate that wanders.
const MOST_STEP_SECS: f64 = 5e-3;

/// What was measured: the profile's rates, and the hardware's own.
pub struct Measured {
    /// Rates of steps.
    pub disk: Disk,
    /// Bytes/s read in long stretches.
    pub raw_read: f64,
    /// Bytes/s written likewise.
    pub raw_write: f64,
}

/// What is measured in turn.
#[derive(Clone, Copy)]
enum Probe {
    Read,
    SmallRead,
    Write,
    Together,
    /// Reading while all cores compute.
    Busy,
}

/// A scratch file, the part of it that was written, and memory to read to and to write from.
struct Scratch {
    file: DirectFile,
    queues: [DiskQueue; 2],
    written: u64,
    at: u64,
    to: Region,
    from: Region,
    /// Rates of reading and writing at once, in the order in which they were measured.
    together: Vec<(f64, f64)>,
}

/// Measures the disk below `directory` for about `budget`. `compute` keeps all cores busy as a layer does and says how
/// many seconds one of its repetitions took.
///
/// # Errors
/// What making, writing or reading a file there gives.
pub fn measure(directory: &Path, budget: Duration, compute: &mut dyn FnMut() -> f64) -> Result<Measured> {
    std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
    let free = disk::free_space(directory)?;
    let began = Instant::now();
    let bytes = (free / 10).min(FILE_BYTES) / STEP_BYTES as u64 * STEP_BYTES as u64;
    let mut scratch = Scratch::new(directory, bytes.max(STEP_BYTES as u64))?;
    let first_write = scratch.fill(bytes, budget / 3)?;
    let probes = [Probe::Read, Probe::SmallRead, Probe::Write, Probe::Read, Probe::Together, Probe::Busy];
    let samples = rounds(&probes, budget.saturating_sub(began.elapsed()), |probe| scratch.sample(probe, compute))?;
    let reads: Vec<f64> = [&samples[0][..], &samples[3][..]].concat();
    let writes: Vec<f64> = samples[2].iter().copied().chain([first_write]).collect();
    let rate = |samples: &[f64]| median(samples).expect("every probe gives a sample");
    let (read, write) = (rate(&reads), rate(&writes));
    let small = rate(&samples[1]);
    let step_secs = (small - SMALL_BYTES as f64 / read).clamp(0.0, MOST_STEP_SECS);
    let together = |pick: fn(&(f64, f64)) -> f64| rate(&scratch.together.iter().map(pick).collect::<Vec<_>>());
    let greatest = |samples: &[f64]| samples.iter().copied().fold(0.0, f64::max);
    Ok(Measured {
        disk: Disk {
            capacity_bytes: free,
            read_bytes_per_s: read,
            write_bytes_per_s: write,
            read_together_bytes_per_s: together(|pair| pair.0).min(read),
            write_together_bytes_per_s: together(|pair| pair.1).min(write),
            step_secs,
            core_secs_per_byte: rate(&samples[5]),
        },
        raw_read: greatest(&reads),
        raw_write: greatest(&writes),
    })
}

impl Scratch {
    fn new(directory: &Path, bytes: u64) -> Result<Self> {
        let path = directory.join(format!(".tidemill-calibrate-{}", std::process::id()));
        let file = DirectFile::create(&path, bytes)?;
        std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        let mut arena = Arena::new("calibration of the disk", Tier::Cpu, 2 * STEP_BYTES)?;
        let mut carve = || arena.carve_aligned(STEP_BYTES, disk::ALIGNMENT);
        let (to, mut from) = (carve(), carve());
        // No byte is like the next: a disk that compresses should not gain.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in from.as_mut_slice::<u64>() {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state;
        }
        let queues = [DiskQueue::new(DEPTH, How::Auto)?, DiskQueue::new(DEPTH, How::Auto)?];
        Ok(Scratch { file, queues, written: 0, at: 0, to, from, together: Vec::new() })
    }

    /// Writes the file from its beginning for some time, one step at least; gives the rate.
    fn fill(&mut self, bytes: u64, time: Duration) -> Result<f64> {
        let began = Instant::now();
        while self.written == 0 || (self.written < bytes && began.elapsed() < time) {
            self.write(self.written)?;
            self.written += STEP_BYTES as u64;
        }
        Ok(self.written as f64 / began.elapsed().as_secs_f64())
    }

    fn write(&mut self, offset: u64) -> Result<()> {
        self.queues[1].write(&[Write { file: &self.file, offset, buffer: self.from.bytes() }])
    }

    /// The next place to read or write `bytes` at.
    fn next(&mut self, bytes: usize) -> u64 {
        if self.at + bytes as u64 > self.written {
            self.at = 0;
        }
        let at = self.at;
        self.at += bytes as u64;
        at
    }

    /// Reads a stretch of the file, in steps as a streamed layer makes them.
    fn stretch(&mut self) -> Result<()> {
        (0..STRETCH_STEPS).try_for_each(|_| {
            let offset = self.next(STEP_BYTES);
            let buffer = self.to.bytes_mut();
            self.queues[0].read(&mut [Read { file: &self.file, offset, buffer }])
        })
    }

    /// Core-seconds that computing loses for every byte that is read meanwhile.
    fn busy(&mut self, compute: &mut dyn FnMut() -> f64) -> Result<f64> {
        let cores = rayon::current_num_threads() as f64;
        let alone = compute();
        let over = AtomicBool::new(false);
        let mut repetitions = Vec::new();
        let (secs, done) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let read = timed(|| self.stretch());
                over.store(true, Ordering::Relaxed);
                read
            });
            while repetitions.is_empty() || !over.load(Ordering::Relaxed) {
                repetitions.push(compute());
            }
            reader.join().expect("reading does not panic")
        });
        done?;
        let alone = (alone + compute()) / 2.0;
        let beside = repetitions.iter().sum::<f64>() / repetitions.len() as f64;
        Ok(cores * (1.0 - alone / beside).max(0.0) * secs / (STRETCH_STEPS * STEP_BYTES) as f64)
    }

    /// Bytes/s of a probe; seconds of small steps; core-seconds per byte where it computes.
    fn sample(&mut self, probe: Probe, compute: &mut dyn FnMut() -> f64) -> Result<Option<f64>> {
        let sample = match probe {
            Probe::Read if self.written > STEP_BYTES as u64 * 4 => {
                let (secs, done) = timed(|| self.stretch());
                done?;
                (STRETCH_STEPS * STEP_BYTES) as f64 / secs
            }
            Probe::Read => {
                raw_read_rate(&self.file, self.written, &mut self.queues[0], &mut self.to.bytes_mut()[..STEP_BYTES])?
            }
            Probe::SmallRead => {
                let (secs, done) = timed(|| {
                    (0..SMALL_STEPS).try_for_each(|_| {
                        let offset = self.next(SMALL_BYTES);
                        let buffer = &mut self.to.bytes_mut()[..SMALL_BYTES];
                        self.queues[0].read(&mut [Read { file: &self.file, offset, buffer }])
                    })
                });
                done?;
                secs / SMALL_STEPS as f64
            }
            Probe::Write => {
                let offset = self.next(STEP_BYTES);
                let (secs, done) = timed(|| self.write(offset));
                done?;
                STEP_BYTES as f64 / secs
            }
            Probe::Together => {
                let pair = self.both()?;
                self.together.push(pair);
                pair.0 + pair.1
            }
            Probe::Busy => self.busy(compute)?,
        };
        Ok(Some(sample))
    }

    /// Bytes/s read and written at the same time, each from its own half of the file.
    fn both(&mut self) -> Result<(f64, f64)> {
        let half = (self.written / 2).max(TURN_BYTES as u64);
        let turns = (half / TURN_BYTES as u64).min(16);
        let over = AtomicBool::new(false);
        let Scratch { file, queues, to, from, .. } = self;
        let [reads, writes] = queues;
        let began = Instant::now();
        // Whoever is done first ends it for both: what one does alone does not count.
        let run = |turn: &mut dyn FnMut(u64) -> Result<()>| -> Result<f64> {
            let mut done = 0;
            while done < turns && (done == 0 || !over.load(Ordering::Relaxed)) {
                turn(done * TURN_BYTES as u64)?;
                done += 1;
            }
            let secs = began.elapsed().as_secs_f64();
            over.store(true, Ordering::Relaxed);
            Ok((done * TURN_BYTES as u64) as f64 / secs)
        };
        let file = &*file;
        let (to, from) = (&mut to.bytes_mut()[..TURN_BYTES], &from.bytes()[..TURN_BYTES]);
        let first = half.min(self.written - TURN_BYTES as u64);
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                run(&mut |offset| {
                    let offset = (first + offset).min(self.written - TURN_BYTES as u64);
                    writes.write(&[Write { file, offset, buffer: from }])
                })
            });
            let read = run(&mut |offset| reads.read(&mut [Read { file, offset, buffer: &mut *to }]));
            let written = writer.join().expect("writing does not panic");
            Ok((read?, written?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_rates_and_stays_empty() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("offload");
        let Measured { disk, raw_read, raw_write } = measure(&below, Duration::from_millis(1), &mut || 1e-3).unwrap();
        let rates = [disk.read_bytes_per_s, disk.write_bytes_per_s, raw_read, raw_write];
        let together = [disk.read_together_bytes_per_s, disk.write_together_bytes_per_s];
        assert!(rates.into_iter().chain(together).all(|rate| rate.is_finite() && rate > 0.0));
        assert!((0.0..=MOST_STEP_SECS).contains(&disk.step_secs));
        assert!((0.0..1e-8).contains(&disk.core_secs_per_byte));
        assert_eq!(std::fs::read_dir(&below).unwrap().count(), 0);
    }
}
