//! Random policies over three tiers.

use super::jobs::Chance;

/// Shares of three tiers; often some are zero.
fn split(chance: &mut Chance) -> String {
    let mut parts = [0, 0, 0].map(|_| if chance.below(2) == 0 { 0 } else { chance.below(8) });
    if parts.iter().all(|&part| part == 0) {
        parts[chance.below(3) as usize] = 1;
    }
    let sum: u64 = parts.iter().sum();
    let [gpu, cpu, disk] = parts.map(|part| part as f64 / sum as f64);
    format!("{{ gpu = {gpu}, cpu = {cpu}, disk = {disk} }}")
}

/// A policy for sequences of up to `context` positions; `planes` says whether weights may come as compressed planes.
pub fn policy(chance: &mut Chance, context: u64, planes: bool) -> String {
    let sequences: u64 = [1, 2, 5, 12, 40][chance.below(5) as usize];
    let blocks = 1 + chance.below(4);
    let longest = context.div_ceil(64) + 1;
    let rows = [sequences, 16, 70][chance.below(3) as usize].max(sequences.div_ceil(blocks));
    let more_pages = [60, 4][chance.below(2) as usize];
    let tier = |chance: &mut Chance| ["gpu", "cpu", "disk"][chance.below(3) as usize];
    let mut text = format!(
        "sequences = {sequences}\nchunk-tokens = {}\nblocks = {blocks}\nblock-rows = {rows}\nweight-slots = {}\n\
         kv-slots = {}\npages = {}\nblock-pages = {}\npaused-pages = {}\nweights = {}\nkv = {}\nhidden = {}\n\
         embed = \"{}\"\nhead = \"{}\"\n",
        [1, 7, 64, 300][chance.below(4) as usize],
        1 + chance.below(4),
        1 + chance.below(4),
        longest + chance.below(more_pages),
        longest + chance.below(30),
        [0, 40][chance.below(2) as usize],
        split(chance),
        split(chance),
        split(chance),
        tier(chance),
        tier(chance),
    );
    if planes && chance.below(2) == 0 {
        text += "compressed = true\n";
    }
    text
}
