//! A job that mixes everything that a line can ask for, made from a seed.

use serde_json::{Value, json};
use tidemill::rng::Philox;

/// What lines may use of a model.
#[derive(Clone, Copy)]
pub struct Mix {
    /// `--model`.
    pub model: &'static str,
    /// Token ids are below this.
    pub vocab: u64,
    /// Positions of prompt and completion.
    pub context: u64,
    /// Whether the model has a chat template.
    pub chat: bool,
}

pub const DEMO: Mix = Mix { model: "demo", vocab: 678, context: 1024, chat: true };
/// Attention with a window of 23 positions.
pub const WINDOW: Mix = Mix { model: "tests/goldens/mistral-w23", vocab: 304, context: 256, chat: true };
/// Rotary frequencies that depend on the length, beyond 64 positions.
pub const DYNAMIC: Mix = Mix { model: "tests/goldens/llama-dynamic", vocab: 288, context: 256, chat: false };
/// Learned positions.
pub const OPT: Mix = Mix { model: "tests/goldens/opt-preln", vocab: 288, context: 180, chat: false };

const WORDS: [&str; 12] = ["Tell", " me", " a", " story", " about", " the", " fox", " and", " Ben", ".", " 7", " é"];
const LENGTHS: [u64; 12] = [1, 2, 9, 23, 24, 63, 64, 65, 100, 128, 129, 300];

/// A seeded source of choices.
pub struct Chance(Philox, u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Chance(Philox::new(seed, 0x7465_7374), 0)
    }

    /// A whole number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.1 += 1;
        (self.0.uniform(self.1) * bound as f64) as u64
    }

    /// Puts things into any order.
    pub fn shuffle<T>(&mut self, things: &mut [T]) {
        for last in (1..things.len()).rev() {
            things.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    fn text(&mut self, words: u64) -> String {
        (0..words).map(|_| WORDS[self.below(WORDS.len() as u64) as usize]).collect()
    }

    fn ids(&mut self, count: u64, vocab: u64) -> Vec<u64> {
        (0..count).map(|_| self.below(vocab)).collect()
    }
}

/// How to sample: line `i` takes the `i`th, round and round.
fn samplings(vocab: u64) -> Vec<Value> {
    let allowed: Vec<u64> = (5..vocab).step_by(7).collect();
    vec![
        json!({"temperature": 0}),
        json!({"temperature": 0.7, "top_p": 0.8, "n": 2}),
        json!({"temperature": 1.3, "top_k": 7, "n": 4}),
        json!({"min_p": 0.1, "seed": -5, "n": 3}),
        json!({"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "presence_penalty": -0.4}),
        json!({"temperature": 0.9, "frequency_penalty": 1.5, "ignore_eos": true, "n": 2, "seed": 11}),
        json!({"logit_bias": {"7": 3.5, "20": -100, "100": 2}, "temperature": 0.8}),
        json!({"stop": [" the", "a", "q"], "include_stop_str_in_output": true, "n": 2}),
        json!({"min_tokens": 5, "stop_token_ids": [30, 60, 90, 120], "temperature": 1.5}),
        json!({"allowed_token_ids": allowed, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}),
        json!({"stop": "e", "skip_special_tokens": false}),
    ]
}

/// What beside the text is asked for; `{}` is nothing.
fn extras(shape: u64) -> Vec<Value> {
    let scores = if shape == 3 { json!({"logprobs": 4}) } else { json!({"logprobs": true, "top_logprobs": 3}) };
    let echoed = match shape {
        0 | 1 => json!({"echo": true, "logprobs": 2}),
        3 => json!({"echo": true, "logprobs": 0, "prompt_logprobs": 1}),
        _ => json!({"prompt_logprobs": 2}),
    };
    vec![json!({}), scores, json!({"return_token_ids": true}), echoed, json!({"prompt_logprobs": 0, "max_tokens": 0})]
}

fn add(line: &mut Value, more: &Value) {
    let fields = more.as_object().expect("an object");
    line.as_object_mut().expect("an object").extend(fields.iter().map(|(key, value)| (key.clone(), value.clone())));
}

/// A mixed job of `count` lines with explicit ids `r0`, `r1`, ... and some lines that are wrong.
pub fn mixed(mix: &Mix, count: u64, seed: u64) -> Vec<String> {
    let mut chance = Chance::new(seed);
    let samplings = samplings(mix.vocab);
    let mut lines = Vec::new();
    for index in 0..count {
        let length = LENGTHS[(index * 5 % 12) as usize].min(mix.context - 20);
        let shape = chance.below(if mix.chat { 5 } else { 4 });
        let shape = if shape == 2 && !mix.chat { 0 } else { shape };
        let mut line = json!({"max_tokens": 1 + chance.below(24)});
        let prompt = match shape {
            0 => json!({"prompt": chance.ids(length, mix.vocab)}),
            1 => json!({"prompt": chance.text(1 + length / 4)}),
            3 => {
                let (one, two) = (chance.ids(length, mix.vocab), chance.ids(1 + length / 2, mix.vocab));
                json!({"prompt": [one, two]})
            }
            _ => json!({"messages": [{"role": "user", "content": chance.text(1 + length / 4)}]}),
        };
        add(&mut line, &prompt);
        add(&mut line, &samplings[index as usize % samplings.len()]);
        let extras = extras(shape);
        add(&mut line, &extras[(index / 2) as usize % extras.len()]);
        if line["max_tokens"] == 0 || line["max_tokens"].as_u64() < line["min_tokens"].as_u64() {
            line["min_tokens"] = json!(0);
        }
        let id = format!("r{index}");
        let url = if shape == 3 { "/v1/completions" } else { "/v1/chat/completions" };
        lines.push(if shape >= 3 {
            json!({"custom_id": id, "method": "POST", "url": url, "body": line}).to_string()
        } else {
            line["id"] = json!(id);
            line["metadata"] = json!({"index": index});
            line.to_string()
        });
    }
    let too_long: Vec<u64> = vec![5; mix.context as usize];
    lines.insert(3, json!({"id": "wrong-1", "prompt": "x", "n": 1000}).to_string());
    lines.insert(8, json!({"id": "wrong-2", "prompt": "x", "temprature": 1}).to_string());
    lines.insert(9, json!({"id": "wrong-3", "prompt": too_long}).to_string());
    lines.insert(15, json!({"custom_id": "wrong-4", "method": "POST", "url": "/v1/none", "body": {}}).to_string());
    lines
}

/// Lines as the content of a file.
pub fn file(lines: &[String]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}
