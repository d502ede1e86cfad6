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
    let peak = stats["peak_bytes"]["cpu"].as_f64().expect("a number");
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
