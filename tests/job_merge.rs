//! Shards merged are the job in one piece.

mod job_support;

use std::fs;
use std::path::{Path, PathBuf};

use job_support::*;
use tidemill::job::{JobOptions, Opening, Output, Shard, merge, open};

fn shard_options(directory: &Path, input: &str, index: u64, count: u64, error_file: bool) -> JobOptions {
    let mut options = options(directory, input);
    options.shard = Some(Shard { index, count });
    options.output = Output::File(directory.join(format!("part-{index}.jsonl")));
    options.error_file = error_file.then(|| directory.join(format!("part-{index}.errors")));
    options
}

fn run_shards(directory: &Path, input: &str, count: u64, error_file: bool) -> Vec<PathBuf> {
    let run = |index| {
        let options = shard_options(directory, input, index, count, error_file);
        run_through(&options, index, false);
        output(&options)
    };
    (0..count).map(run).collect()
}

#[test]
fn merged_shards_equal_the_whole() {
    for (lines, count, error_file) in [(50, 3, false), (50, 4, true), (2, 5, true), (23, 1, false)] {
        let directory = tempfile::tempdir().unwrap();
        let input = mixed_input(lines);
        let mut whole = options(directory.path(), &input);
        whole.error_file = error_file.then(|| directory.path().join("merged.jsonl.errors.jsonl"));
        let mut reference = whole.clone();
        reference.error_file = error_file.then(|| directory.path().join("whole.errors"));
        let expected = run_through(&reference, 1, false);

        let mut parts = run_shards(directory.path(), &input, count, error_file);
        parts.reverse();
        let merged = directory.path().join("merged.jsonl");
        let summary = merge(&merged, &parts).unwrap();
        assert_eq!((summary.succeeded, summary.failed), (expected.succeeded, expected.failed));
        assert!(read(&merged) == read(&output(&reference)));
        if let (Some(ours), Some(theirs)) = (&whole.error_file, &reference.error_file) {
            assert!(read(ours) == read(theirs));
        }
        assert_eq!(merge(&merged, &parts).unwrap().exit_code(), expected.exit_code(), "merging again is a no-op");

        whole.output = Output::File(merged);
        assert!(matches!(open(whole).unwrap(), Opening::Finished(_)), "the merged output is a finished job");
    }
}

#[test]
fn shards_may_be_moved_with_their_error_files() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut parts = run_shards(here.path(), &mixed_input(30), 2, true);
    for name in listing(here.path()) {
        fs::copy(here.path().join(&name), there.path().join(&name)).unwrap();
    }
    drop(here);
    parts = parts.iter().map(|part| there.path().join(part.file_name().unwrap())).collect();
    let summary = merge(&there.path().join("all.jsonl"), &parts).unwrap();
    assert_eq!(read(&there.path().join("all.jsonl.errors.jsonl")).lines().count() as u64, summary.failed);
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let input = mixed_input(20);
    let parts = run_shards(directory.path(), &input, 3, false);
    let merged = directory.path().join("merged.jsonl");
    let refusal = |parts: &[PathBuf]| {
        let error = merge(&merged, parts).unwrap_err();
        assert!(error.hint().is_some());
        error.to_string()
    };
    assert!(refusal(&[]).contains("no shards"));
    assert!(refusal(&parts[..2]).contains("missing: 2/3"));
    let twice = [&parts[..], &parts[..1]].concat();
    assert!(refusal(&twice).contains("0/3, and so is"));
    assert!(merge(&parts[0], &parts).unwrap_err().to_string().contains("is the input"));

    let mut other = shard_options(directory.path(), &input, 2, 3, false);
    other.output = Output::File(directory.path().join("other.jsonl"));
    other.fingerprint.set("seed", "7");
    run_through(&other, 1, false);
    let mixed = [parts[0].clone(), parts[1].clone(), output(&other)];
    assert!(refusal(&mixed).contains("seed 0, now seed 7"), "{}", refusal(&mixed));

    let half = shard_options(directory.path(), &input, 1, 3, false);
    let half = JobOptions { output: Output::File(directory.path().join("half.jsonl")), ..half };
    let Opening::Run(job) = open(half.clone()).unwrap() else { panic!("a fresh job") };
    job.writer.close(false).unwrap();
    assert!(refusal(&[parts[0].clone(), output(&half), parts[2].clone()]).contains("1/3 is not finished"));

    fs::write(&merged, "mine\n").unwrap();
    assert!(refusal(&parts).contains("already exists"));
    assert_eq!(read(&merged), "mine\n");
    fs::remove_file(&merged).unwrap();

    let mut text = read(&parts[1]);
    text.push_str("{}\n");
    fs::write(&parts[1], text).unwrap();
    assert!(refusal(&parts).contains("changed"));
    fs::write(directory.path().join("stray.jsonl"), "{}\n").unwrap();
    assert!(refusal(&[directory.path().join("stray.jsonl")]).contains("no .run.json"));
}
