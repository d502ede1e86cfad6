//! A text of eight times the context: with sinks it stays as likely as at its beginning, in memory that does not grow.
#![allow(missing_docs)]

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{Scratch, generate_ok, read_jsonl};

/// Positions that the demo model was trained with.
const CONTEXT: usize = 1024;

/// Perplexity of every stretch of `CONTEXT` tokens, and the run's figures.
fn perplexities(scratch: &Scratch, model: &str, text: &str, flags: &[&str]) -> (Vec<f64>, Value) {
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": text, "max_tokens": 0, "echo": true, "logprobs": 0})]);
    let (output, figures) = (scratch.path("out.jsonl"), scratch.path("stats.json"));
    let _ = fs::remove_file(&output);
    let extra = [&["--progress", "none", "--stats", figures.to_str().unwrap()], flags].concat();
    generate_ok(model, &input, &output, &extra, 0);
    let answer = &read_jsonl(&output)[0];
    let scores: Vec<f64> =
        answer["logprobs"]["token_logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
    let mean = |part: &[f64]| (-part.iter().sum::<f64>() / part.len() as f64).exp();
    (scores.chunks_exact(CONTEXT).map(mean).collect(), serde_json::from_slice(&fs::read(figures).unwrap()).unwrap())
}

#[test]
fn sinks_outlast_the_context() {
    let scratch = Scratch::new();
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let stories = fs::read_to_string(root.join("examples/tasks/stories.jsonl")).unwrap();
    let stories: Vec<Value> = stories.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut tokens = 0;
    let upto = stories.iter().take_while(|story| {
        tokens += story["tokens"].as_u64().unwrap() as usize + 2;
        tokens < 8 * CONTEXT + 400
    });
    let text = upto.map(|story| story["text"].as_str().unwrap()).collect::<Vec<_>>().join(" ");
    let sink = ["--kv-policy", "sink:start=4,recent=508", "--kv-dtype", "f32"];
    // Room for 512 positions and a page, not for a thousand.
    let (bounded, figures) = perplexities(&scratch, "demo", &text, &[&sink[..], &["--cpu-memory", "16MiB"]].concat());
    assert_eq!(bounded.len(), 8, "{bounded:?}");
    assert!(figures["kv"]["evicted_tokens"].as_u64().unwrap() > 7 * CONTEXT as u64);
    let early = bounded[..2].iter().sum::<f64>() / 2.0;
    assert!(bounded[2..].iter().all(|&late| late < 1.25 * early), "{bounded:?}");
    // The same model told that its context is longer.
    let stretched = scratch.path("stretched");
    fs::create_dir(&stretched).unwrap();
    for file in fs::read_dir(root.join("demo")).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), stretched.join(file.file_name())).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(stretched.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = json!(9 * CONTEXT);
    fs::write(stretched.join("config.json"), config.to_string()).unwrap();
    let (full, _) = perplexities(&scratch, stretched.to_str().unwrap(), &text, &["--kv-dtype", "f32"]);
    assert!(full[7] > 1.6 * bounded[7], "{full:?} {bounded:?}");
}

#[test]
fn what_keeps_more_than_the_context_does_not_outgrow_it() {
    let scratch = Scratch::new();
    let line = |len: usize| json!({"prompt": vec![50; len], "max_tokens": 100, "ignore_eos": true});
    let input = scratch.jsonl("in.jsonl", &[line(CONTEXT + 400), line(CONTEXT - 24)]);
    for (kv_policy, refused) in
        [("sink:start=4,recent=2000", 1), ("sink:start=4,recent=1.0", 1), ("sink:start=4,recent=508", 0)]
    {
        let output = scratch.path(&format!("{kv_policy}.jsonl"));
        let code = if refused > 0 { 3 } else { 0 };
        generate_ok("demo", &input, &output, &["--progress", "none", "--kv-policy", kv_policy], code);
        let answers = read_jsonl(&output);
        if refused > 0 {
            assert_eq!(answers[0]["error"]["code"], "context_length_exceeded", "{kv_policy}: {}", answers[0]);
        }
        let wanted = if refused > 0 { 24 } else { 100 };
        assert_eq!(answers[1]["usage"]["completion_tokens"], wanted, "{kv_policy}: {}", answers[1]);
    }
}
