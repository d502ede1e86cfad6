//! Models that are missing, broken or mean harm: a clear error, an error record, and never a hang.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::process::{command, signal, start, wait};
use support::{Scratch, copy_model, edit_json, generate, generate_ok, golden, hint, read_jsonl, refused};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs one line on a model that must be refused; gives what was said.
fn refuse(model: &str, code: i32) -> String {
    let scratch = Scratch::new();
    let (input, output) = (scratch.jsonl("in.jsonl", &[json!({"prompt": [5], "max_tokens": 2})]), scratch.path("out"));
    let said = refused(&generate(model, &input, &output, &[]), code);
    assert!(!output.exists() && !scratch.path("out.run.json").exists(), "a refused job leaves nothing");
    said
}

#[test]
fn missing_models_are_usage_errors() {
    for (model, needle) in [
        ("org/no-such-model", "hf download org/no-such-model"),
        ("/no/such/directory", "check the path"),
        ("synth:/no/such.json#1", "synth:CONFIG.json#SEED"),
        ("synth:Cargo.toml#x", "synth:CONFIG.json#SEED"),
        ("Cargo.toml", "synth:Cargo.toml"),
    ] {
        let said = refuse(model, 2);
        assert!(hint(&said).contains(needle), "{model}: {said}");
    }
}

#[test]
fn broken_files_are_named() {
    let scratch = Scratch::new();
    type Damage = fn(&Path);
    let damages: [(&str, &str, Damage); 13] = [
        ("no config", "config.json", |d| fs::remove_file(d.join("config.json")).unwrap()),
        ("config is no JSON", "config.json", |d| fs::write(d.join("config.json"), "{").unwrap()),
        ("config is a list", "config.json", |d| fs::write(d.join("config.json"), "[]").unwrap()),
        ("unknown family", "config.json", |d| edit_json(&d.join("config.json"), |c| c["model_type"] = json!("rwkv"))),
        ("no heads", "config.json", |d| edit_json(&d.join("config.json"), |c| c["num_attention_heads"] = json!(0))),
        ("huge width", "", |d| edit_json(&d.join("config.json"), |c| c["hidden_size"] = json!(1u64 << 40))),
        ("other width", "", |d| edit_json(&d.join("config.json"), |c| c["intermediate_size"] = json!(64))),
        ("no tokenizer", "tokenizer.json", |d| fs::remove_file(d.join("tokenizer.json")).unwrap()),
        ("tokenizer is no JSON", "tokenizer.json", |d| fs::write(d.join("tokenizer.json"), "nonsense").unwrap()),
        ("no weights", "", |d| fs::remove_file(d.join("model.safetensors")).unwrap()),
        ("cut weights", "model.safetensors", |d| {
            let bytes = fs::read(d.join("model.safetensors")).unwrap();
            fs::write(d.join("model.safetensors"), &bytes[..bytes.len() - 100]).unwrap();
        }),
        ("a header of 2^60 bytes", "model.safetensors", |d| {
            let mut bytes = fs::read(d.join("model.safetensors")).unwrap();
            bytes[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
            fs::write(d.join("model.safetensors"), bytes).unwrap();
        }),
        ("an index that leads out", "index.json", |d| {
            let map = json!({"weight_map": {"model.embed_tokens.weight": "../../../etc/passwd"}});
            fs::remove_file(d.join("model.safetensors")).unwrap();
            fs::write(d.join("model.safetensors.index.json"), map.to_string()).unwrap();
        }),
    ];
    for (what, file, damage) in damages {
        let copy = copy_model("llama-mha", &scratch);
        damage(&copy);
        let said = refuse(text(&copy), 1);
        assert!(said.contains(file) && said.contains(text(&copy)), "{what}: {said}");
        fs::remove_dir_all(&copy).unwrap();
    }
}

/// Writes a value over the first element of an f32 tensor.
fn poison(file: &Path, tensor: &str, value: f32) {
    let mut bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    assert_eq!(header[tensor]["dtype"], "F32");
    let at = 8 + length + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(file, bytes).unwrap();
}

#[test]
fn logits_that_are_not_finite_fail_their_line_only() {
    for (value, tensor) in [
        (f32::NAN, "model.norm.weight"),
        (f32::INFINITY, "model.norm.weight"),
        (f32::NAN, "model.layers.1.mlp.down_proj.weight"),
    ] {
        let scratch = Scratch::new();
        let copy = copy_model("llama-mha", &scratch);
        poison(&copy.join("model.safetensors"), tensor, value);
        let lines = [
            json!({"prompt": [5, 6, 7], "max_tokens": 8}),
            json!({"prompt": [5, 6], "max_tokens": 8, "n": 3, "temperature": 0, "logprobs": 2}),
            json!({"prompt": [5, 6, 8], "max_tokens": 0, "prompt_logprobs": 1}),
            json!({"prompt": "not ids", "temperature": -1}),
        ];
        let (input, output) = (scratch.jsonl("in.jsonl", &lines), scratch.path("out.jsonl"));
        generate_ok(text(&copy), &input, &output, &[], 3);
        let codes: Vec<Value> = read_jsonl(&output).iter().map(|answer| answer["error"]["code"].clone()).collect();
        assert_eq!(codes, ["not_finite", "not_finite", "not_finite", "invalid_value"], "{value} in {tensor}");
    }
}

#[test]
fn one_token_of_nan_fails_the_lines_that_meet_it() {
    // Token 0 of the embedding is poisoned: only prompts that hold it are lost.
    let scratch = Scratch::new();
    let copy = copy_model("llama-mha", &scratch);
    poison(&copy.join("model.safetensors"), "model.embed_tokens.weight", f32::NAN);
    let line = |prompt: Value| json!({"prompt": prompt, "max_tokens": 4, "logit_bias": {"0": -100}});
    let lines = [line(json!([5, 6])), line(json!([5, 0])), line(json!([7]))];
    let (input, output) = (scratch.jsonl("in.jsonl", &lines), scratch.path("out.jsonl"));
    generate_ok(text(&copy), &input, &output, &[], 3);
    let codes: Vec<Value> = read_jsonl(&output).iter().map(|answer| answer["error"]["code"].clone()).collect();
    assert_eq!(codes, [Value::Null, json!("not_finite"), Value::Null]);
}

#[test]
fn chat_templates_run_on_fuel() {
    let templates = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{{ 'x' * 9000 }}{% endfor %}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ 'x' * 100000000000 }}",
        "{{ range(100000000000) | list | length }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no thanks') }}",
    ];
    for template in templates {
        let scratch = Scratch::new();
        let copy = copy_model("llama-mha", &scratch);
        fs::write(copy.join("chat_template.jinja"), template).unwrap();
        let lines = [json!({"messages": [{"role": "user", "content": "hi"}]}), json!({"prompt": [5], "max_tokens": 2})];
        let (input, output) = (scratch.jsonl("in.jsonl", &lines), scratch.path("out.jsonl"));
        let started = Instant::now();
        generate_ok(text(&copy), &input, &output, &[], 3);
        assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
        let answers = read_jsonl(&output);
        assert_eq!(answers[0]["error"]["code"], "chat_template_error", "{template}");
        assert!(answers[0]["error"]["message"].as_str().unwrap().len() < 1000, "{template}");
        assert_eq!(answers[1]["usage"]["completion_tokens"], 2, "a good line beside a bad one");
    }
}

#[test]
fn a_broken_chat_template_of_the_model_is_named() {
    let scratch = Scratch::new();
    let copy = copy_model("llama-mha", &scratch);
    fs::write(copy.join("chat_template.jinja"), "{% for x %}").unwrap();
    let said = refuse(text(&copy), 1);
    assert!(said.contains("chat_template.jinja"), "{said}");
}

/// A copy of a model whose tokenizer removes what a pattern matches before it looks up tokens.
fn removing(pattern: &str, scratch: &Scratch) -> std::path::PathBuf {
    let copy = copy_model("llama-mha", scratch);
    let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    edit_json(&copy.join("tokenizer.json"), |tokenizer| {
        tokenizer["normalizer"] = Value::Null;
        tokenizer["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
    });
    copy
}

/// Tries every way to read a run of `ab` before it fails for want of a `c`.
const SLOW: &str = "(?:(?:a|b|ab)(?!z))+(?=c)";
/// The same matches, found at once on the texts below.
const FAST: &str = "[ab]+(?=c)";

#[test]
fn a_pattern_that_never_ends_fails_its_line() {
    let scratch = Scratch::new();
    let model = removing(SLOW, &scratch);
    let long = format!("{}d", "ab".repeat(50_000));
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": long}), json!({"prompt": "abc", "max_tokens": 2})]);
    let output = scratch.path("out.jsonl");
    let started = Instant::now();
    generate_ok(text(&model), &input, &output, &[], 3);
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let answers = read_jsonl(&output);
    assert_eq!(answers[0]["error"]["code"], "tokenizer_error");
    assert_eq!(answers[1]["usage"]["completion_tokens"], 2, "{}", answers[1]);
}

#[test]
fn a_pattern_that_gives_up_changes_no_token() {
    let prompts: Vec<String> = (8..40).map(|count| format!("{}dabcd", "ab".repeat(count))).collect();
    let run = |pattern: &str| {
        let scratch = Scratch::new();
        let lines: Vec<Value> =
            prompts.iter().map(|p| json!({"prompt": p, "max_tokens": 1, "return_token_ids": true})).collect();
        let (input, output) = (scratch.jsonl("in.jsonl", &lines), scratch.path("out.jsonl"));
        generate(text(&removing(pattern, &scratch)), &input, &output, &[]);
        read_jsonl(&output)
    };
    for ((slow, fast), prompt) in run(SLOW).iter().zip(run(FAST)).zip(&prompts) {
        if slow["error"].is_null() {
            assert_eq!(slow["prompt_token_ids"], fast["prompt_token_ids"], "{prompt}");
        } else {
            assert_eq!(slow["error"]["code"], "tokenizer_error");
        }
    }
}

/// Every `a` looks through the rest of the text before it is found to stand alone: quadratic, but each search alone
/// stays below any limit on steps.
#[test]
fn a_pattern_that_takes_quadratic_time_holds_up_neither_the_job_nor_a_signal() {
    let scratch = Scratch::new();
    let model = removing("(?:a(?!z))+(?=c)|a", &scratch);
    let lines = [json!({"prompt": "a".repeat(200_000)}), json!({"prompt": "d", "max_tokens": 2})];
    let (input, output, said) = (scratch.jsonl("in.jsonl", &lines), scratch.path("out.jsonl"), scratch.path("said"));
    let mut child = start(command(text(&model), &input, &output, &[]), &said);
    if let Some(status) = wait(&mut child, Duration::from_secs(15)) {
        assert_eq!(status.code(), Some(3));
        return;
    }
    signal(&child, Signal::INT);
    let stopped = wait(&mut child, Duration::from_secs(5));
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("the job hangs; five seconds after SIGINT: {stopped:?}");
}

#[test]
fn a_model_directory_may_hold_more() {
    let scratch = Scratch::new();
    let copy = copy_model("llama-mha", &scratch);
    fs::write(copy.join("README.md"), "hello").unwrap();
    fs::create_dir(copy.join("original")).unwrap();
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": [5, 6], "max_tokens": 4, "temperature": 0})]);
    generate_ok(text(&copy), &input, &scratch.path("copy.jsonl"), &[], 0);
    generate_ok(text(&golden("llama-mha")), &input, &scratch.path("golden.jsonl"), &[], 0);
    assert_eq!(read_jsonl(&scratch.path("copy.jsonl")), read_jsonl(&scratch.path("golden.jsonl")));
}
