//! Who runs when is chance here: few pages, wrong expectations, other placements on the way. No answer changes.
//!
//! `REPLANS=N` draws N seeds instead of 4; the long check draws 200.
#![allow(missing_docs)]

mod support;

use std::path::Path;
use std::sync::atomic::AtomicUsize;

use serde_json::{Value, json};
use support::jobs::Chance;
use support::{Scratch, read_jsonl};
use tidemill::device::host::Host;
use tidemill::engine::{Advisor, Batch, Counts, Engine, Left, Used};
use tidemill::error::{Error, Result, Tier};
use tidemill::executor::size::model_bytes;
use tidemill::executor::{Executor, Parts};
use tidemill::job::{self, Defaults, Fingerprint, Input, JobOptions, Limits, Opening, Output};
use tidemill::kv::layout::KvLayout;
use tidemill::kv::policies::parse;
use tidemill::memory::arena::Arena;
use tidemill::model::Model;
use tidemill::model::config::ModelConfig;
use tidemill::model::dtype::DType;
use tidemill::model::packed::Packed;
use tidemill::model::packed::pack::Packer;
use tidemill::policy::{Order, Policy, Split};
use tidemill::schedule::placement::Placement;

/// Pages of the longest line, and one more for its samples.
const LEAST_PAGES: usize = 9;

/// Lines of all kinds: alike beginnings, several samples, scores, answers that end of themselves.
fn lines(seed: u64) -> Vec<Value> {
    let mut chance = Chance::new(seed);
    let tokens = |count: u64, chance: &mut Chance| (0..count).map(|_| 20 + chance.below(600)).collect::<Vec<u64>>();
    let headers: Vec<Vec<u64>> = (0..3).map(|_| tokens(150, &mut chance)).collect();
    let stops: Vec<u64> = (0..8).map(|index| 20 + 75 * index).collect();
    let line = |_| {
        let own = 1 + chance.below(180);
        let own = tokens(own, &mut chance);
        let prompt = if chance.below(3) == 0 { own } else { [&headers[chance.below(3) as usize][..], &own].concat() };
        let mut line = json!({"prompt": prompt, "max_tokens": 1 + chance.below(140), "stop_token_ids": stops});
        match chance.below(8) {
            0 => line["n"] = json!(2 + chance.below(3)),
            1 => line["prompt_logprobs"] = json!(1),
            2 => line = json!({"context": &prompt[..prompt.len() / 2], "continuation": &prompt[prompt.len() / 2..]}),
            3 => line["temperature"] = json!(0),
            4 => line["ignore_eos"] = json!(true),
            _ => {}
        }
        line
    };
    (0..45).map(line).collect()
}

/// A placement of a few sequences and pages, everything in main memory.
fn placement(chance: &mut Chance, model: &Model, kv: &KvLayout) -> Placement {
    let (sequences, chunk_tokens) = (3 + chance.below(30) as usize, 1 + chance.below(200) as usize);
    let blocks = 1 + chance.below(3) as usize;
    let more = if chance.below(2) == 0 { 6 } else { 60 };
    let pages = LEAST_PAGES + chance.below(more) as usize;
    let paused_pages = if chance.below(3) == 0 { 0 } else { chance.below(2 * pages as u64) as usize };
    let here = Split::all(Tier::Cpu);
    let policy = Policy {
        sequences,
        chunk_tokens,
        blocks,
        block_rows: (sequences + chunk_tokens).div_ceil(blocks) + 1,
        weight_slots: 2,
        kv_slots: 2,
        pages,
        block_pages: pages,
        paused_pages,
        weights: here,
        kv: here,
        hidden: here,
        embed: Tier::Cpu,
        head: Tier::Cpu,
        compressed: false,
        schedule: Order::Mixed,
    };
    Placement::new(&model_bytes(&model.config, Packer::new(model, None).layout(), kv), &policy, Tier::Cpu)
}

fn executor(model: &Model, placement: Placement, kv: KvLayout, offload: &Path) -> Executor<Host> {
    let (device_bytes, host_bytes) = placement.arenas();
    let device = Host::new(Arena::new("test", Tier::Cpu, device_bytes as usize).unwrap());
    let host = Arena::new("test", Tier::Cpu, host_bytes as usize).unwrap();
    let packed = Packer::new(model, None);
    let (config, offload) = (&model.config, Some(offload));
    let parts = Parts { packed: &packed, config, placement, kv, offload, throttle: [None; 6] };
    Executor::new(device, host, parts).unwrap()
}

/// Advises whatever chance has.
struct Whim<'a> {
    chance: Chance,
    model: &'a Model,
    kv: KvLayout,
    offload: &'a Path,
}

impl Advisor<Host> for Whim<'_> {
    fn advise(&mut self, left: Left, _: &Placement) -> Option<Placement> {
        assert!(!left.requests.is_empty());
        let placement = placement(&mut self.chance, self.model, &self.kv);
        (self.chance.below(3) > 0).then_some(placement)
    }

    fn is_slow(&mut self, _: &Used) -> bool {
        self.chance.below(3) == 0
    }

    fn build(&mut self, placement: Placement) -> Result<Executor<Host>> {
        Ok(executor(self.model, placement, self.kv, self.offload))
    }
}

fn layout(model: &Model, scored: bool) -> KvLayout {
    let ModelConfig { num_layers, num_kv_heads, head_dim, .. } = model.config;
    KvLayout { num_layers, num_kv_heads, head_dim, dtype: DType::Bf16, scored }
}

fn batch(placement: &Placement, order: Order, share_prompts: bool, expected_len: Option<usize>) -> Batch {
    let Policy { sequences, chunk_tokens, .. } = placement.policy;
    Batch { sequences, chunk_tokens, share_prompts, order, expected_len }
}

fn options(model: &Model, input: &Path, output: &Path) -> JobOptions {
    let config = &model.config;
    JobOptions {
        input: Input::File(input.to_owned()),
        output: Output::File(output.to_owned()),
        error_file: None,
        retry_failed: false,
        shard: None,
        fingerprint: Fingerprint::new(),
        defaults: Defaults::default(),
        limits: Limits::new(config.vocab_size as u32, config.context_len as u32),
        model_name: "demo".into(),
    }
}

#[test]
fn pauses_and_other_placements_on_the_way_change_no_answer() {
    let count: u64 = std::env::var("REPLANS").map_or(7, |count| count.parse().unwrap());
    let (scratch, files) = (Scratch::new(), Scratch::new());
    let offload = files.path("");
    let model = Model::open("demo").unwrap();
    let (mut total, mut all) = (Counts::default(), Vec::new());
    let policies = [
        "full",
        "h2o:heavy=60,recent=30",
        "sink:start=4,recent=100",
        "pyramid:heavy=50,recent=20,slope=0.8",
        "h2o:keep=0.6,recent=8,stretch=1.0",
    ];
    for seed in 0..count {
        let mut chance = Chance::new(seed);
        let kv_policy = parse(policies[[0, 1, 0, 2, 0, 3, 4][(seed % 7) as usize]]).unwrap();
        let input = scratch.jsonl("in.jsonl", &lines(seed / 7));
        let kv = layout(&model, kv_policy.needs_scores());
        let run = |name: &str, placement: Placement, batch: Batch, advisor: Option<&mut Whim<'_>>| {
            let output = scratch.path(name);
            let Opening::Run(job) = job::open(options(&model, &input, &output)).unwrap() else { panic!("a new job") };
            let (reader, mut writer) = (job.reader, job.writer);
            let mut engine = Engine::new(&model, executor(&model, placement, kv, &offload), kv_policy.clone(), batch);
            let advisor = advisor.map(|advisor| advisor as &mut dyn Advisor<Host>);
            let counts = engine.run(reader, &mut writer, &AtomicUsize::new(0), advisor, &mut |_| {}).unwrap();
            writer.close(true).unwrap();
            let answers = read_jsonl(&output);
            std::fs::read_dir(scratch.path("")).unwrap().flatten().for_each(|file| {
                if file.file_name().to_string_lossy().starts_with(name) {
                    std::fs::remove_file(file.path()).unwrap();
                }
            });
            (answers, counts)
        };
        let roomy = {
            let mut policy = placement(&mut Chance::new(0), &model, &kv).policy;
            (policy.sequences, policy.pages, policy.block_pages, policy.paused_pages) = (200, 900, 900, 0);
            (policy.block_rows, policy.blocks, policy.chunk_tokens) = (1200, 1, 1000);
            let bytes = model_bytes(&model.config, Packer::new(&model, None).layout(), &kv);
            Placement::new(&bytes, &policy, Tier::Cpu)
        };
        let plain = batch(&roomy, Order::Mixed, false, None);
        let (answers, counts) = run("expected", roomy, plain, None);
        assert_eq!((counts.paused, counts.replanned), (0, 0));
        let tight = placement(&mut chance, &model, &kv);
        let order = if chance.below(4) == 0 { Order::Phased } else { Order::Mixed };
        // Far too short, so that more begin than there is room for.
        let expected_len = (chance.below(4) > 0).then(|| 1 + chance.below(12) as usize);
        let tight_batch = batch(&tight, order, chance.below(4) > 0, expected_len);
        let mut whim = Whim { chance, model: &model, kv, offload: &offload };
        for advisor in [None, Some(&mut whim)] {
            let (got, counts) = run("got", tight.clone(), tight_batch, advisor);
            let differ = answers.iter().zip(&got).find(|(a, b)| a != b);
            let what = format!("seed {seed}, {tight_batch:?}, {tight:?}");
            assert!(got.len() == answers.len() && differ.is_none(), "{what}: {differ:?}");
            assert_eq!(counts.succeeded, 45, "{what}");
            (total.paused, total.replanned) = (total.paused + counts.paused, total.replanned + counts.replanned);
            total.kept_tokens += counts.kept_tokens;
            all.push((counts.paused, counts.kept_tokens, counts.replanned));
        }
    }
    assert!(total.paused > count && total.replanned >= count && total.kept_tokens > 100 * count, "{all:?}");
}

/// Advises once, and then has no memory for it.
struct Poor<'a>(Whim<'a>);

impl Advisor<Host> for Poor<'_> {
    fn advise(&mut self, _: Left, _: &Placement) -> Option<Placement> {
        Some(placement(&mut self.0.chance, self.0.model, &self.0.kv))
    }

    fn is_slow(&mut self, _: &Used) -> bool {
        false
    }

    fn build(&mut self, _: Placement) -> Result<Executor<Host>> {
        Err(Error::Device { what: "no memory for this".into() })
    }
}

#[test]
fn a_placement_that_cannot_be_built_ends_the_run_and_another_goes_on() {
    let (scratch, files) = (Scratch::new(), Scratch::new());
    let offload = files.path("");
    let model = Model::open("demo").unwrap();
    let kv = layout(&model, false);
    let input = scratch.jsonl("in.jsonl", &lines(3));
    let run = |name: &str, advisor: Option<&mut dyn Advisor<Host>>| {
        let Opening::Run(job) = job::open(options(&model, &input, &scratch.path(name))).unwrap() else {
            panic!("done")
        };
        let (reader, mut writer) = (job.reader, job.writer);
        let placement = placement(&mut Chance::new(4), &model, &kv);
        let batch = batch(&placement, Order::Mixed, true, None);
        let mut engine = Engine::new(&model, executor(&model, placement, kv, &offload), parse("full").unwrap(), batch);
        let result = engine.run(reader, &mut writer, &AtomicUsize::new(0), advisor, &mut |_| {});
        // What was done can still be told.
        assert!(engine.used().bytes[1] + engine.used().bytes[0] > 0);
        writer.close(result.is_ok()).unwrap();
        result
    };
    run("expected.jsonl", None).unwrap();
    let mut poor = Poor(Whim { chance: Chance::new(5), model: &model, kv, offload: &offload });
    let error = run("out.jsonl", Some(&mut poor)).unwrap_err().to_string();
    assert!(error.contains("no memory for this"), "{error}");
    let counts = run("out.jsonl", None).unwrap();
    assert!(counts.succeeded < 45, "{} lines were done again", counts.succeeded);
    let read = |name: &str| std::fs::read(scratch.path(name)).unwrap();
    assert!(read("out.jsonl") == read("expected.jsonl"));
}
