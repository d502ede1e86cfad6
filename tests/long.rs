//! Checks that take minutes: `cargo test --test long -- --ignored --nocapture`.
#![allow(missing_docs)]

mod support;

use std::io::Write;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use support::jobs::{DEMO, file, mixed};
use support::process::{command, kill_at_random};
use support::{Scratch, generate_ok};

/// Tells a measurement.
fn report(text: &str) {
    writeln!(std::io::stderr(), "{text}").expect("standard error");
}

fn read_stats(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).expect("read")).expect("JSON")
}

/// Peak memory of a job of so many plain lines, in bytes.
fn peak_memory(count: usize, scratch: &Scratch) -> f64 {
    let words = ["a fox", "the moon", "Ben and a bear", "a red boat on the river"];
    let line =
        |at: usize| format!("{{\"prompt\": \"Tell me about {}.\", \"max_tokens\": 1}}\n", words[at % words.len()]);
    let input = scratch.write(&format!("in-{count}.jsonl"), (0..count).map(line).collect::<String>());
    let (output, stats) = (scratch.path(&format!("out-{count}.jsonl")), scratch.path("stats.json"));
    let started = Instant::now();
    generate_ok("demo", &input, &output, &["--stats", stats.to_str().expect("UTF-8")], 0);
    let lines = std::fs::read_to_string(&output).expect("read").lines().count();
    assert_eq!(lines, count);
    let stats = read_stats(&stats);
    let peak = stats["peak_resident_bytes"].as_f64().expect("a number");
    let rate = stats["total_tokens_per_s"].as_f64().expect("a number");
    let secs = started.elapsed().as_secs_f64();
    report(&format!("{count} lines: peak {:.1} MiB, {secs:.1} s, {rate:.0} tokens/s", peak / 1048576.0));
    peak
}

#[test]
#[ignore = "takes minutes"]
fn memory_does_not_grow_with_the_lines() {
    let scratch = Scratch::new();
    let few = peak_memory(10_000, &scratch);
    let many = peak_memory(100_000, &scratch);
    assert!(many <= 1.2 * few, "100,000 lines need {:.2} x the memory of 10,000", many / few);
}

/// Bytes of main memory that a process holds, and has held at most.
fn resident(pid: u32) -> (f64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        1024.0 * line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok()).unwrap_or(0.0)
    };
    (field("VmRSS:"), field("VmHWM:"))
}

/// A million lines behind one header (`LINES=N` for another number): memory does not grow, the rate holds from the
/// first to the last, and a run that was killed in the middle goes on within seconds.
#[test]
#[ignore = "takes minutes"]
fn a_million_lines() {
    let count: u64 = std::env::var("LINES").map_or(1_000_000, |count| count.parse().expect("a number"));
    let scratch = Scratch::new();
    let header = "Answer with one word. Once upon a time there was a fox who lived near the river. ".repeat(6);
    let line = |at: u64| format!("{{\"prompt\": \"{header}Question {at}: what is it?\", \"max_tokens\": 1}}\n");
    let input = scratch.path("in.jsonl");
    let mut writer = std::io::BufWriter::new(std::fs::File::create(&input).expect("create"));
    (0..count).for_each(|at| writer.write_all(line(at).as_bytes()).expect("write"));
    writer.into_inner().expect("write");
    let (output, stats) = (scratch.path("out.jsonl"), scratch.path("stats.json"));
    let start = || {
        let extra = ["--progress", "none", "--stats", stats.to_str().expect("UTF-8")];
        command("demo", &input, &output, &extra).spawn().expect("start")
    };
    let size = || std::fs::metadata(&output).map_or(0, |file| file.len()) as f64;
    let second = std::time::Duration::from_secs(1);
    // Bytes written, seconds and memory, second by second.
    let watch = |child: &mut std::process::Child, until: f64| {
        let (began, mut seen) = (Instant::now(), Vec::new());
        while size() < until && child.try_wait().expect("wait").is_none() {
            std::thread::sleep(second);
            seen.push((size(), began.elapsed().as_secs_f64(), resident(child.id()).0));
        }
        seen
    };
    // Lines are nearly equally long, so bytes stand for lines.
    let mut child = start();
    let first = watch(&mut child, 1e6);
    let bytes_each = {
        let text = std::fs::read_to_string(&output).expect("read");
        text.len() as f64 / text.lines().count() as f64
    };
    let half = watch(&mut child, 0.5 * count as f64 * bytes_each);
    child.kill().expect("kill");
    child.wait().expect("wait");
    let before = size();
    let (mut child, again) = (start(), Instant::now());
    while size() <= before {
        assert!(child.try_wait().expect("wait").is_none(), "the second run ended at once");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    let resumed_secs = again.elapsed().as_secs_f64();
    let rest = watch(&mut child, f64::INFINITY);
    assert!(child.wait().expect("wait").success());
    let text = std::io::BufReader::new(std::fs::File::open(&output).expect("open"));
    let ids = std::io::BufRead::lines(text).map(|line| line.expect("read"));
    let wrong = ids.enumerate().find(|(at, line)| !line.starts_with(&format!("{{\"custom_id\":\"line-{}\"", at + 1)));
    assert!(wrong.is_none(), "{wrong:?}");
    let rate = |seen: &[(f64, f64, f64)]| {
        let (from, to) = (seen.first().expect("seconds"), seen.last().expect("seconds"));
        (to.0 - from.0) / (to.1 - from.1) / bytes_each
    };
    let tenth = (rest.len() / 5).max(2);
    let (early, late) = (rate(&half[..half.len().min(tenth)]), rate(&rest[rest.len() - tenth..]));
    let memory = |seen: &[(f64, f64, f64)]| seen.iter().map(|second| second.2).fold(0.0, f64::max) / 1048576.0;
    report(&format!(
        "{count} lines: {early:.0} lines/s at first, {late:.0} at last; {:.0} MiB at first, {:.0} in the first half, \
         {:.0} in the second; resumed after {resumed_secs:.1} s",
        memory(&first),
        memory(&half),
        memory(&rest)
    ));
    assert!(memory(&rest) < 1.2 * memory(&half) && resumed_secs < 10.0);
    // Other programs may slow either end down, but not by as much as something that grows with the lines would.
    assert!(late > 0.5 * early);
    assert_eq!(read_stats(&stats)["failed"], 0);
}

#[test]
#[ignore = "takes minutes"]
fn killed_at_50_moments() {
    let scratch = Scratch::new();
    let mut lines = mixed(&DEMO, 60, 8);
    for index in 0..60 {
        let line =
            json!({"id": format!("long-{index}"), "prompt": "Tell me a story.", "max_tokens": 150, "ignore_eos": true});
        lines.push(line.to_string());
    }
    let input = scratch.write("in.jsonl", file(&lines));
    let expected = scratch.path("expected.jsonl");
    generate_ok("demo", &input, &expected, &["--progress", "none"], 3);
    let make = |output: &Path| command("demo", &input, output, &["--progress", "none"]);
    let expected = std::fs::read(&expected).expect("read");
    let done = kill_at_random(&make, &scratch.path(""), &expected, 50);
    report(&format!("{} kills over {} outputs", done.kills, done.outputs));
}
