//! The worker: ready line, answers, flush, drain, errors by line, and ends that nobody has to wait for.
#![allow(missing_docs)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::process::{signal, wait};
use support::{Scratch, generate_ok, hint, read_jsonl, refused, tidemill};

const SECONDS: Duration = Duration::from_secs(60);

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    ready: Value,
}

impl Worker {
    fn start(extra: &[&str]) -> Self {
        let mut command = tidemill(&["worker", "--model", "demo", "--progress", "none"]);
        command.args(extra).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("the binary runs");
        let input = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let ready = next(&mut output).expect("a ready line");
        Worker { child, input, output, ready }
    }

    fn say(&mut self, line: impl std::fmt::Display) {
        writeln!(self.input.as_mut().expect("open"), "{line}").expect("the worker reads");
    }

    fn answer(&mut self) -> Value {
        next(&mut self.output).expect("an answer")
    }

    /// Everything that is still answered after the end of the input, and the exit code.
    fn drain(mut self) -> (Vec<Value>, Option<i32>) {
        self.input.take();
        let answers = std::iter::from_fn(|| next(&mut self.output)).collect();
        let status = wait(&mut self.child, SECONDS).expect("the worker ends");
        (answers, status.code())
    }
}

fn next(output: &mut impl BufRead) -> Option<Value> {
    let mut line = String::new();
    (output.read_line(&mut line).expect("readable") > 0).then(|| serde_json::from_str(&line).expect("a JSON line"))
}

fn by_id(mut answers: Vec<Value>) -> Vec<Value> {
    answers.sort_by_key(|answer| answer["custom_id"].as_str().expect("an id").to_owned());
    answers
}

#[test]
fn a_worker_answers_as_a_job_does() {
    let scratch = Scratch::new();
    let lines: Vec<Value> = (0..30)
        .map(|index| match index % 4 {
            0 => json!({"id": format!("r{index:02}"), "prompt": format!("Story: {index}"), "max_tokens": 5}),
            1 => json!({"id": format!("r{index:02}"), "context": "Story:", "continuation": format!(" {index}")}),
            2 => json!({"id": format!("r{index:02}"), "prompt": "x", "temprature": 1}),
            _ => json!({"custom_id": format!("r{index:02}"), "method": "POST", "url": "/v1/completions",
                "body": {"prompt": ["Sum: 1 + 2 =", "Story:"], "max_tokens": 3, "n": 2}}),
        })
        .collect();
    let input = scratch.jsonl("in.jsonl", &lines);
    generate_ok("demo", &input, &scratch.path("out.jsonl"), &[], 3);
    let mut worker = Worker::start(&[]);
    assert_eq!(worker.ready["type"], "ready");
    assert_eq!(worker.ready["model"], "demo");
    assert_eq!((&worker.ready["context_length"], &worker.ready["vocab_size"]), (&json!(1024), &json!(678)));
    assert!(worker.ready["max_batch"].as_u64() > Some(1));
    lines.iter().for_each(|line| worker.say(line));
    let (answers, code) = worker.drain();
    assert_eq!(code, Some(0));
    assert_eq!(by_id(answers), by_id(read_jsonl(&scratch.path("out.jsonl"))));
}

#[test]
fn a_flush_ends_the_wait_for_a_batch_and_the_wait_ends_by_itself() {
    let mut worker = Worker::start(&["--worker-batch-wait-ms", "3600000"]);
    let started = Instant::now();
    worker.say(json!({"id": "a", "prompt": "Story:", "max_tokens": 2}));
    worker.say(json!({"type": "flush"}));
    assert_eq!(worker.answer()["custom_id"], "a");
    worker.say(json!({"type": "flush"}));
    worker.say(json!({"id": "b", "prompt": "Story:", "max_tokens": 2}));
    // The end of the input is a flush too.
    let (answers, code) = worker.drain();
    assert_eq!((answers.len(), code), (1, Some(0)));
    assert!(started.elapsed() < SECONDS);

    let mut worker = Worker::start(&["--worker-batch-wait-ms", "300"]);
    let started = Instant::now();
    worker.say(json!({"id": "c", "prompt": "Story:", "max_tokens": 1}));
    assert_eq!(worker.answer()["custom_id"], "c");
    assert!(started.elapsed() >= Duration::from_millis(290), "{:?}", started.elapsed());
    assert_eq!(worker.drain(), (Vec::new(), Some(0)));
}

#[test]
fn names_are_taken_while_their_lines_are_in_flight() {
    let mut worker = Worker::start(&["--worker-batch-wait-ms", "3600000"]);
    let line = json!({"id": "same", "prompt": "Story:", "max_tokens": 2});
    worker.say(&line);
    worker.say(&line);
    worker.say("no JSON at all");
    worker.say(json!({"type": "pause"}));
    let errors: Vec<Value> = (0..3).map(|_| worker.answer()).collect();
    let codes: Vec<&str> = errors.iter().map(|answer| answer["error"]["code"].as_str().expect("a code")).collect();
    assert_eq!(codes, ["duplicate_custom_id", "invalid_json_line", "missing_field"]);
    assert_eq!(errors[1]["error"]["line"], 3);
    worker.say(json!({"type": "flush"}));
    let first = worker.answer();
    worker.say(&line);
    worker.say(json!({"type": "flush"}));
    assert_eq!(worker.answer(), first);
    assert_eq!(worker.drain(), (Vec::new(), Some(0)));
}

#[test]
fn a_signal_or_a_closed_output_ends_a_worker_whose_input_stays_open() {
    let mut worker = Worker::start(&[]);
    worker.say(json!({"prompt": "Story:", "max_tokens": 1}));
    worker.answer();
    signal(&worker.child, Signal::TERM);
    assert_eq!(wait(&mut worker.child, SECONDS).expect("the worker ends").code(), Some(1));

    let Worker { mut child, input, output, .. } = Worker::start(&[]);
    let mut input = input.expect("open");
    drop(output);
    writeln!(input, "{}", json!({"prompt": "Story:", "max_tokens": 1})).expect("the worker reads");
    assert_eq!(wait(&mut child, SECONDS).expect("the worker ends").code(), Some(1));
}

#[test]
fn flags_of_other_commands_are_refused() {
    for (flags, name) in [(["--input", "x"], "--input"), (["--shard", "0/2"], "--shard")] {
        let result = tidemill(&["worker", "--model", "demo"]).args(flags).output().expect("the binary runs");
        let said = refused(&result, 2);
        assert!(said.contains(name) && hint(&said).contains("worker --help"), "{said}");
    }
    let help = tidemill(&["worker", "--help"]).output().expect("the binary runs");
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.contains("--worker-batch-wait-ms") && !help.contains("--shard"), "{help}");
}

#[test]
fn a_line_that_has_no_room_is_answered_while_input_stays_open() {
    let scratch = Scratch::new();
    let policy = scratch.write("policy.toml", "sequences = 4\nchunk-tokens = 64\npages = 4\n");
    let mut worker = Worker::start(&["--policy", policy.to_str().unwrap()]);
    let long: Vec<u32> = (0..500).map(|i| 20 + i % 300).collect();
    worker.say(json!({"id": "long", "prompt": long, "max_tokens": 2}));
    let answer = worker.answer();
    assert_eq!((&answer["custom_id"], &answer["error"]["code"]), (&json!("long"), &json!("kv_cache_exceeded")));
    worker.say(json!({"id": "short", "prompt": [5, 6], "max_tokens": 1}));
    assert_eq!(worker.answer()["custom_id"], "short");
}
