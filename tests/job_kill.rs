//! Real processes, really killed, at moments that nobody chose.

mod job_support;

use std::process::{Command, Stdio};
use std::time::Duration;

use job_support::*;

const DIRECTORY: &str = "TIDEMILL_TEST_KILL_DIRECTORY";

/// Runs as the child of the test below, which names the directory.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let mut options = options(directory.as_ref(), &mixed_input(400));
    options.retry_failed = std::env::var_os("RETRY").is_some();
    let seed = std::env::var("SEED").unwrap().parse().unwrap();
    run_through(&options, seed, !options.retry_failed);
}

#[test]
fn a_killed_process_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let reference = options(directory.path(), &mixed_input(400));
    run_through(&reference, 1, true);
    let expected = read(&output(&reference));
    run_through(&tidemill::job::JobOptions { retry_failed: true, ..reference.clone() }, 1, false);
    let expected_after_retry = read(&output(&reference));

    let mut chance = Chance(11);
    let mut kills = 0;
    for _ in 0..6 {
        let directory = tempfile::tempdir().unwrap();
        let options = options(directory.path(), &mixed_input(400));
        for (retry, expected) in [(false, &expected), (true, &expected_after_retry)] {
            let mut milliseconds = 2 + chance.next() % 3;
            loop {
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.args(["--exact", "child"]).env(DIRECTORY, directory.path()).stdout(Stdio::null());
                command.env("SEED", chance.next().to_string());
                if retry {
                    command.env("RETRY", "1");
                }
                let mut child = command.spawn().unwrap();
                std::thread::sleep(Duration::from_millis(milliseconds));
                // Kills fall everywhere within what a child takes here, be it fast or slow.
                milliseconds += 1 + milliseconds / 4 + chance.next() % 3;
                if let Some(status) = child.try_wait().unwrap() {
                    assert!(status.success());
                    break;
                }
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                if !retry && output(&options).exists() {
                    assert!(expected.starts_with(&read(&output(&options))));
                }
            }
            assert!(read(&output(&options)) == *expected);
            assert_eq!(listing(directory.path()).len(), 3, "{:?}", listing(directory.path()));
        }
    }
    assert!(kills > 10, "{kills} kills");
}
