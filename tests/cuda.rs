//! Jobs on the card against the host: log-probabilities of prompts (teacher-forced) and of answers agree within a
//! bound, tokens are equal where the two best are further apart than twice that. On machines without a card the
//! emulator runs the unchanged binary; each seed draws a model, numerics, a placement and an order of the streams.
//!
//! `CUDA_SEEDS=N` draws N combinations instead of 24; the long check draws 2,000. `CUDA_SEED=S` runs that one alone.
#![allow(missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::jobs::Chance;
use support::policies::policy;
use support::{Scratch, cuda, golden, read_jsonl, tidemill};

/// A golden model: its name, vocabulary, context, and whether positions are rotated.
struct Model {
    name: &'static str,
    vocab: u64,
    context: u64,
    windowed: bool,
    dynamic: bool,
}

const fn model(name: &'static str, vocab: u64, context: u64) -> Model {
    Model { name, vocab, context, windowed: false, dynamic: false }
}

const MODELS: &[Model] = &[
    model("opt-f16", 288, 180),
    model("llama-gqa-tied", 288, 256),
    model("qwen3-tied", 288, 256),
    model("neox-parallel", 288, 256),
    model("llama-bf16", 288, 256),
    model("opt-postln", 288, 180),
    model("neox-sequential", 288, 256),
    Model { windowed: true, ..model("mistral-w23", 304, 256) },
    model("llama-head20", 288, 256),
    model("qwen3-mixed", 288, 256),
    Model { dynamic: true, ..model("llama-dynamic", 288, 256) },
    model("opt-preln", 288, 180),
];

/// One combination.
struct Case {
    seed: u64,
    model: &'static Model,
    numerics: Vec<&'static str>,
    /// The placement; none for everything on the card.
    policy: Option<String>,
    lines: Vec<Value>,
}

impl Case {
    fn draw(seed: u64) -> Case {
        let chance = &mut Chance::new(31 * seed + 5);
        let model = &MODELS[(seed % MODELS.len() as u64) as usize];
        let mut numerics = Vec::new();
        let weights = ["native", "native", "int4", "int8", "f16", "bf16"][chance.below(6) as usize];
        numerics.extend(["--weights", weights]);
        let kv = ["auto", "f32", "f16", "bf16", "int8", "int4"][chance.below(6) as usize];
        numerics.extend(["--kv-dtype", kv]);
        let kept = match chance.below(4) {
            0 if !model.windowed => "h2o:heavy=20,recent=11",
            1 if !model.dynamic => "sink:start=4,recent=40",
            2 if !model.dynamic => "sink:start=70,recent=0.3",
            _ => "full",
        };
        numerics.extend(["--kv-policy", kept]);
        let policy = (chance.below(4) > 0).then(|| policy(chance, model.context, false));
        let lines = (0..6).map(|_| Case::line(chance, model)).collect();
        Case { seed, model, numerics, policy, lines }
    }

    fn line(chance: &mut Chance, model: &Model) -> Value {
        let len = [1, 5, 40, 64, 65, 130][chance.below(6) as usize];
        let ids: Vec<u64> = (0..len).map(|_| chance.below(model.vocab)).collect();
        let most = 1 + chance.below(20);
        json!({
            "prompt": ids, "max_tokens": most, "temperature": 0, "ignore_eos": true, "repetition_penalty": 1,
            "logprobs": 2, "prompt_logprobs": 1, "return_token_ids": true,
        })
    }

    fn has(&self, value: &str) -> bool {
        self.numerics.iter().any(|numeric| numeric.starts_with(value))
    }

    /// How far log-probabilities may be from the host's.
    fn bound(&self) -> f64 {
        let codes = if self.has("h2o") { 3.0 } else { 1.0 };
        let kv = self.numerics[3];
        let cache: f64 = match kv {
            "int4" => 0.5,
            "int8" => 0.05,
            _ => 0.0,
        };
        codes * (0.1 + cache)
    }

    fn run(&self, directory: &Path, device: &str, extra: &[&str]) -> (i32, String, PathBuf) {
        let input = directory.join(format!("in-{}.jsonl", self.seed));
        let text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&input, text).unwrap();
        let output = directory.join(format!("{device}-{}.jsonl", self.seed));
        let model = golden(self.model.name);
        let mut command = tidemill(&["generate", "--progress", "none", "--model", model.to_str().unwrap()]);
        command.arg("--input").arg(&input).arg("--output").arg(&output).args(["--device", device]);
        command.args(&self.numerics).args(["--cpu-memory", "400MiB", "--disk-space", "400MiB"]);
        command.args(extra);
        if device == "cuda" {
            command.args(["--gpu-memory", "300MiB"]);
            emulate(&mut command, self.seed);
            if let Some(policy) = &self.policy {
                let file = directory.join(format!("policy-{}.toml", self.seed));
                std::fs::write(&file, policy).unwrap();
                command.arg("--policy").arg(file);
            }
        }
        let result = command.output().unwrap();
        (result.status.code().unwrap_or(-1), String::from_utf8_lossy(&result.stderr).into_owned(), output)
    }

    fn name(&self) -> String {
        let policy = self.policy.as_deref().unwrap_or("everything on the card");
        format!("seed {}, {} {}\n{policy}", self.seed, self.model.name, self.numerics.join(" "))
    }

    /// Compares the card with the host; gives the greatest difference of log-probabilities.
    fn compare(&self, directory: &Path) -> f64 {
        let [host, card] = ["host", "cuda"].map(|device| {
            let (code, said, output) = self.run(directory, device, &[]);
            assert_eq!(code, 0, "{device}: {}\n{said}", self.name());
            read_jsonl(&output)
        });
        let mut worst = 0.0f64;
        for (index, (host, card)) in host.iter().zip(&card).enumerate() {
            let what = |detail: &str| format!("line {index}: {detail}: {}", self.name());
            let ids = self.lines[index]["prompt"].as_array().unwrap();
            for position in 1..ids.len() {
                let id = ids[position].to_string();
                let of = |answer: &Value| answer["prompt_logprobs"][position][&id]["logprob"].as_f64().unwrap();
                worst = worst.max((of(host) - of(card)).abs());
            }
            let tokens = |answer: &Value| answer["token_ids"].as_array().unwrap().clone();
            let (host_tokens, card_tokens) = (tokens(host), tokens(card));
            assert_eq!(host_tokens.len(), card_tokens.len(), "{}", what("lengths"));
            for step in 0..host_tokens.len() {
                let tops = host["logprobs"]["top_logprobs"][step].as_object().unwrap();
                let mut best: Vec<f64> = tops.values().map(|value| value.as_f64().unwrap()).collect();
                best.sort_by(|a, b| b.total_cmp(a));
                if host_tokens[step] != card_tokens[step] {
                    let apart = best[0] - best.get(1).copied().unwrap_or(best[0]);
                    let text = format!("token {step} differs where the best are {apart} apart");
                    assert!(apart <= 2.0 * self.bound(), "{}", what(&text));
                    break;
                }
                let of = |answer: &Value| answer["logprobs"]["token_logprobs"][step].as_f64().unwrap();
                worst = worst.max((of(host) - of(card)).abs());
            }
        }
        assert!(worst <= self.bound(), "off by {worst}, bound {}: {}", self.bound(), self.name());
        worst
    }
}

/// The emulator's libraries, unless there is a card, and the order of its streams.
fn emulate(command: &mut std::process::Command, seed: u64) {
    if !cuda::is_real() {
        command.env("LD_LIBRARY_PATH", cuda::emulator().unwrap()).env("TIDEMILL_EMULATOR_SEED", seed.to_string());
    }
}

/// Whether tests can run; tells if not.
fn can_run() -> bool {
    if cuda::is_real() {
        return true;
    }
    cuda::emulator().map_err(|why| cuda::skip(&format!("there is no card, and no emulator: {why}"))).is_ok()
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

#[test]
fn jobs_agree_with_the_host() {
    if !can_run() {
        return;
    }
    use std::io::Write;
    let scratch = Scratch::new();
    let directory = scratch.path("");
    let seeds = match number("CUDA_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("CUDA_SEEDS").unwrap_or(24),
    };
    for seed in seeds {
        let case = Case::draw(seed);
        let worst = case.compare(&directory);
        let numerics = case.numerics.join(" ");
        writeln!(std::io::stderr(), "seed {seed:4} {:16} {numerics}: {worst:.1e}", case.model.name).unwrap();
    }
}
