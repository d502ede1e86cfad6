//! Text to tokens and back.
//!
//! **Invariant:** whatever the text, [`Tokenizer::encode`] ends with the tokens that the Hugging Face tokenizer
//! gives, or with an error; never with a panic, and never with other tokens because a limit was hit.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Model as _, NormalizedString, Normalizer as _};

use super::files::Files;
use super::token_text::TextForm;
use crate::error::{Error, Result};

/// A model's tokenizer.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    len: usize,
    special: HashSet<u32>,
    special_texts: BTreeMap<String, String>,
    form: TextForm,
    patterns: Vec<fancy_regex::Regex>,
    /// Texts shorter than this cannot exhaust the patterns' limits and are not checked.
    checked_len: usize,
}

/// The pattern that a ByteLevel pre-tokenizer splits with.
const GPT2_PATTERN: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Patterns of well-known tokenizers, whose steps are linear but for runs of spaces: GPT-2, Llama 3, Qwen2.
const KNOWN_PATTERNS: [&str; 3] = [
    GPT2_PATTERN,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Texts shorter than this cannot exhaust a known pattern's limits (a million steps a match).
const KNOWN_LEN: usize = 32 << 10;

/// A text whose patterns take longer fails: each match has a limit of its own, but there can be many.
const MAX_PATTERN_TIME: Duration = Duration::from_secs(5);

impl Tokenizer {
    /// Reads `tokenizer.json`, or `vocab.json` and `merges.txt` (OPT).
    ///
    /// # Errors
    /// `Error::Model` when neither is there or one is malformed.
    pub fn load(files: &Files) -> Result<Self> {
        let special_texts = special_texts(files)?;
        if let Some(bytes) = files.read("tokenizer.json")? {
            let path = files.path("tokenizer.json");
            let fail = |error: String| Error::model(&path, format!("is not a usable tokenizer: {error}"));
            let inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes)).map_err(fail)?;
            return Tokenizer::new(inner, path, special_texts);
        }
        let path = files.path("vocab.json");
        match (files.read("vocab.json")?, files.text("merges.txt")?) {
            (Some(vocab), Some(merges)) => {
                let inner = gpt2(&vocab, &merges, &special_texts, files).map_err(|error| Error::model(&path, error))?;
                Tokenizer::new(inner, path, special_texts)
            }
            _ => Err(Error::Model {
                path: files.path("tokenizer.json"),
                what: "is missing (so are vocab.json and merges.txt)".into(),
                hint: Some(
                    "make it once with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)".into(),
                ),
            }),
        }
    }

    fn new(mut inner: tokenizers::Tokenizer, path: PathBuf, special_texts: BTreeMap<String, String>) -> Result<Self> {
        let fail = |error: String| Error::model(&path, format!("is not a usable tokenizer: {error}"));
        // As transformers does: a saved truncation or padding is not applied.
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id).collect();
        let decoder = serde_json::to_value(inner.get_decoder()).map_err(|error| fail(error.to_string()))?;
        let form = TextForm::of_decoder(&decoder);
        let mut patterns = Vec::new();
        let parts = [serde_json::to_value(inner.get_normalizer()), serde_json::to_value(inner.get_pre_tokenizer())];
        for part in parts {
            collect_patterns(&part.map_err(|error| fail(error.to_string()))?, &mut patterns);
        }
        let known = patterns.iter().all(|pattern| KNOWN_PATTERNS.contains(&pattern.as_str()));
        let checked_len = if known { KNOWN_LEN } else { 0 };
        let patterns = patterns
            .iter()
            .map(|pattern| fancy_regex::Regex::new(pattern).map_err(|error| fail(error.to_string())))
            .collect::<Result<_>>()?;
        let len = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        Ok(Tokenizer { inner, path, len, special, special_texts, form, patterns, checked_len })
    }

    /// The tokens of `text`; `add_special_tokens` adds what the model expects around a text (such as BOS).
    ///
    /// # Errors
    /// `Error::Model` when the tokenizer cannot process the text, for example because a pattern needs too many steps.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.check_patterns(text)?;
        let encoding = guarded(|| self.inner.encode_fast(text, add_special_tokens));
        Ok(encoding.map_err(|error| self.error(format!("cannot encode a text: {error}")))?.get_ids().to_vec())
    }

    /// The text of `ids`. Ids that the tokenizer does not know give no text.
    ///
    /// # Errors
    /// `Error::Model` when the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special))
            .map_err(|error| self.error(format!("cannot decode tokens: {error}")))
    }

    /// The bytes that the token `id` stands for, incomplete UTF-8 included; empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.token(id).map(|token| self.form.bytes(&token)).unwrap_or_default()
    }

    /// The token `id` as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.get_added_vocabulary().simple_id_to_token(id).or_else(|| self.inner.get_model().id_to_token(id))
    }

    /// The id of the token that the vocabulary spells `token`.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token, which `skip_special` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// One more than the greatest id.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Named special tokens, such as `bos_token`, as chat templates see them.
    pub fn special_texts(&self) -> &BTreeMap<String, String> {
        &self.special_texts
    }

    /// How tokens become text.
    pub(super) fn form(&self) -> &TextForm {
        &self.form
    }

    /// The tokenizers crate takes a pattern that gives up for one that no longer matches, which would silently change
    /// tokens: so patterns are tried on long texts first.
    fn check_patterns(&self, text: &str) -> Result<()> {
        if text.len() < self.checked_len || self.patterns.is_empty() {
            return Ok(());
        }
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            guarded(|| normalizer.normalize(&mut normalized))
                .map_err(|error| self.error(format!("cannot encode a text: {error}")))?;
        }
        let started = Instant::now();
        for pattern in &self.patterns {
            for found in pattern.find_iter(normalized.get()) {
                let failed = |what: &str| self.error(format!("cannot encode a text of {} bytes: {what}", text.len()));
                found.map_err(|error| failed(&error.to_string()))?;
                if started.elapsed() > MAX_PATTERN_TIME {
                    return Err(failed("its patterns take too long"));
                }
            }
        }
        Ok(())
    }

    fn error(&self, what: String) -> Error {
        Error::model(&self.path, what)
    }
}

/// Runs code of the tokenizers crate, which may panic on input it did not foresee.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizer failed internally".to_owned()),
    }
}

/// Every regular expression in a normalizer or pre-tokenizer.
fn collect_patterns(part: &Value, patterns: &mut Vec<String>) {
    match part {
        Value::Object(map) => {
            if let Some(Value::String(pattern)) = map.get("Regex") {
                patterns.push(pattern.clone());
            }
            if map.get("type") == Some(&Value::from("ByteLevel")) && map.get("use_regex") == Some(&Value::from(true)) {
                patterns.push(GPT2_PATTERN.into());
            }
            map.values().for_each(|value| collect_patterns(value, patterns));
        }
        Value::Array(list) => list.iter().for_each(|value| collect_patterns(value, patterns)),
        _ => {}
    }
}

/// `bos_token` and its like from tokenizer_config.json, else from special_tokens_map.json.
fn special_texts(files: &Files) -> Result<BTreeMap<String, String>> {
    let mut texts = BTreeMap::new();
    for name in ["special_tokens_map.json", "tokenizer_config.json"] {
        let Some(Value::Object(map)) = files.json(name)? else { continue };
        let extra = map.get("extra_special_tokens").and_then(Value::as_object);
        for (key, value) in map.iter().filter(|(key, _)| key.ends_with("_token")).chain(extra.into_iter().flatten()) {
            if let Some(text) = value.as_str().or_else(|| value.get("content")?.as_str()) {
                texts.insert(key.clone(), text.to_owned());
            }
        }
    }
    Ok(texts)
}

/// GPT-2's byte-level BPE with OPT's leading `</s>` (formats, section 5.3).
fn gpt2(
    vocab: &[u8],
    merges: &str,
    special_texts: &BTreeMap<String, String>,
    files: &Files,
) -> std::result::Result<tokenizers::Tokenizer, String> {
    let vocab: std::collections::HashMap<String, u32> =
        serde_json::from_slice(vocab).map_err(|error| format!("is not a vocabulary: {error}"))?;
    let pairs = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .map(|line| match line.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(format!("merges.txt has a line that is no pair: {line:?}")),
        })
        .collect::<std::result::Result<Vec<_>, String>>()?;
    let text = |key: &str, default: &str| special_texts.get(key).cloned().unwrap_or_else(|| default.to_owned());
    let bos = text("bos_token", "</s>");
    let special = [bos.clone(), text("eos_token", "</s>"), text("unk_token", "</s>"), text("pad_token", "<pad>")];
    let special: Vec<AddedToken> = special
        .iter()
        .filter(|token| vocab.contains_key(*token))
        .map(|token| AddedToken::from(token.clone(), true).normalized(true))
        .collect();
    let bos_id = vocab.get(&bos).copied();
    let add_bos = files.json("tokenizer_config.json").ok().flatten();
    let add_bos = add_bos.and_then(|config| config.get("add_bos_token")?.as_bool()).unwrap_or(true);
    guarded(|| {
        let bpe =
            BPE::builder().vocab_and_merges(vocab.into_iter().collect::<ahash::AHashMap<_, _>>(), pairs).build()?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        tokenizer.add_special_tokens(special)?;
        if let Some(id) = bos_id.filter(|_| add_bos) {
            let processor = TemplateProcessing::builder()
                .try_single(vec![bos.as_str(), "$A"])?
                .special_tokens(vec![(bos.clone(), id)])
                .build()?;
            tokenizer.with_post_processor(Some(processor));
        }
        Ok(tokenizer)
    })
}
