//! Flags, limits and budgets that make no sense: refused by name, with a hint that works.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::process::command;
use support::{Scratch, generate, generate_ok, hint, read_jsonl, refused, tidemill};

fn small(scratch: &Scratch) -> std::path::PathBuf {
    scratch.jsonl("in.jsonl", &[json!({"prompt": "Ben", "max_tokens": 3}), json!({"prompt": "A", "max_tokens": 2})])
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Runs with these flags, which must be refused; gives what was said. Nothing is left behind.
fn refuse(flags: &[&str], code: i32) -> String {
    let scratch = Scratch::new();
    let input = small(&scratch);
    let said = refused(&generate("demo", &input, &scratch.path("out.jsonl"), flags), code);
    assert_eq!(names(&scratch.path("")), ["in.jsonl"], "{flags:?} leaves files");
    said
}

#[test]
fn flags_that_make_no_sense_are_usage_errors() {
    for flags in [
        &["--no-such-flag"][..],
        &["--device", "abacus"],
        &["--threads", "many"],
        &["--cpu-memory", "lots"],
        &["--progress", "loud"],
    ] {
        let said = refuse(flags, 2);
        assert!(said.contains(flags[0]), "{said}");
    }
    for flags in [&["--threads", "0"][..], &["--shard", "2/2"], &["--shard", "x"], &["--stats", "/no/such/s.json"]] {
        let said = refuse(flags, 2);
        assert!(said.contains(flags[0].trim_start_matches('-')), "{said}");
        hint(&said);
    }
    for arguments in [&["generate"][..], &["generate", "--model", "demo"], &[], &["grind"]] {
        let output = tidemill(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn caches_that_make_no_sense_are_refused_before_anything_is_written() {
    for policy in [
        "lru",
        "h2o",
        "h2o:heavy=3",
        "sink:recent=1.5",
        "sink:start=1,start=2",
        "h2o:heavy=-1,recent=2",
        "pyramid:heavy=4,recent=4,slope=3",
        "per-head:heavy=4",
    ] {
        let said = refuse(&["--kv-policy", policy], 2);
        assert!(said.contains(&format!("--kv-policy {policy}")), "{said}");
        assert!(hint(&said).contains("h2o:heavy="), "{said}");
    }
    // Layers with windows of their own, and a rotation that depends on the length.
    for (model, policy, instead) in [("mistral-w23", "h2o:heavy=4,recent=4", "sink"), ("llama-dynamic", "sink", "h2o")]
    {
        let scratch = Scratch::new();
        let (input, output) = (small(&scratch), scratch.path("out.jsonl"));
        let model = support::golden(model);
        let said = refused(&generate(model.to_str().unwrap(), &input, &output, &["--kv-policy", policy]), 2);
        assert!(hint(&said).contains(instead), "{said}");
        assert_eq!(names(&scratch.path("")), ["in.jsonl"]);
    }
}

#[test]
fn a_trace_replaces_no_file_of_the_job() {
    let scratch = Scratch::new();
    let (input, output) = (small(&scratch), scratch.path("out.jsonl"));
    let before = fs::read(&input).unwrap();
    for name in ["in.jsonl", "out.jsonl", "out.jsonl.run.json", "out.jsonl.journal", "missing/trace.json"] {
        let trace = scratch.path(name);
        let said = refused(&generate("demo", &input, &output, &["--trace", trace.to_str().unwrap()]), 2);
        assert!(said.contains("--trace"), "{said}");
        hint(&said);
    }
    let both = scratch.path("s.json");
    let flags = ["--trace", both.to_str().unwrap(), "--stats", both.to_str().unwrap()];
    assert!(refused(&generate("demo", &input, &output, &flags), 2).contains("another file"));
    assert_eq!(names(&scratch.path("")), ["in.jsonl"]);
    assert_eq!(fs::read(&input).unwrap(), before);
}

#[test]
fn sampling_flags_have_the_limits_of_lines() {
    let mut wrong = Vec::new();
    for flag in [
        "--n=0",
        "--n=1000",
        "--temperature=-1",
        "--temperature=nan",
        "--temperature=inf",
        "--top-p=0",
        "--top-p=1.5",
        "--top-p=nan",
        "--min-p=7",
        "--min-p=-0.5",
        "--logprobs=100",
        "--max-tokens=0",
        "--stop=",
    ] {
        let scratch = Scratch::new();
        let result = generate("demo", &small(&scratch), &scratch.path("out.jsonl"), &[flag]);
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        let name = flag.split('=').next().unwrap();
        if result.status.code() != Some(2) || !said.contains(name) {
            wrong.push(format!("{flag}: {}", result.status));
        }
    }
    assert!(wrong.is_empty(), "not refused as usage errors:\n{}", wrong.join("\n"));
}

#[test]
fn lines_have_limits() {
    let biases: serde_json::Map<String, Value> = (0..2000).map(|id| (id.to_string(), json!(1))).collect();
    let stops: Vec<String> = (0..100).map(|at| format!("stop {at}")).collect();
    let wrong = [
        ("n", json!(129)),
        ("n", json!(0)),
        ("n", json!(1e300)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1e12)),
        ("stop", json!(stops)),
        ("stop", json!("x".repeat(5000))),
        ("stop", json!("")),
        ("logit_bias", json!(biases)),
        ("logit_bias", json!({"678": 1})),
        ("logit_bias", json!({"5": 101})),
        ("top_logprobs", json!(21)),
        ("prompt_logprobs", json!(1000)),
        ("temperature", json!(-0.1)),
        ("top_p", json!(0)),
        ("allowed_token_ids", json!([])),
        ("min_tokens", json!(5000)),
        ("seed", json!("x")),
    ];
    let lines: Vec<Value> = wrong.iter().map(|(key, value)| json!({"prompt": "A", *key: value})).collect();
    let scratch = Scratch::new();
    let output = scratch.path("out.jsonl");
    generate_ok("demo", &scratch.jsonl("in.jsonl", &lines), &output, &[], 3);
    for (answer, (key, _)) in read_jsonl(&output).iter().zip(&wrong) {
        let message = answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{key}: {answer}"));
        assert!(message.contains(key), "{key}: {message}");
        assert!(message.len() < 400, "{} bytes of message", message.len());
    }
}

#[test]
fn a_budget_that_is_too_small_names_one_that_is_not() {
    let said = refuse(&["--cpu-memory", "1MiB"], 1);
    assert!(said.contains("1.0 MiB"), "the budget is named: {said}");
    let flag = hint(&said);
    let size = flag.split_whitespace().find(|word| word.ends_with("MiB")).unwrap().to_owned();
    let scratch = Scratch::new();
    let stats = scratch.path("stats.json");
    let flags = ["--cpu-memory", size.as_str(), "--stats", stats.to_str().unwrap()];
    generate_ok("demo", &small(&scratch), &scratch.path("out.jsonl"), &flags, 0);
    let said = refuse(&["--cpu-memory", "900TiB"], 1);
    assert!(said.contains("900.0 TiB"), "{said}");
    let size = hint(&said).split_whitespace().find(|word| word.ends_with("MiB")).unwrap().to_owned();
    // What is available moves while others run, so a little less is asked for.
    let size = format!("{}MiB", size.trim_end_matches("MiB").parse::<u64>().unwrap() / 4 * 3);
    generate_ok("demo", &small(&scratch), &scratch.path("out-2.jsonl"), &["--cpu-memory", &size], 0);
}

#[test]
fn a_flag_wins_over_the_environment_over_the_file_over_the_default() {
    let scratch = Scratch::new();
    let (input, stats) = (small(&scratch), scratch.path("stats.json"));
    let config = scratch.write("config.toml", "cpu-memory = \"64MiB\"\nmax-tokens = 2\nseed = 5\nthreads = 1\n");
    let mut count = 0;
    let mut budget = |flags: &[&str], environment: &[(&str, &str)]| {
        count += 1;
        let output = scratch.path(&format!("out-{count}.jsonl"));
        let mut command = command("demo", &input, &output, flags);
        command.args(["--stats", stats.to_str().unwrap()]).envs(environment.iter().copied());
        let result = command.output().unwrap();
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let stats: Value = serde_json::from_str(&fs::read_to_string(&stats).unwrap()).unwrap();
        stats["budget_bytes"]["cpu"].as_u64().unwrap() >> 20
    };
    let file = ["--config", config.to_str().unwrap()];
    let environment = [("TIDEMILL_CPU_MEMORY", "48MiB")];
    assert_eq!(budget(&[&file[..], &["--cpu-memory", "32MiB"]].concat(), &environment), 32);
    assert_eq!(budget(&file, &environment), 48);
    assert_eq!(budget(&file, &[]), 64);
    assert_eq!(budget(&[], &[("TIDEMILL_CONFIG", file[1])]), 64);
    assert!(budget(&[], &[]) > 64);
    let wrong = scratch.write("wrong.toml", "cpu-memry = \"64MiB\"\n");
    let said = refused(&generate("demo", &input, &scratch.path("x"), &["--config", wrong.to_str().unwrap()]), 2);
    assert!(said.contains("cpu-memry") && said.contains("wrong.toml"), "{said}");
    let wrong = scratch.write("policy.toml", "sequences = 0\n");
    let said = refused(&generate("demo", &input, &scratch.path("x"), &["--policy", wrong.to_str().unwrap()]), 2);
    assert!(said.contains("sequences"), "{said}");
}
