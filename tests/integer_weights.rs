//! int8 and int4 weights are the model that they stand for, however they are packed and wherever they lie.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::jobs::{Mix, file, mixed};
use support::{Scratch, copy_model, generate, generate_ok, golden, read_jsonl, refused, tidemill};
use tidemill::quant::groups::{GROUP, encode};

const LLAMA: Mix = Mix { model: "llama-gqa-tied", vocab: 288, context: 256, chat: false };
const WINDOW: Mix = Mix { model: "mistral-w23", vocab: 288, context: 128, chat: false };
const HEAD20: Mix = Mix { model: "llama-head20", vocab: 288, context: 128, chat: false };

/// Replaces every matrix of an f32 checkpoint by what its groups stand for.
fn replace_matrices(file: &Path, most: u8) {
    let mut bytes = fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut changed = 0;
    for (name, tensor) in header.as_object().unwrap() {
        let Some([_, inputs]) = tensor["shape"].as_array().map(Vec::as_slice) else { continue };
        assert_eq!(tensor["dtype"], "F32", "{name}");
        let offset = |end: usize| 8 + length + tensor["data_offsets"][end].as_u64().unwrap() as usize;
        for row in bytes[offset(0)..offset(1)].chunks_exact_mut(4 * inputs.as_u64().unwrap() as usize) {
            for group in row.chunks_mut(4 * GROUP) {
                let weights: Vec<f32> =
                    group.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
                let mut codes = [0; GROUP];
                let grid = encode(&weights, most, &mut codes).unwrap();
                for (bytes, code) in group.chunks_exact_mut(4).zip(codes) {
                    bytes.copy_from_slice(&grid.decode(code).to_le_bytes());
                    changed += 1;
                }
            }
        }
    }
    assert!(changed > 10_000, "{changed}");
    fs::write(file, bytes).unwrap();
}

/// The lines of an output without what names the model.
fn answers(output: &Path) -> Vec<Value> {
    let mut answers = read_jsonl(output);
    for answer in &mut answers {
        for (place, key) in
            [("", "id"), ("/response", "request_id"), ("/response/body", "id"), ("/response/body", "model")]
        {
            answer.pointer_mut(place).and_then(Value::as_object_mut).and_then(|object| object.remove(key));
        }
    }
    answers
}

#[test]
fn they_compute_what_the_decoded_checkpoint_computes() {
    for (mix, dtype, most) in [(LLAMA, "int4", 15), (LLAMA, "int8", 255), (WINDOW, "int4", 15), (HEAD20, "int8", 255)] {
        let scratch = Scratch::new();
        let input = scratch.write("in.jsonl", file(&mixed(&mix, 16, 3)));
        let copy = copy_model(mix.model, &scratch);
        replace_matrices(&copy.join("model.safetensors"), most);
        let run = |model: &Path, weights: &str, output: &str| {
            let output = scratch.path(output);
            generate_ok(model.to_str().unwrap(), &input, &output, &["--progress", "none", "--weights", weights], 3);
            answers(&output)
        };
        let decoded = run(&copy, "f32", "decoded.jsonl");
        assert_eq!(run(&golden(mix.model), dtype, "integers.jsonl"), decoded, "{} {dtype}", mix.model);
        assert!(run(&golden(mix.model), "f32", "exact.jsonl") != decoded, "{}: rounding changed nothing", mix.model);
    }
}

#[test]
fn packed_once_or_on_the_fly_is_the_same() {
    let scratch = Scratch::new();
    let input = scratch.write("in.jsonl", file(&mixed(&LLAMA, 12, 5)));
    let model = golden(LLAMA.model);
    let (packed, outputs) = (scratch.path("packed"), ["a", "b", "c"].map(|name| scratch.path(name)));
    let result = tidemill(&["pack", "--weights", "int4", "--model", model.to_str().unwrap()])
        .args(["--output", packed.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let flags = ["--progress", "none", "--activations", "int8"];
    generate_ok(model.to_str().unwrap(), &input, &outputs[0], &[&flags[..], &["--weights", "int4"]].concat(), 3);
    generate_ok(packed.to_str().unwrap(), &input, &outputs[1], &flags, 3);
    let policy = scratch.write("policy.toml", "weights = { cpu = 0.3, disk = 0.7 }\n");
    generate_ok(
        packed.to_str().unwrap(),
        &input,
        &outputs[2],
        &[&flags[..], &["--policy", policy.to_str().unwrap()]].concat(),
        3,
    );
    let [expected, rest @ ..] = outputs.map(|output| answers(&output));
    rest.iter().for_each(|got| assert_eq!(*got, expected));
}

#[test]
fn what_cannot_be_rounded_is_refused_by_name() {
    let scratch = Scratch::new();
    let copy = copy_model("llama-mha", &scratch);
    let file = copy.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&whole[8..8 + length]).unwrap();
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": [5, 6, 7], "max_tokens": 2})]);
    let said = |output: &str, flags: &[&str], code: i32| {
        refused(&generate(copy.to_str().unwrap(), &input, &scratch.path(output), flags), code)
    };
    // Matrices that are packed alone, and those that are packed behind others.
    for (part, row) in [("mlp.down_proj", 0), ("mlp.down_proj", 20), ("self_attn.k_proj", 20), ("mlp.up_proj", 17)] {
        let name = format!("model.layers.1.{part}.weight");
        let width = header[&name]["shape"][1].as_u64().unwrap() as usize;
        let at = 8 + length + header[&name]["data_offsets"][0].as_u64().unwrap() as usize + 4 * (row * width + 2);
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let text = said(&format!("{part}-{row}.jsonl"), &["--weights", "int4"], 1);
        let place = format!("row {row} at input 2");
        assert!(text.contains(&name) && text.contains(&place) && text.contains("int4"), "{name}, {place}: {text}");
    }
    let text = said("out.jsonl", &["--activations", "int8"], 2);
    assert!(text.contains("--activations int8") && text.contains("--weights int4"), "{text}");
}
