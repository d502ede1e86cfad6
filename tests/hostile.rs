//! Full disks, strange files and second processes: a clear error, and nothing lost.
#![allow(missing_docs)]

mod support;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::process::{command, start, wait, wait_for_text};
use support::{Scratch, copy_model, edit_json, generate, generate_ok, hint, read_jsonl, refused, skip, tidemill};

fn small(scratch: &Scratch) -> std::path::PathBuf {
    scratch.jsonl("in.jsonl", &[json!({"prompt": "Ben", "max_tokens": 3}), json!({"prompt": "A", "max_tokens": 2})])
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn outputs_that_cannot_be_written_are_refused() {
    let scratch = Scratch::new();
    let input = small(&scratch);
    let link = scratch.path("link.jsonl");
    std::os::unix::fs::symlink(&input, &link).unwrap();
    for (output, code) in [
        (scratch.path("no/such/out.jsonl"), 1),
        (scratch.path(""), 1),
        ("/dev/full".into(), 1),
        (input.clone(), 2),
        (link, 2),
    ] {
        hint(&refused(&generate("demo", &input, &output, &[]), code));
    }
    let same = ["--error-file", input.to_str().unwrap()];
    hint(&refused(&generate("demo", &input, &scratch.path("out.jsonl"), &same), 2));
    let foreign = scratch.write("foreign.jsonl", "someone else's\n");
    hint(&refused(&generate("demo", &input, &foreign, &[]), 1));
    assert_eq!(fs::read_to_string(&foreign).unwrap(), "someone else's\n");
}

#[test]
fn statistics_never_replace_the_output() {
    let scratch = Scratch::new();
    let input = small(&scratch);
    let output = scratch.path("o.jsonl");
    let other_name = scratch.path("../").join(output.parent().unwrap().file_name().unwrap()).join("o.jsonl");
    generate("demo", &input, &output, &["--stats", other_name.to_str().unwrap()]);
    let text = fs::read_to_string(&output).unwrap_or_default();
    assert!(text.is_empty() || text.starts_with("{\"custom_id\""), "statistics replaced the output: {text}");
}

#[test]
fn inputs_that_are_no_lines_are_refused() {
    let scratch = Scratch::new();
    let output = scratch.path("out.jsonl");
    for (name, content) in
        [("empty", &b""[..]), ("blank", b"\n \n\t\n"), ("gzip", b"\x1f\x8b\x08\x00abc"), ("utf16", b"\xff\xfe{\0}\0")]
    {
        let said = refused(&generate("demo", &scratch.write(name, content), &output, &[]), 1);
        assert!(said.contains(name) && !hint(&said).is_empty(), "{said}");
        assert!(!output.exists(), "{name}");
    }
    refused(&generate("demo", &scratch.path("absent"), &output, &[]), 1);
    refused(&generate("demo", &scratch.path(""), &output, &[]), 1);
}

#[test]
fn broken_lines_become_error_records() {
    let scratch = Scratch::new();
    let mut text = b"\xef\xbb\xbf{\"id\": \"a\", \"prompt\": \"A\", \"max_tokens\": 1}\r\n".to_vec();
    text.extend_from_slice(b"{\"prompt\": \"\xff\xfe\"}\n\n{\"prompt\": \"x\"\nnull\n[1]\n{}\n");
    text.extend_from_slice(b"{\"id\": \"a\", \"prompt\": \"B\"}\n{\"prompt\": \"\\ud800\"}\n{\"prompt\": 7}\n");
    text.extend_from_slice(format!("{}\n", "[".repeat(100_000)).as_bytes());
    text.extend_from_slice(b"{\"prompt\": \"\\u0000\", \"max_tokens\": 1}\n{\"prompt\": \"last\", \"max_tokens\": 1}");
    let output = scratch.path("out.jsonl");
    generate_ok("demo", &scratch.write("in.jsonl", text), &output, &[], 3);
    let answers = read_jsonl(&output);
    let codes: Vec<&str> = answers.iter().map(|answer| answer["error"]["code"].as_str().unwrap_or("ok")).collect();
    let json = "invalid_json_line";
    let ends = [
        "ok",
        "invalid_utf8",
        json,
        json,
        json,
        "missing_field",
        "duplicate_custom_id",
        "invalid_value",
        "invalid_value",
        json,
        "ok",
        "ok",
    ];
    assert_eq!(codes, ends);
    let lines: Vec<u64> = answers.iter().filter_map(|answer| answer["error"]["line"].as_u64()).collect();
    assert_eq!(lines, [2, 4, 5, 6, 7, 8, 9, 10, 11]);
}

#[test]
fn huge_lines_are_turned_away_without_holding_them() {
    let scratch = Scratch::new();
    let (input, output, stats) = (scratch.path("in.jsonl"), scratch.path("out.jsonl"), scratch.path("stats.json"));
    let good = "{\"prompt\": \"A\", \"max_tokens\": 1}\n";
    let long = |bytes: usize| format!("{{\"prompt\": \"{}\"}}\n", "fox and ".repeat(bytes / 8));
    fs::write(&input, [good, &long(100 << 20), good, &long(6 << 20), good].concat()).unwrap();
    let started = Instant::now();
    generate_ok("demo", &input, &output, &["--stats", stats.to_str().unwrap()], 3);
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    let answers = read_jsonl(&output);
    let codes: Vec<&str> = answers.iter().map(|answer| answer["error"]["code"].as_str().unwrap_or("ok")).collect();
    assert_eq!(codes, ["ok", "line_too_long", "ok", "context_length_exceeded", "ok"]);
    assert!(fs::metadata(&output).unwrap().len() < 4096);
}

/// A job of some seconds.
fn long_input(scratch: &Scratch) -> std::path::PathBuf {
    let line = |at: u64| json!({"id": at.to_string(), "prompt": "Story:", "max_tokens": 200, "ignore_eos": true});
    scratch.jsonl("in.jsonl", &(0..40).map(line).collect::<Vec<_>>())
}

#[test]
fn a_second_process_on_the_same_output_is_refused() {
    let scratch = Scratch::new();
    let (input, output, said) = (long_input(&scratch), scratch.path("out.jsonl"), scratch.path("said"));
    let mut first = start(command("demo", &input, &output, &[]), &said);
    wait_for_text(&said, "model demo", Duration::from_secs(60));
    let second = generate("demo", &input, &output, &[]);
    assert!(first.try_wait().unwrap().is_none(), "the job is too short for this test");
    let told = refused(&second, 1);
    assert!(told.contains(&format!("process {}", first.id())) && !hint(&told).is_empty(), "{told}");
    let status = wait(&mut first, Duration::from_secs(120)).expect("the first goes on");
    assert_eq!(status.code(), Some(0));
    assert_eq!(read_jsonl(&output).len(), 40);
}

#[test]
fn a_finished_job_is_left_alone() {
    let scratch = Scratch::new();
    let input = scratch.jsonl("in.jsonl", &[json!({"prompt": "A", "max_tokens": 2}), json!({"prompt": "B", "n": 0})]);
    let (output, errors) = (scratch.path("out.jsonl"), scratch.path("errors.jsonl"));
    let flags = ["--error-file", errors.to_str().unwrap()];
    generate_ok("demo", &input, &output, &flags, 3);
    assert_eq!((read_jsonl(&output).len(), read_jsonl(&errors).len()), (1, 1));
    let (before, files) = (fs::metadata(&output).unwrap().modified().unwrap(), names(&scratch.path("")));
    let said = generate_ok("demo", &input, &output, &flags, 3);
    assert!(said.contains("already finished: 2 lines, 1 failed"), "{said}");
    assert_eq!((fs::metadata(&output).unwrap().modified().unwrap(), names(&scratch.path(""))), (before, files));
    for (change, name) in [
        (&["--seed", "1"][..], "seed"),
        (&["--max-tokens", "9"], "max_tokens"),
        (&["--kv-dtype", "f32"], "kv_dtype"),
        (&["--shard", "0/2"], "shard"),
    ] {
        let said = refused(&generate("demo", &input, &output, &[&flags[..], change].concat()), 1);
        assert!(said.contains(&format!("was started with {name}")) && !hint(&said).is_empty(), "{said}");
    }
    let said = refused(&generate("demo", &input, &output, &[]), 1);
    assert!(said.contains("error file"), "{said}");
    generate_ok("demo", &input, &output, &[&flags[..], &["--cpu-memory", "64MiB", "--threads", "1"]].concat(), 3);
    fs::write(&input, "{\"prompt\": \"other\"}\n").unwrap();
    assert!(refused(&generate("demo", &input, &output, &flags), 1).contains("input"));
}

/// A budget must not decide an answer: a line that needs more memory waits for a run that has it.
#[test]
fn lines_that_need_more_memory_are_postponed() {
    let scratch = Scratch::new();
    let model = copy_model("llama-mha", &scratch);
    edit_json(&model.join("config.json"), |config| config["max_position_embeddings"] = json!(4096));
    let model = format!("synth:{}#1", model.join("config.json").display());
    let long: Vec<u64> = (0..2500).map(|at| 5 + at % 200).collect();
    let input = scratch.jsonl(
        "in.jsonl",
        &[
            json!({"prompt": [7, 8], "max_tokens": 4}),
            json!({"prompt": long, "max_tokens": 4}),
            json!({"prompt": [9], "max_tokens": 4}),
        ],
    );
    let (output, whole) = (scratch.path("out.jsonl"), scratch.path("whole.jsonl"));
    generate_ok(&model, &input, &whole, &["--cpu-memory", "512MiB"], 0);
    let policy = scratch.write("policy.toml", "chunk-tokens = 64\n");
    let policy = policy.to_str().unwrap();
    let said = refused(&generate(&model, &input, &output, &["--cpu-memory", "64KiB", "--policy", policy]), 1);
    // The hint's budget holds a short cache only.
    let size = hint(&said).split_whitespace().find(|word| word.ends_with("MiB")).unwrap().to_owned();
    let said = refused(&generate(&model, &input, &output, &["--cpu-memory", &size, "--policy", policy]), 1);
    assert!(said.contains("1 postponed") && hint(&said).contains("--cpu-memory"), "{said}");
    assert_eq!(read_jsonl(&output).len(), 1, "the output is a prefix");
    let stats = scratch.path("stats.json");
    generate_ok(&model, &input, &output, &["--cpu-memory", "512MiB", "--stats", stats.to_str().unwrap()], 0);
    assert_eq!(fs::read(&output).unwrap(), fs::read(&whole).unwrap());
    let stats: Value = serde_json::from_str(&fs::read_to_string(&stats).unwrap()).unwrap();
    assert_eq!((&stats["requests"], &stats["resumed"]), (&json!(1), &json!(2)));
}

fn piped(mut command: Command, input: &[u8]) -> Output {
    use std::io::Write;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    child.wait_with_output().unwrap()
}

/// A reader that goes away ends the job with an error, whatever is in flight.
#[test]
fn a_closed_pipe_is_an_error() {
    let scratch = Scratch::new();
    let lines: Vec<Value> =
        (0..40).map(|_| json!({"prompt": "Ben", "max_tokens": 60, "n": 2, "ignore_eos": true})).collect();
    let input = scratch.jsonl("in.jsonl", &lines);
    let mut command = tidemill(&["generate", "--model", "demo", "--output", "-", "--input", input.to_str().unwrap()]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let result = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&result.stderr);
    assert_eq!(result.status.code(), Some(1), "{said}");
    assert!(said.contains("error: write standard output"), "{said}");
}

#[test]
fn streams_go_in_and_out() {
    let lines = b"{\"prompt\": \"Ben\", \"max_tokens\": 30}\n{\"prompt\": \"A\", \"max_tokens\": 2}\nwrong\n";
    let streamed = piped(tidemill(&["generate", "--model", "demo", "--input", "-", "--output", "-"]), lines);
    assert_eq!(streamed.status.code(), Some(3), "{}", String::from_utf8_lossy(&streamed.stderr));
    let mut out: Vec<Value> =
        String::from_utf8(streamed.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    out.sort_by_key(|line| line["custom_id"].as_str().unwrap().to_owned());
    let scratch = Scratch::new();
    let output = scratch.path("out.jsonl");
    let to_file = ["generate", "--model", "demo", "--input", "-", "--output", output.to_str().unwrap()];
    let filed = piped(tidemill(&to_file), lines);
    assert_eq!((filed.status.code(), filed.stdout.len()), (Some(3), 0));
    assert_eq!(read_jsonl(&output), out);
    // Without its input a finished job is still known.
    assert_eq!(piped(tidemill(&to_file), b"").status.code(), Some(3));
    let empty = piped(tidemill(&["generate", "--model", "demo", "--input", "-", "--output", "-"]), b"");
    refused(&empty, 1);
    let mut full = tidemill(&["generate", "--model", "demo", "--input", "-", "--output", "-"]);
    full.stdin(Stdio::piped()).stdout(File::create("/dev/full").unwrap()).stderr(Stdio::piped());
    let mut child = full.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines).unwrap();
    hint(&refused(&child.wait_with_output().unwrap(), 1));
}

#[test]
fn a_full_disk_loses_nothing() {
    let scratch = Scratch::new();
    let (mount, input) = (scratch.path("disk"), long_input(&scratch));
    fs::create_dir(&mount).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program).args(arguments).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    let at = mount.to_str().unwrap();
    if !run("mount", &["-t", "tmpfs", "-o", "size=64k", "tmpfs", at]) {
        return skip("a file system that fills up needs the right to mount one");
    }
    let expected = scratch.path("expected.jsonl");
    let output = mount.join("out.jsonl");
    let outcome = std::panic::catch_unwind(|| {
        generate_ok("demo", &input, &expected, &[], 0);
        let expected = fs::read(&expected).unwrap();
        let said = refused(&generate("demo", &input, &output, &[]), 1);
        assert!(said.contains("out.jsonl") && hint(&said).contains("space"), "{said}");
        assert!(expected.starts_with(&fs::read(&output).unwrap_or_default()), "what is there is a prefix");
        hint(&refused(&generate("demo", &input, &output, &[]), 1));
        assert!(run("mount", &["-o", "remount,size=8m", at]));
        generate_ok("demo", &input, &output, &[], 0);
        assert!(fs::read(&output).unwrap() == expected);
    });
    assert!(run("umount", &[at]), "{at} stays mounted");
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
