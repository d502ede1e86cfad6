//! A disk that fills up: an error, nothing torn, and the same command goes on later.
//!
//! One test alone in its process: the limit on file sizes that stands in for the full disk is the process's.

mod job_support;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use job_support::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tidemill::job::{Opening, open};

/// Beyond this size files refuse to grow, with an error instead of the signal.
fn limit_file_size(bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    setrlimit(Resource::Fsize, Rlimit { current: bytes.or(maximum), maximum }).unwrap();
}

#[test]
fn a_full_disk_loses_nothing() {
    const SIGXFSZ: i32 = 25;
    signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).unwrap();
    let input = mixed_input(60);
    let directory = tempfile::tempdir().unwrap();
    let reference = options(directory.path(), &input);
    run_through(&reference, 1, false);
    let expected = read(&output(&reference));

    let mut refused = 0;
    for seed in 0..40 {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), &input);
        let mut chance = Chance(seed);
        let mut size = 700 + chance.below(900) as u64;
        loop {
            limit_file_size(Some(size));
            let outcome = open(options.clone()).and_then(|opening| match opening {
                Opening::Finished(_) => Ok(()),
                Opening::Run(job) => {
                    let mut run = Run {
                        chance: &mut chance,
                        kill_after: None,
                        flaky_fails: false,
                        in_flight: 12,
                        after_tick: &mut |_| {},
                    };
                    run.work(job).map(drop)
                }
            });
            limit_file_size(None);
            let written = std::fs::read(output(&options)).unwrap_or_default();
            assert!(expected.as_bytes().starts_with(&written), "what is there is a prefix");
            assert!(written.is_empty() || written.ends_with(b"\n"), "no line is torn");
            match outcome {
                Ok(()) => break,
                Err(error) => assert!(error.to_string().contains("out.jsonl"), "{error}"),
            }
            refused += 1;
            size += 500 + chance.below(3000) as u64;
        }
        assert!(read(&output(&options)) == expected, "seed {seed}");
    }
    assert!(refused > 100, "the limit was met {refused} times");
}
