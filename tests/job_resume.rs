//! Kills at any moment: the output in the end is that of a run that was never interrupted.

mod job_support;

use std::fs::{self, OpenOptions};
use std::path::Path;

use job_support::*;
use tidemill::job::{JobOptions, Opening, Shard, Summary, open};

/// The outputs of a run that nobody interrupts.
fn reference(
    input: &str,
    adapt: impl Fn(&Path, &mut JobOptions),
    flaky_fails: bool,
) -> (String, Option<String>, Summary) {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(directory.path(), input);
    adapt(directory.path(), &mut options);
    let summary = run_through(&options, 1, flaky_fails);
    let errors = options.error_file.as_ref().map(|path| read(path));
    (read(&output(&options)), errors, summary)
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Cuts or spoils what a power cut may take: everything behind the last sync.
fn tear(path: &Path, synced: u64, chance: &mut Chance) {
    let now = length(path);
    if now <= synced {
        return;
    }
    let keep = synced + chance.next() % (now - synced + 1);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(keep).unwrap();
    if chance.below(2) == 0 {
        // A file may have grown before its data arrived.
        file.set_len(now).unwrap();
    }
}

/// Runs with kills until the job is complete.
fn run_with_kills(options: &JobOptions, seed: u64, power_cuts: bool, flaky_fails: bool) -> Summary {
    let mut chance = Chance(seed);
    let output = output(options);
    let (journal, partial) = (output.with_extension("jsonl.journal"), output.with_extension("jsonl.partial"));
    let mut resumed = 0;
    for _ in 0..10_000 {
        let job = match open(options.clone()).unwrap() {
            Opening::Finished(summary) => return summary,
            Opening::Run(job) => job,
        };
        assert!(power_cuts || job.resumed >= resumed, "no finished line is lost");
        resumed = job.resumed;
        let files = [Some(&output), Some(&journal), Some(&partial), options.error_file.as_ref()];
        let files: Vec<_> = files.into_iter().flatten().collect();
        let mut synced: Vec<u64> = files.iter().map(|path| length(path)).collect();
        let mut orders = Chance(chance.next());
        let kill_after = Some(chance.below(60));
        let end = Run {
            chance: &mut orders,
            kill_after,
            flaky_fails,
            in_flight: 8,
            after_tick: &mut |second| {
                if second {
                    synced = files.iter().map(|path| length(path)).collect();
                }
            },
        }
        .work(job)
        .unwrap();
        if let End::Complete(summary) = end {
            return summary;
        }
        if power_cuts {
            files.iter().zip(&synced).for_each(|(path, synced)| tear(path, *synced, &mut chance));
        }
    }
    panic!("the job never ends");
}

#[test]
fn kills_change_no_byte() {
    let input = mixed_input(80);
    let (expected, _, summary) = reference(&input, |_, _| {}, false);
    for seed in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), &input);
        let last = run_with_kills(&options, seed, seed % 2 == 1, false);
        assert_eq!(read(&output(&options)), expected, "seed {seed}");
        assert_eq!((last.succeeded, last.failed), (summary.succeeded, summary.failed));
        assert_eq!(listing(directory.path()), ["in.jsonl", "out.jsonl", "out.jsonl.run.json"]);
    }
}

#[test]
fn kills_change_no_byte_with_an_error_file() {
    let input = mixed_input(80);
    let split = |directory: &Path, options: &mut JobOptions| options.error_file = Some(directory.join("err.jsonl"));
    let (expected, errors, summary) = reference(&input, split, true);
    assert_eq!(expected.lines().count() as u64, summary.succeeded);
    assert_eq!(errors.as_ref().unwrap().lines().count() as u64, summary.failed);
    for seed in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(directory.path(), &input);
        split(directory.path(), &mut options);
        run_with_kills(&options, seed, seed % 2 == 1, true);
        assert_eq!(read(&output(&options)), expected, "seed {seed}");
        assert_eq!(fs::read_to_string(options.error_file.unwrap()).unwrap(), *errors.as_ref().unwrap());
    }
}

#[test]
fn the_journal_may_end_anywhere() {
    let input = mixed_input(30);
    let (expected, ..) = reference(&input, |_, _| {}, false);
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &input);
    let Opening::Run(job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
    let mut chance = Chance(3);
    let end =
        Run { chance: &mut chance, kill_after: Some(90), flaky_fails: false, in_flight: 8, after_tick: &mut |_| {} }
            .work(job)
            .unwrap();
    assert_eq!(end, End::Killed);
    let journal = directory.path().join("out.jsonl.journal");
    let (journal_bytes, output_bytes) = (fs::read(&journal).unwrap(), fs::read(output(&options)).unwrap());
    let state = fs::read(directory.path().join("out.jsonl.run.json")).unwrap();
    for length in (50..journal_bytes.len()).step_by(37) {
        fs::write(&journal, &journal_bytes[..length]).unwrap();
        fs::write(output(&options), &output_bytes).unwrap();
        fs::write(directory.path().join("out.jsonl.run.json"), &state).unwrap();
        run_through(&options, length as u64, false);
        assert_eq!(read(&output(&options)), expected, "journal cut at {length}");
    }
}

#[test]
fn a_finished_job_is_a_no_op_with_the_same_summary() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &mixed_input(30));
    let first = run_through(&options, 5, false);
    assert_eq!(first.exit_code(), 3);
    let before = read(&output(&options));
    let Opening::Finished(again) = open(options.clone()).unwrap() else { panic!("nothing is left to do") };
    assert_eq!((again.succeeded, again.failed), (first.succeeded, first.failed));
    assert_eq!(again.resumed, first.succeeded + first.failed);
    assert_eq!(read(&output(&options)), before);

    fs::remove_file(output(&options)).unwrap();
    assert!(matches!(open(options.clone()).unwrap(), Opening::Run(_)), "a removed output is made anew");
}

#[test]
fn retrying_failed_lines_survives_kills() {
    let input = mixed_input(80);
    for error_file in [false, true] {
        let split = |directory: &Path, options: &mut JobOptions| {
            options.error_file = error_file.then(|| directory.join("err.jsonl"));
        };
        let (expected, errors, summary) = reference(&input, split, false);
        for seed in 0..12 {
            let directory = tempfile::tempdir().unwrap();
            let mut options = options(directory.path(), &input);
            split(directory.path(), &mut options);
            if seed % 3 == 0 {
                // Interrupted, not finished, before the retry.
                let Opening::Run(job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
                let mut chance = Chance(seed);
                Run {
                    chance: &mut chance,
                    kill_after: Some(200),
                    flaky_fails: true,
                    in_flight: 8,
                    after_tick: &mut |_| {},
                }
                .work(job)
                .unwrap();
            } else {
                let first = run_through(&options, seed, true);
                assert!(first.failed > summary.failed);
            }
            options.retry_failed = true;
            let last = run_with_kills(&options, seed, seed % 2 == 1, false);
            assert_eq!((last.succeeded, last.failed), (summary.succeeded, summary.failed), "seed {seed}");
            assert_eq!(read(&output(&options)), expected, "seed {seed}");
            assert_eq!(options.error_file.as_ref().map(|path| read(path)), errors);
            assert!(!directory.path().join("out.jsonl.partial").exists());
        }
    }
}

#[test]
fn retrying_without_failures_is_a_no_op() {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(directory.path(), "{\"prompt\":\"a\"}\n");
    options.retry_failed = true;
    assert_eq!(run_through(&options, 1, false).exit_code(), 0);
    assert!(matches!(open(options).unwrap(), Opening::Finished(Summary { succeeded: 1, failed: 0, resumed: 1 })));
}

#[test]
fn shards_together_hold_the_lines_of_the_whole() {
    let input = mixed_input(50);
    let (whole, ..) = reference(&input, |_, _| {}, false);
    let mut parts = Vec::new();
    for index in 0..3 {
        let (part, ..) = reference(&input, |_, options| options.shard = Some(Shard { index, count: 3 }), false);
        parts.extend(part.lines().map(str::to_owned).collect::<Vec<_>>());
    }
    let mut lines: Vec<&str> = whole.lines().collect();
    lines.sort_unstable();
    parts.sort_unstable();
    assert!(lines == parts);
}

#[test]
fn the_order_of_finishing_does_not_matter() {
    use proptest::prelude::*;
    let input = mixed_input(40);
    let (expected, ..) = reference(&input, |_, _| {}, false);
    let config = ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(seed in any::<u64>(), kills in any::<bool>())| {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), &input);
        if kills {
            run_with_kills(&options, seed, seed % 2 == 0, false);
        } else {
            run_through(&options, seed, false);
        }
        prop_assert!(read(&output(&options)) == expected);
    });
}

#[test]
fn side_files_are_never_ahead_of_what_they_describe() {
    let input = mixed_input(20);
    let (expected, errors, _) =
        reference(&input, |directory, options| options.error_file = Some(directory.join("err")), false);
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut options = options(directory.path(), &input);
    options.error_file = Some(at("err"));
    // Killed before the output, and before the journal, was there.
    drop(open(options.clone()).unwrap());
    fs::remove_file(output(&options)).unwrap();
    drop(open(options.clone()).unwrap());
    fs::remove_file(output(&options)).unwrap();
    fs::remove_file(at("out.jsonl.journal")).unwrap();
    run_through(&options, 2, false);
    assert!(read(&output(&options)) == expected);
    // Only the output was removed: the error file is ours to write again.
    fs::remove_file(output(&options)).unwrap();
    run_through(&options, 3, false);
    assert!(read(&output(&options)) == expected);
    assert!(Some(read(&at("err"))) == errors);
    fs::remove_file(output(&options)).unwrap();
    fs::write(at("err"), "mine\n").unwrap();
    assert!(open(options.clone()).is_err(), "a changed error file is not");
    // A journal or a state alone is not enough to go on from.
    let Opening::Run(job) = open(JobOptions { error_file: None, ..options.clone() }).unwrap() else { panic!("fresh") };
    let mut chance = Chance(1);
    Run { chance: &mut chance, kill_after: Some(60), flaky_fails: false, in_flight: 4, after_tick: &mut |_| {} }
        .work(job)
        .unwrap();
    let options = JobOptions { error_file: None, ..options };
    assert!(length(&output(&options)) > 0);
    let journal = fs::read(at("out.jsonl.journal")).unwrap();
    fs::remove_file(at("out.jsonl.journal")).unwrap();
    assert!(open(options.clone()).err().unwrap().to_string().contains("journal"));
    fs::write(at("out.jsonl.journal"), "not a journal").unwrap();
    assert!(open(options.clone()).err().unwrap().to_string().contains("is not a journal"));
    fs::write(at("out.jsonl.journal"), journal).unwrap();
    run_through(&options, 4, false);
    assert_eq!(read(&output(&options)).lines().count(), 20 - 2);
}
