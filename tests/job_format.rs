//! Requests as lines mean them, and answers in the shapes that readers of OpenAI's and our own format expect.

mod job_support;

use job_support::*;
use serde_json::{Value, json};
use tidemill::job::request::{
    Answer, Choice, Endpoint, FinishReason, Prompt, PromptAnswer, Request, Sampling, StopReason, TokenLogprob,
    TokenText,
};
use tidemill::job::{Defaults, Opening, open};

/// Parses one line with flags given.
fn request(line: &str, defaults: Defaults) -> Request {
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(directory.path(), &format!("{line}\n"));
    options.defaults = defaults;
    let Opening::Run(mut job) = open(options).unwrap() else { panic!("a fresh job") };
    job.reader.next().unwrap().unwrap().request.unwrap()
}

fn sampling(line: &str) -> Sampling {
    request(line, Defaults::default()).sampling
}

fn chat(fields: &str) -> String {
    let messages = r#""messages":[{"role":"user","content":"x"}]"#;
    format!(r#"{{"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{{{messages}{fields}}}}}"#)
}

fn completions(fields: &str) -> String {
    format!(r#"{{"custom_id":"c","method":"POST","url":"/v1/completions","body":{{"prompt":"x"{fields}}}}}"#)
}

/// The output line for an answer.
fn rendered(line: &str, answer: Answer) -> String {
    let directory = tempfile::tempdir().unwrap();
    let options = options(directory.path(), &format!("{line}\n"));
    let Opening::Run(mut job) = open(options.clone()).unwrap() else { panic!("a fresh job") };
    let item = job.reader.next().unwrap().unwrap();
    job.writer.finish(&item.header(), Ok(&answer)).unwrap();
    job.writer.close(true).unwrap();
    read(&output(&options))
}

fn parsed(line: &str, answer: Answer) -> Value {
    serde_json::from_str(&rendered(line, answer)).unwrap()
}

fn token(id: u32, text: &str) -> TokenText {
    TokenText { id, text: text.into(), bytes: text.as_bytes().to_vec() }
}

fn choice(text: &str) -> Choice {
    Choice {
        text: text.into(),
        token_ids: vec![7, 8],
        finish_reason: FinishReason::Length,
        stop_reason: None,
        logprobs: None,
    }
}

fn answer(choices: Vec<Choice>) -> Answer {
    let prompt = PromptAnswer {
        prompt_token_ids: vec![1, 2, 3],
        prompt_text: None,
        cut_tokens: 0,
        prompt_logprobs: None,
        choices,
    };
    Answer { prompts: vec![prompt] }
}

fn with_logprobs() -> Choice {
    let logprob = |id, text, logprob, top| TokenLogprob { token: token(id, text), logprob: Some(logprob), top };
    let first = logprob(7, "é", -0.5, vec![(token(9, "b"), -0.25), (token(7, "é"), -0.5)]);
    let second = logprob(8, "cd", f32::NEG_INFINITY, vec![(token(9, "b"), -0.125), (token(10, "b"), -3.0)]);
    Choice { logprobs: Some(vec![first, second]), ..choice("écd") }
}

#[test]
fn a_completion_looks_like_openais() {
    let line = completions(r#","model":"theirs","return_token_ids":true"#);
    let stopped =
        Choice { finish_reason: FinishReason::Stop, stop_reason: Some(StopReason::Text("\n".into())), ..choice("b") };
    let record = parsed(&line, answer(vec![choice("a"), stopped]));
    let id = record["id"].as_str().unwrap().strip_prefix("batch_req_").unwrap();
    let expected = json!({
        "id": format!("batch_req_{id}"),
        "custom_id": "c",
        "response": {"status_code": 200, "request_id": format!("req_{id}"), "body": {
            "id": format!("cmpl-{id}"), "object": "text_completion", "created": 0, "model": "theirs",
            "choices": [
                {"index": 0, "text": "a", "logprobs": null, "finish_reason": "length", "stop_reason": null,
                 "token_ids": [7, 8], "prompt_token_ids": [1, 2, 3]},
                {"index": 1, "text": "b", "logprobs": null, "finish_reason": "stop", "stop_reason": "\n",
                 "token_ids": [7, 8], "prompt_token_ids": [1, 2, 3]}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            "system_fingerprint": null}},
        "error": null,
    });
    assert_eq!(record, expected);
}

#[test]
fn choices_of_several_prompts_are_counted_on() {
    let one = answer(vec![choice("a"), choice("b")]).prompts.remove(0);
    let record = parsed(&completions(""), Answer { prompts: vec![one.clone(), one] });
    let body = &record["response"]["body"];
    let indices: Vec<u64> =
        body["choices"].as_array().unwrap().iter().map(|choice| choice["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(body["usage"], json!({"prompt_tokens": 6, "completion_tokens": 8, "total_tokens": 14}));
}

#[test]
fn completion_logprobs_have_offsets_and_keep_the_sampled_token() {
    let record = parsed(&completions(r#","logprobs":2"#), answer(vec![with_logprobs()]));
    let text = rendered(&completions(r#","logprobs":2"#), answer(vec![with_logprobs()]));
    assert!(text.contains(r#""token_logprobs":[-0.5,-9999.0]"#), "{text}");
    assert_eq!(
        record["response"]["body"]["choices"][0]["logprobs"],
        json!({
            "text_offset": [0, 1],
            "token_logprobs": [-0.5, -9999.0],
            "tokens": ["é", "cd"],
            "top_logprobs": [{"é": -0.5, "b": -0.25}, {"cd": -9999.0, "b": -0.125}],
        })
    );
}

#[test]
fn an_echo_covers_the_prompt() {
    let mut echoed = answer(vec![with_logprobs()]);
    echoed.prompts[0].prompt_text = Some("xy".into());
    let first = TokenLogprob { token: token(1, "xy"), logprob: None, top: Vec::new() };
    echoed.prompts[0].prompt_logprobs = Some(vec![first]);
    let record = parsed(&completions(r#","logprobs":1,"echo":true"#), echoed);
    let choice = &record["response"]["body"]["choices"][0];
    assert_eq!(choice["text"], "xyécd");
    assert_eq!(choice["logprobs"]["tokens"], json!(["xy", "é", "cd"]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 2, 3]));
    assert_eq!(choice["logprobs"]["token_logprobs"][0], Value::Null);
    assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
    assert_eq!(choice.get("prompt_logprobs"), None, "only on request");
}

#[test]
fn prompt_logprobs_look_like_vllms() {
    let mut asked = answer(vec![choice("a")]);
    let known = TokenLogprob { token: token(2, "b"), logprob: Some(-2.0), top: vec![(token(5, "c"), -1.0)] };
    let first = TokenLogprob { token: token(1, "a"), logprob: None, top: Vec::new() };
    asked.prompts[0].prompt_logprobs = Some(vec![first, known]);
    let expected = json!([null, {
        "2": {"logprob": -2.0, "rank": null, "decoded_token": "b"},
        "5": {"logprob": -1.0, "rank": 1, "decoded_token": "c"}}]);
    let record = parsed(&completions(r#","prompt_logprobs":1"#), asked.clone());
    assert_eq!(record["response"]["body"]["choices"][0]["prompt_logprobs"], expected);
    let record = parsed(&chat(r#","prompt_logprobs":1"#), asked);
    assert_eq!(record["response"]["body"]["prompt_logprobs"], expected);
}

#[test]
fn a_chat_answer_looks_like_openais() {
    let record = parsed(&chat(r#","logprobs":true,"top_logprobs":2"#), answer(vec![with_logprobs()]));
    let body = &record["response"]["body"];
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "toy", "the job's name, as the line gives none");
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "écd", "refusal": null}));
    assert_eq!(
        choice["logprobs"]["content"][0],
        json!({"token": "é", "logprob": -0.5, "bytes": [195, 169], "top_logprobs": [
            {"token": "b", "logprob": -0.25, "bytes": [98]},
            {"token": "é", "logprob": -0.5, "bytes": [195, 169]}]})
    );
    assert_eq!(choice.get("text"), None);
    let ids = parsed(&chat(r#","return_token_ids":true"#), answer(vec![choice_of_ids()]));
    assert_eq!(ids["response"]["body"]["prompt_token_ids"], json!([1, 2, 3]));
    assert_eq!(ids["response"]["body"]["choices"][0]["token_ids"], json!([7, 8]));
}

fn choice_of_ids() -> Choice {
    choice("a")
}

#[test]
fn plain_answers_have_the_fields_that_were_asked_for() {
    assert_eq!(
        rendered(r#"{"prompt":"x"}"#, answer(vec![choice("a")])),
        concat!(
            r#"{"custom_id":"line-1","text":"a","finish_reason":"length","#,
            r#""usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}"#,
            "\n"
        )
    );
    let line = r#"{"id":"i","prompt":"x","n":2,"return_token_ids":true,"metadata":{"b": 1.50, "a": "é\u00e9"}}"#;
    let text = rendered(line, answer(vec![choice("a"), choice("b")]));
    assert!(text.ends_with("\"metadata\":{\"b\": 1.50, \"a\": \"é\\u00e9\"}}\n"), "{text}");
    let record: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["text"], "a");
    assert_eq!(record["token_ids"], json!([7, 8]));
    assert_eq!(record["choices"][1], json!({"index": 1, "text": "b", "finish_reason": "length", "token_ids": [7, 8]}));
    let record = parsed(r#"{"prompt":"x","logprobs":2}"#, answer(vec![with_logprobs()]));
    assert_eq!(record["logprobs"]["tokens"], json!(["é", "cd"]));
}

#[test]
fn a_line_wins_over_a_flag_and_a_flag_over_the_model() {
    let flags = Defaults { temperature: Some(0.5), n: Some(2), max_tokens: Some(9), ..Defaults::default() };
    let model = Defaults { temperature: Some(0.7), top_p: Some(0.9), ..Defaults::default() };
    let all = flags.or(model);
    let found = request(r#"{"prompt":"x","n":3}"#, all.clone()).sampling;
    assert_eq!((found.temperature, found.n, found.top_p, found.max_tokens), (0.5, 3, 0.9, 9));
    let nulls = r#"{"prompt":"x","n":null,"max_tokens":null,"temperature":null}"#;
    let found = request(nulls, all).sampling;
    assert_eq!((found.temperature, found.n, found.max_tokens), (0.5, 2, 9), "null means not given");
}

#[test]
fn defaults_are_the_designs() {
    let plain = sampling(r#"{"prompt":"x"}"#);
    assert_eq!((plain.temperature, plain.seed, plain.max_tokens, plain.n), (1.0, 0, 256, 1));
    assert_eq!(sampling(&completions("")).max_tokens, 16);
    assert_eq!(sampling(&completions(r#","max_tokens":null"#)).max_tokens, 16);
    assert_eq!(sampling(&chat("")).max_tokens, 256);
    assert_eq!(sampling(&chat(r#","max_tokens":3,"max_completion_tokens":4"#)).max_tokens, 4);
    assert!(plain.skip_special_tokens && !plain.ignore_eos && plain.logprobs.is_none());
}

#[test]
fn sampling_fields_arrive() {
    let all = sampling(
        r#"{"prompt":"x","temperature":0.001,"top_p":0.5,"top_k":-1,"min_p":0.25,"repetition_penalty":1.5,
        "frequency_penalty":-1,"presence_penalty":2,"logit_bias":{"3":-100,"1":5},"allowed_token_ids":[4,2,4],
        "n":4,"seed":-5,"max_tokens":9,"min_tokens":2,"stop":["a","b"],"stop_token_ids":[6],
        "include_stop_str_in_output":true,"ignore_eos":true,"logprobs":3,"echo":true,"skip_special_tokens":false}"#
            .replace('\n', "")
            .as_str(),
    );
    let expected = Sampling {
        temperature: 0.01,
        top_p: 0.5,
        top_k: 0,
        min_p: 0.25,
        repetition_penalty: 1.5,
        frequency_penalty: -1.0,
        presence_penalty: 2.0,
        logit_bias: vec![(1, 5.0), (3, -100.0)],
        allowed_token_ids: Some(vec![2, 4]),
        n: 4,
        seed: -5,
        max_tokens: 9,
        min_tokens: 2,
        stop: vec!["a".into(), "b".into()],
        stop_token_ids: vec![6],
        include_stop_str_in_output: true,
        ignore_eos: true,
        logprobs: Some(3),
        prompt_logprobs: Some(3),
        echo: true,
        skip_special_tokens: false,
        truncate_prompt_tokens: None,
    };
    assert_eq!(all, expected);
    assert_eq!(sampling(r#"{"prompt":"x","temperature":0}"#).temperature, 0.0);
    assert_eq!(sampling(&completions(r#","echo":true,"max_tokens":0"#)).max_tokens, 0);
    assert_eq!(sampling(&chat(r#","logprobs":true"#)).logprobs, Some(0));
    assert_eq!(sampling(&chat(r#","logprobs":false"#)).logprobs, None);
    assert_eq!(sampling(r#"{"prompt":"x","logprobs":true,"top_logprobs":2}"#).logprobs, Some(2));
    let flag = Defaults { logprobs: Some(1), ..Defaults::default() };
    assert_eq!(request(&chat(""), flag.clone()).sampling.logprobs, Some(1));
    assert_eq!(request(&chat(r#","logprobs":false"#), flag).sampling.logprobs, None);
}

#[test]
fn prompts_arrive() {
    let prompts = |value: &str| {
        let line = completions("").replace("\"x\"", value);
        request(&line, Defaults::default()).prompts
    };
    let text = |text: &str| Prompt::Text { text: text.into(), add_special_tokens: true };
    assert_eq!(prompts("\"a\""), [text("a")]);
    assert_eq!(prompts("[\"a\",\"\"]"), [text("a"), text("")]);
    assert_eq!(prompts("[1,2]"), [Prompt::Tokens(vec![1, 2])]);
    assert_eq!(prompts("[[1],[2,3]]"), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
    let raw = request(r#"{"prompt":"a","add_special_tokens":false}"#, Defaults::default());
    assert_eq!(raw.prompts, [Prompt::Text { text: "a".into(), add_special_tokens: false }]);

    let line = r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}],"name":"z"}],"tools":[{"a":1}],
        "chat_template_kwargs":{"enable_thinking":false},"chat_template":"t","continue_final_message":true}"#;
    let found = request(&line.replace('\n', ""), Defaults::default());
    assert_eq!(found.endpoint, Endpoint::Plain);
    let [Prompt::Messages(chat)] = &found.prompts[..] else { panic!("a conversation") };
    assert_eq!(chat.messages[0]["name"], "z");
    assert!(chat.continue_final_message && !chat.add_generation_prompt && !chat.add_special_tokens);
    assert_eq!(chat.chat_template_kwargs["enable_thinking"], false);
    assert_eq!((chat.tools.is_some(), chat.chat_template.as_deref()), (true, Some("t")));
}
