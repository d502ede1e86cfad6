//! Schedules as values: golden text, and random placements held to the checker.
#![allow(missing_docs)]

use tidemill::error::Tier;
use tidemill::policy::{Order, Policy, Split};
use tidemill::rng::Philox;
use tidemill::schedule::check::{Checker, check_fences};
use tidemill::schedule::fences::Fences;
use tidemill::schedule::lower::{Carried, lower};
use tidemill::schedule::placement::{ModelBytes, Placement, Workspace};
use tidemill::schedule::shape::{BlockShape, Pages};
use tidemill::schedule::step::{Op, Slot, Slots, Step};

fn model(layers: usize, chunks: usize) -> ModelBytes {
    ModelBytes {
        layers: vec![vec![8192; chunks]; layers],
        head: vec![vec![4096; 5]; 2],
        table: 40_960,
        tied: false,
        small: 1024,
        frame: 4096,
        activations: vec![256, 512],
        embedding_row: 256,
        hidden_row: 256,
        logit_row: 4000,
        workspace: Workspace::default(),
    }
}

fn policy() -> Policy {
    Policy {
        sequences: 4,
        chunk_tokens: 8,
        blocks: 2,
        block_rows: 8,
        weight_slots: 2,
        kv_slots: 2,
        pages: 10,
        block_pages: 8,
        paused_pages: 0,
        weights: Split::all(Tier::Gpu),
        kv: Split::all(Tier::Gpu),
        hidden: Split::all(Tier::Gpu),
        embed: Tier::Gpu,
        head: Tier::Gpu,
        compressed: false,
        schedule: Order::Mixed,
    }
}

fn block(loads: Pages, stores: Pages) -> BlockShape {
    BlockShape { rows: 4, segments: 2, keys: 100, pages: 6, loads, stores, outputs: 2, ..BlockShape::default() }
}

fn text(steps: &[Step]) -> String {
    steps.iter().map(|step| format!("{step}\n")).collect()
}

#[test]
fn a_model_that_fits_is_computation_alone() {
    let placement = Placement::new(&model(2, 4), &policy(), Tier::Gpu);
    let steps = lower(&placement, &[block(Pages::default(), Pages::default())], &mut Carried::default());
    let expected = "\
gpu        embed L0 b0
gpu        layer L0 b0
gpu        layer L1 b0
gpu        gather L1 b0
gpu        head L2 b0
";
    assert_eq!(text(&steps), expected);
}

#[test]
fn three_tiers_in_golden_text() {
    let policy = Policy {
        weights: Split { gpu: 0.25, cpu: 0.25, disk: 0.5 },
        kv: Split { gpu: 0.5, cpu: 0.5, disk: 0.0 },
        ..policy()
    };
    let placement = Placement::new(&model(2, 4), &policy, Tier::Gpu);
    let blocks = [
        block(Pages { cpu: 3, disk: 0 }, Pages { cpu: 1, disk: 0 }),
        block(Pages { cpu: 2, disk: 0 }, Pages::default()),
    ];
    let mut carried = Carried::default();
    let steps = lower(&placement, &blocks, &mut carried);
    let expected = "\
h2d        load_weights 1..2 L0 b0  - -> w0
disk_read  read_weights 2..4 L0 b0  - -> ws0
h2d        load_weights 2..4 L0 b0  ws0 -> w0
h2d        load_kv L0 b0  kv@cpu.0.1 -> kv0
h2d        load_kv L0 b1  kv@cpu.0.1 -> kv1
h2d        load_weights 1..2 L1 b0  - -> w1
gpu        embed L0 b0
gpu        layer L0 b0  w0,kv0 -> kv0
d2h        store_kv L0 b0  kv0 -> kv@cpu.0.0
h2d        load_kv L1 b0  kv@cpu.1.1 -> kv0
disk_read  read_weights 2..4 L1 b1  - -> ws1
h2d        load_weights 2..4 L1 b1  ws1 -> w1
gpu        embed L0 b1
gpu        layer L0 b1  w0,kv1 -> -
h2d        load_kv L1 b1  kv@cpu.1.1 -> kv1
h2d        load_weights 1..2 L0 b0  - -> w0
gpu        layer L1 b0  w1,kv0 -> kv0
d2h        store_kv L1 b0  kv0 -> kv@cpu.1.0
gpu        gather L1 b0
disk_read  read_weights 2..4 L0 b1  - -> ws2
h2d        load_weights 2..4 L0 b1  ws2 -> w0
gpu        layer L1 b1  w1,kv1 -> -
gpu        gather L1 b1
gpu        head L2 b0
";
    assert_eq!(text(&steps), expected);
    let next = lower(&placement, &blocks, &mut carried);
    assert!(text(&next).starts_with("h2d        load_kv L0 b0"), "the first layer's weights came with the pass before");
}

/// Uniform numbers in a fixed order.
struct Dice(Philox, u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Dice(Philox::new(seed, 7), 0)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.1 += 1;
        self.0.words(self.1)[0] as usize % bound
    }

    fn split(&mut self) -> Split {
        let parts = [self.below(4), self.below(4), self.below(4)];
        let sum = parts.iter().sum::<usize>().max(1) as f64;
        let [gpu, cpu, disk] = parts.map(|part| part as f64 / sum);
        Split { gpu: if parts.iter().all(|&part| part == 0) { 1.0 } else { gpu }, cpu, disk }
    }

    fn tier(&mut self) -> Tier {
        Tier::ALL[self.below(3)]
    }
}

fn random(dice: &mut Dice) -> (Placement, Vec<Vec<BlockShape>>) {
    let mut model = model(1 + dice.below(4), 1 + dice.below(7));
    model.tied = dice.below(2) == 0;
    let policy = Policy {
        blocks: 1 + dice.below(4),
        weight_slots: 1 + dice.below(4),
        kv_slots: 1 + dice.below(4),
        weights: dice.split(),
        kv: dice.split(),
        hidden: dice.split(),
        embed: dice.tier(),
        head: dice.tier(),
        compressed: dice.below(3) == 0,
        pages: 40,
        ..policy()
    };
    let compute = if dice.below(2) == 0 { Tier::Gpu } else { Tier::Cpu };
    let placement = Placement::new(&model, &policy, compute);
    let has = |tier: Tier| placement.pages[tier as usize] > 0 && tier != compute;
    let passes = (0..5)
        .map(|_| {
            let mut pages = |least: usize| Pages {
                cpu: if has(Tier::Cpu) { least + dice.below(3) } else { 0 },
                disk: if has(Tier::Disk) { least + dice.below(3) } else { 0 },
            };
            let blocks: Vec<BlockShape> = (0..policy.blocks).map(|_| block(pages(0), pages(0))).collect();
            blocks[..1 + dice.below(policy.blocks)].to_vec()
        })
        .collect();
    (placement, passes)
}

#[test]
fn random_placements_lower_to_correct_programs() {
    for seed in 0..400 {
        let mut dice = Dice::new(seed);
        let (placement, passes) = random(&mut dice);
        let (mut carried, mut checker) = (Carried::default(), Checker::new());
        let (mut fences, mut all, mut all_fences) = (Fences::new(), Vec::new(), Vec::new());
        for blocks in &passes {
            let steps = lower(&placement, blocks, &mut carried);
            if let Err(fault) = checker.pass(&placement, blocks, &steps) {
                panic!("seed {seed}: {}\n{}", fault.what, text(&steps[..=fault.index.min(steps.len() - 1)]));
            }
            all_fences.extend(fences.of(&steps));
            all.extend(steps);
        }
        if let Err(fault) = check_fences(&all, &all_fences, Default::default()) {
            panic!("seed {seed}: {}", fault.what);
        }
    }
}

/// A checker that accepts everything would pass the test above: every step that brings something is needed.
#[test]
fn a_missing_transfer_or_fence_is_found() {
    let (mut found, mut faults) = (0, 0);
    for seed in 0..200 {
        let (placement, passes) = random(&mut Dice::new(seed));
        let steps = lower(&placement, &passes[0], &mut Carried::default());
        let needed = |step: &Step| !matches!(step.op, Op::Gather | Op::Head | Op::StoreKv | Op::WriteKv);
        for (index, _) in steps.iter().enumerate().filter(|(_, step)| needed(step)) {
            let mut broken = steps.clone();
            let removed = broken.remove(index);
            let ahead =
                matches!(removed.op, Op::ReadWeights { .. } | Op::DecodeWeights { .. } | Op::LoadWeights { .. });
            let fault = Checker::new().pass(&placement, &passes[0], &broken);
            // Weights for the next pass, and embeddings with the device, leave no trace in this one.
            if !ahead && removed.op != Op::Embed {
                assert!(fault.is_err(), "seed {seed}: nobody misses `{removed}`");
            }
            found += usize::from(fault.is_err());
        }
        let mut fences = Fences::new().of(&steps);
        let waits = fences.iter().enumerate().rev().find_map(|(index, fence)| {
            let own = steps[index].lane.index();
            (0..fence.len()).find(|&lane| lane != own && fence[lane] > 0).map(|lane| (index, lane))
        });
        if let Some((index, lane)) = waits {
            fences[index][lane] = 0;
            faults += usize::from(check_fences(&steps, &fences, Default::default()).is_err());
        }
    }
    assert!(found > 1000 && faults > 50, "{found} missing transfers, {faults} missing fences");
}

#[test]
fn rounded_shares_add_up() {
    for seed in 0..300 {
        let (placement, _) = random(&mut Dice::new(seed));
        assert_eq!(placement.total_pages(), placement.policy.pages);
        assert_eq!(placement.hidden.len(), placement.policy.blocks);
        let layers = &placement.stages[..placement.num_layers];
        let total: usize = layers.iter().map(|stage| stage.chunks.len()).sum();
        let disk: usize = layers.iter().map(|stage| stage.disk).sum();
        let wanted = placement.policy.weights.disk * total as f64;
        assert!((disk as f64 - wanted).abs() <= 1.0, "{disk} chunks on disk for {wanted}");
        let per_layer: Vec<usize> = layers.iter().map(|stage| stage.disk).collect();
        let spread = per_layer.iter().max().unwrap() - per_layer.iter().min().unwrap();
        assert!(spread <= 2, "layers stream {per_layer:?} chunks");
    }
}

#[test]
#[should_panic(expected = "six slots at most")]
fn a_seventh_slot_is_a_bug() {
    let _ = (0..7).fold(Slots::none(), |slots, index| slots.and(Slot::Weights(index)));
}
