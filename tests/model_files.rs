//! Model directories as users and attackers bring them: synthetic ones, damaged ones, hostile ones.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tidemill::model::Model;
use tidemill::model::chat::{ChatInput, ChatTemplate};
use tidemill::model::checkpoint::Checkpoint;
use tidemill::model::config::ModelConfig;
use tidemill::model::files::Files;
use tidemill::model::source::TensorSource;
use tidemill::model::synth_files::write_directory;
use tidemill::model::token_text::Detokenizer;
use tidemill::model::tokenizer::Tokenizer;

const FAMILIES: [&str; 6] = ["opt", "llama", "mistral", "qwen2", "qwen3", "gpt_neox"];

fn config(family: &str, vocab_size: usize) -> Value {
    json!({"model_type": family, "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": if family == "opt" || family == "gpt_neox" { 4 } else { 2 },
        "head_dim": if family == "qwen3" { 16 } else { 8 }, "intermediate_size": 48, "ffn_dim": 48,
        "word_embed_proj_dim": 16, "max_position_embeddings": 128})
}

fn parse(value: &Value) -> tidemill::error::Result<ModelConfig> {
    ModelConfig::from_json(value, Path::new("config.json"))
}

/// Writes a synthetic directory and gives its path.
fn synthesise(directory: &Path, config: &Value, seed: u64) -> std::path::PathBuf {
    let path = directory.join("config-in.json");
    fs::write(&path, config.to_string()).unwrap();
    let output = directory.join(format!("model-{seed}"));
    write_directory(&path, seed, &output).unwrap();
    output
}

#[test]
fn a_synthetic_directory_equals_the_synthetic_model() {
    for family in FAMILIES {
        let directory = tempfile::tempdir().unwrap();
        let output = synthesise(directory.path(), &config(family, 400), 7);
        let stored = Model::open(output.to_str().unwrap()).unwrap();
        let spec = format!("synth:{}#7", directory.path().join("config-in.json").display());
        let made = Model::open(&spec).unwrap();
        assert!(stored.config.synthetic && made.config.synthetic);
        assert_eq!(stored.config.num_parameters(), made.config.num_parameters());
        assert_eq!(stored.source, made.source, "{family}");
        let layer = &stored.source.layers[1];
        for name in [&stored.source.embed, &layer.down.weight[0].tensor, &layer.attn_norm.weight] {
            let (a, b) = (stored.weights.tensor(name).unwrap().unwrap(), made.weights.tensor(name).unwrap().unwrap());
            assert_eq!((a.dtype, a.shape, a.data), (b.dtype, b.shape, b.data), "{family}: {name}");
        }
        let tokens = stored.tokenizer.encode("Hello, 世界!\n", true).unwrap();
        assert_eq!(tokens, made.tokenizer.encode("Hello, 世界!\n", true).unwrap());
        assert_eq!(stored.tokenizer.decode(&tokens, true).unwrap(), "Hello, 世界!\n");
        assert_eq!(stored.tokenizer.len(), 400);
        let other = Model::open(&spec.replace("#7", "#8")).unwrap();
        assert_ne!(made.fingerprint, other.fingerprint);
    }
}

#[test]
fn a_synthetic_vocabulary_has_exactly_the_size_asked_for() {
    for size in [1, 2, 3, 5, 97, 255, 256, 257, 258, 259, 260, 261, 5000] {
        let directory = tempfile::tempdir().unwrap();
        let output = synthesise(directory.path(), &config("llama", size), 0);
        let model = Model::open(output.to_str().unwrap()).unwrap();
        assert_eq!(model.tokenizer.len(), size);
        assert!(model.tokenizer.encode("any text\n\u{1F600}", true).unwrap().iter().all(|&id| (id as usize) < size));
        let spellings: std::collections::HashSet<_> = (0..size as u32).map(|id| model.tokenizer.token(id)).collect();
        assert_eq!(spellings.len(), size);
        if size > 2 {
            assert!(model.tokenizer.is_special(2) && model.generation.eos_token_ids == [2]);
        }
    }
}

#[test]
fn synthesis_overwrites_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let path = directory.path().join("config-in.json");
    assert!(write_directory(&path, 1, &output).unwrap_err().to_string().contains("is there already"));
    // What an interrupted run left is replaced; what is not ours is kept.
    let fresh = directory.path().join("fresh");
    let partial = directory.path().join("fresh.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("model.safetensors"), "half").unwrap();
    write_directory(&path, 1, &fresh).unwrap();
    assert!(!partial.exists());
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("thesis.tex"), "years of work").unwrap();
    assert!(write_directory(&path, 1, &directory.path().join("fresh2")).is_ok());
    fs::remove_dir_all(&fresh).unwrap();
    assert!(write_directory(&path, 1, &fresh).is_err());
    assert!(partial.join("thesis.tex").exists());
}

#[test]
fn a_fingerprint_moves_with_the_directory_and_notices_changes() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let fingerprint = |path: &Path| Model::open(path.to_str().unwrap()).unwrap().fingerprint;
    let before = fingerprint(&output);
    let moved = directory.path().join("moved");
    fs::rename(&output, &moved).unwrap();
    assert_eq!(before, fingerprint(&moved));
    let weights = moved.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    assert_ne!(before, fingerprint(&moved));
}

#[test]
fn an_index_cannot_leave_the_directory() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let index = output.join("model.safetensors.index.json");
    for name in [
        "../model-1/model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "sub/model.safetensors",
        "a\\b.safetensors",
        ".hidden.safetensors",
        "model.txt",
        "nul\0.safetensors",
    ] {
        fs::write(&index, json!({"weight_map": {"lm_head.weight": name}}).to_string()).unwrap();
        let error = Checkpoint::open(&output).err().unwrap().to_string();
        assert!(error.contains("not a plain file name"), "{name:?}: {error}");
    }
    for text in ["{}", "[]", "{\"weight_map\": {}}", "{\"weight_map\": 3}", "nonsense", "{\"weight_map\": {\"a\": 1}}"]
    {
        fs::write(&index, text).unwrap();
        assert!(Checkpoint::open(&output).is_err(), "{text}");
    }
    fs::write(&index, json!({"weight_map": {"absent.weight": "model.safetensors"}}).to_string()).unwrap();
    let checkpoint = Checkpoint::open(&output).unwrap();
    assert!(checkpoint.tensor("absent.weight").err().unwrap().to_string().contains("the index says"));
    assert!(checkpoint.tensor("lm_head.weight").unwrap().is_none(), "the index does not list it");
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let path = output.join("config.json");
    let change = |key: &str, value: Value| {
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        Model::open(output.to_str().unwrap()).err().map(|error| error.to_string()).unwrap_or_default()
    };
    let error = change("num_hidden_layers", json!(3));
    assert!(error.contains("model.layers.2.") && error.contains("is missing"), "{error}");
    assert_eq!(change("num_hidden_layers", json!(2)), "");
    let error = change("intermediate_size", json!(64));
    assert!(error.contains("gate_proj.weight` has shape [48, 32], config.json asks for [64, 32]"), "{error}");
}

#[test]
fn a_file_cut_short_after_opening_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let model = Model::open(output.to_str().unwrap()).unwrap();
    let file = fs::File::options().write(true).open(output.join("model.safetensors")).unwrap();
    file.set_len(100).unwrap();
    assert!(model.weights.tensor("lm_head.weight").err().unwrap().to_string().contains("shrank"));
}

#[test]
fn unsupported_configurations_are_named() {
    let with = |key: &str, value: Value| {
        let mut config = config("llama", 300);
        config[key] = value;
        parse(&config).map(drop).map_err(|error| error.to_string()).unwrap_err()
    };
    assert!(with("model_type", json!("mamba")).contains("\"mamba\""));
    assert!(with("quantization_config", json!({"quant_method": "gptq"})).contains("gptq"));
    assert!(with("num_local_experts", json!(8)).contains("mixtures of experts"));
    assert!(with("hidden_act", json!("xielu")).contains("\"xielu\""));
    assert!(with("num_key_value_heads", json!(3)).contains("does not divide"));
    assert!(with("head_dim", json!(7)).contains("rotary"));
    assert!(with("vocab_size", json!(u64::MAX)).contains("vocab_size"));
    assert!(with("hidden_size", json!(-1)).contains("hidden_size"));
    assert!(with("num_attention_heads", json!(0)).contains("num_attention_heads"));
    assert!(with("rope_scaling", json!({"type": "ntk-magic"})).contains("ntk-magic"));
    assert!(with("rope_scaling", json!({"type": "linear"})).contains("rope_scaling.factor"));
    assert!(with("rope_scaling", json!({"type": "linear", "factor": 0})).contains("factor"));
    assert!(with("rms_norm_eps", json!("small")).contains("rms_norm_eps"));
    assert!(with("torch_dtype", json!("float8_e4m3fn")).contains("float8_e4m3fn"));
    assert!(with("partial_rotary_factor", json!(0.5)).contains("partial_rotary_factor"));
    assert!(with("rope_theta", json!(0.0)).contains("rope_theta"));
}

#[test]
fn sliding_windows_of_each_family() {
    let windows = |mut value: Value, changes: Value| {
        for (key, change) in changes.as_object().unwrap() {
            value[key] = change.clone();
        }
        parse(&value).unwrap().sliding_window
    };
    assert_eq!(windows(config("mistral", 300), json!({})), [Some(4096); 2]);
    assert_eq!(windows(config("mistral", 300), json!({"sliding_window": null})), [None; 2]);
    assert_eq!(windows(config("llama", 300), json!({"sliding_window": 8})), [None; 2]);
    let qwen = |changes| windows(config("qwen2", 300), changes);
    assert_eq!(qwen(json!({"sliding_window": 8})), [None; 2]);
    let sliding = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(qwen(sliding), [None, Some(8)]);
    let listed = json!({"use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(qwen(listed), [Some(8), None]);
}

#[test]
fn long_and_hostile_texts_encode_or_fail() {
    let directory = tempfile::tempdir().unwrap();
    let output = synthesise(directory.path(), &config("llama", 300), 1);
    let tokenizer = Tokenizer::load(&Files::Directory(output)).unwrap();
    for text in [" ".repeat(100_000), "a".repeat(100_000), "\u{0}\u{FFFD}\u{10FFFF}".into(), "'s".repeat(20_000)] {
        let tokens = tokenizer.encode(&text, true).unwrap();
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text);
    }
    // Beyond a million steps the pattern gives up: an error, not other tokens.
    match tokenizer.encode(&" ".repeat(3_000_000), true) {
        Ok(tokens) => assert_eq!(tokens.len(), 3_000_000),
        Err(error) => assert!(error.to_string().contains("cannot encode a text"), "{error}"),
    }
}

#[test]
fn tokenizer_files_that_are_none() {
    let files = |bytes: &[u8]| Files::Memory("m".into(), vec![("tokenizer.json".into(), bytes.to_vec().into())]);
    for bytes in [&b""[..], b"{}", b"[1]", b"\xff\xfe", b"{\"model\": {\"type\": \"BPE\"}}"] {
        assert!(Tokenizer::load(&files(bytes)).is_err());
    }
    let error = Tokenizer::load(&Files::Memory("m".into(), Vec::new())).err().unwrap();
    assert!(error.hint().is_some());
}

fn template(source: &str) -> Result<ChatTemplate, String> {
    let sources = BTreeMap::from([("default".to_owned(), source.to_owned())]);
    ChatTemplate::new(sources, BTreeMap::new()).map_err(|error| error.to_string())
}

fn render(source: &str, messages: &[Value], continue_final: bool) -> Result<String, String> {
    let kwargs = Map::new();
    let input = ChatInput {
        messages,
        tools: None,
        documents: None,
        add_generation_prompt: false,
        continue_final_message: continue_final,
        chat_template: None,
        kwargs: &kwargs,
    };
    template(source)?.render(&input).map_err(|error| error.to_string())
}

#[test]
fn hostile_templates_end() {
    let hello = [json!({"role": "user", "content": "Hi"})];
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    assert!(render(endless, &hello, false).unwrap_err().contains("steps"));
    let deep = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    assert!(render(deep, &hello, false).is_err());
    let large = "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}";
    assert!(render(large, &hello, false).unwrap_err().contains("bytes of output"));
    assert!(render("{% include '/etc/passwd' %}", &hello, false).is_err());
    assert!(render(&"{".repeat(5 << 20), &hello, false).is_err());
    assert!(render(&"{{ ((((".repeat(5000), &hello, false).is_err());
    assert!(render("{{ messages[0].content }}", &[], false).is_err());
    assert!(render("{{ messages[0].content }}", &[json!("text")], false).is_err());
}

#[test]
fn the_final_message_can_be_continued() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}";
    let trimming = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}";
    let messages = [json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Well, "})];
    assert_eq!(render(source, &messages, true).unwrap(), "<user>Hi</s>\n<assistant>Well, ");
    assert_eq!(render(trimming, &messages, true).unwrap(), "<user>Hi</s>\n<assistant>Well,");
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let blocks = "{% for m in messages %}{% for b in m.content %}[{{ b.text }}]{% endfor %}{% endfor %}";
    assert_eq!(render(blocks, &[json!({"role": "user", "content": parts})], true).unwrap(), "[one][two");
    assert!(render("{{ messages[0].content }}", &messages, true).is_err(), "the last message is left out");
    assert!(render(source, &[json!({"role": "user"})], true).is_err());
}

#[test]
fn templates_are_found_in_order() {
    let files = |list: &[(&str, String)]| {
        let list = list.iter().map(|(name, text)| ((*name).to_owned(), text.clone().into_bytes().into())).collect();
        Files::Memory("m".into(), list)
    };
    let named = json!({"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }}"}]});
    let load = |list: &[(&str, String)]| ChatTemplate::load(&files(list), &BTreeMap::new()).unwrap().unwrap();
    let chat = load(&[("tokenizer_config.json", named.to_string())]);
    let messages = [json!({"role": "user", "content": "Hi"})];
    let tools = json!([{"name": "f"}]);
    let kwargs = Map::new();
    let input = ChatInput {
        messages: &messages,
        tools: None,
        documents: None,
        add_generation_prompt: true,
        continue_final_message: false,
        chat_template: None,
        kwargs: &kwargs,
    };
    assert_eq!(chat.render(&input).unwrap(), "plain");
    assert_eq!(chat.render(&ChatInput { tools: Some(&tools), ..input }).unwrap(), "with 1");
    let by_name = ChatInput { tools: Some(&tools), chat_template: Some("default"), ..input };
    assert_eq!(chat.render(&by_name).unwrap(), "plain");
    assert!(
        chat.render(&ChatInput { chat_template: Some("{{ 1 + 1 }}"), ..input }).is_err(),
        "lines bring no templates"
    );
    let chat = load(&[
        ("tokenizer_config.json", named.to_string()),
        ("chat_template.jinja", "file".into()),
        ("additional_chat_templates/tool_use.jinja", "extra".into()),
    ]);
    assert_eq!(chat.render(&input).unwrap(), "file");
    assert_eq!(chat.render(&ChatInput { tools: Some(&tools), ..input }).unwrap(), "extra");
}

/// A JSON value of any shape, biased to numbers at the edges.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop_oneof![Just(0u64), Just(1), Just(2), Just(1 << 20), Just(u64::MAX)].prop_map(Value::from),
        "[a-z]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        let keys = prop_oneof![Just("rope_type"), Just("type"), Just("factor"), Just("rope_theta"), Just("x")];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((keys, inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any value under any key: refused, or a configuration whose sizes can be multiplied.
    #[test]
    fn any_configuration_is_refused_or_sound(
        family in prop::sample::select(&FAMILIES[..]),
        changes in prop::collection::vec((prop::sample::select(vec![
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "intermediate_size", "ffn_dim", "word_embed_proj_dim", "max_position_embeddings", "rope_scaling",
            "rope_parameters", "rope_theta", "rotary_pct", "sliding_window", "max_window_layers", "layer_types",
            "eos_token_id", "use_sliding_window", "original_max_position_embeddings", "torch_dtype",
        ]), any_json()), 0..3),
    ) {
        let mut value = config(family, 300);
        for (key, change) in changes {
            value[key] = change;
        }
        if let Ok(config) = parse(&value) {
            prop_assert!(config.num_layers > 64 || config.num_parameters() > 0);
            prop_assert!(config.num_heads % config.num_kv_heads == 0 && config.attention_scale.is_finite());
            prop_assert_eq!(config.sliding_window.len(), config.num_layers);
            if let tidemill::model::config::Positions::Rotary(rope) = &config.positions {
                prop_assert!(rope.rotary_dim % 2 == 0 && rope.rotary_dim <= config.head_dim);
                prop_assert_eq!(rope.inv_freq(1000).len(), rope.rotary_dim / 2);
            }
        }
    }

    /// Token by token equals all at once, whatever the tokens.
    #[test]
    fn streamed_text_is_decoded_text(
        model in prop::sample::select(vec!["opt-preln", "llama-gqa-tied", "llama-mha", "qwen2-tied"]),
        ids in prop::collection::vec(0u32..310, 0..40),
        skip: bool,
    ) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(model);
        let tokenizer = Tokenizer::load(&Files::Directory(path)).unwrap();
        let mut detokenizer = Detokenizer::new(skip);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&detokenizer.push(&tokenizer, id).unwrap());
        }
        text.push_str(&detokenizer.finish(&tokenizer).unwrap());
        prop_assert_eq!(text, tokenizer.decode(&ids, skip).unwrap());
    }

    /// A damaged weight file is refused, or its tensors still have the bytes of their shapes.
    #[test]
    fn damaged_directories_never_panic(
        model in prop::sample::select(vec!["opt-preln", "llama-gqa-tied", "opt-noprefix", "llama-bf16"]),
        at in 0usize..4000,
        value: u8,
        cut in 0usize..8,
    ) {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(model);
        let directory = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            if name == "golden.json" {
                continue;
            }
            let mut bytes = fs::read(&path).unwrap();
            if name.ends_with(".bin") || name.ends_with(".safetensors") {
                let len = bytes.len();
                // Damage near the start (safetensors header, pickle) or near the end (zip directory).
                let place = if at % 2 == 0 { at % len } else { len - 1 - at % len };
                bytes[place] = value;
                bytes.truncate(if cut == 0 { place } else { len });
            }
            fs::write(directory.path().join(name), bytes).unwrap();
        }
        if let Ok(model) = Model::open(directory.path().to_str().unwrap()) {
            let tensor = model.weights.tensor(&model.source.embed).unwrap().unwrap();
            prop_assert_eq!(tensor.shape.iter().product::<usize>() * tensor.dtype.size(), tensor.data.len());
        }
    }
}
