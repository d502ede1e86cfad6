//! Runs that are stopped from outside.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tidemill::rng::Philox;

use super::tidemill;

/// The arguments of `generate` for files.
pub fn command(model: &str, input: &Path, output: &Path, extra: &[&str]) -> Command {
    let (input, output) = (input.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    let mut command = tidemill(&["generate", "--model", model, "--input", input, "--output", output]);
    command.args(extra).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Starts a command whose standard error goes to a file.
pub fn start(mut command: Command, said: &Path) -> Child {
    command.stderr(File::create(said).expect("create")).spawn().expect("the binary runs")
}

/// The exit status, if the process ends within the time.
pub fn wait(child: &mut Child, time: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + time;
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("the process is there");
}

/// The text of a file, once it has some.
pub fn wait_for_text(path: &Path, needle: &str, time: Duration) -> String {
    let deadline = Instant::now() + time;
    loop {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        if text.contains(needle) {
            return text;
        }
        assert!(Instant::now() < deadline, "no `{needle}` in {text:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What came of a series of kills.
pub struct Killed {
    pub kills: u32,
    pub outputs: u32,
}

/// Kills the command at `kills` random moments, each time going on with the same command, and compares what it
/// leaves with `expected`: a prefix after every kill, the same bytes in the end. Starts over when it ends early.
pub fn kill_at_random(make: &dyn Fn(&Path) -> Command, directory: &Path, expected: &[u8], kills: u32) -> Killed {
    let chance = Philox::new(u64::from(kills), 9);
    let mut done = Killed { kills: 0, outputs: 0 };
    // Moments lie within what an undisturbed run takes here, so that a fast machine is interrupted too.
    let started = Instant::now();
    let undisturbed = start(make(&directory.join("undisturbed.jsonl")), &directory.join("said")).wait().expect("wait");
    assert!(matches!(undisturbed.code(), Some(0 | 3)), "{undisturbed}");
    let span = started.elapsed().min(Duration::from_secs(2));
    let mut attempts = 0;
    while done.kills < kills {
        done.outputs += 1;
        let output = directory.join(format!("killed-{}.jsonl", done.outputs));
        let said = directory.join("said");
        loop {
            let mut child = start(make(&output), &said);
            // With no kills left the last output is finished.
            let left = done.kills < kills;
            attempts += 1;
            let moment = if left { span.mul_f64(chance.uniform(attempts)) } else { Duration::from_secs(600) };
            if let Some(status) = wait(&mut child, moment) {
                let text = std::fs::read_to_string(&said).expect("read");
                assert!(matches!(status.code(), Some(0 | 3)), "{status}: {text}");
                break;
            }
            child.kill().expect("kill");
            child.wait().expect("wait");
            done.kills += 1;
            let there = std::fs::read(&output).unwrap_or_default();
            assert!(expected.starts_with(&there), "after kill {} the output is no prefix", done.kills);
        }
        assert!(std::fs::read(&output).expect("read") == expected, "output {} differs", done.outputs);
        let journal = output.with_file_name(format!("killed-{}.jsonl.journal", done.outputs));
        assert!(!journal.exists(), "the journal outlives the job");
    }
    done
}
