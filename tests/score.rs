//! Scoring: continuations and rolling windows, against echoed prompts of the same engine.
#![allow(missing_docs)]

mod support;

use serde_json::{Value, json};
use support::{Scratch, generate_ok, read_jsonl};

/// Small passes and few rows with logits: chunk borders everywhere.
const CHUNKS: &str = "sequences = 3\nchunk-tokens = 7\n";

fn run(scratch: &Scratch, name: &str, model: &str, lines: &[Value], extra: &[&str], code: i32) -> Vec<Value> {
    let input = scratch.jsonl(&format!("{name}.in"), lines);
    let output = scratch.path(&format!("{name}.out"));
    generate_ok(model, &input, &output, extra, code);
    read_jsonl(&output)
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

/// Log-probability and whether it is the best, of every token but the first.
fn echoed(answer: &Value, tokens: &[usize]) -> Vec<(f64, bool)> {
    let positions = answer["prompt_logprobs"].as_array().expect("scores");
    let score = |(position, token): (&Value, &usize)| {
        let entry = &position[token.to_string()];
        (entry["logprob"].as_f64().expect("a number"), entry["rank"] == 1)
    };
    positions.iter().zip(tokens).skip(1).map(score).collect()
}

fn ids(count: usize, seed: usize) -> Vec<usize> {
    (0..count).map(|index| 5 + (index * index * 31 + index * 7 + seed * 101) % 280).collect()
}

#[test]
fn continuations_are_scored_as_echoed_prompts() {
    let scratch = Scratch::new();
    let (mut scored, mut echo) = (Vec::new(), Vec::new());
    let shapes = [(1, 1), (1, 9), (63, 1), (64, 2), (65, 64), (30, 100), (120, 3)];
    for (seed, (context, continuation)) in shapes.into_iter().enumerate() {
        let tokens = ids(context + continuation, seed);
        scored.push(json!({"context": tokens[..context], "continuation": tokens[context..], "return_token_ids": true}));
        echo.push(json!({"prompt": tokens, "prompt_logprobs": 1, "max_tokens": 0}));
    }
    for model in ["tests/goldens/llama-gqa-tied", "tests/goldens/mistral-w23", "tests/goldens/opt-preln"] {
        let name = model.rsplit('/').next().expect("a name");
        let policy = scratch.write("policy.toml", CHUNKS);
        let scores = run(&scratch, &format!("{name}-s"), model, &scored, &[], 0);
        let small = run(&scratch, &format!("{name}-c"), model, &scored, &["--policy", policy.to_str().unwrap()], 0);
        assert_eq!(scores, small, "{name}: batches change scores");
        let echoes = run(&scratch, &format!("{name}-e"), model, &echo, &[], 0);
        for (seed, (answer, echo)) in scores.iter().zip(&echoes).enumerate() {
            let (context, continuation) = shapes[seed];
            let expected = &echoed(echo, &ids(context + continuation, seed))[context - 1..];
            assert_eq!(
                numbers(&answer["token_logprobs"]),
                expected.iter().map(|(score, _)| *score).collect::<Vec<_>>()
            );
            let sum: f64 = expected.iter().map(|(score, _)| score).sum();
            assert!((answer["logprob"].as_f64().expect("a number") - sum).abs() < 1e-4, "{answer}");
            assert_eq!(answer["is_greedy"], json!(expected.iter().all(|(_, best)| *best)));
            assert_eq!(answer["token_ids"].as_array().map(Vec::len), Some(continuation));
            assert_eq!(answer["usage"]["prompt_tokens"], json!(context + continuation - 1));
        }
    }
}

#[test]
fn texts_are_split_where_the_harness_splits_them() {
    let scratch = Scratch::new();
    let greedy = run(
        &scratch,
        "greedy",
        "demo",
        &[json!({"prompt": "Sum: 7 - 7 = 0; 7 - 6 = 1; 42 - 12 =", "max_tokens": 3, "temperature": 0})],
        &[],
        0,
    );
    let text = greedy[0]["text"].as_str().expect("text");
    let lines = [
        json!({"context": "Sum: 7 - 7 = 0; 7 - 6 = 1; 42 - 12 =", "continuation": text}),
        // Spaces before the border belong to the continuation.
        json!({"context": "Sum: 7 - 7 = 0; 7 - 6 = 1; 42 - 12 = ", "continuation": &text[1..]}),
        json!({"context": "Sum: 7 - 7 = 0; 7 - 6 = 1; 42 - 12 =", "continuation": " never"}),
        json!({"context": "", "continuation": "Story:", "metadata": {"kept": 1}}),
        json!({"text": "Story:", "add_special_tokens": false}),
        json!({"text": []}),
        json!({"text": "Story:", "return_token_ids": true}),
    ];
    let answers = run(&scratch, "split", "demo", &lines, &[], 0);
    assert!(text.starts_with(' '), "{text:?}");
    assert_eq!(answers[0]["is_greedy"], true);
    assert_eq!(answers[0]["logprob"], answers[1]["logprob"]);
    assert_eq!(answers[2]["is_greedy"], false);
    assert_eq!(answers[3]["metadata"], json!({"kept": 1}));
    assert_eq!(answers[5]["logprob"], json!(0.0));
    // Both begin with the prefix alone.
    assert_eq!(answers[3]["logprob"], answers[4]["logprob"]);
    // As in the harness, what the tokenizer puts before a text is scored with it.
    let count = |answer: &Value| numbers(&answer["token_logprobs"]).len();
    assert_eq!(count(&answers[6]), count(&answers[4]) + 1);
}

#[test]
fn long_texts_roll_and_long_contexts_lose_their_beginning() {
    let scratch = Scratch::new();
    let (tokens, most) = (ids(70, 3), 32);
    let mut lines = vec![json!({"text": tokens, "max_length": most, "prefix_token_id": 4, "return_token_ids": true})];
    lines.push(json!({"context": tokens[..60], "continuation": tokens[60..], "max_length": most}));
    // The windows by hand: 32 from the prefix, 32 from the last of those, 6 with as much before them as fits.
    let windows = [(json!([4]), &tokens[..32]), (json!(tokens[31..32]), &tokens[32..64])];
    lines.extend(windows.map(|(context, continuation)| json!({"context": context, "continuation": continuation})));
    lines.push(json!({"context": tokens[37..64], "continuation": tokens[64..]}));
    lines.push(json!({"context": tokens[37..60], "continuation": tokens[60..]}));
    let answers = run(&scratch, "roll", "tests/goldens/qwen2-tied", &lines, &[], 0);
    let parts: Vec<f64> = answers[2..5].iter().flat_map(|answer| numbers(&answer["token_logprobs"])).collect();
    assert_eq!(numbers(&answers[0]["token_logprobs"]), parts);
    assert_eq!(answers[0]["token_ids"], json!(tokens));
    assert_eq!(answers[1]["token_logprobs"], answers[5]["token_logprobs"]);
    assert_eq!((&answers[1]["truncated_tokens"], &answers[5]["truncated_tokens"]), (&json!(37), &json!(0)));
}

#[test]
fn a_whole_context_scores_one_token_more_than_it_has_positions() {
    let scratch = Scratch::new();
    // 180 learned positions: there is no row for another one.
    let tokens = ids(181, 9);
    let lines = [
        json!({"context": tokens[..1], "continuation": tokens[1..]}),
        json!({"context": [7], "continuation": tokens}),
        json!({"text": tokens}),
    ];
    let answers = run(&scratch, "whole", "tests/goldens/opt-preln", &lines, &[], 3);
    assert_eq!(numbers(&answers[0]["token_logprobs"]).len(), 180);
    assert_eq!(answers[1]["error"]["code"], "context_length_exceeded");
    assert_eq!(numbers(&answers[2]["token_logprobs"]).len(), 181);
}

#[test]
fn what_cannot_be_scored_says_why() {
    let scratch = Scratch::new();
    let cases = [
        (json!({"context": "a"}), "missing_field", "continuation"),
        (json!({"continuation": "a"}), "missing_field", "context"),
        (json!({"context": "a", "continuation": ""}), "empty_continuation", "continuation"),
        (json!({"context": "a", "continuation": [1]}), "invalid_value", "both"),
        (json!({"context": "a", "text": "b"}), "invalid_value", "text"),
        (json!({"context": [1], "continuation": [100_000]}), "invalid_value", "100000"),
        (json!({"text": 5}), "invalid_value", "text"),
        (json!({"text": "a", "temperature": 0}), "unknown_field", "temperature"),
        (json!({"text": "a", "max_length": 0}), "invalid_value", "max_length"),
        (json!({"text": "a", "prefix_token_id": -1}), "invalid_value", "prefix_token_id"),
        (json!({"prompt": "a", "text": "b"}), "unknown_field", "text"),
    ];
    let lines: Vec<Value> = cases.iter().map(|(line, ..)| line.clone()).collect();
    let answers = run(&scratch, "wrong", "demo", &lines, &[], 3);
    for (answer, (line, code, name)) in answers.iter().zip(&cases) {
        assert_eq!(answer["error"]["code"], *code, "{line}: {answer}");
        assert!(answer["error"]["message"].as_str().expect("a message").contains(name), "{line}: {answer}");
    }
}

#[test]
fn prompts_are_cut_and_rendered_on_request() {
    let scratch = Scratch::new();
    let lines = [
        json!({"prompt": "Sum: 3 + 4 = 7; 2 + 5 =", "truncate_prompt_tokens": 3, "max_tokens": 4, "temperature": 0}),
        json!({"messages": [{"role": "user", "content": "Sum: 1 + 1 ="}], "echo": true, "max_tokens": 0}),
        json!({"messages": [{"role": "user", "content": "x ".repeat(4000)}], "echo": true, "max_tokens": 0}),
    ];
    let answers = run(&scratch, "cut", "demo", &lines, &[], 0);
    assert_eq!(answers[0]["usage"]["prompt_tokens"], 3);
    assert!(answers[1]["text"].as_str().expect("text").contains("Sum: 1 + 1 ="), "{}", answers[1]);
    // Nothing is computed, so the context is no bound.
    assert!(answers[2]["text"].as_str().expect("text").len() > 8000);
}
