//! Every golden model against Hugging Face transformers: greedy tokens equal, log-probabilities within 1e-3.
//! The goldens are made by scripts/make_goldens.py.
#![allow(missing_docs)]

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{Scratch, generate_ok, golden, read_jsonl};

/// What the issue allows between two f32 computations in different order.
const TOLERANCE: f64 = 1e-3;

fn names() -> Vec<String> {
    let entries = fs::read_dir(golden("")).expect("tests/goldens");
    let directories =
        entries.map(|entry| entry.expect("entry").path()).filter(|path| path.join("golden.json").exists());
    let mut names: Vec<String> =
        directories.map(|path| path.file_name().unwrap().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn read(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(golden(name).join("golden.json")).unwrap()).unwrap()
}

fn close(ours: &Value, theirs: &Value, what: &str) {
    let (ours, theirs) = (ours.as_f64().expect(what), theirs.as_f64().expect(what));
    assert!((ours - theirs).abs() < TOLERANCE, "{what}: {ours}, transformers {theirs}");
}

/// Runs all cases of a model in one job and compares each with its golden.
fn compare(name: &str) {
    let golden_json = read(name);
    let cases = golden_json["cases"].as_array().unwrap();
    let scratch = Scratch::new();
    let lines: Vec<Value> = cases
        .iter()
        .map(|case| {
            json!({
                "prompt": case["prompt_ids"], "max_tokens": case["max_tokens"], "temperature": 0, "ignore_eos": true, "repetition_penalty": 1,
                "logprobs": 3, "prompt_logprobs": 1, "return_token_ids": true,
            })
        })
        .collect();
    let input = scratch.jsonl("in.jsonl", &lines);
    let output = scratch.path("out.jsonl");
    // The goldens are computed in f32 with a cache in f32, whatever the weights are stored in.
    generate_ok(golden(name).to_str().unwrap(), &input, &output, &["--kv-dtype", "f32"], 0);
    for (index, (ours, case)) in read_jsonl(&output).iter().zip(cases).enumerate() {
        let what = format!("{name}, case {index}");
        assert_eq!(ours["token_ids"], case["tokens"], "{what}");
        let tokens = ours["logprobs"]["token_logprobs"].as_array().expect("log-probabilities");
        for (step, (ours, theirs)) in tokens.iter().zip(case["logprobs"].as_array().unwrap()).enumerate() {
            close(ours, theirs, &format!("{what}, token {step}"));
        }
        let prompt = case["prompt_logprobs"].as_array().unwrap();
        for (position, theirs) in prompt.iter().enumerate().skip(1) {
            let id = case["prompt_ids"][position].to_string();
            close(&ours["prompt_logprobs"][position][&id]["logprob"], theirs, &format!("{what}, position {position}"));
        }
    }
}

#[test]
fn all_models_agree_with_transformers() {
    let names = names();
    assert!(names.len() >= 14, "only {} golden models", names.len());
    for name in &names {
        compare(name);
    }
}
