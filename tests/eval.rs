//! `tidemill eval`: scenarios of every shape in one command, resumed and refused.
#![allow(missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::process::{signal, start, wait, wait_for_text};
use support::{Scratch, hint, refused, tidemill};

fn eval(scenarios: &[&Path], output: &Path, extra: &[&str]) -> Output {
    let mut command = tidemill(&["eval", "--model", "demo", "--progress", "none"]);
    command.arg("--output").arg(output).arg("--scenario").args(scenarios).args(extra);
    command.output().expect("the binary runs")
}

fn evaluated(scenarios: &[&Path], output: &Path, extra: &[&str]) -> String {
    let result = eval(scenarios, output, extra);
    assert_eq!(result.status.code(), Some(0), "{}", String::from_utf8_lossy(&result.stderr));
    String::from_utf8(result.stdout).expect("UTF-8")
}

fn read(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .expect("JSON")
}

fn write(scratch: &Scratch, folder: &str, state: &Value) -> PathBuf {
    std::fs::create_dir_all(scratch.path(folder)).expect("create");
    scratch.write(&format!("{folder}/scenario_state.json"), state.to_string())
}

/// An instance with references, the first of which is right.
fn instance(id: usize, input: &str, references: &[&str]) -> Value {
    let tags = |index: usize| if index == 0 { vec!["correct"] } else { vec![] };
    let reference = |(index, text): (usize, &&str)| json!({"output": {"text": text}, "tags": tags(index)});
    let references: Vec<Value> = references.iter().enumerate().map(reference).collect();
    json!({"input": {"text": input}, "references": references, "split": "test", "id": format!("id{id}")})
}

fn state(method: &str, num_outputs: usize, states: Vec<Value>) -> Value {
    let adapter = json!({"method": method, "num_outputs": num_outputs, "num_train_trials": 1});
    json!({"adapter_spec": adapter, "request_states": states})
}

fn request(instance: Value, request: Value) -> Value {
    json!({"instance": instance, "train_trial_index": 0, "request": request, "num_train_instances": 2,
        "prompt_truncated": false})
}

fn fact(seed: usize) -> Value {
    let ask = |index: usize| {
        let prompt = format!("Story: Mia lived in house {index}{seed}");
        let ask = json!({"prompt": prompt, "temperature": 1, "num_completions": 5, "max_tokens": 8,
            "stop_sequences": ["\n"], "top_k_per_token": 1, "model": "x/y", "random": "r"});
        request(instance(index, "Mia", &["the mill", "mill"]), ask)
    };
    state("generation", 5, (0..4).map(ask).collect())
}

fn choice(seed: usize) -> Value {
    let ask = |index: usize| {
        let prompt = format!("A. mill\nB. harbour\nQuestion {index}{seed}\nAnswer:");
        let ask = json!({"prompt": prompt, "temperature": 0, "max_tokens": 1, "top_k_per_token": 5});
        let mut ask = request(instance(index, "?", &["mill", "harbour"]), ask);
        ask["output_mapping"] = json!({"A": "mill", "B": "harbour"});
        ask
    };
    let mut states: Vec<Value> = (0..4).map(ask).collect();
    let mut changed = states[0].clone();
    changed["instance"]["perturbation"] = json!({"name": "lowercase", "robustness": true, "fairness": false});
    changed["request"]["prompt"] = json!("a. mill\nb. harbour\nanswer:");
    states.push(changed);
    state("multiple_choice_joint", 5, states)
}

fn sets(prompt: &str, gold: &str, max_tokens: usize, stop: Option<&str>, temperature: f64) -> Value {
    let ask = |index: usize| {
        let stops: Vec<&str> = stop.into_iter().collect();
        let ask = json!({"prompt": format!("{prompt} {index}"), "temperature": temperature, "max_tokens": max_tokens,
            "stop_sequences": stops});
        request(instance(index, "x", &[gold]), ask)
    };
    state("generation", 1, (0..3).map(ask).collect())
}

fn separate(calibrated: bool) -> Value {
    let mut states = Vec::new();
    for index in 0..3 {
        for (at, reference) in ["mill", "harbour"].iter().enumerate() {
            for mode in ["original", "calibration"].iter().take(1 + usize::from(calibrated)) {
                let question = if *mode == "original" { format!("Where is Mia {index}?") } else { "Answer:".into() };
                let ask = json!({"prompt": format!("{question} {reference}"), "temperature": 0, "max_tokens": 0,
                    "echo_prompt": true});
                let mut ask = request(instance(index, "?", &["mill", "harbour"]), ask);
                ask["reference_index"] = json!(at);
                ask["request_mode"] = json!(mode);
                states.push(ask);
            }
        }
    }
    let method = if calibrated { "calibrated" } else { "original" };
    state(&format!("multiple_choice_separate_{method}"), 1, states)
}

fn texts() -> Value {
    let ask = |index: usize| {
        let ask = json!({"prompt": format!("Story: Mia saw “{index}” é."), "max_tokens": 0, "echo_prompt": true});
        let mut ask = request(json!({"input": {"text": "x"}, "split": "test", "id": format!("id{index}")}), ask);
        ask["num_conditioning_tokens"] = json!(1);
        ask
    };
    state("language_modeling", 1, (0..3).map(ask).collect())
}

/// FlexGen's seven sub-scenarios by shape, and the three adapters beside them.
fn all(scratch: &Scratch) -> Vec<PathBuf> {
    let shapes = [
        ("wikifact-plaintiff", fact(1)),
        ("wikifact-instance_of", fact(2)),
        ("mmlu-abstract_algebra", choice(1)),
        ("mmlu-us_foreign_policy", choice(2)),
        ("synthetic_reasoning", sets("Story: Mia", "X + Y", 50, Some("\n"), 0.0)),
        ("synthetic_reasoning_natural", sets("Rules: Carol is big.", "Carol is red and big.", 20, None, 0.0)),
        ("summarization_xsum_sampled", sets("### Article: Mia", "Mia walked home.", 64, Some("###"), 0.3)),
        ("separate", separate(false)),
        ("calibrated", separate(true)),
        ("texts", texts()),
    ];
    shapes.iter().map(|(name, state)| write(scratch, name, state)).collect()
}

fn mean(stats: &Value, name: &str) -> f64 {
    let plain = |stat: &&Value| stat["name"]["name"] == name && stat["name"]["perturbation"].is_null();
    let stat = stats.as_array().expect("a list").iter().find(plain);
    stat.unwrap_or_else(|| panic!("no {name}"))["mean"].as_f64().expect("a number")
}

#[test]
fn ten_shapes_run_in_one_command() {
    let scratch = Scratch::new();
    let files = all(&scratch);
    let before: Vec<_> = files.iter().map(|file| std::fs::read(file).expect("read")).collect();
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let output = scratch.path("results");
    let table = evaluated(&files, &output, &[]);
    for file in &files {
        let name = file.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned();
        assert!(table.contains(&name), "{table}");
        let (input, filled) = (read(file.to_path_buf()), read(output.join(&name).join("scenario_state.json")));
        for (asked, state) in
            input["request_states"].as_array().unwrap().iter().zip(filled["request_states"].as_array().unwrap())
        {
            let result = &state["result"];
            assert_eq!(result["success"], true);
            let count = asked["request"]["num_completions"].as_u64().unwrap_or(1);
            let completions = result["completions"].as_array().unwrap();
            assert_eq!(completions.len() as u64, count);
            for completion in completions {
                let logprobs = completion["tokens"].as_array().unwrap().iter().map(|token| token["logprob"].as_f64());
                let sum: f64 = logprobs.map(|logprob| logprob.expect("a number")).sum();
                assert!((completion["logprob"].as_f64().unwrap() - sum).abs() < 1e-9);
                assert!(["length", "stop", "endoftext"].iter().any(|r| completion["finish_reason"]["reason"] == *r));
                let text = completion["text"].as_str().unwrap();
                let stops = asked["request"]["stop_sequences"].as_array().into_iter().flatten();
                assert!(stops.into_iter().all(|stop| !text.contains(stop.as_str().unwrap())));
                if asked["request"]["echo_prompt"] == true {
                    assert_eq!(text, asked["request"]["prompt"]);
                }
            }
            // Nothing but the result was added.
            let mut without = state.clone();
            without.as_object_mut().unwrap().remove("result");
            assert_eq!(without, *asked);
        }
        let stats = read(output.join(&name).join("stats.json"));
        match name.as_str() {
            "texts" => assert!(mean(&stats, "perplexity") > 1.0 && mean(&stats, "bits_per_byte") > 0.0),
            "separate" | "calibrated" => assert!(mean(&stats, "max_prob") >= 0.5),
            "summarization_xsum_sampled" => assert!(mean(&stats, "rouge_l") <= 1.0),
            "wikifact-plaintiff" => assert!(mean(&stats, "exact_match@5") >= mean(&stats, "exact_match")),
            _ => assert!(mean(&stats, "exact_match") <= 1.0),
        }
        assert!(!read(output.join(&name).join("per_instance_stats.json")).as_array().unwrap().is_empty());
    }
    let worst = read(output.join("mmlu-abstract_algebra/stats.json"));
    let worst = worst.as_array().unwrap().iter().filter(|stat| stat["name"]["perturbation"]["computed_on"] == "worst");
    assert!(worst.count() > 0);
    let after: Vec<_> = files.iter().map(|file| std::fs::read(file).expect("read")).collect();
    assert!(before == after, "an input was edited");
    // Again: nothing is computed, everything is the same. Alone: the same answers.
    let again = eval(&files, &output, &[]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("already finished"));
    assert_eq!(String::from_utf8_lossy(&again.stdout), table);
    evaluated(&files[..1], &scratch.path("alone"), &["--threads", "1"]);
    let state = |folder: &str| read(scratch.path(&format!("{folder}/wikifact-plaintiff/scenario_state.json")));
    assert_eq!(state("alone"), state("results"));
}

#[test]
fn an_interrupted_evaluation_goes_on() {
    let scratch = Scratch::new();
    let file = write(&scratch, "long", &sets("Story: Mia", "x", 400, None, 1.0));
    let task =
        scratch.write("items.jsonl", "{\"prompt\": \"Sum: 1 + 2 =\", \"references\": [\" 3\"], \"stop\": \";\"}\n");
    let (whole, parts) = (scratch.path("whole"), scratch.path("parts"));
    evaluated(&[&file, &task], &whole, &[]);
    let mut command = tidemill(&["eval", "--model", "demo", "--progress", "json"]);
    command.arg("--output").arg(&parts).arg("--scenario").args([&file, &task]);
    command.stdout(std::process::Stdio::null());
    let said = scratch.path("said");
    let mut child = start(command, &said);
    wait_for_text(&said, "model demo", Duration::from_secs(60));
    std::thread::sleep(Duration::from_millis(150));
    signal(&child, Signal::TERM);
    let status = wait(&mut child, Duration::from_secs(60)).expect("it ends");
    assert!(matches!(status.code(), Some(0 | 1)), "{status}");
    evaluated(&[&file, &task], &parts, &[]);
    for name in ["answers.jsonl", "long/scenario_state.json", "long/stats.json", "items/stats.json"] {
        assert!(std::fs::read(whole.join(name)).unwrap() == std::fs::read(parts.join(name)).unwrap(), "{name} differs");
    }
    // Another scenario is another job.
    let other = write(&scratch, "long", &sets("Story: Leo", "x", 4, None, 1.0));
    let said = refused(&eval(&[&other, &task], &parts, &[]), 2);
    assert!(said.contains("holds other requests"), "{said}");
}

#[test]
fn what_is_wrong_is_named_by_its_path() {
    let scratch = Scratch::new();
    let good = fact(1);
    let edit = |path: &str, value: Value| {
        let mut state = good.clone();
        *state.pointer_mut(path).expect("a path") = value;
        state.to_string()
    };
    let cut = |path: &str, key: &str| {
        let mut state = good.clone();
        state.pointer_mut(path).expect("a path").as_object_mut().expect("an object").remove(key);
        state.to_string()
    };
    let calibrated = separate(true);
    let mut unnamed = calibrated.clone();
    unnamed["request_states"][1].as_object_mut().unwrap().remove("reference_index");
    let huge = "x".repeat(65 << 20);
    let cases = [
        (cut("", "adapter_spec"), "adapter_spec is missing"),
        (cut("/request_states/2/request", "prompt"), "request_states[2].request.prompt is missing"),
        (cut("/request_states/0/instance", "id"), "request_states[0].instance.id is missing"),
        (edit("/adapter_spec/method", json!("psychic")), "adapter_spec.method must be one of generation, "),
        (edit("/request_states", json!([])), "request_states must be a list that is not empty"),
        (edit("/request_states/1", json!(7)), "request_states[1] must be an object, got 7"),
        (
            edit("/request_states/3/request/max_tokens", json!("8")),
            "request_states[3].request.max_tokens must be a whole number from 1 to 4294967295, got \"8\"",
        ),
        (
            edit("/request_states/0/request/temperature", json!(-1)),
            "request.temperature must be a number from 0 to 100",
        ),
        (edit("/request_states/0/request/stop_sequences", json!("x")), "stop_sequences must be a list, got \"x\""),
        (edit("/request_states/0/request/prompt", json!(["x"])), "request.prompt must be a string, got a list of 1"),
        (edit("/request_states/0/request/prompt", json!(huge)), "request.prompt has 68157440 bytes"),
        (edit("/request_states/0/instance/references/0/tags", json!(["wrong"])), "a reference tagged `correct`"),
        (edit("/request_states/0/train_trial_index", json!(4)), "train_trial_index must be a whole number from 0 to 0"),
        (
            good.to_string().replace("\"temperature\":1", "\"temperature\":NaN"),
            "request_states[0].request.temperature is no JSON",
        ),
        (unnamed.to_string(), "request_states[1].reference_index is missing"),
        (good.to_string()[..200].to_owned(), "is no JSON: EOF"),
        ("[]".to_owned(), "the file must be an object"),
    ];
    for (index, (text, expected)) in cases.iter().enumerate() {
        let folder = format!("bad-{index}");
        std::fs::create_dir_all(scratch.path(&folder)).expect("create");
        let file = scratch.write(&format!("{folder}/scenario_state.json"), text);
        let said = refused(&eval(&[&file], &scratch.path("out"), &[]), 1);
        assert!(said.contains(expected), "{expected}: {}", &said[..said.len().min(600)]);
        assert!(said.len() < 2000 && !hint(&said).is_empty(), "{}", said.len());
    }
    assert!(!scratch.path("out").exists(), "something was written for a bad scenario");
}

#[test]
fn results_that_would_meet_or_replace_an_input_are_refused() {
    let scratch = Scratch::new();
    let line = "{\"prompt\": \"Sum: 1 + 2 =\", \"references\": [\" 3\"]}\n";
    std::fs::create_dir(scratch.path("own")).unwrap();
    let own = scratch.write("own/requests.jsonl", line);
    let said = refused(&eval(&[&own], &scratch.path("own"), &[]), 2);
    assert!(said.contains("would replace it"), "{said}");
    assert_eq!(std::fs::read_to_string(&own).unwrap(), line);
    for name in ["...jsonl", "answers.jsonl.jsonl"] {
        let file = scratch.write(name, line);
        let said = refused(&eval(&[&file], &scratch.path("fresh"), &[]), 2);
        assert!(said.contains("cannot have the name"), "{said}");
    }
    let one = write(&scratch, "a/same", &fact(1));
    let two = write(&scratch, "b/same", &fact(2));
    let said = refused(&eval(&[&one, &two], &scratch.path("out"), &[]), 2);
    assert!(said.contains("`same`"), "{said}");
    let said = refused(&eval(&[&one], &scratch.path("a"), &[]), 2);
    assert!(said.contains("would replace it"), "{said}");
    let said = refused(&eval(&[&one], &scratch.path("out"), &["--temperature", "0"]), 2);
    assert!(said.contains("--temperature"), "{said}");
}

#[test]
fn failed_requests_are_results_and_no_metrics() {
    let scratch = Scratch::new();
    let mut state = sets("Story: Mia", "x", 4, None, 0.0);
    state["request_states"][1]["request"]["prompt"] = json!("x ".repeat(5000));
    let file = write(&scratch, "partly", &state);
    let result = eval(&[&file], &scratch.path("out"), &[]);
    assert_eq!(result.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&result.stderr).contains("partly: 1 failed"));
    let filled = read(scratch.path("out/partly/scenario_state.json"));
    let failed = &filled["request_states"][1]["result"];
    assert_eq!(failed["success"], false);
    assert!(failed["error"].as_str().unwrap().starts_with("context_length_exceeded: "));
    let stats = read(scratch.path("out/partly/stats.json"));
    let exact = stats.as_array().unwrap().iter().find(|stat| stat["name"]["name"] == "exact_match").unwrap();
    assert_eq!(exact["count"], 1);
    assert_eq!(read(scratch.path("out/partly/per_instance_stats.json")).as_array().unwrap().len(), 2);
}
