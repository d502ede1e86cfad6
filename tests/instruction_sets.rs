//! Every instruction set, chunking and mixture of sequences gives the same bits: the executor is driven directly.
#![allow(missing_docs)]

mod support;

use tidemill::device::Device as _;
use tidemill::device::host::Host;
use tidemill::device::host::isa::Isa;
use tidemill::device::sampling::{Draw, Drawn, Target};
use tidemill::error::Tier;
use tidemill::executor::size::model_bytes;
use tidemill::executor::{Executor, Parts};
use tidemill::kv::layout::KvLayout;
use tidemill::kv::policies;
use tidemill::memory::arena::Arena;
use tidemill::model::Model;
use tidemill::model::dtype::DType;
use tidemill::model::packed::Packed;
use tidemill::model::packed::pack::Packer;
use tidemill::policy::{Order, Policy, Split};
use tidemill::schedule::placement::Placement;
use tidemill::schedule::{Pass, Run};

const PAGES: usize = 16;
/// Tokens of a sequence that count as generated: they evict one by one.
const GENERATED: usize = 20;

#[derive(Debug)]
struct Numerics {
    kv: DType,
    weights: Option<DType>,
    /// Activations are rounded to integers.
    rounds: bool,
    /// What the cache keeps.
    policy: &'static str,
}

fn executor(model: &Model, isa: Isa, numerics: &Numerics) -> Executor<Host> {
    let config = &model.config;
    let layout = KvLayout {
        num_layers: config.num_layers,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        dtype: numerics.kv,
        scored: policies::parse(numerics.policy).unwrap().needs_scores(),
    };
    let packed = Packer::new(model, numerics.weights);
    let policy = Policy {
        sequences: 7,
        chunk_tokens: 400,
        blocks: 1,
        block_rows: 400,
        weight_slots: 2,
        kv_slots: 2,
        pages: PAGES,
        block_pages: PAGES,
        paused_pages: 0,
        weights: Split::all(Tier::Cpu),
        kv: Split::all(Tier::Cpu),
        hidden: Split::all(Tier::Cpu),
        embed: Tier::Cpu,
        head: Tier::Cpu,
        compressed: false,
        schedule: Order::Mixed,
    };
    let mut placement = Placement::new(&model_bytes(config, packed.layout(), &layout), &policy, Tier::Cpu);
    // Every row of a pass is scored.
    placement.output_rows = 400;
    let (device_bytes, host_bytes) = placement.arenas();
    let room = 400 * placement.hidden_row as usize * 3;
    let arena = Arena::new("test", Tier::Cpu, device_bytes as usize + room).unwrap();
    let host = Arena::new("test", Tier::Cpu, host_bytes as usize).unwrap();
    let parts = Parts { packed: &packed, config, placement, kv: layout, offload: None, throttle: [None; 6] };
    let mut device = Host::with_isa(arena, isa);
    device.round_activations(numerics.rounds);
    Executor::new(device, host, parts).unwrap()
}

fn tokens(len: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * 7919 + salt * 104_729 + 3) % vocab) as u32).collect()
}

/// Scores of every token of two sequences, run in chunks of these sizes, side by side or one after the other.
fn scores(model: &Model, isa: Isa, numerics: &Numerics, chunk: usize, together: bool) -> Vec<Vec<Drawn>> {
    let mut executor = executor(model, isa, numerics);
    let sequences = [tokens(150, 1, model.config.vocab_size), tokens(67, 2, model.config.vocab_size)];
    let mut scores = vec![Vec::new(), Vec::new()];
    let mut first_page = 0;
    let policy = policies::parse(numerics.policy).unwrap();
    let kept = |tokens: &[u32]| policy.kept(tokens.len() - GENERATED, GENERATED + 1);
    let pages: Vec<Vec<u32>> = sequences
        .iter()
        .map(|tokens| {
            let count = kept(tokens).most_held(tokens.len()) as u32;
            first_page += count;
            (first_page - count..first_page).rev().collect()
        })
        .collect();
    let groups: Vec<Vec<usize>> = if together { vec![vec![0, 1]] } else { vec![vec![1], vec![0]] };
    for group in groups {
        let mut done = [0; 2];
        while group.iter().any(|&s| done[s] < sequences[s].len()) {
            let mut pass = Pass::default();
            let (mut draws, mut owners) = (Vec::new(), Vec::new());
            for &s in &group {
                let (tokens, kept) = (&sequences[s], kept(&sequences[s]));
                let range = done[s]..(done[s] + chunk).min(tokens.len());
                if range.is_empty() {
                    continue;
                }
                let range = range.start..kept.reach(&range);
                done[s] = range.end;
                let prompt_len = tokens.len() - GENERATED;
                let run = Run { tokens, range: range.clone(), prompt_len, pages: &pages[s], kept };
                let first_row = pass.push(&run);
                for position in range.clone() {
                    let next = tokens.get(position + 1).copied().unwrap_or(0);
                    draws.push(Draw { row: first_row + position - range.start, target: Target::Score(next), top: 2 });
                    owners.push(s);
                }
            }
            for (owner, drawn) in owners.into_iter().zip(executor.run(&pass, &draws).unwrap()) {
                scores[owner].push(drawn);
            }
        }
    }
    scores
}

#[test]
fn one_set_of_bits_for_all() {
    for name in ["llama-head20", "mistral-w23", "opt-postln", "qwen3-mixed", "neox-parallel", "llama-dynamic"] {
        let model = Model::from_directory(name, &support::golden(name)).unwrap();
        let plain = DType::ALL.map(|kv| Numerics { kv, weights: None, rounds: false, policy: "full" });
        let integers = [(DType::Int4, false), (DType::Int4, true), (DType::Int8, true)]
            .map(|(dtype, rounds)| Numerics { kv: DType::F16, weights: Some(dtype), rounds, policy: "full" });
        let mut evicting = vec!["sink:start=3,recent=29", "sink:start=70,recent=40", "sink:start=0,recent=1"];
        if name != "mistral-w23" && name != "qwen3-mixed" {
            evicting.extend(["h2o:heavy=0.2,recent=0.2", "h2o:heavy=30,recent=40", "h2o:heavy=0,recent=5"]);
            evicting.extend(["h2o:keep=40,recent=8,stretch=128", "h2o:keep=0.2,recent=8,stretch=1.0"]);
            evicting.extend(["pyramid:heavy=60,recent=10,slope=1", "per-head:heavy=0.2,recent=0.1"]);
        }
        let evicting = evicting.into_iter().zip(DType::ALL.into_iter().cycle()).map(|(policy, kv)| Numerics {
            kv,
            weights: None,
            rounds: false,
            policy,
        });
        for numerics in plain.into_iter().chain(integers).chain(evicting) {
            let expected = scores(&model, Isa::Portable, &numerics, 400, false);
            assert!(expected.iter().flatten().all(|drawn| drawn.logprob.is_finite()));
            for isa in Isa::all().into_iter().filter(|isa| isa.is_available()) {
                for (chunk, together) in [(400, true), (64, false), (37, true), (1, true)] {
                    let same = scores(&model, isa, &numerics, chunk, together) == expected;
                    assert!(same, "{name}, {numerics:?}, {isa:?}, chunks of {chunk}, together {together}");
                }
            }
        }
    }
}
