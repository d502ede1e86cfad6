//! Passes as calibration and the cost model predict them, beside passes as they run.
//!
//! `cargo bench --bench passes` loads a Llama shape of 1.1 B parameters (seeded bf16 weights) into memory, measures this
//! machine, runs single passes, and prints predicted over measured seconds: of decoding with few and many sequences,
//! of a chunk of a prompt, of both at once. The machine is measured before every pass, since shared machines drift.
//! `-- --quick` calibrates quickly, `-- CONFIG.json` takes another model, `-- --rounds N` takes more turns.
#![allow(missing_docs, clippy::print_stdout)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tidemill::calibrate::{Options, calibrate};
use tidemill::cost::ModelCost;
use tidemill::device::host::Host;
use tidemill::device::sampling::{Draw, SampleRule, Target};
use tidemill::error::Tier;
use tidemill::executor::size::model_bytes;
use tidemill::executor::{Executor, Parts, PassRecord};
use tidemill::hardware::Hardware;
use tidemill::kv::layout::{KvLayout, PAGE_POSITIONS, pages_for};
use tidemill::kv::policy::Kept;
use tidemill::memory::arena::Arena;
use tidemill::memory::limits;
use tidemill::model::Model;
use tidemill::model::dtype::DType;
use tidemill::model::packed::pack::Packer;
use tidemill::policy::{Order, Policy, Split};
use tidemill::schedule::placement::Placement;
use tidemill::schedule::price::{placed, step_work};
use tidemill::schedule::step::Op;
use tidemill::schedule::{Pass, Run};

/// Pages of the cache.
const PAGES: usize = 1600;
/// Rows of a pass at most.
const ROWS: usize = 1024;
/// Repetitions of a pass in a turn: three at least, and as many as begin within this time.
const TURN: Duration = Duration::from_millis(600);

/// A turn in which others took more than this many cores tells nothing.
const QUIET: f64 = 0.06;

/// What a pass carries.
#[derive(Clone, Copy)]
struct Case {
    decodes: usize,
    context: usize,
    prompt: usize,
    prompt_context: usize,
}

const CASES: [Case; 7] = [
    Case { decodes: 16, context: 128, prompt: 0, prompt_context: 0 },
    Case { decodes: 1, context: 128, prompt: 0, prompt_context: 0 },
    Case { decodes: 64, context: 128, prompt: 0, prompt_context: 0 },
    Case { decodes: 64, context: 1024, prompt: 0, prompt_context: 0 },
    Case { decodes: 200, context: 256, prompt: 0, prompt_context: 0 },
    Case { decodes: 0, context: 0, prompt: 512, prompt_context: 0 },
    Case { decodes: 64, context: 256, prompt: 192, prompt_context: 0 },
];

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    (samples[(samples.len() - 1) / 2] + samples[samples.len() / 2]) / 2.0
}

fn executor(model: &Model) -> Executor<Host> {
    let config = &model.config;
    let (num_kv_heads, head_dim) = (config.num_kv_heads, config.head_dim);
    let layout = KvLayout { num_layers: config.num_layers, num_kv_heads, head_dim, dtype: DType::Bf16, scored: false };
    let packed = Packer::new(model, None);
    let policy = Policy {
        sequences: 256,
        chunk_tokens: ROWS,
        blocks: 1,
        block_rows: ROWS,
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
    use tidemill::model::packed::Packed;
    let placement = Placement::new(&model_bytes(config, packed.layout(), &layout), &policy, Tier::Cpu);
    let (device_bytes, host_bytes) = placement.arenas();
    let device = Host::new(Arena::new("bench", Tier::Cpu, device_bytes as usize).expect("memory"));
    let host = Arena::new("bench", Tier::Cpu, host_bytes as usize).expect("memory");
    let parts = Parts { packed: &packed, config, placement, kv: layout, offload: None, throttle: [None; 6] };
    Executor::new(device, host, parts).expect("loads")
}

/// A pass, and a token drawn for every sequence in it, as a job draws by default.
fn pass(case: Case) -> (Pass, Vec<Draw>) {
    let tokens: Vec<u32> = (0..8192).map(|i| 3 + i * 7919 % 31_990).collect();
    let (mut pass, mut draws) = (Pass::default(), Vec::new());
    let mut free = 0..;
    let mut push = |range: std::ops::Range<usize>| {
        let pages: Vec<u32> = free.by_ref().take(pages_for(range.end)).collect();
        assert!(pages.iter().all(|&page| (page as usize) < PAGES));
        let end = range.end;
        let first = pass.push(&Run {
            tokens: &tokens[..end],
            prompt_len: end,
            pages: &pages,
            kept: Kept::All,
            range: range.clone(),
        });
        let rule = SampleRule {
            allowed: None,
            banned: [].into(),
            bias: [].into(),
            counts: [].into(),
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            temperature: 1.0,
            min_p: 0.0,
            top_k: 0,
            top_p: 1.0,
            uniform: 0.5,
        };
        draws.push(Draw { row: first + range.len() - 1, target: Target::Sample(rule), top: 0 });
    };
    for sequence in 0..case.decodes {
        // Contexts differ, as they do in a job; the mean is the one that is named.
        let position = case.context - 1 + sequence % PAGE_POSITIONS - case.decodes.min(PAGE_POSITIONS) / 2;
        push(position..position + 1);
    }
    if case.prompt > 0 {
        push(case.prompt_context..case.prompt_context + case.prompt);
    }
    (pass, draws)
}

/// Seconds of the median pass, and of its layers and head; what the pass consisted of.
fn measured(executor: &mut Executor<Host>, (pass, draws): &(Pass, Vec<Draw>)) -> ([f64; 3], PassRecord) {
    let mut samples = [Vec::new(), Vec::new(), Vec::new()];
    let mut record = None;
    let turn = Instant::now();
    while record.is_none() || samples[0].len() < 3 || turn.elapsed() < TURN {
        executor.trace();
        let began = Instant::now();
        executor.run(pass, draws).expect("runs");
        samples[0].push(began.elapsed().as_secs_f64());
        let (events, records) = executor.take_trace();
        for (index, op) in [(1, Op::Layer), (2, Op::Head)] {
            let of = events.iter().filter(|event| event.step.op == op);
            samples[index].push(of.map(|event| event.end - event.start).sum());
        }
        record = records.into_iter().next();
    }
    (samples.map(median), record.expect("a pass was traced"))
}

/// The same as the cost model has it, and the layers' products, attention and element-wise work.
fn predicted(record: &PassRecord, cost: &ModelCost, hardware: &Hardware, placement: &Placement) -> [f64; 6] {
    let costs = placed(cost, hardware, placement);
    let of = |op: Option<Op>| -> f64 {
        let steps = record.steps.iter().filter(|step| op.is_none_or(|op| step.op == op));
        steps.map(|step| step_work(step, &record.blocks, &costs).lane_secs).sum()
    };
    let (kernels, layers) = (hardware.kernels(), cost.num_layers as f64);
    let rows = record.blocks.iter().map(|block| block.rows as f64);
    let curve = kernels.curve(cost.weights, cost.integer_activations);
    let products: f64 = rows.clone().map(|rows| layers * cost.layer_weights() * curve.secs_per_weight(rows)).sum();
    let pointwise: f64 = rows.map(|rows| layers * rows * cost.pointwise_bytes / kernels.pointwise_bytes_per_s).sum();
    let all = of(Some(Op::Layer));
    [of(None), all, of(Some(Op::Head)), products, all - products - pointwise - layers * kernels.step_secs, pointwise]
}

/// Ticks of all cores that were busy, and those of this process.
fn ticks() -> [f64; 2] {
    let numbers = |file: &str, skip: &str| -> Vec<f64> {
        let text = std::fs::read_to_string(file).expect("Linux");
        let line = text.lines().next().expect("a line");
        let rest = line.rsplit_once(skip).map_or(line, |(_, rest)| rest);
        rest.split_whitespace().map(|word| word.parse().unwrap_or(0.0)).collect()
    };
    let (all, own) = (numbers("/proc/stat", "cpu "), numbers("/proc/self/stat", ") "));
    // user, nice, system, idle, iowait, irq, softirq, steal; of a process, user and system come 12th after its name.
    [all[..8].iter().sum::<f64>() - all[3] - all[4], own[11] + own[12]]
}

/// Waits for a moment without others, for some minutes at most.
fn wait_for_quiet() {
    for _ in 0..600 {
        if watched(|| std::thread::sleep(Duration::from_millis(500))).1 < QUIET {
            return;
        }
    }
}

/// Does `work`, and tells which share of one core others took meanwhile.
fn watched<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let (before, began) = (ticks(), Instant::now());
    let result = work();
    let after = ticks();
    let others = (after[0] - before[0]) - (after[1] - before[1]);
    (result, others.max(0.0) / 100.0 / began.elapsed().as_secs_f64())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let after = |flag: &str| arguments.iter().position(|argument| argument == flag).map(|at| &arguments[at + 1]);
    let rounds: usize = after("--rounds").map_or(3, |text| text.parse().expect("a number"));
    let config = arguments.iter().find(|argument| argument.ends_with(".json")).map(PathBuf::from);
    let config =
        config.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/policies/models/llama-1.1b.json").into());
    let model = Model::open(&format!("synth:{}#1", config.display())).expect("a configuration");
    let weights = model.config.dtype.unwrap_or(DType::Bf16);
    let cost = ModelCost::new(&model.config, None, weights, DType::Bf16);
    let mut executor = executor(&model);
    let runs = CASES.map(pass);
    // Memory is given out when it is first written.
    runs.iter().for_each(|(pass, draws)| drop(executor.run(pass, draws).expect("runs")));
    let mut ratios = vec![[Vec::new(), Vec::new(), Vec::new()]; CASES.len()];
    for round in 0..rounds {
        println!("round {round}; ms: predicted / measured; layers = products + attention + element by element");
        for (index, (case, run)) in CASES.iter().zip(&runs).enumerate() {
            let options = Options { quick, disk: None, memory_bytes: limits::default_cpu_memory() };
            wait_for_quiet();
            let (hardware, before) = watched(|| calibrate(&options, &mut |_| ()).expect("calibrates"));
            let ((measured, record), during) = watched(|| measured(&mut executor, run));
            let disturbed = before.max(during);
            let secs = predicted(&record, &cost, &hardware, executor.placement());
            let ms = |secs: f64| 1e3 * secs;
            println!(
                "  {:3} x {:4} + {:3} @ {:4}: pass {:7.1} / {:7.1}; layers {:7.1} / {:7.1} ({:.1} + {:.1} + {:.1}); \
                 head {:6.2} / {:6.2}; others {disturbed:.2}",
                case.decodes,
                case.context,
                case.prompt,
                case.prompt_context,
                ms(secs[0]),
                ms(measured[0]),
                ms(secs[1]),
                ms(measured[1]),
                ms(secs[3]),
                ms(secs[4]),
                ms(secs[5]),
                ms(secs[2]),
                ms(measured[2]),
            );
            if disturbed < QUIET {
                for (part, ratios) in ratios[index].iter_mut().enumerate() {
                    ratios.push(secs[part] / measured[part]);
                }
            }
        }
    }
    println!("predicted / measured, medians of what was not disturbed: pass, layers, head (rounds)");
    for (case, ratios) in CASES.iter().zip(ratios).filter(|(_, ratios)| !ratios[0].is_empty()) {
        let rounds = ratios[0].len();
        let [pass, layers, head] = ratios.map(median);
        println!(
            "  {:3} x {:4} + {:3} @ {:4}: {pass:.3}  {layers:.3}  {head:.3}  ({rounds})",
            case.decodes, case.context, case.prompt, case.prompt_context
        );
    }
}
