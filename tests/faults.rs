//! What disks do wrong while a model streams: every failure names its file, nothing is lost, the same command goes on.
#![allow(missing_docs)]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use support::jobs::{DEMO, file, mixed};
use support::process::{command, start, wait};
use support::{Scratch, generate, generate_ok};

/// Weights and a part of the pages come from the disk.
const POLICY: &str = "sequences = 4\nchunk-tokens = 64\nblocks = 2\nblock-rows = 40\npages = 40\nblock-pages = 20\n\
                      weights = { cpu = 0.3, disk = 0.7 }\nkv = { cpu = 0.3, disk = 0.7 }\n";

struct Job {
    scratch: Scratch,
    input: PathBuf,
    output: PathBuf,
    expected: Vec<u8>,
}

impl Job {
    fn new() -> Self {
        let scratch = Scratch::new();
        let input = scratch.write("in.jsonl", file(&mixed(&DEMO, 24, 5)));
        let reference = scratch.path("expected.jsonl");
        generate_ok("demo", &input, &reference, &["--progress", "none"], 3);
        let expected = fs::read(reference).unwrap();
        scratch.write("policy.toml", POLICY);
        let output = scratch.path("out.jsonl");
        Job { scratch, input, output, expected }
    }

    fn flags(&self) -> Vec<String> {
        let path = |name: &str| self.scratch.path(name).display().to_string();
        let flags = ["--progress", "none", "--policy", &path("policy.toml"), "--cache-dir", &path("cache")];
        flags.into_iter().map(str::to_owned).collect()
    }

    /// Runs with the flags and some more; gives exit code and standard error.
    fn run(&self, more: &[&str]) -> (i32, String) {
        let mut flags = self.flags();
        flags.extend(more.iter().map(|&flag| flag.to_owned()));
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let result = generate("demo", &self.input, &self.output, &flags);
        (result.status.code().unwrap_or(-1), String::from_utf8_lossy(&result.stderr).into_owned())
    }

    /// The file of a layer in the cache.
    fn layer(&self, layer: usize) -> PathBuf {
        let packs = self.scratch.path("cache").join("packs");
        let mut entries = fs::read_dir(&packs).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        entries.next().unwrap().join(format!("layer-{layer:03}.safetensors"))
    }

    fn finish(&self) {
        let (code, said) = self.run(&[]);
        assert_eq!(code, 3, "{said}");
        assert!(fs::read(&self.output).unwrap() == self.expected, "the same bytes as without a fault");
    }

    fn forget_output(&self) {
        for entry in fs::read_dir(self.scratch.path("")).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with("out.jsonl") {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

fn names(said: &str, path: &Path) -> bool {
    said.contains(path.file_name().unwrap().to_str().unwrap())
}

#[test]
fn damaged_packs_are_named_and_mended() {
    let job = Job::new();
    job.finish();
    let path = job.layer(1);
    let healthy = fs::read(&path).unwrap();

    // A flipped bit in what streams. The last chunks are those on disk.
    job.forget_output();
    let at = healthy.len() as u64 - 5000;
    let packed = File::options().write(true).open(&path).unwrap();
    packed.write_all_at(&[healthy[at as usize] ^ 0x10], at).unwrap();
    let (code, said) = job.run(&[]);
    assert_eq!(code, 1, "{said}");
    assert!(names(&said, &path) && said.contains("offset") && said.contains("hint:"), "{said}");

    // A file that was cut.
    packed.set_len(healthy.len() as u64 / 2).unwrap();
    let (code, said) = job.run(&[]);
    assert_eq!(code, 1, "{said}");
    assert!(names(&said, &path) && said.contains("bytes"), "{said}");

    // A file that is gone.
    fs::remove_file(&path).unwrap();
    let (code, said) = job.run(&[]);
    assert_eq!(code, 1, "{said}");
    assert!(names(&said, &path) && said.contains("missing"), "{said}");

    // What the hint says helps.
    fs::remove_dir_all(path.parent().unwrap()).unwrap();
    job.finish();
}

#[test]
fn damaged_planes_are_named_and_made_again() {
    let job = Job::new();
    job.scratch.write("policy.toml", format!("{POLICY}compressed = true\n"));
    job.finish();
    let path = job.layer(1).with_file_name("layer-001.planes.safetensors");
    let healthy = fs::read(&path).unwrap();
    assert!(healthy.len() < fs::read(job.layer(1)).unwrap().len());

    // A flipped bit in the code of the last chunk, which is one of those that stream.
    job.forget_output();
    let at = healthy.len() as u64 - 4096;
    let planes = File::options().write(true).open(&path).unwrap();
    planes.write_all_at(&[healthy[at as usize] ^ 0x10], at).unwrap();
    let (code, said) = job.run(&[]);
    assert_eq!(code, 1, "{said}");
    assert!(names(&said, &path) && said.contains("offset") && said.contains("hint:"), "{said}");

    // What the hint says helps, and so does nothing at all where the file was cut.
    fs::remove_file(&path).unwrap();
    job.finish();
    assert!(fs::read(&path).unwrap() == healthy);
    job.forget_output();
    File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
    job.finish();
    assert!(fs::read(&path).unwrap() == healthy);
}

#[test]
fn a_file_that_shrinks_under_a_run_ends_it_with_the_journal_intact() {
    let job = Job::new();
    job.finish();
    job.forget_output();
    let path = job.layer(0);
    let mut flags = job.flags();
    // Slow enough to be caught in the middle.
    flags.extend(["--throttle".to_owned(), "disk_read=40MB/s".to_owned()]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let said = job.scratch.path("said");
    let mut child = start(command("demo", &job.input, &job.output, &flags), &said);
    let journal = job.scratch.path("out.jsonl.journal");
    while fs::metadata(&journal).map_or(0, |file| file.len()) < 2000 {
        assert!(child.try_wait().unwrap().is_none(), "{}", fs::read_to_string(&said).unwrap());
        std::thread::sleep(Duration::from_millis(2));
    }
    let packed = File::options().write(true).open(&path).unwrap();
    let healthy = fs::read(&path).unwrap();
    packed.set_len(8192).unwrap();
    let status = wait(&mut child, Duration::from_secs(60)).expect("it ends");
    let text = fs::read_to_string(&said).unwrap();
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(names(&text, &path) && text.contains("offset"), "{text}");
    fs::write(&path, healthy).unwrap();
    job.finish();
}

#[test]
fn what_does_not_fit_on_the_disk_is_refused_with_numbers() {
    let job = Job::new();
    let (code, said) = job.run(&["--disk-space", "64KiB"]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("on disk, budget is 64.0 KiB") && said.contains("hint: use --disk-space"), "{said}");
    // The hint works.
    let advice = said.split("use --disk-space ").nth(1).unwrap().split_whitespace().next().unwrap();
    let (code, said) = job.run(&["--disk-space", advice]);
    assert_eq!(code, 3, "{said}");
    assert!(fs::read(&job.output).unwrap() == job.expected);
}

#[test]
fn an_offload_directory_that_cannot_be_one_is_named() {
    let job = Job::new();
    let blocker = job.scratch.write("blocker", "x");
    let place = blocker.join("below");
    let (code, said) = job.run(&["--offload-dir", place.to_str().unwrap()]);
    assert_eq!(code, 1, "{said}");
    assert!(said.contains(place.to_str().unwrap()), "{said}");
    job.finish();
}

#[test]
fn an_offload_directory_that_vanishes_is_not_missed() {
    let job = Job::new();
    let place = job.scratch.path("offload");
    let flags = ["--offload-dir", place.to_str().unwrap()];
    fs::create_dir(&place).unwrap();
    let mut all = job.flags();
    all.extend(flags.map(str::to_owned));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let said = job.scratch.path("said");
    let mut child = start(command("demo", &job.input, &job.output, &all), &said);
    let journal = job.scratch.path("out.jsonl.journal");
    while fs::metadata(&journal).map_or(0, |file| file.len()) < 100 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Its files have no names: nothing is left in it, and nothing needs it.
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    fs::remove_dir(&place).unwrap();
    assert_eq!(wait(&mut child, Duration::from_secs(60)).unwrap().code(), Some(3));
    assert!(fs::read(&job.output).unwrap() == job.expected);
}
