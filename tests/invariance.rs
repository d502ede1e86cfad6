//! Placement never changes a token: the same bytes for any batch, chunk, order, number of threads, shards and kills.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::jobs::{Chance, DEMO, DYNAMIC, Mix, OPT, WINDOW, file, mixed};
use support::process::{command, kill_at_random, signal, start, wait, wait_for_text};
use support::{Scratch, generate_ok, read_jsonl, tidemill};

/// A policy file.
fn policy(scratch: &Scratch, sequences: u64, chunk_tokens: u64) -> PathBuf {
    let text = format!("sequences = {sequences}\nchunk-tokens = {chunk_tokens}\n");
    scratch.write(&format!("policy-{sequences}-{chunk_tokens}.toml"), text)
}

/// Runs a job and gives the output's bytes.
fn bytes(mix: &Mix, input: &Path, name: &str, scratch: &Scratch, extra: &[&str]) -> Vec<u8> {
    let output = scratch.path(name);
    let mut arguments = vec!["--progress", "none"];
    arguments.extend(extra);
    generate_ok(mix.model, input, &output, &arguments, 3);
    std::fs::read(output).unwrap()
}

fn first_difference(a: &[u8], b: &[u8]) -> String {
    let (a, b) = (String::from_utf8_lossy(a), String::from_utf8_lossy(b));
    let different = a.lines().zip(b.lines()).find(|(a, b)| a != b);
    different.map_or("the lengths differ".into(), |(a, b)| format!("\n{a}\n{b}"))
}

/// Compares every batch and chunk with the default.
fn any_batch(mix: &Mix, lines: u64, policies: &[(u64, u64)]) {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", file(&mixed(mix, lines, 1)));
    let expected = bytes(mix, &input, "expected.jsonl", &scratch, &[]);
    let errors = read_jsonl(&scratch.path("expected.jsonl")).iter().filter(|line| !line["error"].is_null()).count();
    assert_eq!(errors, 4, "all lines but those that are wrong on purpose succeed");
    for &(sequences, chunk) in policies {
        let policy = policy(&scratch, sequences, chunk);
        let name = format!("out-{sequences}-{chunk}.jsonl");
        let threads = if sequences == 3 { "1" } else { "2" };
        let extra = ["--policy", policy.to_str().unwrap(), "--threads", threads];
        let got = bytes(mix, &input, &name, &scratch, &extra);
        let what = format!("{}: {sequences} sequences, chunks of {chunk}", mix.model);
        assert!(got == expected, "{what}: {}", first_difference(&expected, &got));
    }
}

const ALL: [(u64, u64); 12] =
    [(1, 1), (1, 7), (1, 64), (1, 300), (3, 1), (3, 7), (3, 64), (3, 300), (64, 1), (64, 7), (64, 64), (64, 300)];

#[test]
fn any_batch_and_chunk_with_the_demo_model() {
    any_batch(&DEMO, 40, &[(1, 300), (1, 7), (3, 1), (3, 64), (64, 7), (64, 300)]);
}

#[test]
fn any_batch_and_chunk_with_a_sliding_window() {
    any_batch(&WINDOW, 40, &ALL);
}

#[test]
fn any_batch_and_chunk_with_length_scaled_positions() {
    any_batch(&DYNAMIC, 40, &ALL);
}

#[test]
fn any_batch_and_chunk_with_learned_positions() {
    any_batch(&OPT, 40, &ALL);
}

/// Caches that evict: by attention, when the prompt has been read, all but the beginning and the end, more with depth, head by head.
const EVICTING: [&[&str]; 5] = [
    &["--kv-policy", "h2o:heavy=0.15,recent=0.15", "--kv-dtype", "int4"],
    &["--kv-policy", "h2o:keep=0.1,recent=8,stretch=1.0", "--kv-dtype", "f16"],
    &["--kv-policy", "sink:start=4,recent=30", "--kv-dtype", "int8"],
    &["--kv-policy", "pyramid:heavy=0.3,recent=0.05,slope=0.8"],
    &["--kv-policy", "per-head:heavy=0.2,recent=0.05,least=0.1", "--kv-dtype", "int8"],
];

#[test]
fn sharing_prompts_changes_nothing() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", file(&mixed(&DEMO, 30, 8)));
    for (index, numerics) in [&[][..]].into_iter().chain(EVICTING).enumerate() {
        let shared = bytes(&DEMO, &input, &format!("shared-{index}"), &scratch, numerics);
        let extra = [numerics, &["--prefix-sharing", "off"]].concat();
        let own = bytes(&DEMO, &input, &format!("own-{index}"), &scratch, &extra);
        assert!(shared == own, "{numerics:?}: {}", first_difference(&shared, &own));
    }
}

#[test]
fn phases_and_wrong_expectations_change_nothing() {
    let scratch = Scratch::new();
    let mut lines = mixed(&DEMO, 30, 9);
    // Answers that go on for much longer than expected.
    let story = |index| json!({"id": format!("s{index}"), "prompt": format!("Story {index}:"), "max_tokens": 150});
    lines.extend((0..12).map(|index| story(index).to_string()));
    let input = scratch.write("in.jsonl", file(&lines));
    let expected = bytes(&DEMO, &input, "expected.jsonl", &scratch, &[]);
    let tight = "sequences = 30\nchunk-tokens = 50\npages = 20\n";
    let tight = scratch.write("tight.toml", tight);
    let keeping =
        scratch.write("keeping.toml", format!("{}paused-pages = 30\n", std::fs::read_to_string(&tight).unwrap()));
    let [tight, keeping] =
        [&tight, &keeping].map(|policy| ["--policy", policy.to_str().unwrap(), "--expect-output-len", "2"]);
    let phased = ["--schedule", "phased"];
    // How it is run, and what surely happens: sequences are paused, what they have computed is kept. Who is in a batch
    // that is closed depends on when lines come.
    let ways = [
        (phased.to_vec(), vec![]),
        (tight.to_vec(), vec!["pauses"]),
        (keeping.to_vec(), vec!["pauses", "kept_tokens"]),
        ([&tight[..], &phased].concat(), vec![]),
        ([&keeping[..], &phased].concat(), vec![]),
    ];
    let stats = scratch.path("stats.json");
    for (index, (mut extra, happens)) in ways.into_iter().enumerate() {
        extra.extend(["--stats", stats.to_str().unwrap()]);
        let got = bytes(&DEMO, &input, &format!("got-{index}.jsonl"), &scratch, &extra);
        assert!(got == expected, "{extra:?}: {}", first_difference(&expected, &got));
        let kv = &read_stats(&stats)["kv"];
        assert!(happens.iter().all(|key| kv[key].as_u64() > Some(0)), "{extra:?}: {kv}");
    }
}

#[test]
fn a_small_cache_changes_nothing() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", file(&mixed(&DEMO, 24, 5)));
    for (index, numerics) in [&[][..]].into_iter().chain(EVICTING).enumerate() {
        let expected = bytes(&DEMO, &input, &format!("expected-{index}.jsonl"), &scratch, numerics);
        let extra = [numerics, &["--cpu-memory", "12MiB"]].concat();
        let got = bytes(&DEMO, &input, &format!("small-{index}.jsonl"), &scratch, &extra);
        assert!(got == expected, "{numerics:?}: {}", first_difference(&expected, &got));
    }
}

#[test]
fn a_pyramid_without_a_slope_is_plain_heavy_hitters() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", file(&mixed(&DEMO, 16, 6)));
    let [plain, flat, steep] =
        ["h2o:heavy=0.2,recent=0.1", "pyramid:heavy=0.2,recent=0.1,slope=0", "pyramid:heavy=0.2,recent=0.1,slope=0.8"]
            .map(|kv_policy| {
                bytes(&DEMO, &input, kv_policy, &scratch, &["--kv-policy", kv_policy]);
                by_id(&scratch.path(kv_policy))
            });
    assert_eq!(plain, flat);
    assert!(plain != steep, "layers keep other amounts");
}

/// Output lines by id, without what names the line's place in the file.
fn by_id(path: &Path) -> BTreeMap<String, Value> {
    let place_free = |mut line: Value| {
        for pointer in ["/id", "/response/request_id", "/response/body/id", "/error/line"] {
            if let Some(value) = line.pointer_mut(pointer) {
                *value = json!("");
            }
        }
        (line["custom_id"].as_str().unwrap().to_owned(), line)
    };
    read_jsonl(path).into_iter().map(place_free).collect()
}

#[test]
fn any_order_of_lines() {
    for mix in [&DEMO, &WINDOW, &DYNAMIC] {
        let scratch = Scratch::new();
        let mut lines = mixed(mix, 40, 2);
        let input = scratch.write("in.jsonl", file(&lines));
        bytes(mix, &input, "expected.jsonl", &scratch, &[]);
        let expected = by_id(&scratch.path("expected.jsonl"));
        let mut chance = Chance::new(3);
        for round in 0..2 {
            chance.shuffle(&mut lines);
            let input = scratch.write("shuffled.jsonl", file(&lines));
            let policy = policy(&scratch, 3 + 50 * round, 64);
            let name = format!("out-{round}.jsonl");
            bytes(mix, &input, &name, &scratch, &["--policy", policy.to_str().unwrap()]);
            let got = by_id(&scratch.path(&name));
            assert_eq!(got.len(), expected.len());
            for (id, line) in &expected {
                assert_eq!(&got[id], line, "{}, {id}", mix.model);
            }
        }
    }
}

/// A job with blank lines, default ids and a duplicate, and its outputs: whole, shard 0 of 2, shard 1 of 2.
fn sharded(scratch: &Scratch) -> Vec<PathBuf> {
    let mut lines = mixed(&WINDOW, 21, 4);
    lines.insert(5, String::new());
    lines.insert(6, json!({"prompt": "no id", "max_tokens": 5}).to_string());
    lines.insert(11, json!({"id": "r1", "prompt": "again"}).to_string());
    let input = scratch.write("in.jsonl", file(&lines));
    let run = |name: &str, extra: &[&str]| {
        bytes(&WINDOW, &input, name, scratch, extra);
        scratch.path(name)
    };
    vec![run("whole.jsonl", &[]), run("0.jsonl", &["--shard", "0/2"]), run("1.jsonl", &["--shard", "1/2"])]
}

#[test]
fn shards_hold_the_lines_of_the_whole() {
    let scratch = Scratch::new();
    let paths = sharded(&scratch);
    let [whole, zero, one] = [0, 1, 2].map(|at| std::fs::read_to_string(&paths[at]).unwrap());
    let input = std::fs::read_to_string(scratch.path("in.jsonl")).unwrap();
    let (mut zero, mut one) = (zero.lines(), one.lines());
    let mut together = String::new();
    for (index, _) in input.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let line = if index % 2 == 0 { zero.next() } else { one.next() };
        together += line.unwrap();
        together.push('\n');
    }
    assert_eq!(together, whole);
}

#[test]
fn merged_shards_are_the_whole() {
    let scratch = Scratch::new();
    let paths = sharded(&scratch);
    let merged = scratch.path("merged.jsonl");
    let result = tidemill(&["merge", "--output", merged.to_str().unwrap()]).args(&paths[1..]).output().unwrap();
    let said = String::from_utf8_lossy(&result.stderr).into_owned();
    assert_eq!(result.status.code(), Some(3), "failed lines remain failed lines: {said}");
    let got = std::fs::read(&merged).expect("the merged output");
    let expected = std::fs::read(&paths[0]).unwrap();
    assert!(got == expected, "{}", first_difference(&expected, &got));
    let missing =
        tidemill(&["merge", "--output", scratch.path("one.jsonl").to_str().unwrap()]).arg(&paths[1]).output().unwrap();
    let said = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert_ne!(missing.status.code(), Some(0), "half of the shards are no whole: {said}");
    assert!(said.contains("1/2"), "{said}");
}

/// A job of some seconds: mixed lines, then long ones.
fn long_job(lines: u64) -> String {
    let mut all = mixed(&DEMO, 30, 6);
    for index in 0..lines {
        let prompt = format!("Tell me a story about {}", ["a fox", "Ben", "the moon"][index as usize % 3]);
        all.push(json!({"id": format!("long-{index}"), "prompt": prompt, "max_tokens": 100, "ignore_eos": true, "n": 1 + index % 2}).to_string());
    }
    file(&all)
}

#[test]
fn killed_at_20_moments() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", long_job(30));
    let expected = bytes(&DEMO, &input, "expected.jsonl", &scratch, &[]);
    let make = |output: &Path| command("demo", &input, output, &["--progress", "none"]);
    let done = kill_at_random(&make, &scratch.path(""), &expected, 20);
    assert_eq!(done.kills, 20);
}

#[test]
fn killed_while_the_cache_evicts() {
    for numerics in EVICTING {
        let scratch = Scratch::new();
        let input = scratch.write("in.jsonl", long_job(30));
        let expected = bytes(&DEMO, &input, "expected.jsonl", &scratch, numerics);
        let extra = [&["--progress", "none"], numerics].concat();
        let make = |output: &Path| command("demo", &input, output, &extra);
        assert_eq!(kill_at_random(&make, &scratch.path(""), &expected, 6).kills, 6);
    }
}

#[test]
fn stopped_by_a_signal() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", long_job(150));
    let expected = bytes(&DEMO, &input, "expected.jsonl", &scratch, &[]);
    for (number, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM")] {
        let (output, said) = (scratch.path(&format!("{name}.jsonl")), scratch.path("said"));
        let (stats, again) = (scratch.path("stats.json"), scratch.path("again.json"));
        let mut child = start(command("demo", &input, &output, &["--stats", stats.to_str().unwrap()]), &said);
        wait_for_text(&said, "model demo", Duration::from_secs(60));
        // Long enough to have sampled, far from long enough to be done.
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, number);
        let status = wait(&mut child, Duration::from_secs(10)).expect("the process ends soon after a signal");
        let text = std::fs::read_to_string(&said).unwrap();
        assert_eq!(status.code(), Some(1), "{text}");
        assert!(text.contains(&format!("error: stopped by {name}\nhint: run the same command again")), "{text}");
        assert!(expected.starts_with(&std::fs::read(&output).unwrap_or_default()));
        // Nothing that was sampled is sampled again.
        generate_ok("demo", &input, &output, &["--stats", again.to_str().unwrap()], 3);
        assert!(std::fs::read(&output).unwrap() == expected);
        let sampled = |path: &Path| read_stats(path)["generated_tokens"].as_u64().unwrap();
        assert_eq!(sampled(&stats) + sampled(&again), tokens_of(&output), "{name}");
    }
}

fn read_stats(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Tokens that were sampled for an output.
fn tokens_of(output: &Path) -> u64 {
    let usage = |line: &Value| match &line["usage"]["completion_tokens"] {
        Value::Null => line["response"]["body"]["usage"]["completion_tokens"].as_u64().unwrap_or(0),
        tokens => tokens.as_u64().unwrap(),
    };
    read_jsonl(output).iter().map(usage).sum()
}

/// Starts a job and kills it as soon as it has shown its counts, after five seconds; gives these counts. None when the
/// job ends before.
fn kill_when_counts_are_shown(input: &Path, output: &Path, said: &Path) -> Option<Value> {
    let mut child = start(command("demo", input, output, &["--progress", "json"]), said);
    loop {
        let ended = wait(&mut child, Duration::from_millis(1)).is_some();
        let text = std::fs::read_to_string(said).unwrap();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        if let Some(line) = whole.lines().find(|line| line.contains("elapsed_s")) {
            child.kill().unwrap();
            child.wait().unwrap();
            return (!ended).then(|| serde_json::from_str(line).unwrap());
        }
        if ended {
            return None;
        }
    }
}

#[test]
fn a_kill_repeats_at_most_two_seconds_of_work() {
    let scratch = Scratch::new();
    let said = scratch.path("said");
    let mut lines = 150;
    // A fast machine needs a longer job.
    let (shown, input, output) = loop {
        let input = scratch.write(&format!("in-{lines}.jsonl"), long_job(lines));
        let output = scratch.path(&format!("out-{lines}.jsonl"));
        if let Some(shown) = kill_when_counts_are_shown(&input, &output, &said) {
            break (shown, input, output);
        }
        lines *= 2;
    };
    let rate = shown["generated_tokens_per_s"].as_f64().unwrap();
    let sampled = rate * shown["elapsed_s"].as_f64().unwrap();
    let stats = scratch.path("stats.json");
    generate_ok("demo", &input, &output, &["--stats", stats.to_str().unwrap()], 3);
    let stats = read_stats(&stats);
    let kept = tokens_of(&output) as f64 - stats["generated_tokens"].as_f64().unwrap();
    let lost = (sampled - kept) / rate;
    assert!(lost <= 2.0, "{lost:.2} s of work lost: {sampled} tokens sampled, {kept} kept");
    assert!(kept <= sampled + rate, "more is kept than was sampled: {kept} of {sampled}");
    assert!(stats["resumed"].as_u64() >= shown["done"].as_u64(), "finished lines are kept");
}
