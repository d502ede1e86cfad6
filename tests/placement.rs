//! Any placement over three tiers gives the bytes of the single-tier run, within the budgets that it was given.
//!
//! `PLACEMENTS=N` draws N policies instead of 30; the long check draws 1,000.
#![allow(missing_docs)]

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::jobs::{Chance, DEMO, DYNAMIC, Mix, OPT, WINDOW, file, mixed};
use support::policies::policy;
use support::{Scratch, generate_ok};

/// The norm after each half layer, embeddings narrower than the hidden state.
const POST_NORM: Mix = Mix { model: "tests/goldens/opt-postln", vocab: 288, context: 180, chat: false };
/// A tied head that streams is the table that embeddings are looked up in.
const TIED: Mix = Mix { model: "tests/goldens/llama-gqa-tied", vocab: 288, context: 256, chat: false };

/// Stored in bf16, as the demo model is: what comes from the disk may come as compressed planes.
const BF16: Mix = Mix { model: "tests/goldens/llama-bf16", vocab: 288, context: 256, chat: false };

/// Numerics that are not the model's own.
const INT4: &[&str] = &["--weights", "int4"];
const INTEGERS: &[&str] = &["--weights", "int4", "--activations", "int8"];
const INT8: &[&str] = &["--weights", "int8", "--activations", "int8"];
const HEAVY: &[&str] = &["--kv-dtype", "int4", "--kv-policy", "h2o:heavy=0.2,recent=0.2"];
const HEAVY_COUNT: &[&str] = &["--kv-policy", "h2o:heavy=20,recent=11"];
const WHOLE: &[&str] = &["--kv-dtype", "int8", "--kv-policy", "h2o:keep=0.15,recent=4,stretch=1.0"];
const WHOLE_LONG: &[&str] = &["--kv-policy", "h2o:keep=0.6,recent=4,stretch=1.0"];
const STRETCHED: &[&str] = &["--kv-policy", "h2o:keep=40,recent=8,stretch=128"];
const SINK: &[&str] = &["--kv-dtype", "int8", "--kv-policy", "sink:start=4,recent=40"];
const NARROW: &[&str] = &["--kv-dtype", "int4", "--kv-policy", "sink:start=0,recent=0.3"];

const PYRAMID: &[&str] = &["--kv-dtype", "int8", "--kv-policy", "pyramid:heavy=0.25,recent=0.05,slope=1"];
const PYRAMID_COUNT: &[&str] = &["--kv-policy", "pyramid:heavy=90,recent=5,slope=0.9"];
const PER_HEAD: &[&str] = &["--kv-dtype", "int4", "--kv-policy", "per-head:heavy=0.2,recent=0.05"];

fn stats(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn random_policies_change_no_byte_and_keep_the_budgets() {
    let count: u64 = std::env::var("PLACEMENTS").map_or(30, |count| count.parse().unwrap());
    let scratch = Scratch::new();
    let native = [DEMO, WINDOW, DYNAMIC, BF16, OPT, POST_NORM, TIED].map(|mix| (mix, &[][..]));
    let rounded = [(DEMO, INTEGERS), (WINDOW, INT4), (TIED, INT8)];
    let bounded = [(DEMO, HEAVY), (TIED, HEAVY_COUNT), (OPT, HEAVY), (BF16, SINK), (WINDOW, NARROW), (POST_NORM, SINK)];
    let spread =
        [(DEMO, WHOLE), (BF16, STRETCHED), (DEMO, PYRAMID), (DEMO, PER_HEAD), (TIED, PER_HEAD), (BF16, PYRAMID_COUNT)];
    let mixes: Vec<(Mix, &[&str])> = native.into_iter().chain(rounded).chain(bounded).chain(spread).collect();
    let expected: Vec<(std::path::PathBuf, Vec<u8>)> = mixes
        .iter()
        .enumerate()
        .map(|(index, (mix, numerics))| {
            let input = scratch.write(&format!("in-{index}.jsonl"), file(&mixed(mix, 24, index as u64)));
            let output = scratch.path(&format!("expected-{index}.jsonl"));
            generate_ok(mix.model, &input, &output, &[&["--progress", "none"], *numerics].concat(), 3);
            (input, std::fs::read(output).unwrap())
        })
        .collect();
    let cache = scratch.path("cache");
    let (mut streamed, mut decoded) = ([0u64; 4], 0);
    for seed in 0..count {
        let mut chance = Chance::new(1000 + seed);
        let which = (seed % mixes.len() as u64) as usize;
        let (mix, numerics) = &mixes[which];
        // Of the others, which are not bf16, there are no planes.
        let planes = [DEMO.model, BF16.model].contains(&mix.model) && !numerics.contains(&"--weights");
        let text = policy(&mut chance, mix.context, planes);
        let file = scratch.write("policy.toml", &text);
        let (output, figures) = (scratch.path(&format!("out-{seed}.jsonl")), scratch.path("stats.json"));
        let threads = (1 + seed % 2).to_string();
        let mut extra = vec!["--progress", "none", "--policy", file.to_str().unwrap(), "--threads", &threads];
        extra.extend(["--cache-dir", cache.to_str().unwrap(), "--stats", figures.to_str().unwrap()]);
        extra.extend(["--cpu-memory", "400MiB", "--disk-space", "400MiB"]);
        // Wrong, so that sequences are paused.
        if seed % 2 == 0 {
            extra.extend(["--expect-output-len", "1"]);
        }
        // Every fourth has no device: main memory and files alone.
        if seed % 4 != 3 {
            extra.extend(["--gpu-memory", "200MiB", "--device", "host"]);
        }
        extra.extend(*numerics);
        let (input, expected) = &expected[which];
        generate_ok(mix.model, input, &output, &extra, 3);
        let got = std::fs::read(&output).unwrap();
        if got != *expected {
            let (got, expected) = (String::from_utf8_lossy(&got), String::from_utf8_lossy(expected));
            let lines = expected.lines().zip(got.lines()).find(|(a, b)| a != b);
            panic!("seed {seed}, {} {numerics:?}:\n{text}\n{lines:?}", mix.model);
        }
        std::fs::remove_file(&output).unwrap();
        let figures = stats(&figures);
        for tier in ["gpu", "cpu", "disk"] {
            let (peak, budget) = (&figures["peak_bytes"][tier], &figures["budget_bytes"][tier]);
            assert!(peak.as_u64() <= budget.as_u64(), "seed {seed}: {peak} of {budget} bytes on {tier}");
        }
        decoded += u64::from(text.contains("compressed") && figures["lanes"]["disk_read"]["bytes"].as_u64() > Some(0));
        let granted: u64 = ["gpu", "cpu"].iter().filter_map(|tier| figures["budget_bytes"][tier].as_u64()).sum();
        let resident = figures["peak_resident_bytes"].as_u64().unwrap();
        assert!(resident <= granted + 300_000_000, "seed {seed}: {resident} bytes resident of {granted}");
        for (count, lane) in streamed.iter_mut().zip(["disk_read", "disk_write", "h2d", "d2h"]) {
            *count += u64::from(figures["lanes"][lane]["bytes"].as_u64().unwrap_or(0) > 0);
        }
    }
    assert!(streamed.iter().all(|&runs| runs * 5 > count), "lanes that moved bytes, of {count} runs: {streamed:?}");
    assert!(decoded * 20 > count, "{decoded} of {count} runs read from disk under policies with compressed planes");
}

/// Answers get much longer than expected, so sequences are paused; what they have computed goes to files and comes
/// back, wherever their pages lie.
#[test]
fn what_a_paused_sequence_has_computed_comes_back() {
    let scratch = Scratch::new();
    let story = |index: usize| {
        let prompt = format!("{} Tell me a story.", "Once there was a fox. ".repeat(index % 7));
        json!({"id": format!("s{index}"), "prompt": prompt, "max_tokens": 150, "n": 1 + index % 3 / 2})
    };
    let input = scratch.jsonl("in.jsonl", &(0..16).map(story).collect::<Vec<_>>());
    let cache = scratch.path("cache");
    let ways: [(&[&str], u64, &str, bool); 7] = [
        (&[], 16, "gpu = 1.0", true),
        (&[], 16, "gpu = 0.3, cpu = 0.4, disk = 0.3", true),
        (&[], 16, "cpu = 0.5, disk = 0.5", false),
        (HEAVY, 12, "cpu = 1.0", false),
        (WHOLE_LONG, 12, "cpu = 0.5, disk = 0.5", false),
        (SINK, 12, "cpu = 0.6, disk = 0.4", true),
        (PYRAMID, 12, "gpu = 0.5, cpu = 0.5", true),
    ];
    for (index, (numerics, pages, kv, has_device)) in ways.into_iter().enumerate() {
        let run = |name: &str, extra: &[&str]| {
            let (output, figures) = (scratch.path(name), scratch.path("stats.json"));
            let mut all = vec!["--progress", "none", "--cache-dir", cache.to_str().unwrap()];
            all.extend(["--stats", figures.to_str().unwrap()]);
            all.extend(numerics.iter().chain(extra));
            generate_ok("demo", &input, &output, &all, 0);
            (std::fs::read(output).unwrap(), stats(&figures))
        };
        let (expected, _) = run(&format!("expected-{index}.jsonl"), &[]);
        let policy = format!(
            "sequences = 20\nchunk-tokens = 60\nblocks = 2\npages = {pages}\nblock-pages = {pages}\n\
             paused-pages = 40\nkv = {{ {kv} }}\n"
        );
        let policy = scratch.write("policy.toml", policy);
        let mut extra = vec!["--policy", policy.to_str().unwrap(), "--expect-output-len", "2"];
        if has_device {
            extra.extend(["--gpu-memory", "200MiB", "--device", "host"]);
        }
        let (got, figures) = run(&format!("got-{index}.jsonl"), &extra);
        assert!(got == expected, "{numerics:?} {kv}");
        let [pauses, kept] = ["pauses", "kept_tokens"].map(|key| figures["kv"][key].as_u64().unwrap());
        assert!(pauses > 0 && kept > 0, "{numerics:?} {kv}: {}", figures["kv"]);
        let rows = figures["computed_tokens"].as_u64().unwrap() - figures["generated_tokens"].as_u64().unwrap();
        assert!(rows <= figures["prompt_tokens"].as_u64().unwrap(), "nothing was computed again: {figures}");
        assert!(figures["peak_bytes"]["disk"].as_u64().unwrap() > 0);
    }
}

/// Rows are full with samples, so the other sequence sits out a pass in which no page of its kind is stored: what it
/// had stored before must have arrived when it goes on.
#[test]
fn a_sequence_that_sits_out_a_pass_finds_what_it_stored() {
    let scratch = Scratch::new();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 272,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    });
    let model = format!("synth:{}#1", scratch.write("config.json", config.to_string()).display());
    let prompt = |seed: u64, len: u64| (0..len).map(|i| 10 + (i * i * 7 + seed * 31) % 250).collect::<Vec<u64>>();
    let input: String = [
        json!({"id": "X", "prompt": prompt(1, 64), "max_tokens": 2, "n": 5, "ignore_eos": true}),
        json!({"id": "B", "prompt": prompt(2, 320), "max_tokens": 8, "ignore_eos": true, "temperature": 0}),
    ]
    .map(|line| format!("{line}\n"))
    .concat();
    let input = scratch.write("in.jsonl", input);
    let cache = scratch.path("cache");
    let policies = ["full", "h2o:heavy=60,recent=10", "h2o:keep=70,recent=8,stretch=1.0", "sink:start=4,recent=80"];
    for (index, kv_policy) in policies.into_iter().enumerate() {
        let output = scratch.path(&format!("expected-{index}.jsonl"));
        generate_ok(&model, &input, &output, &["--progress", "none", "--kv-policy", kv_policy], 0);
        let expected = std::fs::read(output).unwrap();
        for kv_slots in [4, 64] {
            let policy = format!(
                "sequences = 8\nchunk-tokens = 5\nblocks = 1\nblock-rows = 5\nkv-slots = {kv_slots}\npages = 100\n\
                 block-pages = 40\nkv = {{ cpu = 0.95, disk = 0.05 }}\n"
            );
            let policy = scratch.write("policy.toml", policy);
            let output = scratch.path(&format!("out-{index}-{kv_slots}.jsonl"));
            let mut extra = vec!["--progress", "none", "--kv-policy", kv_policy, "--policy", policy.to_str().unwrap()];
            extra.extend(["--cache-dir", cache.to_str().unwrap(), "--throttle", "disk_write=1MB/s"]);
            generate_ok(&model, &input, &output, &extra, 0);
            assert!(std::fs::read(output).unwrap() == expected, "{kv_policy}, {kv_slots} slots");
        }
    }
}
