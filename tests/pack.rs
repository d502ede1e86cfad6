//! Packed directories: the same weights as packed on the fly, whatever happens on the way.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tidemill::error::{Error, Result};
use tidemill::memory::arena::Arena;
use tidemill::memory::disk::{self, DiskQueue, How, Read};
use tidemill::model::Model;
use tidemill::model::dtype::DType;
use tidemill::model::packed::layout::StageId;
use tidemill::model::packed::planes::{self, Trust};
use tidemill::model::packed::write::{Outcome, Progress, Step, pack};
use tidemill::model::packed::{Packed, cache};
use tidemill::model::safetensors::SafetensorsFile;

fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries.filter(|path| path.join("config.json").exists()).collect();
    paths.sort();
    paths
}

fn open(path: &Path) -> Result<Model> {
    Model::open(path.to_str().unwrap())
}

fn quiet(model: &Model, weights: Option<DType>, output: &Path) -> Result<Outcome> {
    pack(model, weights, output, &mut |_| {})
}

/// Every chunk and small tensor, by name; read into page-aligned memory and into any other.
fn contents(packed: &dyn Packed) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut all = BTreeMap::new();
    let bytes = packed.layout().stages().map(|(_, stage)| stage.bytes).max().unwrap();
    let mut memory = Arena::new("test", tidemill::error::Tier::Cpu, bytes + 1)?.carve_aligned(bytes + 1, 4096);
    for (id, stage) in packed.layout().stages() {
        for (index, chunk) in stage.chunks.iter().enumerate() {
            let bytes = &mut memory.bytes_mut()[index % 2..][..chunk.bytes];
            bytes.fill(1);
            packed.chunk(id, index, bytes)?;
            all.insert(format!("{id:?} {index}"), bytes.to_vec());
        }
    }
    for (index, tensor) in packed.layout().small.iter().enumerate() {
        let mut bytes = vec![1; tensor.bytes];
        packed.small(index, &mut bytes)?;
        all.insert(tensor.key.clone(), bytes);
    }
    Ok(all)
}

/// A packed demo model in a directory of its own.
fn packed_demo() -> (tempfile::TempDir, PathBuf, Model) {
    let scratch = tempfile::tempdir().unwrap();
    let output = scratch.path().join("packed");
    let demo = Model::open("demo").unwrap();
    quiet(&demo, None, &output).unwrap();
    (scratch, output, demo)
}

fn inodes(directory: &Path) -> BTreeMap<String, u64> {
    let weights = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    weights
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "safetensors"))
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino()))
        .collect()
}

fn edit(path: &Path, offset: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

#[test]
fn every_family_reads_as_it_was_packed() {
    for (number, golden) in goldens().iter().enumerate() {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("packed");
        let model = open(golden).unwrap();
        let weights = [None, Some(DType::F16), Some(DType::Bf16), Some(DType::F32)][number % 4];
        assert!(matches!(quiet(&model, weights, &output).unwrap(), Outcome::Written(_)));
        let again = open(&output).unwrap();
        let shown = golden.display();
        assert_eq!(again.config, model.config, "{shown}");
        assert_eq!(again.source, model.source, "{shown}");
        assert_eq!(again.fingerprint, model.fingerprint, "{shown}");
        assert_eq!(again.chat.is_some(), model.chat.is_some(), "{shown}");
        let (fresh, stored) = (model.packed(weights).unwrap(), again.packed(None).unwrap());
        assert_eq!(fresh.layout(), stored.layout(), "{shown}");
        assert!(contents(&*fresh).unwrap() == contents(&*stored).unwrap(), "{shown}");
        again.packed.as_ref().unwrap().verify(&mut |_| {}).unwrap();
        // A copy of a packed directory is a packed directory.
        let copy = scratch.path().join("copy");
        if weights.is_none() {
            quiet(&again, None, &copy).unwrap();
            assert!(fs::read(output.join("tidemill.json")).unwrap() == fs::read(copy.join("tidemill.json")).unwrap());
        }
    }
}

#[test]
fn files_are_safetensors_whose_data_is_one_aligned_extent() {
    let (_scratch, output, demo) = packed_demo();
    let model = open(&output).unwrap();
    let packed = model.packed.as_ref().unwrap();
    let on_the_fly = demo.packed(None).unwrap();
    let mut queue = DiskQueue::new(4, How::Auto).unwrap();
    for (id, stage) in on_the_fly.layout().stages() {
        let extent = packed.extent(id).unwrap().unwrap();
        let path = extent.file().path();
        assert_eq!(extent.offset % 4096, 0);
        assert_eq!(fs::metadata(path).unwrap().len(), extent.offset + stage.bytes as u64);
        let tensors = SafetensorsFile::open(path).unwrap();
        assert!(tensors.names().filter(|name| !name.starts_with("hole.")).count() == stage.chunks.len());
        let mut memory = Arena::new("test", tidemill::error::Tier::Cpu, stage.bytes).unwrap();
        let mut memory = memory.carve_aligned(stage.bytes, disk::ALIGNMENT);
        queue.read(&mut [Read { file: extent.file(), offset: extent.offset, buffer: memory.bytes_mut() }]).unwrap();
        for (index, chunk) in stage.chunks.iter().enumerate() {
            let found = &memory.bytes()[chunk.offset..chunk.offset + chunk.bytes];
            let mut expected = vec![0; chunk.bytes];
            on_the_fly.chunk(id, index, &mut expected).unwrap();
            assert!(found == expected);
            extent.check(index, found).unwrap();
        }
    }
}

#[test]
fn a_killed_run_goes_on_where_it_stopped() {
    let (_scratch, whole, demo) = packed_demo();
    for calls in 1..12 {
        let scratch = tempfile::tempdir().unwrap();
        let output = scratch.path().join("packed");
        let mut left = calls;
        let killed = catch_unwind(AssertUnwindSafe(|| {
            pack(&demo, None, &output, &mut |_| {
                left -= 1;
                assert!(left > 0, "killed");
            })
        }));
        if killed.is_ok() {
            assert!(calls > 6, "{calls}");
            break;
        }
        let error = open(&output).err().unwrap();
        assert!(error.to_string().contains("interrupted"), "{error}");
        let before = inodes(&output);
        assert_eq!(before.len(), (calls - 1usize).saturating_sub(1), "every file is one call here");
        // What a torn write leaves.
        let journal = output.join("tidemill.journal");
        let torn = [fs::read(&journal).unwrap(), b"{\"name\":\"lay".to_vec()].concat();
        fs::write(&journal, torn).unwrap();
        fs::write(output.join("layer-003.safetensors.tmp"), "torn").unwrap();
        assert_eq!(quiet(&demo, None, &output).unwrap(), Outcome::Written(6 - before.len()));
        let after = inodes(&output);
        assert!(before.iter().all(|(name, inode)| after[name] == *inode), "finished files stay");
        for (name, _) in after {
            assert!(fs::read(output.join(&name)).unwrap() == fs::read(whole.join(&name)).unwrap(), "{name}");
        }
        let left: Vec<_> = fs::read_dir(&output).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.iter().any(|name| name.to_str().unwrap().contains("tmp") || name == "tidemill.journal"));
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no lock is left");
    }
}

#[test]
fn damage_is_named_and_packing_again_mends_it() {
    let (_scratch, output, demo) = packed_demo();
    let path = output.join("layer-001.safetensors");
    let healthy = fs::read(&path).unwrap();
    let packed = open(&output).unwrap().packed.unwrap();
    let begin = (&packed).extent(StageId::Layer(1)).unwrap().unwrap().offset;
    let mend = |what: &str| {
        assert!(matches!(quiet(&demo, None, &output).unwrap(), Outcome::Written(1)), "{what}");
        assert!(fs::read(&path).unwrap() == healthy, "{what}");
        assert_eq!(quiet(&demo, None, &output).unwrap(), Outcome::Unchanged, "{what}");
    };

    edit(&path, begin + 5, &[healthy[begin as usize + 5] ^ 1]);
    let model = open(&output).unwrap();
    let expected = format!("{}: the 18432 bytes at offset {begin} are not those that were packed", path.display());
    for error in [
        contents(&*model.packed(None).unwrap()).unwrap_err(),
        model.packed.as_ref().unwrap().verify(&mut |_| {}).unwrap_err(),
    ] {
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().unwrap().contains("tidemill pack"));
    }
    mend("a flipped bit");

    let model = open(&output).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(begin + 100).unwrap();
    let error = contents(&*model.packed(None).unwrap()).unwrap_err();
    assert!(matches!(&error, Error::IoAt { offset, .. } if *offset == begin), "{error}");
    let error = open(&output).err().unwrap().to_string();
    assert!(error.contains(&format!("has {} bytes instead of {}", begin + 100, healthy.len())), "{error}");
    mend("a truncated file");

    edit(&path, 20, b"X");
    let error = open(&output).err().unwrap().to_string();
    assert!(error.contains("layer-001.safetensors: has another header than expected from offset 20"), "{error}");
    mend("a header");

    fs::remove_file(&path).unwrap();
    assert!(open(&output).err().unwrap().to_string().contains("layer-001.safetensors: is missing"));
    mend("a missing file");

    fs::write(output.join("generation_config.json"), "{}").unwrap();
    let error = open(&output).err().unwrap().to_string();
    assert!(error.contains("generation_config.json: has changed since it was packed"), "{error}");
    assert_eq!(quiet(&demo, None, &output).unwrap(), Outcome::Written(0));
    open(&output).unwrap();

    fs::write(output.join("tidemill.json"), "{").unwrap();
    assert!(open(&output).is_err());
    assert_eq!(quiet(&demo, None, &output).unwrap(), Outcome::Written(6));
    open(&output).unwrap();
}

#[test]
fn other_contents_are_refused_and_left_alone() {
    let (scratch, output, demo) = packed_demo();
    let refused = |weights, output: &Path| {
        let error = quiet(&demo, weights, output).unwrap_err();
        assert!(matches!(error, Error::Output { hint: Some(_), .. }), "{error}");
        error.to_string()
    };
    let taken = scratch.path().join("taken");
    fs::create_dir(&taken).unwrap();
    fs::write(taken.join("thesis.tex"), "x").unwrap();
    assert!(refused(None, &taken).contains("holds something else"));
    assert_eq!(fs::read_dir(&taken).unwrap().count(), 1);
    assert!(refused(Some(DType::F16), &output).contains("holds another pack"));
    // A kill just after the directory was made, before the journal had its name.
    let unborn = scratch.path().join("unborn");
    fs::create_dir(&unborn).unwrap();
    fs::write(unborn.join("tidemill.journal.tmp"), "{").unwrap();
    assert_eq!(quiet(&demo, None, &unborn).unwrap(), Outcome::Written(6));
    let lock = tidemill::durable::Lock::take(&scratch.path().join("packed.lock")).unwrap();
    assert!(refused(None, &output).contains("is working on this output"));
    drop(lock);
    let model = open(&output).unwrap();
    assert!(model.packed(Some(DType::Bf16)).is_ok(), "that is what it is stored in");
    assert!(matches!(model.packed(Some(DType::F32)).err().unwrap(), Error::Usage { .. }));
    // An interrupted pack in another dtype is not continued.
    let half = scratch.path().join("half");
    let mut calls = 0;
    let killed = catch_unwind(AssertUnwindSafe(|| {
        pack(&demo, Some(DType::F32), &half, &mut |_| {
            calls += 1;
            assert!(calls < 3, "killed");
        })
    }));
    assert!(killed.is_err());
    assert!(refused(None, &half).contains("holds the beginning of another pack"));
}

#[test]
fn the_cache_packs_once() {
    let scratch = tempfile::tempdir().unwrap();
    let demo = Model::open("demo").unwrap();
    let mut said: Vec<Progress> = Vec::new();
    let first = cache::ensure(&demo, None, scratch.path(), false, &mut |progress| said.push(progress)).unwrap();
    assert!(said[0].done == 0 && said[0].step == Step::Write && said.last().unwrap().done <= said[0].total);
    said.clear();
    let second = cache::ensure(&demo, None, scratch.path(), false, &mut |progress| said.push(progress)).unwrap();
    assert_eq!((first.directory(), said.len()), (second.directory(), 0));
    let other = cache::ensure(&demo, Some(DType::F16), scratch.path(), false, &mut |_| {}).unwrap();
    assert_ne!(other.directory(), first.directory());
    assert!(contents(&&second).unwrap() == contents(&*demo.packed(None).unwrap()).unwrap());
    let given = Some(scratch.path());
    assert_eq!(cache::directory(given).unwrap(), scratch.path());
}

#[test]
fn planes_go_on_after_a_kill_and_hold_the_same_weights() {
    let scratch = tempfile::tempdir().unwrap();
    let demo = Model::open("demo").unwrap();
    let packed = cache::ensure(&demo, None, scratch.path(), false, &mut |_| {}).unwrap();
    let stages = packed.layout().stages().count();
    assert!(packed.layout().stages().all(|(id, _)| !packed.has_planes(id)));
    // Half the chunks are written, then the process is gone.
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        planes::ensure(&packed, Trust::Lengths, &mut |now| assert!(2 * now.done < now.total, "killed"))
    }));
    assert!(killed.is_err());
    let Outcome::Written(left) = planes::ensure(&packed, Trust::Lengths, &mut |_| {}).unwrap() else {
        panic!("something was left to do")
    };
    assert!(0 < left && left < stages, "{left} of {stages}");
    assert_eq!(planes::ensure(&packed, Trust::Verify, &mut |_| {}).unwrap(), Outcome::Unchanged);

    let packed = cache::ensure(&demo, None, scratch.path(), true, &mut |_| panic!("all is there")).unwrap();
    for (id, stage) in packed.layout().stages() {
        let planes = (&packed).planes(id).unwrap().unwrap();
        let file = std::fs::read(planes.file().path()).unwrap();
        for (index, chunk) in stage.chunks.iter().enumerate() {
            let place = planes.code(index);
            assert!(place.start.is_multiple_of(4096) && planes.extent(&(index..index + 1)).end <= file.len() as u64);
            let (mut expected, mut out) = (vec![0; chunk.bytes], vec![0; chunk.bytes]);
            let code = &file[place.start as usize..place.end as usize];
            assert!(code.len() <= chunk.bytes);
            planes.check(index, code).unwrap();
            planes.decode(index, code, &mut out).unwrap();
            packed.chunk(id, index, &mut expected).unwrap();
            assert!(out == expected, "chunk {index} of {id:?}");
            let said = planes.decode(index, &code[1..], &mut out).unwrap_err().to_string();
            assert!(said.contains(".planes.safetensors") && said.contains("at offset"), "{said}");
        }
    }
}

/// Prints rates of reading the packed directory named by an environment variable, pair by pair with one thread's
/// plain reads: `TIDEMILL_PACKED=DIR cargo test --release --test pack -- --ignored --nocapture rates`.
#[test]
#[ignore = "a measurement"]
#[expect(clippy::print_stderr, reason = "it is what the measurement is for")]
fn rates() {
    let directory = PathBuf::from(std::env::var("TIDEMILL_PACKED").expect("TIDEMILL_PACKED"));
    let model = open(&directory).unwrap();
    let packed = model.packed.as_ref().unwrap();
    let layers = packed.layout().layers.len();
    let bytes = packed.layout().layers.iter().map(|stage| stage.bytes).max().unwrap();
    let mut memory = Arena::new("test", tidemill::error::Tier::Cpu, bytes).unwrap();
    let mut memory = memory.carve_aligned(bytes, disk::ALIGNMENT);
    let mut pass = |queue: &mut DiskQueue| {
        let started = std::time::Instant::now();
        let mut total = 0;
        for layer in 0..layers {
            let extent = packed.extent(StageId::Layer(layer)).unwrap().unwrap();
            let buffer = &mut memory.bytes_mut()[..packed.layout().layers[layer].bytes];
            total += buffer.len();
            queue.read(&mut [Read { file: extent.file(), offset: extent.offset, buffer }]).unwrap();
        }
        total as f64 / started.elapsed().as_secs_f64() / 1e9
    };
    for _ in 0..5 {
        let plain = pass(&mut DiskQueue::new(1, How::Threads).unwrap().with_piece_bytes(4 << 20));
        let queued = pass(&mut DiskQueue::new(disk::DEPTH, How::Auto).unwrap());
        eprintln!("layers: plain 4 MiB preads {plain:.2}, queue {queued:.2} GB/s");
    }
    let started = std::time::Instant::now();
    let mut total = 0;
    for (id, stage) in packed.layout().stages() {
        for (index, chunk) in stage.chunks.iter().enumerate() {
            packed.chunk(id, index, &mut memory.bytes_mut()[..chunk.bytes]).unwrap();
            total += chunk.bytes;
        }
    }
    eprintln!("chunk by chunk with checksums: {:.2} GB/s", total as f64 / started.elapsed().as_secs_f64() / 1e9);
}
