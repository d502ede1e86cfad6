//! A stand-in for the engine: answers are a pure function of the request, finished in any order.

#![allow(dead_code, missing_docs)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tidemill::job::request::{
    Answer, Choice, FinishReason, LineError, PromptAnswer, Request, SampledToken, TokenLogprob, TokenText,
};
use tidemill::job::{Defaults, Fingerprint, Input, Item, Job, JobOptions, Limits, Opening, Output, Summary, open};

pub fn options(directory: &Path, input: &str) -> JobOptions {
    let path = directory.join("in.jsonl");
    if std::fs::read(&path).ok().as_deref() != Some(input.as_bytes()) {
        std::fs::write(&path, input).unwrap();
    }
    JobOptions {
        input: Input::File(path),
        output: Output::File(directory.join("out.jsonl")),
        error_file: None,
        retry_failed: false,
        shard: None,
        fingerprint: Fingerprint::new().with("model", "toy").with("seed", "0"),
        defaults: Defaults::default(),
        limits: Limits::new(1000, 512),
        model_name: "toy".into(),
    }
}

/// A small reproducible generator for orders and kills.
pub struct Chance(pub u64);

impl Chance {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// The tokens that the toy model gives to a sample.
pub fn toy_tokens(request: &Request, prompt: u32, sample: u32) -> Vec<SampledToken> {
    let length = 1 + (request.line * 7 + u64::from(prompt) + u64::from(sample) * 3) % 9;
    (0..length as u32)
        .map(|at| {
            let id = (request.line as u32 * 31 + prompt * 17 + sample * 5 + at * 3) % 900;
            SampledToken { id, logprob: -(id as f32) / 100.0, top: vec![(id, -0.5)] }
        })
        .collect()
}

pub fn text_of(id: u32) -> TokenText {
    let text = format!("<{id}>");
    TokenText { id, bytes: text.clone().into_bytes(), text }
}

pub fn toy_choice(request: &Request, tokens: &[SampledToken]) -> Choice {
    let logprob = |token: &SampledToken| TokenLogprob {
        token: text_of(token.id),
        logprob: Some(token.logprob),
        top: token.top.iter().map(|(id, logprob)| (text_of(*id), *logprob)).collect(),
    };
    Choice {
        text: tokens.iter().map(|token| text_of(token.id).text).collect(),
        token_ids: tokens.iter().map(|token| token.id).collect(),
        finish_reason: FinishReason::Length,
        stop_reason: None,
        logprobs: request.sampling.logprobs.map(|_| tokens.iter().map(logprob).collect()),
    }
}

/// A request being worked on: for every sample the tokens so far.
struct Active {
    request: Request,
    samples: Vec<(u32, u32, Vec<SampledToken>)>,
}

impl Active {
    fn new(item: &Item, request: &Request) -> Active {
        let mut samples = Vec::new();
        for prompt in 0..request.prompts.len() as u32 {
            for sample in 0..request.sampling.n {
                let known = item.partial.iter().find(|known| (known.prompt, known.sample) == (prompt, sample));
                let tokens = known.map(|known| known.tokens.clone()).unwrap_or_default();
                assert!(toy_tokens(request, prompt, sample).starts_with(&tokens), "resumed tokens are the old ones");
                samples.push((prompt, sample, tokens));
            }
        }
        Active { request: request.clone(), samples }
    }

    fn answer(&self) -> Answer {
        let prompt_answer = |prompt| PromptAnswer {
            prompt_token_ids: vec![1, 2, 3],
            prompt_text: None,
            cut_tokens: 0,
            prompt_logprobs: None,
            choices: self
                .samples
                .iter()
                .filter(|(of, ..)| *of == prompt)
                .map(|(_, _, tokens)| toy_choice(&self.request, tokens))
                .collect(),
        };
        Answer { prompts: (0..self.request.prompts.len() as u32).map(prompt_answer).collect() }
    }
}

/// What ends a run of the toy engine.
#[derive(Debug, PartialEq)]
pub enum End {
    Complete(Summary),
    /// Dropped without closing, as by a kill.
    Killed,
}

/// How the toy engine goes about its work.
pub struct Run<'a> {
    pub chance: &'a mut Chance,
    /// Writer calls before the kill.
    pub kill_after: Option<usize>,
    /// Whether requests whose text holds `flaky` fail.
    pub flaky_fails: bool,
    pub in_flight: usize,
    /// Called after each tick with whether a second had passed.
    pub after_tick: &'a mut dyn FnMut(bool),
}

impl Run<'_> {
    /// Works until the job is done or the kill comes.
    pub fn work(&mut self, job: Job) -> tidemill::error::Result<End> {
        let Job { mut reader, mut writer, .. } = job;
        let mut now = Instant::now();
        let mut active: Vec<(Item, Result<Active, LineError>)> = Vec::new();
        let mut calls = 0;
        let mut more = true;
        loop {
            while more && active.len() < self.in_flight {
                match reader.next()? {
                    None => more = false,
                    Some(item) => {
                        let work = item.request.as_ref().map(|request| Active::new(&item, request));
                        let work = work.map_err(LineError::clone);
                        active.push((item, work));
                    }
                }
            }
            if active.is_empty() {
                return writer.close(true).map(End::Complete);
            }
            for _ in 0..1 + self.chance.below(8) {
                if self.kill_after.is_some_and(|limit| calls >= limit) {
                    return Ok(End::Killed);
                }
                if active.is_empty() {
                    break;
                }
                calls += 1;
                let at = self.chance.below(active.len());
                let (item, work) = &mut active[at];
                let Ok(work) = work else {
                    writer.finish(&item.header(), Err(item.request.as_ref().unwrap_err()))?;
                    drop(active.swap_remove(at));
                    continue;
                };
                if self.flaky_fails && format!("{:?}", work.request.prompts).contains("flaky") {
                    writer.finish(&item.header(), Err(&LineError::new("flaky", "failed this time")))?;
                    drop(active.swap_remove(at));
                    continue;
                }
                let unfinished = work.samples.iter_mut().find_map(|(prompt, sample, tokens)| {
                    let all = toy_tokens(&work.request, *prompt, *sample);
                    (tokens.len() < all.len()).then_some((*prompt, *sample, tokens, all))
                });
                match unfinished {
                    Some((prompt, sample, tokens, all)) => {
                        let start = tokens.len();
                        let end = (start + 1 + self.chance.below(3)).min(all.len());
                        writer.tokens(item.index, prompt, sample, start as u32, &all[start..end])?;
                        tokens.extend_from_slice(&all[start..end]);
                    }
                    None => {
                        writer.finish(&item.header(), Ok(&work.answer()))?;
                        drop(active.swap_remove(at));
                    }
                }
            }
            if self.chance.below(3) == 0 {
                let second = self.chance.below(4) == 0;
                if second {
                    now += Duration::from_secs(2);
                }
                writer.tick(now)?;
                (self.after_tick)(second);
            }
        }
    }
}

/// Runs a job to its end without any kill.
pub fn run_through(options: &JobOptions, seed: u64, flaky_fails: bool) -> Summary {
    match open(options.clone()).unwrap() {
        Opening::Finished(summary) => summary,
        Opening::Run(job) => {
            let mut run = Run {
                chance: &mut Chance(seed),
                kill_after: None,
                flaky_fails,
                in_flight: 16,
                after_tick: &mut |_| {},
            };
            match run.work(job).unwrap() {
                End::Complete(summary) => summary,
                End::Killed => unreachable!("nobody kills this run"),
            }
        }
    }
}

pub fn output(options: &JobOptions) -> PathBuf {
    match &options.output {
        Output::File(path) => path.clone(),
        Output::Stdout => panic!("the test has an output file"),
    }
}

pub fn read(path: &Path) -> String {
    String::from_utf8(std::fs::read(path).unwrap()).unwrap()
}

/// Names of the files in a directory.
pub fn listing(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Lines of every kind, some of them wrong.
pub fn mixed_input(lines: usize) -> String {
    let mut text = String::from("\u{feff}");
    for line in 0..lines {
        let body = r#"{"prompt":["a","b"],"n":2,"logprobs":1,"max_tokens":5}"#;
        let next = match line % 11 {
            0 => format!(r#"{{"prompt":"plain {line}"}}"#),
            1 => format!(r#"{{"custom_id":"c{line}","method":"POST","url":"/v1/completions","body":{body}}}"#),
            2 => "  ".into(),
            3 => "not json".into(),
            4 => format!(r#"{{"id":"flaky{line}","prompt":"flaky {line}","metadata":{{"k": [1, 2.50]}}}}"#),
            5 => r#"{"id":"twice","prompt":"x"}"#.into(),
            6 => format!(r#"{{"messages":[{{"role":"user","content":"hi {line}"}}],"n":3}}"#),
            7 => format!(
                r#"{{"custom_id":"chat{line}","method":"POST","url":"/v1/chat/completions","body":{{"messages":[{{"role":"user","content":"x"}}]}}}}"#
            ),
            8 => format!(r#"{{"prompt":[1,2,{line}],"return_token_ids":true}}"#),
            9 => format!(r#"{{"prompt":"bad {line}","temperatur":1}}"#),
            _ => format!("{{\"prompt\":\"carriage {line}\"}}\r"),
        };
        text.push_str(&next);
        text.push('\n');
    }
    text
}
