//! Inputs and outputs that nobody hopes for: single bad lines become records, the rest is refused in clear words.

mod job_support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use job_support::*;
use serde_json::{Value, json};
use tidemill::error::Error;
use tidemill::job::{Fingerprint, Input, JobOptions, Opening, Output, open};

/// The error record of a single line.
fn refusal(line: &str) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &format!("{line}\n"));
    run_through(&options, 1, false);
    let record: Value = serde_json::from_str(&read(&output(&options))).unwrap();
    assert_eq!(record["error"]["line"], 1, "{line}: {record}");
    record
}

/// Why a job cannot be opened.
fn open_error(options: &JobOptions) -> Error {
    match open(options.clone()) {
        Err(error) => error,
        Ok(_) => panic!("the job is refused"),
    }
}

#[test]
fn each_bad_field_is_named() {
    let cases = [
        (r#"{"prompt":"x","temperature":-1}"#, "invalid_value", "`temperature` must be a number from 0 to 100, got -1"),
        (r#"{"prompt":"x","temperature":1e300}"#, "invalid_value", "temperature"),
        (r#"{"prompt":"x","temperature":"hot"}"#, "invalid_value", "got \"hot\""),
        (r#"{"prompt":"x","top_p":0}"#, "invalid_value", "top_p"),
        (r#"{"prompt":"x","top_p":1.1}"#, "invalid_value", "top_p"),
        (r#"{"prompt":"x","top_k":-2}"#, "invalid_value", "top_k"),
        (r#"{"prompt":"x","min_p":2}"#, "invalid_value", "min_p"),
        (r#"{"prompt":"x","n":0}"#, "invalid_value", "`n` must be a whole number from 1 to 128, got 0"),
        (r#"{"prompt":"x","n":1.5}"#, "invalid_value", "`n`"),
        (r#"{"prompt":"x","seed":9223372036854775808}"#, "invalid_value", "seed"),
        (r#"{"prompt":"x","max_tokens":0}"#, "invalid_value", "max_tokens"),
        (r#"{"prompt":"x","max_tokens":true}"#, "invalid_value", "max_tokens"),
        (r#"{"prompt":"x","min_tokens":300}"#, "invalid_value", "min_tokens"),
        (r#"{"prompt":"x","stop":""}"#, "invalid_value", "stop"),
        (r#"{"prompt":"x","stop":["a",1]}"#, "invalid_value", "stop"),
        (r#"{"prompt":"x","stop":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]}"#, "invalid_value", "stop"),
        (r#"{"prompt":"x","logit_bias":{"1000":1}}"#, "invalid_value", "logit_bias"),
        (r#"{"prompt":"x","logit_bias":{"1":101}}"#, "invalid_value", "logit_bias"),
        (r#"{"prompt":"x","logit_bias":{"x":1}}"#, "invalid_value", "logit_bias"),
        (r#"{"prompt":"x","logprobs":21}"#, "invalid_value", "logprobs"),
        (r#"{"prompt":"x","allowed_token_ids":[]}"#, "invalid_value", "allowed_token_ids"),
        (r#"{"prompt":"x","stop_token_ids":[1000]}"#, "invalid_value", "stop_token_ids"),
        (r#"{"prompt":"x","stream":true}"#, "unsupported_field", "`stream`"),
        (r#"{"prompt":"x","best_of":2}"#, "unsupported_field", "`best_of`"),
        (r#"{"prompt":"x","response_format":{"type":"json_object"}}"#, "unsupported_field", "`response_format`"),
        (r#"{"prompt":"x","colour":1}"#, "unknown_field", "`colour`"),
        (r#"{"prompt":"x","prompt":"y"}"#, "invalid_json_line", "`prompt` is given twice"),
        (r#"{"prompt":"x","messages":[]}"#, "invalid_value", "both given"),
        (r#"{"prompt":[]}"#, "invalid_value", "prompt"),
        (r#"{"prompt":["a","b"]}"#, "invalid_value", "prompt"),
        (r#"{"prompt":[1,"b"]}"#, "invalid_value", "prompt"),
        (r#"{"prompt":[1,1000]}"#, "invalid_value", "token ids below 1000"),
        (r#"{"prompt":{"a":1}}"#, "invalid_value", "prompt"),
        (r#"{"messages":[]}"#, "invalid_value", "messages"),
        (r#"{"messages":["hi"]}"#, "invalid_value", "messages[0]"),
        (r#"{"messages":[{"content":"hi"}]}"#, "invalid_value", "messages[0].role"),
        (r#"{"messages":[{"role":"user","content":5}]}"#, "invalid_value", "messages[0].content"),
        (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "unsupported_field", "image_url"),
        (
            r#"{"method":"POST","url":"/v1/chat/completions","body":{"messages":[{"role":"user","content":"x"}],"echo":true}}"#,
            "unsupported_field",
            "echo",
        ),
        (r#"{"messages":[{"role":"user","content":"x"}],"top_logprobs":2}"#, "invalid_value", "top_logprobs"),
        (r#"{}"#, "missing_field", "neither `prompt` nor `messages`"),
        (r#"{"id":7,"prompt":"x"}"#, "invalid_value", "`id` must be a string that is not empty, got 7"),
        (r#"{"custom_id":"","prompt":"x"}"#, "invalid_value", "custom_id"),
        (r#"{"custom_id":"a","id":"a","prompt":"x"}"#, "invalid_value", "both given"),
        ("[1,2]", "invalid_json_line", "JSON object"),
        ("{\"prompt\":\"x\"", "invalid_json_line", "column"),
        ("{\"prompt\":NaN}", "invalid_json_line", "column"),
        ("{\"prompt\":\"\\ud800\"}", "invalid_value", "prompt"),
        (
            r#"{"custom_id":"a","method":"GET","url":"/v1/completions","body":{"prompt":"x"}}"#,
            "invalid_value",
            "`method` must be \"POST\", got `GET`",
        ),
        (
            r#"{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{}}"#,
            "url_mismatch",
            "supported: /v1/completions, /v1/chat/completions",
        ),
        (r#"{"custom_id":"a","method":"POST","url":"/v1/completions"}"#, "missing_field", "`body`"),
        (r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":5}"#, "invalid_value", "`body`"),
        (
            r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"messages":[]}}"#,
            "missing_field",
            "`prompt`",
        ),
        (
            r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"prompt":"x"}}"#,
            "missing_field",
            "`messages`",
        ),
        (
            r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"x"},"priority":1}"#,
            "unknown_field",
            "`priority`",
        ),
    ];
    for (line, code, part) in cases {
        let record = refusal(line);
        assert_eq!(record["error"]["code"], code, "{line}: {record}");
        let message = record["error"]["message"].as_str().unwrap();
        assert!(message.contains(part), "{line}: {message}");
    }
}

#[test]
fn neutral_values_are_accepted() {
    let neutral = r#""stream":false,"stream_options":null,"suffix":null,"user":"u","best_of":1,"n":1,"logprobs":null,
        "response_format":{"type":"text"},"tools":null,"length_penalty":1.0,"max_tokens":16.0,"temperature":0,
        "stop":null,"logit_bias":{},"priority":0,"service_tier":"auto","metadata":{"a":1},"store":false"#;
    let neutral = neutral.replace('\n', " ");
    let chat = r#""messages":[{"role":"user","content":"x"}]"#;
    let input = format!(
        "{{\"prompt\":\"x\",{neutral}}}\n\
         {{\"custom_id\":\"b\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{{\"model\":\"other\",\"prompt\":\"x\",{neutral}}}}}\n\
         {{\"custom_id\":\"c\",\"method\":\"POST\",\"url\":\"\\/v1\\/chat\\/completions\",\"body\":{{\"model\":\"other\",{chat},{neutral},\"top_logprobs\":0}}}}\n"
    );
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &input);
    let summary = run_through(&options, 1, false);
    assert_eq!((summary.succeeded, summary.failed), (3, 0), "{}", read(&output(&options)));
}

#[test]
fn hostile_lines_become_records_and_the_rest_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let mut input = Vec::new();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    input.extend_from_slice(b"\xef\xbb\xbf{\"prompt\":\"bom\"}\r\n\n   \t\r\n");
    input.extend_from_slice(b"{\"prompt\":\"\xff\"}\n");
    input.extend_from_slice(format!("{{\"prompt\":{deep}}}\n").as_bytes());
    input.extend_from_slice(format!("{{\"prompt\":\"x\",\"metadata\":{deep}}}\n").as_bytes());
    input.extend_from_slice(format!("{{\"messages\":[{{\"role\":\"user\",\"content\":{deep}}}]}}\n").as_bytes());
    input.extend_from_slice(format!("{{\"prompt\":\"{}\"}}\n", "x".repeat(300_000)).as_bytes());
    input.extend_from_slice(b"{\"id\":\"same\",\"prompt\":\"1\"}\n{\"custom_id\":\"same\",\"prompt\":\"2\"}\n");
    input.extend_from_slice(b"\0\0\0\n");
    input.extend_from_slice("{\"prompt\":\"no\u{2028}line\u{85}end\"}".as_bytes());
    let mut options = options(directory.path(), "");
    options.limits.line_bytes = 250_000;
    fs::write(directory.path().join("in.jsonl"), input).unwrap();
    run_through(&options, 1, false);
    let records: Vec<Value> = read(&output(&options)).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let found: Vec<(&str, &str)> = records
        .iter()
        .map(|record| (record["custom_id"].as_str().unwrap(), record["error"]["code"].as_str().unwrap_or("ok")))
        .collect();
    assert_eq!(
        found,
        [
            ("line-1", "ok"),
            ("line-4", "invalid_utf8"),
            ("line-5", "invalid_value"),
            ("line-6", "invalid_value"),
            ("line-7", "invalid_value"),
            ("line-8", "line_too_long"),
            ("same", "ok"),
            ("same", "duplicate_custom_id"),
            ("line-11", "invalid_json_line"),
            ("line-12", "ok"),
        ]
    );
}

#[test]
fn places_that_cannot_work_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let base = options(directory.path(), "{\"prompt\":\"x\"}\n");
    let refused = |options: JobOptions, part: &str| {
        let error = open_error(&options);
        assert!(error.to_string().contains(part), "{error}");
        error
    };
    let with_output = |path: &Path| JobOptions { output: Output::File(path.to_owned()), ..base.clone() };
    let with_input = |path: &Path| JobOptions { input: Input::File(path.to_owned()), ..base.clone() };

    refused(with_output(&at("in.jsonl")), "is the input");
    symlink(at("in.jsonl"), at("link")).unwrap();
    refused(with_output(&at("link")), "is the input");
    fs::hard_link(at("in.jsonl"), at("hard")).unwrap();
    refused(with_output(&at("hard")), "is the input");
    refused(JobOptions { error_file: Some(at("hard")), ..base.clone() }, "is the input");
    refused(JobOptions { error_file: Some(at("out.jsonl")), ..base.clone() }, "error file is the output");
    refused(with_output(&at("nowhere/out")), "directory does not exist");
    refused(with_output(directory.path()), "is a directory");
    refused(with_output(Path::new("/dev/null")), "not a regular file");
    symlink(at("gone"), at("dangling")).unwrap();
    refused(with_output(&at("dangling")), "broken symbolic link");
    refused(with_input(&at("missing")), "missing");
    refused(with_input(directory.path()), "is a directory");
    for (content, part) in
        [(&b""[..], "empty_file"), (b"\n \n\r\n", "empty_file"), (b"\x1f\x8b\x08", "gzip"), (b"\xff\xfe{\0", "UTF-16")]
    {
        fs::write(at("other"), content).unwrap();
        assert!(refused(with_input(&at("other")), part).hint().is_some());
    }
    fs::write(at("mine"), "precious\n").unwrap();
    refused(with_output(&at("mine")), "already exists");
    refused(JobOptions { error_file: Some(at("mine")), ..base.clone() }, "already exists");
    assert_eq!(read(&at("mine")), "precious\n");
    assert!(!listing(directory.path()).iter().any(|name| name.ends_with(".journal")));
}

#[test]
fn another_job_on_the_same_output_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &mixed_input(20));
    let Opening::Run(job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
    let error = open_error(&options);
    assert!(
        error.to_string().contains(&format!("process {} is working on this output", std::process::id())),
        "{error}"
    );
    job.writer.close(false).unwrap();

    let other =
        JobOptions { fingerprint: Fingerprint::new().with("model", "toy").with("seed", "2"), ..options.clone() };
    assert!(open_error(&other).to_string().ends_with("was started with seed 0, now seed 2"));
    let split = JobOptions { error_file: Some(directory.path().join("e")), ..options.clone() };
    assert!(open_error(&split).to_string().contains("error file none, now"));
    let shard = JobOptions { shard: Some("0/2".parse().unwrap()), ..options.clone() };
    assert!(open_error(&shard).to_string().contains("shard 0/1, now shard 0/2"));
    run_through(&options, 1, false);
    assert!(open_error(&other).to_string().contains("seed"), "a finished job is not another job's either");
    fs::write(directory.path().join("in.jsonl"), "{\"prompt\":\"new\"}\n").unwrap();
    assert!(open_error(&options).to_string().contains("was started with input "));
}

#[test]
fn damage_to_the_output_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &mixed_input(20));
    run_through(&options, 1, false);
    let text = read(&output(&options));
    fs::write(output(&options), text.replacen("usage", "usagf", 1)).unwrap();
    assert!(open_error(&options).to_string().contains("no longer what was written"));
    fs::write(output(&options), &text[..text.len() - 5]).unwrap();
    assert!(open_error(&options).to_string().contains("changed after the job finished"));
}

#[test]
fn an_input_that_changes_under_the_job_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), "{\"prompt\":\"a\"}\n");
    let Opening::Run(mut job) = open(options).unwrap() else { panic!("a fresh job") };
    fs::write(directory.path().join("in.jsonl"), "{\"prompt\":\"b\"}\n").unwrap();
    job.reader.next().unwrap();
    let error = job.reader.next().unwrap_err();
    assert!(error.to_string().contains("changed while the job was reading it"), "{error}");
}

#[test]
fn a_pipe_is_kept_until_the_job_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let input = mixed_input(40);
    let options = JobOptions { input: Input::File(pipe.clone()), ..options(directory.path(), "") };
    let feed = |text: &str| {
        let (pipe, text) = (pipe.clone(), text.to_owned());
        std::thread::spawn(move || fs::write(pipe, text).unwrap())
    };
    let feeder = feed(&input);
    let Opening::Run(job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
    feeder.join().unwrap();
    job.writer.close(false).unwrap();

    let feeder = feed("{\"prompt\":\"other\"}\n");
    assert!(open_error(&options).to_string().contains("another standard input"));
    feeder.join().unwrap();
    let feeder = feed("");
    let first = run_through(&options, 1, false);
    feeder.join().unwrap();
    assert_eq!(read(&output(&options)).lines().count() as u64, first.succeeded + first.failed);
    assert_eq!(listing(directory.path()), ["in.jsonl", "out.jsonl", "out.jsonl.run.json", "pipe"]);
    for again in ["", &input] {
        let feeder = feed(again);
        assert!(matches!(open(options.clone()).unwrap(), Opening::Finished(_)));
        feeder.join().unwrap();
    }
    assert_eq!(listing(directory.path()), ["in.jsonl", "out.jsonl", "out.jsonl.run.json", "pipe"]);
}

#[test]
fn many_lines_stay_small_in_memory() {
    let lines = 100_000;
    let input: String = (0..lines).map(|line| format!("{{\"prompt\":\"{line} {}\"}}\n", "x".repeat(500))).collect();
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &input);
    drop(input);
    let before = resident_bytes();
    let Opening::Run(mut job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
    // The first line is finished last, so that all others wait.
    let first = job.reader.next().unwrap().unwrap();
    let error = tidemill::job::request::LineError::new("late", "x".repeat(500));
    while let Some(item) = job.reader.next().unwrap() {
        job.writer.finish(&item.header(), Err(&error)).unwrap();
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 24 << 20, "{grown} bytes for {lines} waiting lines of 0.5 KiB");
    job.writer.finish(&first.header(), Err(&error)).unwrap();
    assert_eq!(job.writer.close(true).unwrap().failed, lines);
    assert_eq!(read(&output(&options)).lines().count() as u64, lines);
}

fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn records_keep_the_shape_of_their_lines() {
    let openai = refusal(r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":5}}"#);
    assert_eq!(openai["response"], Value::Null);
    assert!(openai["id"].as_str().unwrap().starts_with("batch_req_"));
    assert_eq!(openai["custom_id"], "a");
    let torn = refusal(r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":5}"#);
    assert_eq!(torn["response"], Value::Null);
    assert_eq!(torn["custom_id"], "line-1");
    let plain = refusal(r#"{"prompt":5}"#);
    assert_eq!(plain, json!({"custom_id": "line-1", "error": plain["error"]}));
}
