//! The shapes of answers, what counts as a prompt, and where defaults come from.
#![allow(missing_docs)]

mod support;

use serde_json::{Value, json};
use support::{Scratch, generate_ok, golden, read_jsonl};

fn run_coded(model: &str, lines: &[Value], extra: &[&str], code: i32) -> Vec<Value> {
    let scratch = Scratch::new();
    let input = scratch.jsonl("in.jsonl", lines);
    let output = scratch.path("out.jsonl");
    generate_ok(model, &input, &output, extra, code);
    read_jsonl(&output)
}

fn demo(lines: &[Value]) -> Vec<Value> {
    run_coded("demo", lines, &[], 0)
}

fn model(name: &str) -> String {
    golden(name).to_str().unwrap().to_owned()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn batch(id: &str, url: &str, body: Value) -> Value {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body})
}

#[test]
fn completions_have_the_shape_of_openai() {
    let body = json!({"model": "any", "prompt": ["A fox", "Ben"], "n": 2, "max_tokens": 4, "logprobs": 2, "echo": true, "temperature": 0});
    let answer = &demo(&[batch("c-1", "/v1/completions", body)])[0];
    assert_eq!(keys(answer), ["id", "custom_id", "response", "error"]);
    assert_eq!((&answer["custom_id"], &answer["error"]), (&json!("c-1"), &Value::Null));
    assert!(answer["id"].as_str().unwrap().starts_with("batch_req_"));
    assert_eq!(keys(&answer["response"]), ["status_code", "request_id", "body"]);
    assert_eq!(answer["response"]["status_code"], 200);
    let body = &answer["response"]["body"];
    assert_eq!(keys(body), ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]);
    assert_eq!((&body["object"], &body["model"]), (&json!("text_completion"), &json!("any")));
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    let choices = body["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    for (at, choice) in choices.iter().enumerate() {
        assert_eq!(keys(choice), ["index", "text", "logprobs", "finish_reason", "stop_reason"]);
        assert_eq!(choice["index"], at, "all samples of the first prompt come first");
        let text = choice["text"].as_str().unwrap();
        assert!(text.starts_with(if at < 2 { "A fox" } else { "Ben" }), "{text}");
        let logprobs = &choice["logprobs"];
        assert_eq!(keys(logprobs), ["text_offset", "token_logprobs", "tokens", "top_logprobs"]);
        let lengths = ["text_offset", "token_logprobs", "tokens", "top_logprobs"]
            .map(|key| logprobs[key].as_array().unwrap().len());
        assert_eq!(lengths, [lengths[0]; 4]);
        assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
        assert!(logprobs["top_logprobs"].as_array().unwrap()[1..].iter().all(|top| keys(top).len() <= 3));
    }
    assert_eq!(choices[0]["text"], choices[1]["text"], "greedy samples are equal");
    let usage = &body["usage"];
    assert_eq!(keys(usage), ["prompt_tokens", "completion_tokens", "total_tokens"]);
    assert_eq!((&usage["completion_tokens"], &usage["prompt_tokens"]), (&json!(16), &json!(7)), "prompts count once");
    assert_eq!(usage["total_tokens"], 23);
}

#[test]
fn chat_completions_have_the_shape_of_openai() {
    let messages = json!([{"role": "user", "content": "Tell me a story about a fox."}]);
    let body = json!({"messages": messages, "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 2, "n": 2});
    let answer = &demo(&[batch("h-1", "/v1/chat/completions", body)])[0]["response"]["body"];
    assert_eq!(keys(answer), ["id", "object", "created", "model", "choices", "usage", "system_fingerprint"]);
    assert_eq!((&answer["object"], &answer["model"]), (&json!("chat.completion"), &json!("demo")));
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    for (at, choice) in answer["choices"].as_array().unwrap().iter().enumerate() {
        assert_eq!(keys(choice), ["index", "message", "logprobs", "finish_reason", "stop_reason"]);
        assert_eq!(choice["index"], at);
        assert_eq!(keys(&choice["message"]), ["role", "content", "refusal"]);
        assert_eq!(choice["message"]["role"], "assistant");
        let content = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(content.len(), 5);
        for token in content {
            assert_eq!(keys(token), ["token", "logprob", "bytes", "top_logprobs"]);
            assert_eq!(keys(&token["top_logprobs"][0]), ["token", "logprob", "bytes"]);
        }
        let shown = content.iter().map(|token| token["token"].as_str().unwrap()).filter(|text| !text.starts_with('<'));
        assert_eq!(choice["message"]["content"], shown.collect::<String>());
    }
}

#[test]
fn plain_answers_say_no_more_than_was_asked() {
    let lines = [
        json!({"prompt": "Ben", "max_tokens": 3}),
        json!({"id": "n", "prompt": "Ben", "max_tokens": 3, "n": 2, "metadata": {"z": [1, 2.50], "a": null}}),
        json!({"prompt": "Ben", "max_tokens": 3, "return_token_ids": true, "logprobs": 1}),
        json!({"prompt": "Ben", "max_tokns": 3}),
    ];
    let answers = run_coded("demo", &lines, &[], 3);
    assert_eq!(keys(&answers[0]), ["custom_id", "text", "finish_reason", "usage"]);
    assert_eq!(answers[0]["custom_id"], "line-1");
    assert_eq!(keys(&answers[1]), ["custom_id", "text", "finish_reason", "usage", "choices", "metadata"]);
    assert_eq!(answers[1]["metadata"].to_string(), r#"{"z":[1,2.50],"a":null}"#.replace("2.50", "2.5"));
    assert_eq!(answers[1]["text"], answers[1]["choices"][0]["text"]);
    assert_eq!(answers[1]["usage"]["completion_tokens"], 6);
    assert_eq!(answers[2]["token_ids"].as_array().unwrap().len(), 3);
    assert_eq!(keys(&answers[3]), ["custom_id", "error"]);
    assert_eq!((&answers[3]["error"]["code"], &answers[3]["error"]["line"]), (&json!("unknown_field"), &json!(4)));
    assert!(answers[3]["error"]["message"].as_str().unwrap().contains("max_tokns"));
}

#[test]
fn echo_puts_the_prompt_before_the_completion() {
    let line = |prompt: Value| json!({"id": "e", "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": true});
    let echoed = |prompt: Value, more: Value| {
        let mut line = line(prompt);
        line["echo"] = json!(true);
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        demo(&[line]).remove(0)
    };
    let plain = &demo(&[line(json!("A fox"))])[0];
    let with_echo = echoed(json!("A fox"), json!({}));
    assert_eq!(with_echo["text"], format!("A fox{}", plain["text"].as_str().unwrap()));
    assert_eq!((&with_echo["token_ids"], &with_echo["usage"]), (&plain["token_ids"], &plain["usage"]));
    let only = echoed(json!("A fox"), json!({"max_tokens": 0}));
    assert_eq!((&only["text"], &only["usage"]["completion_tokens"]), (&json!("A fox"), &json!(0)));
    // The text of a prompt of tokens is that of its tokens, and offsets point into the text.
    let tokens = echoed(json!([37, 331, 434, 18]), json!({"logprobs": 1}));
    let text = tokens["text"].as_str().unwrap();
    for (offset, token) in tokens["logprobs"]["text_offset"]
        .as_array()
        .unwrap()
        .iter()
        .zip(tokens["logprobs"]["tokens"].as_array().unwrap())
    {
        let rest = &text[offset.as_u64().unwrap() as usize..];
        assert!(rest.starts_with(token.as_str().unwrap()), "{rest:?} for {token}");
    }
}

#[test]
fn messages_are_their_rendered_text() {
    let messages = json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell me a story."}]);
    let line = |more: Value| {
        let mut line = json!({"id": "m", "max_tokens": 10, "return_token_ids": true});
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        demo(&[line]).remove(0)
    };
    let rendered = "<s><|system|>Be kind.<|user|>Tell me a story.<|assistant|>";
    let chat = line(json!({"messages": messages}));
    assert_eq!(chat, line(json!({"prompt": rendered, "add_special_tokens": false})));
    assert_eq!(chat["prompt_token_ids"].as_array().unwrap().first(), Some(&json!(0)), "one beginning of sequence");
    assert_eq!(chat["prompt_token_ids"][1], 2);
    assert_eq!(chat, line(json!({"prompt": chat["prompt_token_ids"]})));
    assert_eq!(chat, line(json!({"messages": messages, "chat_template": "default"})), "templates have names");
    let parts = json!([{"type": "text", "text": "A"}, {"type": "text", "text": "fox"}]);
    let parts = line(json!({"messages": [{"role": "user", "content": parts}]}));
    assert_eq!(parts, line(json!({"messages": [{"role": "user", "content": "A\nfox"}]})), "parts become one text");
    let open = line(json!({"messages": [{"role": "user", "content": "A fox"}], "add_generation_prompt": false}));
    assert_eq!(open, line(json!({"prompt": "<s><|user|>A fox", "add_special_tokens": false})));
}

#[test]
fn templates_are_not_taken_from_lines() {
    let messages = json!([{"role": "user", "content": "hi"}]);
    let lines = [
        json!({"messages": messages}),
        json!({"messages": messages, "chat_template": "{{ messages[0].content }}", "max_tokens": 2}),
    ];
    let answers = run_coded(&model("opt-preln"), &lines, &[], 3);
    assert_eq!(answers[0]["error"]["code"], "chat_template_error");
    assert_eq!(answers[1]["error"]["code"], "chat_template_error");
    let lines = [json!({"messages": messages, "chat_template": "{{ messages[0].content }}"})];
    assert_eq!(run_coded("demo", &lines, &[], 3)[0]["error"]["code"], "chat_template_error");
}

#[test]
fn max_tokens_is_clipped_to_the_context() {
    let opt = model("opt-preln");
    let line = |count: u64| json!({"prompt": vec![9; count as usize], "max_tokens": 100, "ignore_eos": true});
    let answers = run_coded(&opt, &[line(170), line(179), line(180), line(500)], &[], 3);
    for (answer, tokens) in answers.iter().zip([10, 1]) {
        assert_eq!(
            (&answer["usage"]["completion_tokens"], &answer["finish_reason"]),
            (&json!(tokens), &json!("length"))
        );
    }
    for answer in &answers[2..] {
        assert_eq!(answer["error"]["code"], "context_length_exceeded");
        assert!(answer["error"]["message"].as_str().unwrap().contains("180"), "{answer}");
    }
}

#[test]
fn a_prompt_as_long_as_the_context_is_an_error_in_every_form() {
    // With its beginning of sequence each text has 1024 tokens, the demo model's context.
    let text = " fox".repeat(1023);
    let mut tokens = vec![434; 1023];
    tokens.insert(0, 0);
    for more in [json!({"max_tokens": 1}), json!({"max_tokens": 0, "echo": true})] {
        let line = |prompt: Value| {
            let mut line = more.clone();
            line["prompt"] = prompt;
            line
        };
        for line in [line(json!(text)), line(json!(tokens))] {
            let scratch = Scratch::new();
            let (input, output) = (scratch.jsonl("in.jsonl", &[line]), scratch.path("out.jsonl"));
            support::generate("demo", &input, &output, &[]);
            let code = &read_jsonl(&output)[0]["error"]["code"];
            assert_eq!(code, "context_length_exceeded", "{more}");
        }
    }
}

#[test]
fn the_line_wins_over_the_flag_over_the_model_over_the_default() {
    // The model's generation_config.json says temperature 0.7 and top_p 0.9.
    let opt = model("opt-preln");
    let line = |more: Value| {
        let mut line =
            json!({"id": "d", "prompt": [5, 6, 7, 8], "max_tokens": 30, "ignore_eos": true, "return_token_ids": true});
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        line
    };
    let tokens = |more: Value, flags: &[&str]| run_coded(&opt, &[line(more)], flags, 0)[0]["token_ids"].clone();
    let from_model = tokens(json!({}), &[]);
    assert_eq!(from_model, tokens(json!({"temperature": 0.7, "top_p": 0.9}), &[]));
    assert_ne!(from_model, tokens(json!({"temperature": 1, "top_p": 1}), &[]));
    let from_flag = tokens(json!({}), &["--temperature", "1.7", "--top-p", "1"]);
    assert_eq!(from_flag, tokens(json!({"temperature": 1.7, "top_p": 1}), &[]));
    assert_eq!(
        from_model,
        tokens(json!({"temperature": 0.7, "top_p": 0.9}), &["--temperature", "0", "--top-p", "0.1"])
    );
    let plain = json!({"prompt": "Ben", "ignore_eos": true});
    let completion = batch("c", "/v1/completions", json!({"prompt": "Ben", "ignore_eos": true}));
    let count = |answer: &Value| match &answer["usage"] {
        Value::Null => answer["response"]["body"]["usage"]["completion_tokens"].clone(),
        usage => usage["completion_tokens"].clone(),
    };
    let counts = |flags: &[&str]| {
        run_coded("demo", &[plain.clone(), completion.clone()], flags, 0).iter().map(count).collect::<Vec<_>>()
    };
    assert_eq!(counts(&[]), [256, 16], "the defaults of the two shapes");
    assert_eq!(counts(&["--max-tokens", "3", "--n", "2"]), [6, 6]);
    let flags =
        ["--max-tokens", "60", "--stop", " the", "--stop", " a", "--logprobs", "2", "--top-k", "3", "--min-p", "0.01"];
    let answer = &run_coded("demo", &[json!({"prompt": "Story: Ben"})], &flags, 0)[0];
    let text = answer["text"].as_str().unwrap();
    assert!(!text.contains(" the") && !text.contains(" a"), "{text}");
    assert!(answer["logprobs"]["top_logprobs"].is_array());
}
