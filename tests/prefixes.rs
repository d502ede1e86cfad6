//! Prompts that begin alike share what they begin with, and nobody can tell from the answers.
#![allow(missing_docs)]

mod support;

use serde_json::{Value, json};
use support::jobs::{Chance, file};
use support::{Scratch, generate_ok};

/// Few-shot headers of several pages, questions behind them, some with an example of their own in between: nested
/// beginnings. In order of subjects, or mixed up.
fn questions(seed: u64, subjects: u64, each: u64, mixed: bool) -> Vec<Vec<u32>> {
    let mut chance = Chance::new(seed);
    let tokens =
        |count: u64, chance: &mut Chance| -> Vec<u32> { (0..count).map(|_| 20 + chance.below(600) as u32).collect() };
    let mut prompts = Vec::new();
    for _ in 0..subjects {
        let count = 150 + chance.below(250);
        let header = tokens(count, &mut chance);
        let documents: Vec<Vec<u32>> = (0..2).map(|_| tokens(100, &mut chance)).collect();
        for question in 0..each {
            let document: &[u32] = if question % 3 == 0 { &[] } else { &documents[(question % 2) as usize] };
            let count = 5 + chance.below(60);
            prompts.push([&header[..], document, &tokens(count, &mut chance)].concat());
        }
    }
    if mixed {
        for index in (1..prompts.len()).rev() {
            prompts.swap(index, chance.below(index as u64 + 1) as usize);
        }
    }
    prompts
}

/// Tokens of whole pages that some earlier prompt has computed, if nothing is ever forgotten.
fn could_be_saved(prompts: &[Vec<u32>]) -> usize {
    let mut known: std::collections::HashSet<&[u32]> = std::collections::HashSet::new();
    let mut saved = 0;
    for prompt in prompts {
        let pages = (1..=prompt.len() / 64).map(|page| &prompt[..64 * page]);
        // The last token is always computed.
        saved += pages.clone().filter(|page| page.len() < prompt.len() && known.contains(page)).count() * 64;
        known.extend(pages);
    }
    saved
}

fn lines(prompts: &[Vec<u32>]) -> Vec<Value> {
    let mut chance = Chance::new(5);
    let line = |prompt: &Vec<u32>| match chance.below(8) {
        0 => json!({"prompt": prompt, "max_tokens": 5, "n": 3}),
        1 => json!({"prompt": prompt, "max_tokens": 3, "prompt_logprobs": 1}),
        2 => json!({"context": &prompt[..prompt.len() - 3], "continuation": &prompt[prompt.len() - 3..]}),
        3 => json!({"prompt": prompt, "max_tokens": 20, "temperature": 0}),
        _ => json!({"prompt": prompt, "max_tokens": 1 + chance.below(6)}),
    };
    prompts.iter().map(line).collect()
}

struct Outcome {
    bytes: Vec<u8>,
    stats: Value,
}

fn run(scratch: &Scratch, lines: &[Value], extra: &[&str]) -> Outcome {
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    let input = scratch.write("in.jsonl", file(&lines));
    let (output, stats) = (scratch.path("out.jsonl"), scratch.path("stats.json"));
    let fixed = ["--progress", "none", "--stats", stats.to_str().unwrap()];
    generate_ok("demo", &input, &output, &[&fixed, extra].concat(), 0);
    let outcome = Outcome {
        bytes: std::fs::read(&output).unwrap(),
        stats: serde_json::from_slice(&std::fs::read(&stats).unwrap()).unwrap(),
    };
    for path in std::fs::read_dir(scratch.path("")).unwrap().flatten() {
        if path.file_name().to_string_lossy().starts_with("out.jsonl") {
            std::fs::remove_file(path.path()).unwrap();
        }
    }
    outcome
}

/// Caches that keep everything share pages. Those that keep a number of positions get copies of what others had there;
/// the first of a group may be past a place when others come that part from it there.
#[test]
fn nearly_all_that_could_be_saved_is_saved() {
    let scratch = Scratch::new();
    for (mixed, kv_policy) in [
        (false, "full"),
        (true, "full"),
        (false, "h2o:heavy=60,recent=40"),
        (true, "h2o:heavy=100,recent=20"),
        (true, "h2o:keep=0.2,recent=8,stretch=1.0"),
        (false, "h2o:keep=60,recent=8,stretch=128"),
        (true, "sink:start=4,recent=100"),
        (true, "pyramid:heavy=60,recent=40,slope=0.8"),
        (false, "per-head:heavy=50,recent=50"),
    ] {
        let prompts = questions(1, 8, 15, mixed);
        let lines: Vec<Value> = prompts.iter().map(|prompt| json!({"prompt": prompt, "max_tokens": 2})).collect();
        let shared = run(&scratch, &lines, &["--kv-policy", kv_policy]);
        let own = run(&scratch, &lines, &["--kv-policy", kv_policy, "--prefix-sharing", "off"]);
        let what = format!("{kv_policy}, mixed: {mixed}");
        assert!(shared.bytes == own.bytes, "{what}");
        let tokens = |outcome: &Outcome, key: &str| outcome.stats[key].as_u64().unwrap() as usize;
        let (could, saved) = (could_be_saved(&prompts), tokens(&shared, "prefix_shared_tokens"));
        let least = if kv_policy == "full" { 95 } else { 85 };
        assert!(saved * 100 >= could * least && saved <= could, "{what}, saved {saved} of {could}");
        assert_eq!(tokens(&own, "prefix_shared_tokens"), 0);
        assert_eq!(tokens(&own, "computed_tokens") - tokens(&shared, "computed_tokens"), saved);
        assert_eq!(tokens(&shared, "prompt_tokens"), prompts.iter().map(Vec::len).sum::<usize>());
    }
}

#[test]
fn sharing_changes_no_byte_wherever_pages_are_and_however_few() {
    let scratch = Scratch::new();
    let lines = lines(&questions(2, 6, 7, true));
    let expected = run(&scratch, &lines, &["--prefix-sharing", "off"]).bytes;
    let policies = [
        "sequences = 1\nchunk-tokens = 7\npages = 18\n",
        "sequences = 5\nchunk-tokens = 64\npages = 20\n",
        "sequences = 40\nchunk-tokens = 300\npages = 60\n",
        "sequences = 12\nchunk-tokens = 100\nblocks = 3\npages = 50\nkv = { gpu = 0.3, cpu = 0.4, disk = 0.3 }\n",
    ];
    for (index, policy) in policies.iter().enumerate() {
        let policy = scratch.write("policy.toml", policy);
        let mut extra = vec!["--policy", policy.to_str().unwrap()];
        let cache = scratch.path("cache");
        if index == 3 {
            extra.extend(["--device", "host", "--gpu-memory", "200MiB", "--cache-dir", cache.to_str().unwrap()]);
        }
        let outcome = run(&scratch, &lines, &extra);
        assert!(outcome.bytes == expected, "policy {index}");
        assert!(outcome.stats["prefix_shared_tokens"].as_u64() > Some(0), "policy {index}");
    }
    // Caches that evict, and numerics of integers; in as few pages as a sequence and its copies need, too.
    for numerics in [
        &["--kv-policy", "h2o:heavy=0.1,recent=0.1"][..],
        &["--kv-policy", "h2o:heavy=60,recent=60", "--kv-dtype", "int8"],
        &["--kv-policy", "h2o:keep=0.1,recent=8,stretch=1.0"],
        &["--kv-policy", "sink:start=4,recent=150"],
        &["--kv-dtype", "int4", "--weights", "int8"],
    ] {
        let own = run(&scratch, &lines, &[numerics, &["--prefix-sharing", "off"]].concat());
        assert!(run(&scratch, &lines, numerics).bytes == own.bytes, "{numerics:?}");
        let policy = scratch.write("policy.toml", "sequences = 6\nchunk-tokens = 100\npages = 18\npaused-pages = 5\n");
        let tight = run(&scratch, &lines, &[numerics, &["--policy", policy.to_str().unwrap()]].concat());
        assert!(tight.bytes == own.bytes, "{numerics:?}, few pages");
    }
}

/// Prompts that must compute again what is ready, in a cache that holds the longest of them and no page more.
#[test]
fn what_is_ready_and_cannot_be_taken_makes_room() {
    let scratch = Scratch::new();
    let mut chance = Chance::new(9);
    let mut tokens = |count: u64| -> Vec<u32> { (0..count).map(|_| 20 + chance.below(600) as u32).collect() };
    let (header, pages) = (tokens(256), tokens(128));
    let scored = [&header[..], &tokens(200)].concat();
    let answered = |prompt: &[u32], count: u32| json!({"prompt": prompt, "max_tokens": count, "ignore_eos": true});
    let job = [
        answered(&pages, 128),
        answered(&header, 1),
        json!({"prompt": scored, "max_tokens": 50, "ignore_eos": true, "prompt_logprobs": 1}),
        answered(&pages, 128),
        answered(&header, 250),
        json!({"prompt": header, "max_tokens": 100, "ignore_eos": true, "n": 3, "temperature": 1.0}),
        answered(&header, 256),
    ];
    let expected = run(&scratch, &job, &["--prefix-sharing", "off"]).bytes;
    for (sequences, schedule) in [(1, "mixed"), (2, "mixed"), (5, "mixed"), (3, "phased")] {
        for pages in [8, 9] {
            let text =
                format!("sequences = {sequences}\nchunk-tokens = 64\npages = {pages}\nschedule = \"{schedule}\"\n");
            let policy = scratch.write("policy.toml", &text);
            let outcome = run(&scratch, &job, &["--policy", policy.to_str().unwrap()]);
            assert!(outcome.bytes == expected, "{text}");
        }
    }
}

/// In phases nobody decodes while there are prompts, so the pages of who will decode must not keep them out. Nested
/// beginnings, several samples and a cache of hardly more than the longest prompt; chance decides how answers end.
#[test]
fn prompts_go_on_in_phases_while_pages_are_few() {
    let scratch = Scratch::new();
    let policy = scratch.write("policy.toml", "sequences = 10\nchunk-tokens = 64\npages = 11\n");
    let kv_policies = ["h2o:heavy=20,recent=40", "h2o:keep=30,recent=8,stretch=1.0"];
    // Which line each prompt begins like, for how long, how long it is, and how many samples of how many tokens.
    let shape = [
        (0, 0, 413, 4, 1),
        (0, 64, 64, 2, 66),
        (0, 349, 450, 1, 35),
        (0, 128, 128, 1, 144),
        (0, 349, 433, 1, 126),
        (0, 177, 341, 1, 68),
        (0, 0, 490, 1, 33),
        (0, 255, 463, 4, 63),
        (7, 350, 441, 2, 1),
        (7, 320, 321, 1, 91),
        (7, 350, 363, 1, 109),
    ];
    let stops: Vec<u32> = (0..8).map(|index| 20 + 75 * index).collect();
    for seed in 0..60 {
        let numerics = ["--kv-policy", kv_policies[usize::from(seed % 3 == 2)]];
        let mut chance = Chance::new(seed);
        let mut prompts: Vec<Vec<u32>> = Vec::new();
        for (like, shared, len, ..) in shape {
            let mut prompt = if shared > 0 { prompts[like][..shared].to_vec() } else { Vec::new() };
            prompt.extend((shared..len).map(|_| 20 + chance.below(600) as u32));
            prompts.push(prompt);
        }
        let line = |(prompt, (.., n, max_tokens)): (&Vec<u32>, (_, _, _, u32, u32))| {
            let max_tokens = json!(max_tokens);
            json!({"prompt": prompt, "n": n, "max_tokens": max_tokens, "stop_token_ids": stops})
        };
        let lines: Vec<Value> = prompts.iter().zip(shape).map(line).collect();
        let expected = run(&scratch, &lines, &numerics).bytes;
        let tight = ["--policy", policy.to_str().unwrap(), "--schedule", "phased", "--expect-output-len", "3"];
        assert!(run(&scratch, &lines, &[&numerics[..], &tight].concat()).bytes == expected, "seed {seed}");
    }
}
