//! The files around seeded weights: a tokenizer of exactly the right size, and a whole Hugging Face directory.
//!
//! **Invariant:** a directory appears complete or not at all.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::config::ModelConfig;
use super::files::{Files, read_bounded};
use super::names::{WeightShape, weight_shapes};
use super::synth::SyntheticWeights;
use super::token_text::character_of;
use crate::error::{Bytes, Error, Result};

const MAX_CONFIG_BYTES: u64 = 16 << 20;
const MAX_SHARD_BYTES: u64 = 5_000_000_000;
const WRITE_BYTES: usize = 64 << 20;

const TEMPLATE: &str = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}\
    {% if add_generation_prompt %}assistant:{% endif %}";

/// Reads the config.json at `path` and makes the small files of a model with seeded weights.
///
/// # Errors
/// `Error::Model` when the configuration is not supported.
pub fn describe(path: &Path) -> Result<(ModelConfig, Files)> {
    let text = read_bounded(path, MAX_CONFIG_BYTES)?;
    let mut value: Value = serde_json::from_slice(&text).map_err(|error| Error::model(path, error.to_string()))?;
    let mut config = ModelConfig::from_json(&value, path)?;
    config.synthetic = true;
    if let Value::Object(map) = &mut value {
        map.insert("tidemill_synthetic".into(), true.into());
        map.entry("dtype").or_insert_with(|| "bfloat16".into());
    }
    let vocabulary = Vocabulary::new(&config);
    let bos = vocabulary.text(config.bos_token_id);
    let eos = vocabulary.text(config.eos_token_ids.first().copied());
    let tokenizer_config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config.context_len,
        "chat_template": TEMPLATE,
    });
    let generation = json!({"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids});
    let files = [
        ("config.json", pretty(&value)),
        ("generation_config.json", pretty(&generation)),
        ("tokenizer_config.json", pretty(&tokenizer_config)),
        ("tokenizer.json", vocabulary.tokenizer_json().to_string().into_bytes()),
    ];
    let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), Cow::Owned(bytes))).collect();
    Ok((config, Files::Memory(path.display().to_string(), files)))
}

fn pretty(value: &Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}

/// Token spellings by id.
struct Vocabulary {
    tokens: Vec<String>,
    special: Vec<u32>,
}

impl Vocabulary {
    /// The special tokens at the ids that the configuration names; then the 256 bytes, printable ones first; then
    /// `Ġword300`-like filler, reachable by generation alone. A vocabulary too small for all bytes gets the first of
    /// them and an unknown token.
    fn new(config: &ModelConfig) -> Self {
        let size = config.vocab_size;
        let mut tokens = vec![String::new(); size];
        let mut special = Vec::new();
        let named =
            config.eos_token_ids.iter().map(|&id| (id, "</s>")).chain(config.bos_token_id.map(|id| (id, "<s>")));
        for (id, text) in named {
            if let Some(token) = tokens.get_mut(id as usize).filter(|token| token.is_empty()) {
                *token = if special.is_empty() || text == "<s>" { text.into() } else { format!("</s{id}>") };
                special.push(id);
            }
        }
        let taken: HashSet<String> = tokens.iter().filter(|token| !token.is_empty()).cloned().collect();
        let unknown = (size < 256 + special.len()).then(|| "<unk>".to_owned());
        let bytes = (b' '..=b'~')
            .chain([b'\n', b'\t'])
            .chain((0..=255).filter(|byte| !matches!(byte, b' '..=b'~' | b'\n' | b'\t')));
        let bytes = bytes.map(|byte| character_of(byte).to_string());
        let filler = (0..).map(|number| format!("Ġword{number}"));
        let mut texts = unknown.into_iter().chain(bytes).chain(filler).filter(|text| !taken.contains(text));
        for token in tokens.iter_mut().filter(|token| token.is_empty()) {
            *token = texts.next().expect("filler never ends");
        }
        special.sort_unstable();
        Vocabulary { tokens, special }
    }

    fn text(&self, id: Option<u32>) -> Option<&String> {
        id.and_then(|id| self.tokens.get(id as usize))
    }

    fn tokenizer_json(&self) -> Value {
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect();
        let added = self.special.iter().map(|&id| {
            json!({"id": id, "content": self.tokens[id as usize], "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        });
        let unknown = vocab.contains_key("<unk>").then_some("<unk>");
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": null,
            "pre_tokenizer": byte_level,
            "post_processor": null,
            "decoder": byte_level,
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocab, "merges": []},
        })
    }
}

/// Writes a Hugging Face directory with seeded weights to `output`, which must not exist (or be empty).
///
/// # Errors
/// `Error::Output` when `output` is taken or the disk too small, `Error::Model` when the configuration is not
/// supported, `Error::Io` when writing fails; what was written so far stays in `<output>.partial`.
pub fn write_directory(config_path: &Path, seed: u64, output: &Path) -> Result<()> {
    let (config, files) = describe(config_path)?;
    let Files::Memory(_, small) = &files else { unreachable!("`describe` makes files in memory") };
    let weights = SyntheticWeights::new(&config, seed, config_path.to_owned());
    let size = weights.element_type().size() as u64;
    let shards = shards(weight_shapes(&config), size);
    let total: u64 = shards.iter().flatten().map(|weight| bytes_of(weight, size)).sum();
    let partial = begin(output, total)?;
    for (name, bytes) in small {
        let path = partial.join(name);
        write_durably(&path, bytes)?;
    }
    let mut index = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        write_shard(&partial.join(&name), shard, &weights)?;
        index.extend(shard.iter().map(|weight| (weight.name.clone(), Value::from(name.clone()))));
    }
    if shards.len() > 1 {
        let path = partial.join("model.safetensors.index.json");
        let index = json!({"metadata": {"total_size": total}, "weight_map": index});
        write_durably(&path, &pretty(&index))?;
    }
    if output.is_dir() {
        fs::remove_dir(output).map_err(Error::io("replace", output))?;
    }
    fs::rename(&partial, output).map_err(Error::io("create", output))
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(Error::io("write", path))
}

fn bytes_of(weight: &WeightShape, size: u64) -> u64 {
    weight.shape.iter().map(|&size| size as u64).product::<u64>() * size
}

/// Consecutive weights in files of at most [`MAX_SHARD_BYTES`], unless a single weight is larger.
fn shards(weights: Vec<WeightShape>, size: u64) -> Vec<Vec<WeightShape>> {
    let mut shards: Vec<Vec<WeightShape>> = Vec::new();
    let mut room = 0;
    for weight in weights {
        let need = bytes_of(&weight, size);
        match shards.last_mut() {
            Some(shard) if need <= room => shard.push(weight),
            _ => {
                room = MAX_SHARD_BYTES.max(need);
                shards.push(vec![weight]);
            }
        }
        room -= need;
    }
    shards
}

/// Makes an empty `<output>.partial` on a disk with room for `total` bytes.
fn begin(output: &Path, total: u64) -> Result<PathBuf> {
    let refuse =
        |what: String, hint: &str| Err(Error::Output { path: output.to_owned(), what, hint: Some(hint.to_owned()) });
    if output.exists() && fs::read_dir(output).map_or(true, |mut entries| entries.next().is_some()) {
        return refuse("is there already".into(), "give another --output, or remove it");
    }
    let Some(name) = output.file_name() else {
        return refuse("is not a name for a directory".into(), "give a path that ends with a name");
    };
    let mut partial_name = name.to_owned();
    partial_name.push(".partial");
    let partial = output.with_file_name(partial_name);
    remove_leftover(&partial)?;
    fs::create_dir_all(&partial).map_err(Error::io("create", &partial))?;
    let disk = rustix::fs::statvfs(&partial).map_err(|error| Error::io("inspect", &partial)(error.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let need = total + (64 << 20);
    if free < need {
        let _ = fs::remove_dir(&partial);
        return refuse(format!("needs {}, the disk has {} free", Bytes(need), Bytes(free)), "free some space");
    }
    Ok(partial)
}

/// Removes what an interrupted run left, file by file, so that nothing else can be lost.
fn remove_leftover(partial: &Path) -> Result<()> {
    if !partial.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(partial).map_err(Error::io("inspect", partial))? {
        let path = entry.map_err(Error::io("inspect", partial))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ours = name.ends_with(".safetensors")
            || ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"].contains(&&*name)
            || name == "model.safetensors.index.json";
        if ours {
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
    }
    fs::remove_dir(partial).map_err(Error::io("replace", partial))
}

fn write_shard(path: &Path, shard: &[WeightShape], weights: &SyntheticWeights) -> Result<()> {
    let dtype = weights.element_type();
    let size = dtype.size();
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for weight in shard {
        let end = at + bytes_of(weight, size as u64);
        let dtype = dtype.to_string().to_uppercase();
        header.insert(weight.name.clone(), json!({"dtype": dtype, "shape": weight.shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create(path).map_err(Error::io("create", path))?;
    let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", path));
    write(&(header.len() as u64).to_le_bytes())?;
    write(&header)?;
    let mut buffer = vec![0; WRITE_BYTES];
    for weight in shard {
        let elements: usize = weight.shape.iter().product();
        let step = WRITE_BYTES / size;
        for start in (0..elements).step_by(step) {
            let end = elements.min(start + step);
            let bytes = &mut buffer[..(end - start) * size];
            weights.fill(&weight.name, start..end, bytes);
            write(bytes)?;
        }
    }
    file.sync_all().map_err(Error::io("write", path))
}
