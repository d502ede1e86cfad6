//! Measured passes beside simulated ones: 50 random placements in three rehearsed tiers with throttled links.
//!
//! `cargo bench --bench overlap` measures this machine first, then prints a row per placement: pass time measured,
//! simulated and bounded, and what binds. `SETTINGS=N` draws N placements.
#![allow(missing_docs, clippy::print_stdout)]

use std::time::Instant;

use tidemill::calibrate::{Options, calibrate};
use tidemill::device::host::Host;
use tidemill::device::sampling::{Draw, Target};
use tidemill::error::Tier;
use tidemill::executor::size::model_bytes;
use tidemill::executor::{Executor, Parts, Throttle};
use tidemill::hardware::{Hardware, Link, Throttles};
use tidemill::kv::layout::{KvLayout, pages_for};
use tidemill::kv::pages::PagePool;
use tidemill::kv::policy::Kept;
use tidemill::memory::arena::Arena;
use tidemill::model::Model;
use tidemill::model::dtype::DType;
use tidemill::model::packed::cache;
use tidemill::planner::model::PlanModel;
use tidemill::planner::search::rehearse;
use tidemill::policy::{Order, Policy, Split};
use tidemill::rng::Philox;
use tidemill::schedule::placement::Placement;
use tidemill::schedule::price::{Demand, Resources, placed, step_work};
use tidemill::schedule::shape::BlockShape;
use tidemill::schedule::step::Lane;
use tidemill::schedule::{Block, Pass, Run};

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8192,
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": false, "torch_dtype": "bfloat16"}"#;

const WARM_PASSES: usize = 2;
const PASSES: usize = 7;

struct Dice(Philox, u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.1 += 1;
        self.0.words(self.1)[0] as usize % bound
    }

    fn split(&mut self) -> Split {
        let parts = [self.below(4), self.below(4), self.below(3)];
        let sum = parts.iter().sum::<usize>().max(1) as f64;
        let [gpu, cpu, disk] = parts.map(|part| part as f64 / sum);
        if gpu + cpu + disk == 0.0 { Split::all(Tier::Cpu) } else { Split { gpu, cpu, disk } }
    }

    fn tier(&mut self) -> Tier {
        Tier::ALL[self.below(3)]
    }
}

/// A placement and the decoding sequences that run under it.
struct Setting {
    policy: Policy,
    context: usize,
    throttles: Throttles,
}

fn setting(seed: u64) -> Setting {
    let mut dice = Dice(Philox::new(seed, 0x6f76), 0);
    let sequences = [4, 16, 48][dice.below(3)];
    let context = [70, 250, 600][dice.below(3)];
    let blocks = [1, 2, 4][dice.below(3)];
    let per_sequence = pages_for(context + PASSES + WARM_PASSES);
    let policy = Policy {
        sequences,
        chunk_tokens: 16,
        blocks,
        block_rows: sequences.div_ceil(blocks),
        weight_slots: 2 + dice.below(3),
        kv_slots: 2 + dice.below(2),
        pages: sequences * per_sequence,
        block_pages: sequences.div_ceil(blocks) * per_sequence,
        paused_pages: 0,
        weights: dice.split(),
        kv: if dice.below(2) == 0 { Split::all(Tier::Gpu) } else { dice.split() },
        hidden: Split::all(dice.tier()),
        embed: dice.tier(),
        head: dice.tier(),
        compressed: false,
        schedule: Order::Mixed,
    };
    let rates = [
        (Link::H2d, [0.3e9, 0.6e9, 1.2e9][dice.below(3)]),
        (Link::D2h, [0.3e9, 0.6e9, 1.2e9][dice.below(3)]),
        (Link::DiskRead, [0.15e9, 0.3e9, 0.6e9][dice.below(3)]),
        (Link::DiskWrite, [0.15e9, 0.3e9][dice.below(2)]),
    ];
    Setting { policy, context, throttles: Throttles(rates.into_iter().collect()) }
}

struct Row {
    measured: f64,
    simulated: f64,
    bound: f64,
    binds: &'static str,
}

fn main() {
    let settings: u64 = std::env::var("SETTINGS").map_or(50, |count| count.parse().expect("a number"));
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("overlap");
    std::fs::create_dir_all(&directory).expect("a directory");
    let config = directory.join("config.json");
    std::fs::write(&config, CONFIG).expect("writes");
    let model = Model::synthetic("overlap", &config, 1).expect("a model");
    let packed = cache::ensure(&model, None, &directory, false, &mut |_| {}).expect("packs");
    let options = Options { quick: false, disk: Some(directory.clone()), memory_bytes: 1 << 30 };
    let machine = calibrate(&options, &mut |_| {}).expect("measures");
    println!("{} cores, {} settings; pass times in ms", machine.cpu.cores, settings);
    println!(
        "{:>4} {:>9} {:>9} {:>9} {:>9} {:>9}  binds",
        "seed", "measured", "simulated", "bound", "meas/sim", "sim/bound"
    );
    let mut ratios = Vec::new();
    for seed in 0..settings {
        let row = run(&model, &packed, &machine, &setting(seed), &directory);
        let (over, above) = (row.measured / row.simulated, row.simulated / row.bound);
        println!(
            "{seed:>4} {:>9.1} {:>9.1} {:>9.1} {over:>9.3} {above:>9.3}  {}",
            1e3 * row.measured,
            1e3 * row.simulated,
            1e3 * row.bound,
            row.binds
        );
        assert!(above > 1.0 - 1e-6, "a simulated pass is below its bound");
        ratios.push(over);
    }
    ratios.sort_by(f64::total_cmp);
    let at = |share: f64| ratios[((ratios.len() - 1) as f64 * share) as usize];
    println!("measured / simulated: median {:.3}, 10 % {:.3}, 90 % {:.3}", at(0.5), at(0.1), at(0.9));
}

fn run(
    model: &Model,
    packed: &tidemill::model::packed::read::PackedModel,
    machine: &Hardware,
    setting: &Setting,
    directory: &std::path::Path,
) -> Row {
    let config = &model.config;
    let kv = KvLayout {
        num_layers: config.num_layers,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        dtype: DType::Bf16,
        scored: false,
    };
    let bytes = model_bytes(config, packed.layout(), &kv);
    let placement = Placement::new(&bytes, &setting.policy, Tier::Gpu);
    let hardware = machine.without_gpu().rehearsed(placement.bytes[0].max(1)).throttled(&setting.throttles);
    let plan_model = PlanModel::new("overlap", config.clone(), None, DType::Bf16, DType::Bf16).with_bytes(bytes);
    let (device_bytes, host_bytes) = placement.arenas();
    let device = Host::new(Arena::new("bench", Tier::Gpu, device_bytes as usize).expect("memory")).rehearsing();
    let host = Arena::new("bench", Tier::Cpu, host_bytes as usize).expect("memory");
    let mut throttle = Throttle::default();
    for (lane, link) in [Lane::DiskRead, Lane::DiskWrite, Lane::H2d, Lane::D2h].into_iter().zip(Link::ALL) {
        throttle[lane.index()] = setting.throttles.rate(link);
    }
    let parts = Parts { packed: &packed, config, placement, kv, offload: Some(directory), throttle };
    let mut executor = Executor::new(device, host, parts).expect("an executor");
    let mut pool = PagePool::new(executor.placement().pages, 0);
    let per_sequence = pages_for(setting.context + PASSES + WARM_PASSES);
    let pages: Vec<Vec<u32>> =
        (0..setting.policy.sequences).map(|_| (0..per_sequence).map(|_| pool.take()).collect()).collect();
    let tokens = vec![7u32; setting.context + PASSES + WARM_PASSES + 1];
    let (mut measured, mut shapes): (Vec<f64>, Vec<BlockShape>) = (Vec::new(), Vec::new());
    for number in 0..WARM_PASSES + PASSES {
        let at = setting.context + number;
        let mut pass = Pass::default();
        let mut draws = Vec::new();
        for (index, pages) in pages.iter().enumerate() {
            if index.is_multiple_of(setting.policy.block_rows) {
                pass.open_block();
            }
            assert_eq!(pass.room(executor.placement(), (pages, Kept::All), at..at + 1), 1, "every sequence has room");
            let row = pass.push(&Run { tokens: &tokens, range: at..at + 1, prompt_len: at, pages, kept: Kept::All });
            draws.push(Draw { row, target: Target::Score(1), top: 0 });
        }
        let outputs: Vec<usize> = draws.iter().map(|draw| draw.row).collect();
        shapes = Block::of(&pass, executor.placement(), &outputs).iter().map(|block| block.shape).collect();
        let started = Instant::now();
        executor.run(&pass, &draws).expect("runs");
        if number >= WARM_PASSES {
            measured.push(started.elapsed().as_secs_f64());
        }
    }
    let placement = executor.placement();
    let costs = placed(&plan_model.cost, &hardware, placement);
    let rehearsed = rehearse(placement, &shapes, &costs, 3);
    let simulated = rehearsed.ends[1] - rehearsed.ends[0];
    let mut demand = Demand::none();
    for (step, _) in rehearsed.steps.iter().zip(&rehearsed.passes).filter(|(_, pass)| **pass == 1) {
        demand.add(step.lane, step_work(step, &shapes, &costs));
    }
    let (binds, bound) = demand.bottleneck(&Resources::of(&hardware));
    measured.sort_by(f64::total_cmp);
    Row { measured: measured[measured.len() / 2], simulated, bound, binds: binds.name() }
}
