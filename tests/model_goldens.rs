//! The model module against goldens from Hugging Face transformers (scripts/make_goldens.py).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tidemill::model::Model;
use tidemill::model::chat::{ChatInput, ChatTemplate};
use tidemill::model::config::{ModelConfig, Positions};
use tidemill::model::files::Files;
use tidemill::model::token_text::Detokenizer;
use tidemill::model::tokenizer::Tokenizer;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn cases(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(goldens().join(file)).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    value["cases"].as_array().unwrap().clone()
}

fn text<'a>(case: &'a Value, key: &str) -> &'a str {
    case[key].as_str().unwrap_or_else(|| panic!("no {key} in {case}"))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn rope_frequencies() {
    for case in cases("rope.json") {
        let name = text(&case, "name");
        let mut config = case["config"].clone();
        for (key, value) in [("vocab_size", 10), ("num_hidden_layers", 1), ("intermediate_size", 8)] {
            config[key] = value.into();
        }
        let parsed = ModelConfig::from_json(&config, Path::new(name));
        let Positions::Rotary(rope) = parsed.unwrap().positions else { panic!("{name}: no rope") };
        let found = rope.inv_freq(case["seq_len"].as_u64().unwrap() as usize);
        let wanted: Vec<f64> = case["inv_freq"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(found.len(), wanted.len(), "{name}");
        for (i, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
            let error = (f64::from(*found) / wanted - 1.0).abs();
            assert!(error < 1e-6, "{name}, frequency {i}: {found} is not {wanted}");
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((f64::from(rope.attention_factor()) / factor - 1.0).abs() < 1e-6, "{name}");
    }
}

/// Pushes token by token and finishes.
fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
    let mut detokenizer = Detokenizer::new(skip_special);
    let mut text = String::new();
    for &id in ids {
        text.push_str(&detokenizer.push(tokenizer, id).unwrap());
    }
    text + &detokenizer.finish(tokenizer).unwrap()
}

#[test]
fn tokenizers() {
    for case in cases("tokenizers.json") {
        let model = text(&case, "model");
        let tokenizer = Tokenizer::load(&Files::Directory(goldens().join(model))).unwrap();
        for item in case["encode"].as_array().unwrap() {
            let input = text(item, "text");
            assert_eq!(tokenizer.encode(input, true).unwrap(), ids(&item["ids"]), "{model}: {input:?}");
            assert_eq!(tokenizer.encode(input, false).unwrap(), ids(&item["ids_no_special"]), "{model}: {input:?}");
        }
        for item in case["decode"].as_array().unwrap() {
            let input = ids(&item["ids"]);
            for (key, skip) in [("text", false), ("text_skip_special", true)] {
                assert_eq!(tokenizer.decode(&input, skip).unwrap(), text(item, key), "{model}: {input:?}");
                assert_eq!(streamed(&tokenizer, &input, skip), text(item, key), "{model}, streamed: {input:?}");
            }
        }
    }
}

#[test]
fn chat_templates() {
    for case in cases("chat.json") {
        let name = text(&case, "name");
        let rendered = render(&case);
        match case.get("error") {
            None => assert_eq!(rendered.as_deref(), Ok(text(&case, "rendered")), "{name}"),
            Some(_) => {
                let error = rendered.unwrap_err();
                let wanted = match name {
                    "llama2-roles-error" => "Roles must alternate",
                    "mistral-role-error" => "Only user and assistant roles are supported, not tool",
                    _ => "syntax error",
                };
                assert!(error.contains(wanted), "{name}: {error}");
            }
        }
    }
}

fn render(case: &Value) -> Result<String, String> {
    let special = ["bos_token", "eos_token"].map(|key| (key.to_owned(), text(case, key).to_owned()));
    let sources = BTreeMap::from([("default".to_owned(), text(case, "template").to_owned())]);
    let template = ChatTemplate::new(sources, special.into()).map_err(|error| error.to_string())?;
    let messages = case["messages"].as_array().unwrap();
    let kwargs = case["kwargs"].as_object().cloned().unwrap_or_else(Map::new);
    let input = ChatInput {
        messages,
        tools: case.get("tools").filter(|tools| !tools.is_null()),
        documents: case.get("documents"),
        add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        continue_final_message: case.get("continue_final_message").and_then(Value::as_bool).unwrap_or(false),
        chat_template: None,
        kwargs: &kwargs,
    };
    template.render(&input).map_err(|error| error.to_string())
}

#[test]
fn every_model_directory_opens() {
    let mut fingerprints = BTreeMap::new();
    for entry in std::fs::read_dir(goldens()).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        let model = Model::open(path.to_str().unwrap()).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(model.source.layers.len(), model.config.num_layers);
        assert!(model.tokenizer.len() <= model.config.vocab_size + 8, "{}", path.display());
        for layer in &model.source.layers {
            for linear in [&layer.qkv, &layer.o, &layer.up, &layer.down] {
                let rows: usize = linear.weight.iter().flat_map(|rows| &rows.ranges).map(|range| range.len()).sum();
                assert_eq!(rows, linear.outputs);
            }
        }
        if let Some(other) = fingerprints.insert(model.fingerprint.clone(), path.clone()) {
            panic!("{} and {} have one fingerprint", other.display(), path.display());
        }
    }
    assert!(fingerprints.len() > 20);
}
