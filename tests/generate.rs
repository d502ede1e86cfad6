//! What `generate` answers, feature by feature, against oracles that are slower or simpler.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;

use serde_json::{Value, json};
use support::{Scratch, generate_ok, golden, read_jsonl};

const STORY: &str = "Tell me a story about a fox.";
/// End of sequence of the demo model.
const EOS: u64 = 1;

/// Runs lines that all succeed (`code` 0) or not (3).
fn run_coded(model: &str, lines: &[Value], extra: &[&str], code: i32) -> Vec<Value> {
    let scratch = Scratch::new();
    let input = scratch.jsonl("in.jsonl", lines);
    let output = scratch.path("out.jsonl");
    generate_ok(model, &input, &output, extra, code);
    read_jsonl(&output)
}

fn run(model: &str, lines: &[Value]) -> Vec<Value> {
    run_coded(model, lines, &[], 0)
}

fn demo(lines: &[Value]) -> Vec<Value> {
    run("demo", lines)
}

fn model(name: &str) -> String {
    golden(name).to_str().unwrap().to_owned()
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("token ids").iter().map(|id| id.as_u64().unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("numbers").iter().map(|number| number.as_f64().unwrap()).collect()
}

/// A line with more fields.
fn with(line: Value, more: Value) -> Value {
    let mut line = line;
    let more = more.as_object().unwrap().clone();
    line.as_object_mut().unwrap().extend(more);
    line
}

fn greedy(more: Value) -> Value {
    with(json!({"prompt": STORY, "temperature": 0, "max_tokens": 24, "return_token_ids": true}), more)
}

#[test]
fn scoring_a_completion_gives_the_bits_that_its_generation_gave() {
    for (name, length) in
        [("demo".to_owned(), 140), (model("mistral-w23"), 100), (model("llama-dynamic"), 20), (model("opt-preln"), 90)]
    {
        let prompt: Vec<u64> = (0..length).map(|at| 5 + at * 31 % 250).collect();
        let more = json!({"prompt": prompt, "max_tokens": 40, "logprobs": 3, "return_token_ids": true, "ignore_eos": true, "top_p": 1});
        let lines = [with(more.clone(), json!({"temperature": 0})), with(more, json!({"temperature": 1, "seed": 4}))];
        for answer in run(&name, &lines) {
            let completion = ids(&answer["token_ids"]);
            let whole: Vec<u64> = prompt.iter().chain(&completion).copied().collect();
            let score = json!({"prompt": whole, "max_tokens": 0, "echo": true, "logprobs": 3});
            let scored = &run(&name, &[score])[0];
            for key in ["token_logprobs", "top_logprobs", "tokens"] {
                let scored = scored["logprobs"][key].as_array().unwrap();
                assert_eq!(scored.len(), whole.len());
                let tail = Value::from(scored[prompt.len()..].to_vec());
                assert_eq!(tail, answer["logprobs"][key], "{name}, {key}");
                if key != "tokens" {
                    assert_eq!(scored[0], Value::Null, "nothing predicts the first token");
                }
            }
        }
    }
}

#[test]
fn samples_go_by_seed_name_and_index() {
    let line = |more: Value| with(json!({"id": "a", "prompt": STORY, "max_tokens": 12, "ignore_eos": true}), more);
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().cloned().unwrap_or_else(|| vec![answer.clone()]);
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let one = |more: Value| texts(&demo(&[line(more)])[0]);
    let four = one(json!({"n": 4}));
    assert_eq!(four.len(), 4);
    assert!(four.iter().any(|text| *text != four[0]), "samples differ: {four:?}");
    assert_eq!(one(json!({"n": 2})), four[..2], "fewer samples are the first ones");
    assert_eq!(one(json!({})), four[..1]);
    let others = [json!({"id": "b", "prompt": "x"}), line(json!({"n": 4})), json!({"id": "c", "prompt": "y", "n": 3})];
    assert_eq!(texts(&demo(&others)[1]), four, "neighbours do not matter");
    assert_ne!(one(json!({"seed": 1})), four[..1]);
    assert_ne!(one(json!({"id": "b"})), four[..1]);
    assert_eq!(one(json!({"seed": 0})), four[..1], "the default seed is 0");
    let flag = run_coded("demo", &[line(json!({}))], &["--seed=-7"], 0);
    assert_eq!(texts(&flag[0]), one(json!({"seed": -7})));
}

#[test]
fn draws_follow_the_log_probabilities() {
    const PER_LINE: usize = 128;
    const LINES: usize = 12;
    let top = &demo(&[json!({"prompt": STORY, "max_tokens": 1, "temperature": 0, "logprobs": 20})])[0];
    let top = top["logprobs"]["top_logprobs"][0].as_object().unwrap().clone();
    let mut p: Vec<(String, f64)> = top.into_iter().map(|(token, lp)| (token, lp.as_f64().unwrap().exp())).collect();
    p.sort_by(|a, b| b.1.total_cmp(&a.1));
    let renormal = |p: &[(String, f64)], power: f64| -> BTreeMap<String, f64> {
        let total: f64 = p.iter().map(|(_, p)| p.powf(power)).sum();
        p.iter().map(|(token, p)| (token.clone(), p.powf(power) / total)).collect()
    };
    let nucleus = (1..=p.len()).find(|&count| p[..count].iter().map(|(_, p)| p).sum::<f64>() >= 0.9).unwrap_or(p.len());
    let likely = p.iter().filter(|(_, q)| *q >= 0.05 * p[0].1).count();
    let cases = [
        (json!({"top_k": 5}), renormal(&p[..5], 1.0)),
        (json!({"top_k": 8, "temperature": 2}), renormal(&p[..8], 0.5)),
        (json!({"top_p": 0.9}), renormal(&p[..nucleus], 1.0)),
        (json!({"min_p": 0.05}), renormal(&p[..likely], 1.0)),
        (json!({"top_k": 1, "temperature": 3}), renormal(&p[..1], 1.0)),
        (json!({"top_p": 1e-6, "temperature": 0.02}), renormal(&p[..1], 1.0)),
    ];
    for (how, expected) in cases {
        let line = |index: usize| {
            with(
                json!({"id": format!("d{index}"), "prompt": STORY, "max_tokens": 1, "n": PER_LINE, "logprobs": 0, "skip_special_tokens": false}),
                how.clone(),
            )
        };
        let mut counts: BTreeMap<String, f64> = BTreeMap::new();
        for answer in demo(&(0..LINES).map(line).collect::<Vec<_>>()) {
            for choice in answer["choices"].as_array().unwrap() {
                *counts.entry(choice["logprobs"]["tokens"][0].as_str().unwrap().to_owned()).or_default() += 1.0;
            }
        }
        let draws = (PER_LINE * LINES) as f64;
        for (token, count) in &counts {
            assert!(expected.contains_key(token), "{how}: {token:?} was drawn {count} times");
        }
        for (token, p) in &expected {
            let (count, deviation) = (counts.get(token).copied().unwrap_or(0.0), (draws * p * (1.0 - p)).sqrt());
            let off = (count - draws * p).abs();
            assert!(off <= 5.0 * deviation + 1e-6, "{how}: {token:?} {count} times, expected {:.1}", draws * p);
        }
    }
}

#[test]
fn biases_force_and_ban() {
    let plain = &demo(&[greedy(json!({"logprobs": 2}))])[0];
    let best = ids(&plain["token_ids"])[0].to_string();
    let second = plain["logprobs"]["top_logprobs"][0].as_object().unwrap();
    let second = second.keys().find(|token| *token != plain["logprobs"]["tokens"][0].as_str().unwrap()).unwrap();
    let lines = [
        greedy(json!({"temperature": 1, "logit_bias": {"50": 100}, "n": 3, "ignore_eos": true})),
        greedy(json!({"logit_bias": {best.as_str(): -100}, "logprobs": 2})),
        greedy(json!({"logit_bias": {best.as_str(): 0.0}})),
    ];
    let answers = demo(&lines);
    for choice in answers[0]["choices"].as_array().unwrap() {
        assert_eq!(ids(&choice["token_ids"]), [50; 24]);
    }
    assert_eq!(answers[1]["logprobs"]["tokens"][0], json!(second));
    let raw = |answer: &Value| answer["logprobs"]["top_logprobs"][0].clone();
    assert_eq!(raw(&answers[1]), raw(plain), "log-probabilities are those of the unmodified logits");
    assert_eq!(answers[2]["token_ids"], plain["token_ids"]);
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let allowed = [37u64, 60, 95, 300, 301];
    let lines = [
        greedy(json!({"allowed_token_ids": allowed})),
        greedy(json!({"allowed_token_ids": allowed, "temperature": 2, "n": 4})),
        greedy(json!({"allowed_token_ids": allowed, "logit_bias": {"50": 100}, "min_tokens": 3})),
    ];
    for answer in demo(&lines) {
        let choices = answer["choices"].as_array().cloned().unwrap_or_else(|| vec![answer.clone()]);
        for choice in choices {
            assert!(ids(&choice["token_ids"]).iter().all(|id| allowed.contains(id)), "{choice}");
        }
    }
}

#[test]
fn rules_that_leave_no_token_are_an_error() {
    let line = greedy(json!({"allowed_token_ids": [EOS], "min_tokens": 3}));
    let scratch = Scratch::new();
    let (input, output) = (scratch.jsonl("in.jsonl", &[line]), scratch.path("out.jsonl"));
    support::generate("demo", &input, &output, &[]);
    let answer = &read_jsonl(&output)[0];
    let tokens = answer["token_ids"].as_array().cloned().unwrap_or_default();
    assert!(tokens.iter().all(|id| id.as_u64() == Some(EOS)), "a token that is not allowed: {answer}");
    assert!(answer["error"]["code"].is_string(), "{answer}");
}

#[test]
fn frequency_and_presence_penalties_are_those_of_the_definition() {
    let (frequency, presence) = (0.9, 0.6);
    let more = json!({"frequency_penalty": frequency, "presence_penalty": presence, "logprobs": 20, "ignore_eos": true, "max_tokens": 80, "prompt": "Story: Ben"});
    let answer = &demo(&[greedy(more)])[0];
    let tokens = answer["logprobs"]["tokens"].as_array().unwrap();
    let (mut counts, mut checked, mut changed) = (BTreeMap::new(), 0, 0);
    for (step, token) in tokens.iter().enumerate() {
        let token = token.as_str().unwrap();
        let top = answer["logprobs"]["top_logprobs"][step].as_object().unwrap();
        let least = top.values().map(|lp| lp.as_f64().unwrap()).fold(f64::INFINITY, f64::min);
        let penalised = |(token, lp): (&String, &Value)| {
            let count = *counts.get(token.as_str()).unwrap_or(&0) as f64;
            (token.clone(), lp.as_f64().unwrap() - frequency * count - if count > 0.0 { presence } else { 0.0 })
        };
        let best = top.iter().map(penalised).max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        // Otherwise a token that is not shown may be the best.
        if best.1 > least {
            assert_eq!(best.0, token, "step {step}");
            checked += 1;
            changed += usize::from(top.values().any(|lp| lp.as_f64() > top[token].as_f64()));
        }
        *counts.entry(token).or_insert(0) += 1;
    }
    assert!(checked > 60 && changed > 3, "{checked} steps checked, {changed} changed by the penalties");
}

#[test]
fn a_repetition_penalty_covers_prompt_and_output() {
    let prompt: Vec<u64> = (255..420).collect();
    let base = json!({"prompt": prompt, "max_tokens": 12, "ignore_eos": true});
    let lines = [
        greedy(with(base.clone(), json!({"repetition_penalty": 100}))),
        greedy(with(base.clone(), json!({"repetition_penalty": 1}))),
        greedy(base),
        greedy(json!({"repetition_penalty": 0.01, "max_tokens": 12, "ignore_eos": true})),
    ];
    let answers = demo(&lines);
    let strong = ids(&answers[0]["token_ids"]);
    let mut seen = prompt;
    for id in strong {
        assert!(!seen.contains(&id), "{id} is repeated");
        seen.push(id);
    }
    assert_eq!(answers[1]["token_ids"], answers[2]["token_ids"]);
    let weak = ids(&answers[3]["token_ids"]);
    let mut seen = ids(&answers[3]["prompt_token_ids"]);
    for id in weak {
        assert!(seen.contains(&id), "below 1 it makes a model repeat: {id} is new");
        seen.push(id);
    }
}

#[test]
fn temperature_zero_is_the_best_of_the_top() {
    let answer = &demo(&[greedy(json!({"logprobs": 20, "max_tokens": 60, "ignore_eos": true}))])[0];
    let logprobs = &answer["logprobs"];
    for (step, chosen) in numbers(&logprobs["token_logprobs"]).into_iter().enumerate() {
        let top: Vec<f64> =
            logprobs["top_logprobs"][step].as_object().unwrap().values().map(|lp| lp.as_f64().unwrap()).collect();
        assert!(top.len() == 20, "step {step}: {} alternatives", top.len());
        assert_eq!(chosen, top.iter().copied().fold(f64::NEG_INFINITY, f64::max), "step {step}");
        assert!(top.iter().map(|lp| lp.exp()).sum::<f64>() < 1.0 + 1e-4);
    }
}

#[test]
fn alternatives_are_sorted_and_ranked() {
    let chat = json!({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {
        "messages": [{"role": "user", "content": STORY}], "max_tokens": 30, "logprobs": true, "top_logprobs": 6, "seed": 3}});
    let scored = json!({"prompt": STORY, "max_tokens": 1, "prompt_logprobs": 4});
    let answers = demo(&[chat, scored]);
    for entry in answers[0]["response"]["body"]["choices"][0]["logprobs"]["content"].as_array().unwrap() {
        let top = entry["top_logprobs"].as_array().unwrap();
        let values: Vec<f64> = top.iter().map(|other| other["logprob"].as_f64().unwrap()).collect();
        assert!(values.is_sorted_by(|a, b| a >= b) && values.len() >= 6, "{values:?}");
        let bytes: Vec<u8> = serde_json::from_value(entry["bytes"].clone()).unwrap();
        assert_eq!(String::from_utf8_lossy(&bytes), entry["token"].as_str().unwrap());
        match top.iter().find(|other| other["token"] == entry["token"]) {
            Some(same) => assert_eq!(same["logprob"], entry["logprob"]),
            None => assert!(entry["logprob"].as_f64() <= values.last().copied()),
        }
    }
    let positions = answers[1]["prompt_logprobs"].as_array().unwrap();
    assert_eq!(positions[0], Value::Null);
    for position in &positions[1..] {
        let entries = position.as_object().unwrap();
        assert!((4..=5).contains(&entries.len()));
        let mut ranked: Vec<(u64, f64)> = entries
            .values()
            .filter_map(|entry| Some((entry["rank"].as_u64()?, entry["logprob"].as_f64().unwrap())))
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        assert_eq!(ranked.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(ranked.is_sorted_by(|a, b| a.1 >= b.1));
    }
}

#[test]
fn ends_of_sequence_wait_for_min_tokens() {
    let eos = EOS.to_string();
    let bias = json!({"logit_bias": {eos.as_str(): 100}});
    let lines = [
        greedy(bias.clone()),
        greedy(with(bias.clone(), json!({"min_tokens": 5}))),
        greedy(with(bias.clone(), json!({"ignore_eos": true}))),
        greedy(with(bias, json!({"include_stop_str_in_output": true, "skip_special_tokens": false}))),
    ];
    let answers = demo(&lines);
    assert_eq!((ids(&answers[0]["token_ids"]), &answers[0]["text"]), (vec![EOS], &json!("")));
    assert_eq!(answers[0]["finish_reason"], "stop");
    let late = ids(&answers[1]["token_ids"]);
    assert_eq!((late.len(), late[5]), (6, EOS));
    assert!(!late[..5].contains(&EOS));
    assert_eq!((ids(&answers[2]["token_ids"]), &answers[2]["finish_reason"]), (vec![EOS; 24], &json!("length")));
    assert_eq!(answers[3]["text"], "</s>");
}

#[test]
fn stop_texts_are_found_wherever_tokens_border() {
    let answer = &demo(&[greedy(json!({"max_tokens": 40, "ignore_eos": true}))])[0];
    let text = answer["text"].as_str().unwrap();
    let stops: Vec<&str> = (1..text.len() - 5).step_by(3).map(|at| &text[at..at + 5]).collect();
    let lines: Vec<Value> = stops
        .iter()
        .enumerate()
        .map(|(at, stop)| greedy(json!({"max_tokens": 40, "ignore_eos": true, "stop": ["never there", stop], "include_stop_str_in_output": at % 2 == 1})))
        .collect();
    for (at, (answer, stop)) in demo(&lines).iter().zip(&stops).enumerate() {
        let end = text.find(stop).unwrap() + if at % 2 == 1 { stop.len() } else { 0 };
        assert_eq!(answer["text"], text[..end], "stop {stop:?}");
        assert_eq!(answer["finish_reason"], "stop");
        assert!(answer["usage"]["completion_tokens"].as_u64() <= Some(40));
    }
    let body = json!({"prompt": STORY, "temperature": 0, "max_tokens": 40, "stop": stops[4]});
    let line = json!({"custom_id": "s", "method": "POST", "url": "/v1/completions", "body": body});
    assert_eq!(demo(&[line])[0]["response"]["body"]["choices"][0]["stop_reason"], stops[4]);
    let waits = greedy(json!({"max_tokens": 40, "ignore_eos": true, "stop": stops[0], "min_tokens": 20}));
    assert!(ids(&demo(&[waits])[0]["token_ids"]).len() >= 20, "min_tokens holds for stop texts too");
}

#[test]
fn stop_tokens_end_a_sample() {
    let plain = &demo(&[greedy(json!({"ignore_eos": true}))])[0];
    let tokens = ids(&plain["token_ids"]);
    let stop = tokens[tokens.len() / 2];
    let at = tokens.iter().position(|id| *id == stop).unwrap();
    let body = json!({"prompt": STORY, "temperature": 0, "max_tokens": 24, "stop_token_ids": [stop], "ignore_eos": true, "return_token_ids": true});
    let lines = [
        json!({"custom_id": "t", "method": "POST", "url": "/v1/completions", "body": body}),
        greedy(json!({"max_tokens": at, "ignore_eos": true})),
    ];
    let answers = demo(&lines);
    let choice = &answers[0]["response"]["body"]["choices"][0];
    assert_eq!(ids(&choice["token_ids"]), tokens[..=at]);
    assert_eq!((&choice["stop_reason"], &choice["finish_reason"]), (&json!(stop), &json!("stop")));
    assert_eq!(choice["text"], answers[1]["text"], "the stop token leaves no text");
}

#[test]
fn numerics_that_the_program_chose_are_kept_by_whoever_goes_on() {
    let scratch = Scratch::new();
    let lines = [greedy(json!({"max_tokens": 20})), greedy(json!({"prompt": "Sum: 1 + 2 =", "max_tokens": 3}))];
    let input = scratch.jsonl("in.jsonl", &lines);
    let (chosen, stats) = (scratch.path("chosen.jsonl"), scratch.path("stats.json"));
    let lossy = ["--allow-lossy", "--stats", stats.to_str().unwrap()];
    let said = generate_ok("demo", &input, &chosen, &lossy, 0);
    let words = said.lines().find_map(|line| line.strip_prefix("--allow-lossy chose ")).expect("it says what");
    let words = words.split(", ").next().unwrap();
    let flags: Vec<&str> = words.split(' ').collect();
    let numerics = &serde_json::from_slice::<Value>(&std::fs::read(&stats).unwrap()).unwrap()["numerics"];
    for pair in flags.chunks(2) {
        let name = pair[0].trim_start_matches('-').replace('-', "_");
        let same = numerics[&name] == pair[1] || (numerics[&name] == "bf16" && ["native", "auto"].contains(&pair[1]));
        assert!(same, "{numerics} {words}");
    }
    // The flags that it names give the same bytes.
    let again = scratch.path("again.jsonl");
    generate_ok("demo", &input, &again, &flags, 0);
    assert_eq!(std::fs::read(&chosen).unwrap(), std::fs::read(&again).unwrap());
    // A job begun with numerics that are hardly anybody's choice goes on with them; what is said must agree.
    let begun = scratch.path("begun.jsonl");
    generate_ok("demo", &input, &begun, &["--weights", "int8", "--kv-dtype", "f32"], 0);
    let before = std::fs::read(&begun).unwrap();
    let said = generate_ok("demo", &input, &begun, &["--allow-lossy"], 0);
    assert!(said.contains("already finished"), "{said}");
    assert_eq!(std::fs::read(&begun).unwrap(), before);
    let said = generate_ok("demo", &input, &begun, &["--allow-lossy", "--weights", "int4"], 1);
    assert!(said.contains("int8") && said.contains("int4"), "{said}");
    // What was removed is made anew, and shards are not to choose each for itself.
    std::fs::remove_file(&begun).unwrap();
    let said = generate_ok("demo", &input, &begun, &["--allow-lossy"], 0);
    assert!(said.contains("--allow-lossy chose"), "{said}");
    let shard = scratch.path("shard.jsonl");
    let said = generate_ok("demo", &input, &shard, &["--allow-lossy", "--shard", "0/2"], 2);
    assert!(said.contains("--shard") && said.contains("hint: run `tidemill plan"), "{said}");
}
