//! `pack` and `doctor` as commands: kills, full disks, what is said.
#![allow(missing_docs)]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use support::process::{signal, start, wait};
use support::{Scratch, generate_ok, tidemill};

fn config(layers: usize, hidden: usize) -> String {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": hidden / 64,
        "num_key_value_heads": hidden / 64, "vocab_size": 512, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16"
    })
    .to_string()
}

fn pack(model: &str, output: &Path) -> Command {
    let mut command = tidemill(&["pack", "--model", model, "--output", output.to_str().unwrap()]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

fn said(command: &mut Command) -> (Option<i32>, String) {
    let result = command.output().expect("the binary runs");
    (result.status.code(), String::from_utf8_lossy(&result.stderr).into_owned())
}

#[test]
fn kills_cost_no_finished_file() {
    let scratch = Scratch::new();
    let config = scratch.write("config.json", config(24, 256));
    let model = format!("synth:{}#3", config.display());
    let whole = scratch.path("whole");
    let (code, text) = said(&mut pack(&model, &whole));
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("whole: 48.9 MiB\n") && text.contains("27 files written"), "{text}");
    let output = scratch.path("killed");
    let mut kills = 0;
    for attempt in 0.. {
        let mut child = start(pack(&model, &output), &scratch.path("said"));
        if let Some(status) = wait(&mut child, Duration::from_millis(20 + 5 * attempt)) {
            assert!(status.success(), "{}", fs::read_to_string(scratch.path("said")).unwrap());
            break;
        }
        signal(&child, Signal::KILL);
        child.wait().unwrap();
        kills += 1;
        assert!(kills < 200, "no end");
    }
    assert!(kills > 0, "never killed");
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        let same = fs::read(whole.join(&name)).unwrap() == fs::read(output.join(&name)).unwrap();
        assert!(same, "{name:?}");
    }
    assert_eq!(fs::read_dir(&whole).unwrap().count(), fs::read_dir(&output).unwrap().count());
    let (code, text) = said(&mut pack(&model, &output));
    assert!(code == Some(0) && text.contains("is packed already, and intact"), "{text}");
}

#[test]
fn a_disk_that_is_too_small_is_refused_before_anything_is_written() {
    let scratch = Scratch::new();
    let config = scratch.write("config.json", config(4096, 1 << 16));
    let output = scratch.path("packed");
    let (code, text) = said(&mut pack(&format!("synth:{}", config.display()), &output));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("packing needs") && text.contains("are free") && text.contains("hint:"), "{text}");
    assert!(!output.exists());
}

#[test]
fn a_disk_that_fills_up_names_the_file_and_the_rerun_goes_on() {
    let scratch = Scratch::new();
    let config = scratch.write("config.json", config(2, 256));
    let model = format!("synth:{}", config.display());
    let output = scratch.path("packed");
    let limited = |kib: &str| {
        let mut command = Command::new("sh");
        let program = env!("CARGO_BIN_EXE_tidemill");
        let script = format!("trap '' XFSZ; ulimit -f {kib}; exec {program} pack --model {model} --output \"$0\"");
        command.args(["-c", &script, output.to_str().unwrap()]);
        command
    };
    // Blocks of 512 bytes: the parts of the table fit, a layer does not.
    let (code, text) = said(&mut limited("2000"));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("layer-000.safetensors.tmp"), "{text}");
    assert!(output.join("table-000.safetensors").exists() && !output.join("layer-000.safetensors.tmp").exists());
    let (code, text) = said(&mut limited("unlimited"));
    assert!(code == Some(0) && text.contains("4 files written"), "{text}");
}

#[test]
fn completions_do_not_depend_on_where_weights_come_from() {
    let scratch = Scratch::new();
    let prompts = ["Once upon a time", "12 + 30 =", "The ship"].map(|prompt| json!({"prompt": prompt}));
    let input = scratch.jsonl("in.jsonl", &prompts);
    let policy = scratch.write("disk.toml", "embed = \"disk\"\nhead = \"disk\"\nweights = { cpu = 0.3, disk = 0.7 }\n");
    let (cache, packed) = (scratch.path("cache"), scratch.path("packed"));
    let (code, text) = said(&mut pack("demo", &packed));
    assert_eq!(code, Some(0), "{text}");
    let on_disk = ["--policy", policy.to_str().unwrap(), "--cache-dir", cache.to_str().unwrap()];
    let runs: [(&str, &[&str], bool); 5] = [
        ("demo", &[], false),
        ("demo", &on_disk, true),
        ("demo", &on_disk, false),
        (packed.to_str().unwrap(), &on_disk, false),
        (packed.to_str().unwrap(), &[], false),
    ];
    let mut outputs = Vec::new();
    for (number, (model, extra, packs)) in runs.into_iter().enumerate() {
        let output = scratch.path(&format!("{number}.jsonl"));
        let extra = [extra, &["--max-tokens", "16", "--cpu-memory", "200MiB"]].concat();
        let text = generate_ok(model, &input, &output, &extra, 0);
        assert_eq!(text.contains("packing demo into"), packs, "{text}");
        outputs.push(fs::read(output).unwrap());
    }
    assert!(outputs.iter().all(|output| *output == outputs[0]));
    assert!(cache.join("packs").is_dir());

    let broken = packed.join("layer-002.safetensors");
    let len = fs::metadata(&broken).unwrap().len();
    fs::File::options().write(true).open(&broken).unwrap().set_len(len - 4096).unwrap();
    let text = generate_ok(packed.to_str().unwrap(), &input, &scratch.path("broken.jsonl"), &[], 1);
    assert!(text.contains("layer-002.safetensors: has ") && text.contains("hint: run `tidemill pack` again"), "{text}");
    assert_eq!(said(&mut pack("demo", &packed)).0, Some(0));
    generate_ok(packed.to_str().unwrap(), &input, &scratch.path("mended.jsonl"), &[], 0);
}

#[test]
fn planes_are_written_beside_a_pack_and_read_from_there() {
    let scratch = Scratch::new();
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": "Once upon a time", "max_tokens": 8})]);
    let text = "embed = \"disk\"\nhead = \"disk\"\nweights = { disk = 1.0 }\ncompressed = true\n";
    let policy = scratch.write("planes.toml", text);
    let packed = scratch.path("packed");
    let shown = packed.to_str().unwrap();
    let flags = ["--policy", policy.to_str().unwrap(), "--cpu-memory", "200MiB"];
    generate_ok("demo", &input, &scratch.path("expected.jsonl"), &[], 0);
    let expected = fs::read(scratch.path("expected.jsonl")).unwrap();

    // A pack without them says how to get them, and that works.
    assert_eq!(said(&mut pack("demo", &packed)).0, Some(0));
    let text = generate_ok(shown, &input, &scratch.path("refused.jsonl"), &flags, 2);
    assert!(text.contains("compressed planes, which") && text.contains("hint: run `tidemill pack --planes"), "{text}");
    let add = |model: &str| said(pack(model, &packed).arg("--planes"));
    let (code, text) = add(shown);
    assert!(code == Some(0) && text.contains("compressing") && text.contains("has compressed planes:"), "{text}");
    let stats = scratch.path("stats.json");
    let with_stats = [&flags[..], &["--stats", stats.to_str().unwrap()]].concat();
    generate_ok(shown, &input, &scratch.path("planes.jsonl"), &with_stats, 0);
    assert!(fs::read(scratch.path("planes.jsonl")).unwrap() == expected);

    // What is counted is what was read.
    let read = |path: &Path| -> f64 {
        let stats: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        stats["lanes"]["disk_read"]["bytes"].as_f64().unwrap()
    };
    let planes = read(&stats);
    let raw = scratch.write("raw.toml", fs::read_to_string(&policy).unwrap().replace("true", "false"));
    let with_stats = ["--policy", raw.to_str().unwrap(), "--stats", stats.to_str().unwrap()];
    generate_ok(shown, &input, &scratch.path("raw.jsonl"), &with_stats, 0);
    assert!(planes < 0.95 * read(&stats), "{planes} bytes of planes, {} bytes of weights", read(&stats));

    // Once they are there they are compared, and written again where they differ.
    let (code, text) = add("demo");
    assert!(code == Some(0) && text.contains("has its compressed planes, intact"), "{text}");
    let file = packed.join("layer-000.planes.safetensors");
    let healthy = fs::read(&file).unwrap();
    let mut damaged = healthy.clone();
    damaged[healthy.len() - 4096] ^= 1;
    fs::write(&file, damaged).unwrap();
    let (code, text) = add("demo");
    assert!(code == Some(0) && text.contains("compressed planes: 1 files written"), "{text}");
    assert!(fs::read(&file).unwrap() == healthy);
    safetensors::SafeTensors::deserialize(&healthy).expect("a safetensors file");

    // Of f32 there are none.
    let model = "tests/goldens/llama-gqa-tied";
    let text = generate_ok(model, &input, &scratch.path("f32.jsonl"), &flags, 2);
    assert!(text.contains("only bf16 has") && text.contains("f32"), "{text}");
    let (code, text) = said(pack(model, &scratch.path("f32")).arg("--planes"));
    assert!(code == Some(2) && text.contains("no matrices in bf16"), "{text}");
}

#[test]
fn doctor_says_what_is_there() {
    let scratch = Scratch::new();
    let cache = scratch.path("not/made/yet");
    let result = tidemill(&["doctor", "--cache-dir", cache.to_str().unwrap()]).output().unwrap();
    let text = String::from_utf8(result.stdout).unwrap();
    assert!(result.status.success() && result.stderr.is_empty(), "{text}");
    for expected in ["cpu ", "memory ", "O_DIRECT: ", "io_uring: ", " free", "gpu      none"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    assert!(text.contains(cache.to_str().unwrap()) && !cache.exists());
}

#[test]
fn shards_that_start_together_share_one_pack() {
    let scratch = Scratch::new();
    let config = scratch.write("config.json", config(12, 256));
    let model = format!("synth:{}#4", config.display());
    let lines: Vec<_> = (0..4).map(|i| json!({"prompt": [5, 6, 7 + i], "max_tokens": 2, "ignore_eos": true})).collect();
    let input = scratch.jsonl("in.jsonl", &lines);
    let policy = scratch.write("policy.toml", "weights = { cpu = 0.2, disk = 0.8 }\n");
    let shards = ["0/2", "1/2"].map(|shard| {
        let output = scratch.path(&format!("out-{}.jsonl", &shard[..1]));
        let mut command = tidemill(&["generate", "--model", &model, "--shard", shard, "--progress", "none"]);
        command.arg("--input").arg(&input).arg("--output").arg(output).arg("--policy").arg(&policy);
        command.arg("--cache-dir").arg(scratch.path("cache")).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().expect("the binary runs")
    });
    for shard in shards {
        let result = shard.wait_with_output().unwrap();
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    }
}
