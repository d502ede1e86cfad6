//! Plan = run: what the planner predicts beside what `tidemill generate` then does, over a grid of real runs.
//!
//! `cargo bench --bench plan_run` lets the program measure this machine, plan and run every job of the grid. Raw rates
//! are probed before and after each run and the plan that was chosen is repriced with their mean; a run whose probes
//! differ by more than 10 % is void and repeated. `ONLY=name` runs one job; the table goes to standard output.
#![allow(missing_docs, clippy::print_stdout)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tidemill::calibrate::{Options, calibrate};
use tidemill::error::Tier;
use tidemill::executor::size::model_bytes;
use tidemill::hardware::{Curve, Hardware, Throttles};
use tidemill::kv::layout::KvLayout;
use tidemill::model::Model;
use tidemill::model::dtype::DType;
use tidemill::planner::job::Job;
use tidemill::planner::model::PlanModel;
use tidemill::planner::predict::predict;
use tidemill::policy::Policy;
use tidemill::schedule::placement::Placement;

const SMALL: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16000,
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

/// Probes may differ by this much.
const STEADY: f64 = 0.10;
const ATTEMPTS: usize = 4;

struct Setting {
    name: &'static str,
    large: bool,
    requests: usize,
    prompt_len: usize,
    gen_len: usize,
    flags: &'static [&'static str],
}

const fn job(name: &'static str, sizes: [usize; 3], flags: &'static [&'static str]) -> Setting {
    Setting { name, large: false, requests: sizes[0], prompt_len: sizes[1], gen_len: sizes[2], flags }
}

const fn large(name: &'static str, sizes: [usize; 3], flags: &'static [&'static str]) -> Setting {
    Setting { large: true, ..job(name, sizes, flags) }
}

const GRID: [Setting; 14] = [
    job("memory", [64, 128, 32], &[]),
    job("memory, long answers", [48, 32, 128], &[]),
    job("memory, long prompts", [32, 512, 8], &[]),
    large("memory, 1.1 B", [16, 128, 24], &[]),
    job("disk", [64, 64, 24], &["--cpu-memory", "250MiB"]),
    job("slow disk", [64, 64, 24], &["--cpu-memory", "250MiB", "--throttle", "disk_read=300MB/s"]),
    job("slow disk, few", [8, 64, 24], &["--cpu-memory", "250MiB", "--throttle", "disk_read=500MB/s"]),
    large("slow disk, 1.1 B", [24, 64, 12], &["--cpu-memory", "900MiB", "--throttle", "disk_read=600MB/s"]),
    job("copies", [64, 64, 24], &["--gpu-memory", "160MiB", "--cpu-memory", "2GiB"]),
    job(
        "slow link",
        [64, 64, 24],
        &["--gpu-memory", "160MiB", "--cpu-memory", "2GiB", "--throttle", "h2d=500MB/s,d2h=500MB/s"],
    ),
    job(
        "slow link, few",
        [8, 128, 32],
        &["--gpu-memory", "160MiB", "--cpu-memory", "2GiB", "--throttle", "h2d=1GB/s,d2h=1GB/s"],
    ),
    job(
        "three tiers",
        [48, 64, 24],
        &["--gpu-memory", "160MiB", "--cpu-memory", "220MiB", "--throttle", "h2d=2GB/s,d2h=2GB/s,disk_read=400MB/s"],
    ),
    job(
        "long contexts",
        [24, 700, 16],
        &["--gpu-memory", "400MiB", "--cpu-memory", "3GiB", "--throttle", "h2d=800MB/s,d2h=800MB/s"],
    ),
    large(
        "slow link, 1.1 B",
        [24, 64, 12],
        &["--gpu-memory", "900MiB", "--cpu-memory", "4GiB", "--throttle", "h2d=1GB/s,d2h=1GB/s"],
    ),
];

struct Run {
    predicted: f64,
    measured: f64,
    /// Predicted and measured.
    passes: (f64, u64),
    drift: f64,
    binds: String,
}

fn main() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plan_run");
    std::fs::create_dir_all(&directory).expect("a directory");
    // Profiles of older versions of this program would be taken for its own.
    let _ = std::fs::remove_dir_all(directory.join("calibration"));
    let small = directory.join("small.json");
    std::fs::write(&small, SMALL).expect("writes");
    let large = Path::new(env!("CARGO_MANIFEST_DIR")).join("policies/models/llama-1.1b.json");
    let only = std::env::var("ONLY").ok();
    println!(
        "| job | sequences x prompt + generated | flags | predicted tokens/s | measured | ratio | probes differ |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut ratios = Vec::new();
    for setting in GRID.iter().filter(|setting| only.as_ref().is_none_or(|only| only == setting.name)) {
        let config = if setting.large { &large } else { &small };
        let model = Model::synthetic(setting.name, config, 1).expect("a model");
        for attempt in 1..=ATTEMPTS {
            let run = run(setting, config, &model, &directory);
            let ratio = run.predicted / run.measured;
            let void = run.drift > STEADY && attempt < ATTEMPTS;
            println!(
                "| {}{} | {} x {} + {} | {} | {:.1} | {:.1} | {ratio:.3} | {:.0}, {} | {:.1} %{} |",
                setting.name,
                if run.binds.is_empty() { String::new() } else { format!(" ({} binds)", run.binds) },
                setting.requests,
                setting.prompt_len,
                setting.gen_len,
                setting.flags.join(" "),
                run.predicted,
                run.measured,
                run.passes.0,
                run.passes.1,
                100.0 * run.drift,
                if run.drift > STEADY { ", void" } else { "" }
            );
            if !void {
                ratios.push(ratio);
                break;
            }
        }
    }
    let within = |share: f64| ratios.iter().filter(|&&ratio| ratio < 1.0 + share && ratio > 1.0 - share).count();
    println!("\n{} runs: {} within 10 %, {} within 20 %", ratios.len(), within(0.1), within(0.2));
}

fn probe(directory: &Path) -> Hardware {
    let options = Options { quick: true, disk: Some(directory.join("offload")), memory_bytes: 1 << 30 };
    calibrate(&options, &mut |_| {}).expect("measures")
}

fn run(setting: &Setting, config: &Path, model: &Model, directory: &Path) -> Run {
    let (input, output, stats) =
        (directory.join("in.jsonl"), directory.join("out.jsonl"), directory.join("stats.json"));
    let line = |index: usize| {
        let tokens: Vec<usize> = (0..setting.prompt_len).map(|i| 5 + (i * 31 + index * 977) % 7000).collect();
        json!({"prompt": tokens, "max_tokens": setting.gen_len, "temperature": 0, "ignore_eos": true})
    };
    let lines: String = (0..setting.requests).map(|index| format!("{}\n", line(index))).collect();
    std::fs::write(&input, lines).expect("writes");
    for file in std::fs::read_dir(directory).expect("lists").map(|entry| entry.expect("an entry").path()) {
        if file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("out.jsonl")) {
            std::fs::remove_file(file).expect("removes");
        }
    }
    let generate = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
        command.args(["generate", "--progress", "none", "--model"]).arg(format!("synth:{}#1", config.display()));
        command.arg("--input").arg(&input).arg("--output").arg(&output).arg("--stats").arg(&stats);
        command.arg("--cache-dir").arg(directory).args(setting.flags);
        // A trace makes the program measure the machine even where nothing needs a plan.
        command.arg("--trace").arg(directory.join("trace.json"));
        command
    };
    let before = probe(directory);
    let result = generate().output().expect("the program runs");
    let said = String::from_utf8_lossy(&result.stderr).into_owned();
    assert!(result.status.success(), "{}: {said}", setting.name);
    let after = probe(directory);
    let figures: Value = serde_json::from_slice(&std::fs::read(&stats).expect("reads")).expect("JSON");
    let policy: Policy = serde_json::from_value(figures["policy"].clone()).expect("a policy");
    let profile = profile(directory);
    let hardware = repriced(&profile, &before, &after);
    let hardware = match setting.flags.iter().position(|&flag| flag == "--gpu-memory") {
        Some(_) => hardware.without_gpu().rehearsed(figures["budget_bytes"]["gpu"].as_u64().expect("bytes")),
        None => hardware.without_gpu(),
    };
    let throttles = setting.flags.iter().position(|&flag| flag == "--throttle").map(|at| setting.flags[at + 1]);
    let throttles: Throttles = throttles.map_or(Throttles::default(), |text| text.parse().expect("throttles"));
    let hardware = hardware.throttled(&throttles);
    let kv = KvLayout {
        num_layers: model.config.num_layers,
        num_kv_heads: model.config.num_kv_heads,
        head_dim: model.config.head_dim,
        dtype: DType::Bf16,
        scored: false,
    };
    let bytes = model_bytes(&model.config, model.packed(None).expect("packs").layout(), &kv);
    let plan_model = PlanModel::new("plan_run", model.config.clone(), None, DType::Bf16, DType::Bf16).with_bytes(bytes);
    let compute = if setting.flags.contains(&"--gpu-memory") { Tier::Gpu } else { Tier::Cpu };
    let placement = Placement::new(&plan_model.bytes, &policy, compute);
    let job = Job::uniform(setting.requests, setting.prompt_len, setting.gen_len);
    let prediction = predict(&plan_model, &hardware, &placement, &job);
    let binds = said.lines().find_map(|line| line.split("; ").find_map(|part| part.strip_suffix(" binds")));
    Run {
        predicted: prediction.total_tokens_per_s,
        passes: (prediction.passes, figures["passes"].as_u64().expect("a count")),
        measured: figures["total_tokens_per_s"].as_f64().expect("a rate"),
        drift: drift(&before, &after, setting, &throttles),
        binds: binds.unwrap_or_default().to_owned(),
    }
}

/// The profile that the program measured for itself.
fn profile(directory: &Path) -> Hardware {
    let files =
        std::fs::read_dir(directory.join("calibration")).expect("it measured").map(|entry| entry.expect("an entry"));
    let file: PathBuf = files.map(|entry| entry.path()).find(|path| path.extension().is_some()).expect("a profile");
    Hardware::from_toml(&std::fs::read_to_string(&file).expect("reads"), "profile").expect("a profile")
}

/// How far two probes lie apart in what the run depends on.
fn drift(before: &Hardware, after: &Hardware, setting: &Setting, throttles: &Throttles) -> f64 {
    let apart = |a: f64, b: f64| (a - b).abs() / a.max(b);
    let mut drift = apart(before.raw.cpu_flops, after.raw.cpu_flops);
    let uses_disk = setting.name.contains("disk");
    if uses_disk && throttles.0.is_empty() {
        let read = |hardware: &Hardware| hardware.raw.disk_read_bytes_per_s.unwrap_or(1.0);
        drift = drift.max(apart(read(before), read(after)));
    }
    drift
}

/// The profile at the rates that the probes found: computation by the multiply-add rate, memory and disk by theirs.
fn repriced(profile: &Hardware, before: &Hardware, after: &Hardware) -> Hardware {
    let factor = |rate: &dyn Fn(&Hardware) -> f64| (rate(before) + rate(after)) / 2.0 / rate(profile);
    let flops = factor(&|hardware| hardware.raw.cpu_flops);
    let disk = factor(&|hardware| hardware.raw.disk_read_bytes_per_s.unwrap_or(1.0));
    let memory = factor(&|hardware| hardware.raw.dram_bytes_per_s);
    let mut hardware = profile.clone();
    let kernels = &mut hardware.cpu.kernels;
    kernels.matmul.values_mut().for_each(|Curve(points)| points.iter_mut().for_each(|point| point.1 *= flops));
    kernels.attention_prefill_flops *= flops;
    kernels.attention_decode_flops *= flops;
    kernels.attention_bytes_per_s *= memory;
    kernels.pointwise_bytes_per_s *= memory;
    hardware.cpu.copy_bytes_per_core_s *= memory;
    hardware.cpu.dram_bytes_per_s *= memory;
    if let Some(link) = &mut hardware.disk {
        link.read_bytes_per_s *= disk;
        link.read_together_bytes_per_s *= disk;
        link.write_bytes_per_s *= disk;
        link.write_together_bytes_per_s *= disk;
    }
    hardware
}
