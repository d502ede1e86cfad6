//! Jobs on the card against the host: log-probabilities of prompts (teacher-forced) and of answers agree within a
//! bound, tokens are equal where the two best are further apart than twice that. On machines without a card the
//! emulator runs the unchanged binary; each seed draws a model, numerics, a placement and an order of the streams.
//!
//! `CUDA_SEEDS=N` draws N combinations instead of 20; the long check draws 2,000. `CUDA_SEED=S` runs that one alone.
#![allow(missing_docs)]

mod support;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use support::jobs::Chance;
use support::policies::policy;
use support::{Scratch, cuda, golden, read_jsonl, tidemill};
use tidemill::hardware::Hardware;

/// A golden model: its name, vocabulary, context, and whether positions are rotated.
struct Model {
    name: &'static str,
    vocab: u64,
    context: u64,
    /// Some layers have a window of their own.
    windowed: bool,
    dynamic: bool,
    stored: &'static str,
}

const fn model(name: &'static str, vocab: u64, context: u64) -> Model {
    Model { name, vocab, context, windowed: false, dynamic: false, stored: "f32" }
}

const MODELS: &[Model] = &[
    Model { stored: "f16", ..model("opt-f16", 288, 180) },
    model("llama-gqa-tied", 288, 256),
    model("qwen3-tied", 288, 256),
    Model { stored: "f16", ..model("neox-parallel", 288, 256) },
    Model { stored: "bf16", ..model("llama-bf16", 288, 256) },
    model("opt-postln", 288, 180),
    Model { stored: "bf16", ..model("neox-sequential", 288, 256) },
    Model { windowed: true, ..model("mistral-w23", 304, 256) },
    model("llama-head20", 288, 256),
    Model { stored: "bf16", windowed: true, ..model("qwen3-mixed", 288, 256) },
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
        // Each counts on at a pace of its own, so that all pairs come soon.
        let models = MODELS.len() as u64;
        let model = &MODELS[(seed % models) as usize];
        let weights = ["native", "int4", "f16", "native", "int8", "bf16"][((5 * seed + seed / models) % 6) as usize];
        let kv = ["auto", "int4", "f16", "int8", "bf16", "f32"][((seed / 2 + seed / models) % 6) as usize];
        let mut numerics = vec!["--weights", weights, "--kv-dtype", kv];
        let kept = match (seed + seed / models) % 4 {
            0 if !model.windowed && (seed / 4).is_multiple_of(3) => "pyramid:heavy=20,recent=11,slope=0.5",
            0 if !model.windowed && (seed / 4) % 3 == 1 => "h2o:keep=31,recent=11,stretch=1.0",
            0 if !model.windowed => "h2o:heavy=20,recent=11",
            1 if !model.dynamic => "sink:start=4,recent=40",
            2 if !model.dynamic => "sink:start=70,recent=0.3",
            _ => "full",
        };
        numerics.extend(["--kv-policy", kept]);
        if weights.starts_with("int") && (seed / models).is_multiple_of(2) {
            numerics.extend(["--activations", "int8"]);
        }
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

    /// How far log-probabilities may be from the host's: what products round their operands to decides, and codes of
    /// the cache that fall on the other side of a border. Where keys are evicted by their scores, another key may go.
    fn bound(&self) -> f64 {
        let [_, weights, _, kv, _, kept, ref activations @ ..] = self.numerics[..] else { panic!("three numerics") };
        let weights = if weights == "native" { self.model.stored } else { weights };
        let products = match weights {
            "f32" => 2e-3,
            "bf16" => 0.3,
            // A code of the activations that falls on the other side of a border, too.
            _ if !activations.is_empty() => 0.2,
            _ => 0.1,
        };
        let cache = match kv {
            "int4" => 0.5,
            "int8" => 0.1,
            _ => 0.0,
        };
        if kept.starts_with("h2o") || kept.starts_with("pyramid") {
            3.0 * (0.1 + products + cache)
        } else {
            products + cache
        }
    }

    /// Runs the job into a file of its own; gives exit code, standard error and output.
    fn run_with(&self, directory: &Path, device: &str, environment: &[(&str, &str)]) -> (i32, String, PathBuf) {
        let output = directory.join(format!("{device}-{}.jsonl", self.seed));
        self.start(directory, device, &output, &[], environment)
    }

    /// Runs the job into a file.
    fn run_onto(&self, directory: &Path, device: &str, output: &Path) -> (i32, String, PathBuf) {
        self.start(directory, device, output, &[], &[])
    }

    fn start(
        &self,
        directory: &Path,
        device: &str,
        output: &Path,
        flags: &[&str],
        environment: &[(&str, &str)],
    ) -> (i32, String, PathBuf) {
        let input = directory.join(format!("in-{}.jsonl", self.seed));
        let text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&input, text).unwrap();
        let model = golden(self.model.name);
        let mut command = tidemill(&["generate", "--progress", "none", "--model", model.to_str().unwrap()]);
        command.arg("--input").arg(&input).arg("--output").arg(output).args(["--device", device]);
        command.args(&self.numerics).args(["--cpu-memory", "400MiB", "--disk-space", "400MiB"]);
        if device != "host" {
            command.args(["--gpu-memory", "300MiB"]);
            emulate(&mut command, self.seed);
            if let Some(policy) = &self.policy {
                let file = directory.join(format!("policy-{}.toml", self.seed));
                std::fs::write(&file, policy).unwrap();
                command.arg("--policy").arg(file);
            }
        }
        command.args(flags).envs(environment.iter().copied());
        let result = command.output().unwrap();
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        (result.status.code().unwrap_or(-1), said, output.to_owned())
    }

    fn name(&self) -> String {
        let policy = self.policy.as_deref().unwrap_or("everything on the card");
        format!("seed {}, {} {}\n{policy}", self.seed, self.model.name, self.numerics.join(" "))
    }

    /// Compares the card with the host; gives the greatest difference of log-probabilities.
    fn compare(&self, directory: &Path) -> f64 {
        let [host, card] = ["host", "cuda"].map(|device| {
            let (code, said, output) = self.run_with(directory, device, &[]);
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
        None => 0..number("CUDA_SEEDS").unwrap_or(20),
    };
    for seed in seeds {
        let case = Case::draw(seed);
        let worst = case.compare(&directory);
        let numerics = case.numerics.join(" ");
        writeln!(std::io::stderr(), "seed {seed:4} {:16} {numerics}: {worst:.1e}", case.model.name)
            .expect("standard error");
    }
}

/// Everything that can stream does, with two sequences in each of two blocks.
const STREAMING: &str = "sequences = 4\nchunk-tokens = 70\nblocks = 2\nblock-rows = 72\nweight-slots = 2\n\
    kv-slots = 2\npages = 24\nblock-pages = 12\nweights = { gpu = 0, cpu = 1, disk = 0 }\n\
    kv = { gpu = 0, cpu = 1, disk = 0 }\nhidden = { gpu = 0, cpu = 1, disk = 0 }\nembed = \"gpu\"\nhead = \"gpu\"\n";

fn streaming(seed: u64) -> Case {
    let case = Case::draw(1);
    Case {
        seed,
        numerics: vec!["--weights", "native", "--kv-dtype", "auto", "--kv-policy", "full"],
        policy: Some(STREAMING.into()),
        ..case
    }
}

#[test]
fn the_host_waits_for_the_card_where_passes_end() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    let (case, directory) = (streaming(1), scratch.path(""));
    let [trace, stats] = ["trace", "stats.json"].map(|name| scratch.path(name));
    let (code, said, _) = case.start(
        &directory,
        "cuda",
        &directory.join("out.jsonl"),
        &["--stats", stats.to_str().unwrap()],
        &[("TIDEMILL_EMULATOR_TRACE", trace.to_str().unwrap())],
    );
    assert_eq!(code, 0, "{said}");
    let stats: Value = serde_json::from_str(&std::fs::read_to_string(stats).unwrap()).unwrap();
    let passes = stats["passes"].as_u64().unwrap() as usize;
    let trace = std::fs::read_to_string(trace).unwrap();
    // What is said of loading ends where the first block's tokens are looked up.
    let computed: Vec<&str> = trace.lines().skip_while(|line| !line.ends_with(" embed_rows")).collect();
    let count = |what: &dyn Fn(&str) -> bool| computed.iter().filter(|line| what(line)).count();
    let waits = count(&|line| line.starts_with("wait "));
    // The answers of a pass, and its end; streams that are waited for when all is over.
    assert!(waits <= 2 * passes + 3, "{waits} waits in {passes} passes");
    let copies = |beside: bool| {
        count(&|line| {
            let mut words = line.split(' ').skip(1);
            let (stream, others) = (words.next(), words.next());
            line.ends_with("copy to the device") && stream == Some("2") && (others != Some("0")) == beside
        })
    };
    // A device could have computed meanwhile.
    assert!(copies(true) > 0, "all {} copies are alone", copies(false));
}

#[test]
fn a_stream_that_waits_for_no_other_is_noticed() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    let directory = scratch.path("");
    let answer = |seed: u64, name: &str, environment: &[(&str, &str)]| {
        let output = directory.join(format!("{name}-{seed}.jsonl"));
        let (code, _, output) = streaming(seed).start(&directory, "cuda", &output, &[], environment);
        (code == 0).then(|| std::fs::read(output).unwrap())
    };
    let right = answer(0, "right", &[]).expect("it runs");
    // Computing does not wait for what it reads; copies in overwrite a slot early; copies out take what is not there.
    for deaf in ["deaf:1", "deaf:2", "deaf:3"] {
        let wrong = |seed: u64| answer(seed, &deaf.replace(':', "-"), &[("TIDEMILL_EMULATOR_FAULT", deaf)]);
        let noticed = (0..8).find(|&seed| wrong(seed).as_ref() != Some(&right));
        assert!(noticed.is_some(), "{deaf} changes nothing");
    }
    // The order of the streams alone changes nothing.
    assert!((1..4).all(|seed| answer(seed, "other", &[]).as_ref() == Some(&right)));
}

#[test]
fn a_card_without_bf16_computes() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    // Weights and pages of bf16.
    let case = Case { policy: None, ..Case::draw(4) };
    let case = Case { numerics: vec!["--weights", "native", "--kv-dtype", "auto", "--kv-policy", "full"], ..case };
    let turing = [("TIDEMILL_EMULATOR_CAPABILITY", "75")];
    let (code, said, output) = case.run_with(&scratch.path(""), "cuda", &turing);
    assert_eq!(code, 0, "{said}");
    assert_eq!(read_jsonl(&output).len(), case.lines.len());
}

#[test]
fn a_card_is_measured_and_planned_for() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    let [input, output, cache] = ["in.jsonl", "out.jsonl", "cache"].map(|name| scratch.path(name));
    std::fs::write(&input, "{\"prompt\": \"Story: Mia\", \"max_tokens\": 3}\n").unwrap();
    let generate = |gpu_memory: &str| {
        let mut command = tidemill(&["generate", "--model", "demo", "--device", "cuda", "--gpu-memory", gpu_memory]);
        command.args(["--cpu-memory", "400MiB", "--progress", "none"]);
        command.arg("--input").arg(&input).arg("--output").arg(&output).arg("--cache-dir").arg(&cache);
        emulate(&mut command, 1);
        let result = command.output().unwrap();
        (result.status.success(), String::from_utf8_lossy(&result.stderr).into_owned())
    };
    let (done, said) = generate("20MiB");
    assert!(!done && said.contains("measuring Tidemill emulator"), "{said}");
    // Just as much as it takes, and nobody says how: planned for.
    let least = said.split("use --gpu-memory ").nth(1).and_then(|text| text.split(' ').next()).expect("a hint");
    let (done, said) = generate(least);
    assert!(done && said.contains("expected "), "{said}");
    assert_eq!(read_jsonl(&output).len(), 1);
    let profiles = std::fs::read_dir(cache.join("calibration")).unwrap().map(|entry| entry.unwrap().path());
    let profile = profiles.into_iter().find(|path| path.to_string_lossy().contains("Tidemill-emulator"));
    let text = std::fs::read_to_string(profile.expect("it is kept")).unwrap();
    let hardware = Hardware::from_toml(&text, "profile").unwrap();
    let gpu = hardware.gpu.expect("the card is in the profile");
    assert!(gpu.name == "Tidemill emulator" && !gpu.kernels.matmul.is_empty() && hardware.links.is_some());
}

#[test]
fn memory_that_is_not_there_is_refused_with_numbers() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    let case = Case::draw(0);
    let refused = |environment: &[(&str, &str)], numbers: &[&str]| {
        let (code, said, _) = case.run_with(&scratch.path(""), "cuda", environment);
        assert_eq!(code, 1, "{said}");
        assert!(said.contains("error: ") && said.contains("hint: ") && !said.contains("panicked"), "{said}");
        assert!(numbers.iter().all(|number| said.contains(number)), "{said}");
    };
    refused(&[("TIDEMILL_EMULATOR_FAULT", "oom:0")], &["on gpu"]);
    // Less than is asked for.
    refused(&[("TIDEMILL_EMULATOR_MEMORY_MIB", "128")], &["300.0 MiB", "128.0 MiB", "--gpu-memory 128MiB"]);
}

#[test]
fn failures_end_the_run_and_the_next_goes_on() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    for (index, fault) in ["launch:0", "launch:40", "ecc:90", "lost:150", "launch:300"].iter().enumerate() {
        let case = Case { policy: None, ..Case::draw(3 + index as u64) };
        let directory = scratch.path(&format!("run-{index}"));
        std::fs::create_dir(&directory).unwrap();
        let (code, said, output) = case.run_with(&directory, "cuda", &[("TIDEMILL_EMULATOR_FAULT", fault)]);
        assert_eq!(code, 1, "{fault}: {said}");
        assert!(said.contains("error: the device failed: ") && said.contains("hint: run the same command"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
        let lines = std::fs::read_to_string(&output).unwrap();
        assert!(lines.is_empty() || lines.ends_with('\n'), "{fault}: a line is not whole");
        // The host's arithmetic is another one.
        let (code, said, _) = case.run_onto(&directory, "host", &output);
        assert!(code != 0 && said.contains("arithmetic"), "{said}");
        let (code, said, _) = case.run_onto(&directory, "cuda", &output);
        assert_eq!(code, 0, "{fault}: {said}");
        let answers = read_jsonl(&output);
        assert_eq!(answers.len(), case.lines.len(), "{fault}");
        assert!(answers.iter().all(|answer| answer["error"].is_null()), "{fault}");
    }
}

/// A directory with some of the emulator's libraries under other names.
fn libraries(scratch: &Scratch, directory: &str, names: &[(&str, &str)]) -> PathBuf {
    let path = scratch.path(directory);
    std::fs::create_dir_all(&path).unwrap();
    for (from, to) in names {
        std::os::unix::fs::symlink(cuda::emulator().unwrap().join(from), path.join(to)).unwrap();
    }
    path
}

#[test]
fn libraries_are_found_where_they_are() {
    if !can_run() || cuda::is_real() {
        return;
    }
    let scratch = Scratch::new();
    let driver = libraries(&scratch, "driver", &[("libcuda.so.1", "libcuda.so.1")]);
    let doctor = |environment: &[(&str, &Path)]| {
        let mut command = tidemill(&["doctor"]);
        command.env_remove("VIRTUAL_ENV").env_remove("CONDA_PREFIX").env("LD_LIBRARY_PATH", &driver);
        command.envs(environment.iter().copied()).env("TIDEMILL_EMULATOR_DRIVER", "13000");
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    // Wheels, named for CUDA 13 alone.
    let wheel = "venv/lib/python3.12/site-packages/nvidia/cu13/lib";
    let names = [("libnvrtc.so.12", "libnvrtc.so.13"), ("libcublas.so.12", "libcublas.so.13")];
    let wheel = libraries(&scratch, wheel, &names);
    let said = doctor(&[("VIRTUAL_ENV", &scratch.path("venv"))]);
    assert!(said.contains("--device cuda: yes") && said.contains(wheel.to_str().unwrap()), "{said}");
    // A toolkit.
    libraries(&scratch, "toolkit/lib64", &names);
    let said = doctor(&[("CUDA_HOME", &scratch.path("toolkit"))]);
    assert!(said.contains("--device cuda: yes") && said.contains("toolkit/lib64/libnvrtc.so.13"), "{said}");
    // Nowhere, unless the machine has them.
    let said = doctor(&[("HOME", &scratch.path("none")), ("PATH", &scratch.path("none"))]);
    let found = said.contains("--device cuda: yes");
    assert!(found || (said.contains("NVRTC: missing") && said.contains("pip install nvidia-cuda-nvrtc")), "{said}");
}

#[test]
fn auto_takes_the_card_and_no_card_is_said() {
    if !can_run() {
        return;
    }
    let scratch = Scratch::new();
    let case = Case { policy: None, ..Case::draw(0) };
    let (code, said, output) = case.run_with(&scratch.path(""), "auto", &[]);
    assert_eq!(code, 0, "{said}");
    assert!(!said.contains("; host, "), "{said}");
    if cuda::is_real() {
        return;
    }
    std::fs::remove_file(&output).unwrap();
    std::fs::remove_file(output.with_file_name("auto-0.jsonl.run.json")).unwrap();
    let none = [("TIDEMILL_EMULATOR_DEVICES", "0")];
    let (code, said, _) = case.run_with(&scratch.path(""), "auto", &none);
    assert!(code == 0 && said.contains("; host, "), "{said}");
    let (code, said, _) = case.run_with(&scratch.path(""), "cuda", &none);
    assert!(code == 1 && said.contains("error: the NVIDIA driver shows no card") && said.contains("hint: "), "{said}");
    let (code, said, _) = case.run_with(&scratch.path(""), "cuda", &[("LD_LIBRARY_PATH", "")]);
    assert!(code == 1 && said.contains("no NVIDIA driver is installed") && said.contains("hint: "), "{said}");
    let numerics = vec!["--kv-policy", "per-head:heavy=0.2,recent=0.05"];
    let (code, said, _) = Case { numerics, ..Case::draw(1) }.run_with(&scratch.path(""), "cuda", &[]);
    assert!(code == 2 && said.contains("hint: "), "{said}");
}
