//! Transfers against what the standard library reads and writes, with and without faults.
//!
//! **Invariant:** every test runs on every backend that works here.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::faults::Fault;
use super::*;
use crate::error::Tier;
use crate::memory::arena::{Arena, Region};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const EINTR: i32 = 4;

fn aligned_memory(bytes: usize) -> Region {
    Arena::new("test", Tier::Cpu, bytes).unwrap().carve_aligned(bytes, ALIGNMENT)
}

/// Every backend that works here.
fn backends() -> Vec<How> {
    let ring = DiskQueue::new(1, How::IoUring).map(|queue| queue.how());
    ring.into_iter().chain([How::Threads]).collect()
}

fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..bytes).map(|_| next()).collect()
}

/// A file in the build directory, whose file system takes O_DIRECT more often than that of /tmp.
fn scratch(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let program = std::env::current_exe().unwrap();
    let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
    let path = directory.path().join("data");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

fn read_error(queue: &mut DiskQueue, file: &DirectFile, offset: u64, bytes: usize) -> Error {
    let mut memory = aligned_memory(bytes);
    queue.read(&mut [Read { file, offset, buffer: memory.bytes_mut() }]).unwrap_err()
}

#[test]
fn requests_larger_than_the_queue_arrive_whole() {
    let content = pattern(5 << 20);
    let (_directory, path) = scratch(&content);
    for how in backends() {
        for (depth, piece) in [(1, 4096), (3, 8192), (64, 1 << 20)] {
            let mut queue = DiskQueue::new(depth, how).unwrap().with_piece_bytes(piece);
            let file = DirectFile::open(&path).unwrap();
            let mut memory = aligned_memory(content.len());
            let (first, second) = memory.bytes_mut().split_at_mut(3 << 20);
            let later = Read { file: &file, offset: 3 << 20, buffer: second };
            queue.read(&mut [later, Read { file: &file, offset: 0, buffer: first }]).unwrap();
            assert!(memory.bytes() == content, "{how:?} {depth} {piece}");
            queue.read(&mut []).unwrap();
            queue.read(&mut [Read { file: &file, offset: 0, buffer: &mut [] }]).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Random writes, then random reads, agree with a plain vector and with what the standard library reads.
    #[test]
    fn random_requests(
        blocks in 1usize..64,
        writes in prop::collection::vec((0usize..64, 1usize..16), 0..8),
        reads in prop::collection::vec((0usize..64, 1usize..16), 1..8),
        depth in 1usize..9,
        direct in any::<bool>(),
        short in 1usize..5,
    ) {
        for how in backends() {
            let bytes = blocks * ALIGNMENT;
            let (_directory, path) = scratch(&[]);
            let mut file = DirectFile::create(&path, bytes as u64).unwrap();
            if !direct {
                file = file.buffered().unwrap();
            }
            // Every third piece is cut; an uncut file takes unaligned cuts too.
            let cut = if file.is_direct() { short * ALIGNMENT } else { short * 777 };
            let mut count = 0;
            let plan = move |_, _, _| {
                count += 1;
                if count % 3 == 0 { Fault::Short(cut) } else { Fault::None }
            };
            let queue = DiskQueue::new(depth, how).unwrap().with_piece_bytes(4 * ALIGNMENT);
            let mut queue = queue.with_faults(Box::new(plan));
            let mut expected = vec![0; bytes];
            for (number, &(start, len)) in writes.iter().enumerate() {
                let start = start % blocks;
                let len = len.min(blocks - start);
                let mut memory = aligned_memory(len * ALIGNMENT);
                memory.bytes_mut().copy_from_slice(&pattern(len * ALIGNMENT));
                memory.bytes_mut().iter_mut().for_each(|byte| *byte ^= number as u8);
                let extent = start * ALIGNMENT..(start + len) * ALIGNMENT;
                let offset = extent.start as u64;
                queue.write(&[Write { file: &file, offset, buffer: memory.bytes() }]).unwrap();
                expected[extent].copy_from_slice(memory.bytes());
            }
            let extents: Vec<_> = reads
                .iter()
                .map(|&(start, len)| (start % blocks, len.min(blocks - start % blocks)))
                .collect();
            let mut memories: Vec<_> = extents.iter().map(|&(_, len)| aligned_memory(len * ALIGNMENT)).collect();
            let mut requests: Vec<_> = extents
                .iter()
                .zip(&mut memories)
                .map(|(&(start, _), memory)| {
                    Read { file: &file, offset: (start * ALIGNMENT) as u64, buffer: memory.bytes_mut() }
                })
                .collect();
            queue.read(&mut requests).unwrap();
            for (&(start, len), memory) in extents.iter().zip(&memories) {
                prop_assert!(memory.bytes() == &expected[start * ALIGNMENT..(start + len) * ALIGNMENT]);
            }
            file.sync().unwrap();
            prop_assert!(fs::read(&path).unwrap() == expected);
        }
    }
}

#[test]
fn a_truncated_file_names_what_is_missing() {
    let (_directory, path) = scratch(&pattern(1 << 20));
    for how in backends() {
        for len in [0, 100, 4096, 300_000, 1 << 19] {
            fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
            let file = DirectFile::open(&path).unwrap();
            let mut queue = DiskQueue::new(4, how).unwrap().with_piece_bytes(1 << 16);
            let error = read_error(&mut queue, &file, 0, 1 << 20);
            let expected = format!("read {} at offset 0: the file ends after {len} of 1048576 bytes", path.display());
            assert_eq!(error.to_string(), expected);
            assert!(error.hint().unwrap().contains("tidemill pack"));
        }
    }
}

#[test]
fn errors_name_file_and_offset_and_leave_the_queue_usable() {
    let content = pattern(1 << 20);
    let (_directory, path) = scratch(&content);
    for how in backends() {
        let file = DirectFile::open(&path).unwrap();
        let broken = |_, offset, _| if offset >= 5 << 16 { Fault::Error(EIO) } else { Fault::None };
        let queue = DiskQueue::new(4, how).unwrap().with_piece_bytes(1 << 16);
        let mut queue = queue.with_faults(Box::new(broken));
        let error = read_error(&mut queue, &file, 0, 1 << 20);
        assert!(error.to_string().starts_with(&format!("read {} at offset 327680: ", path.display())), "{error}");
        let mut memory = aligned_memory(1 << 16);
        queue.read(&mut [Read { file: &file, offset: 0, buffer: memory.bytes_mut() }]).unwrap();
        assert!(memory.bytes() == &content[..1 << 16]);
    }
}

#[test]
fn passing_refusals_are_tried_again() {
    let content = pattern(1 << 18);
    let (_directory, path) = scratch(&content);
    for how in backends() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let flaky = move |_, offset, _| {
            let mut seen = log.lock().unwrap();
            let earlier = seen.iter().filter(|&&old| old == offset).count();
            seen.push(offset);
            [Fault::Error(EAGAIN), Fault::Error(EINTR)].get(earlier).copied().unwrap_or(Fault::None)
        };
        let queue = DiskQueue::new(2, how).unwrap().with_piece_bytes(1 << 16);
        let mut queue = queue.with_faults(Box::new(flaky));
        let file = DirectFile::open(&path).unwrap();
        let mut memory = aligned_memory(content.len());
        queue.read(&mut [Read { file: &file, offset: 0, buffer: memory.bytes_mut() }]).unwrap();
        assert!(memory.bytes() == content);
        assert_eq!(seen.lock().unwrap().len(), 3 * 4);
    }
}

#[test]
fn a_full_disk_shows_while_writing_and_before() {
    let (directory, path) = scratch(&[]);
    for how in backends() {
        let file = DirectFile::create(&path, 1 << 20).unwrap();
        let full = |direction, offset, _| match direction {
            Direction::Write if offset == 1 << 18 => Fault::Error(ENOSPC),
            _ => Fault::None,
        };
        let queue = DiskQueue::new(2, how).unwrap().with_piece_bytes(1 << 16);
        let mut queue = queue.with_faults(Box::new(full));
        let memory = aligned_memory(1 << 20);
        let error = queue.write(&[Write { file: &file, offset: 0, buffer: memory.bytes() }]).unwrap_err();
        assert!(error.to_string().contains("write") && error.to_string().contains("at offset 262144"), "{error}");
        assert!(error.hint().unwrap().contains("free some space"));
        let stuck = |_, _, _| Fault::Short(0);
        let mut queue = DiskQueue::new(2, how).unwrap().with_faults(Box::new(stuck));
        queue.write(&[Write { file: &file, offset: 0, buffer: memory.bytes() }]).unwrap_err();
    }
    let huge = directory.path().join("huge");
    let Error::Io { source, .. } = DirectFile::create(&huge, 1 << 50).unwrap_err() else { panic!("another error") };
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::FileTooLarge];
    assert!(kinds.contains(&source.kind()), "{source:?}");
    assert!(!huge.exists());
}

#[test]
fn a_vanished_directory_is_an_error_and_open_files_go_on() {
    let (directory, path) = scratch(&pattern(8192));
    let file = DirectFile::open(&path).unwrap();
    let gone = directory.path().to_owned();
    drop(directory);
    let error = DirectFile::create(&gone.join("scratch"), 4096).unwrap_err().to_string();
    assert!(error.starts_with(&format!("create {}", gone.join("scratch").display())), "{error}");
    assert!(DirectFile::open(&path).is_err() && probe(&gone).is_err() && free_space(&gone).is_err());
    for how in backends() {
        let mut memory = aligned_memory(8192);
        let mut queue = DiskQueue::new(1, how).unwrap();
        queue.read(&mut [Read { file: &file, offset: 0, buffer: memory.bytes_mut() }]).unwrap();
        assert!(memory.bytes() == pattern(8192));
    }
}

#[test]
fn only_regular_files_are_opened() {
    assert!(DirectFile::open(std::path::Path::new(env!("CARGO_MANIFEST_DIR"))).is_err());
    assert!(DirectFile::open(std::path::Path::new("/dev/null")).is_err());
}

#[test]
#[should_panic(expected = "direct transfer")]
fn unaligned_direct_transfers_are_a_bug() {
    let (_directory, path) = scratch(&pattern(8192));
    let file = DirectFile::open(&path).unwrap();
    assert!(file.is_direct(), "direct transfer not possible here: nothing to test");
    let mut memory = aligned_memory(4096);
    let mut queue = DiskQueue::new(1, How::Threads).unwrap();
    let _ = queue.read(&mut [Read { file: &file, offset: 100, buffer: memory.bytes_mut() }]);
}

#[test]
fn the_probe_says_what_works_and_leaves_nothing() {
    let (directory, path) = scratch(&pattern(1 << 20));
    let support = probe(directory.path()).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    assert_eq!(support.why.len(), usize::from(!support.direct) + usize::from(!support.io_uring));
    assert_eq!(support.direct, DirectFile::open(&path).unwrap().is_direct());
    assert!(free_space(directory.path()).unwrap() > 0);
    let mut queue = DiskQueue::new(DEPTH, How::Auto).unwrap();
    let mut memory = aligned_memory(1 << 18);
    let file = DirectFile::open(&path).unwrap();
    assert!(raw_read_rate(&file, 1 << 20, &mut queue, memory.bytes_mut()).unwrap() > 0.0);
}

/// Prints read rates by backend, depth and piece size, beside plain preads, of the file named by an environment
/// variable: `TIDEMILL_DISK_FILE=FILE cargo test --release --lib -- --ignored --nocapture disk::tests::rates`.
#[test]
#[ignore = "a measurement"]
#[expect(clippy::print_stderr, reason = "it is what the measurement is for")]
fn rates() {
    let path = PathBuf::from(std::env::var("TIDEMILL_DISK_FILE").expect("TIDEMILL_DISK_FILE"));
    let file = DirectFile::open(&path).unwrap();
    let bytes = file.len().unwrap() / 4;
    let mut memory = aligned_memory(64 << 20);
    let mut at = 0;
    let mut rate = |queue: &mut DiskQueue| {
        // Another quarter each time.
        at = (at + bytes) % (4 * bytes);
        let started = std::time::Instant::now();
        for offset in (at..at + bytes).step_by(memory.len()) {
            queue.read(&mut [Read { file: &file, offset, buffer: memory.bytes_mut() }]).unwrap();
        }
        bytes as f64 / started.elapsed().as_secs_f64() / 1e9
    };
    for round in 0..5 {
        let mut plain = DiskQueue::new(1, How::Threads).unwrap().with_piece_bytes(4 << 20);
        eprintln!("round {round}: plain 4 MiB preads {:.2} GB/s", rate(&mut plain));
        for how in backends() {
            for depth in [2, 4, 8, 16] {
                let mut line = format!("  {how:?} depth {depth:2}:");
                for piece in [512 << 10, 1 << 20, 2 << 20, 4 << 20] {
                    let mut queue = DiskQueue::new(depth, how).unwrap().with_piece_bytes(piece);
                    line += &format!(" {:.2}", rate(&mut queue));
                }
                eprintln!("{line} GB/s");
            }
        }
    }
}
