//! Where things live and how much is computed together.
//!
//! **Invariant:** a policy is placement alone: no field of it can change a token.

use serde::{Deserialize, Serialize};

use crate::error::Tier;

/// Shares of something over the tiers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Split {
    /// In device memory; 0 where the CPU computes.
    #[serde(default)]
    pub gpu: f64,
    /// In main memory.
    #[serde(default)]
    pub cpu: f64,
    /// In files.
    #[serde(default)]
    pub disk: f64,
}

impl Split {
    /// Everything in one tier.
    pub fn all(tier: Tier) -> Self {
        let share = |of: Tier| f64::from(u8::from(of == tier));
        Split { gpu: share(Tier::Gpu), cpu: share(Tier::Cpu), disk: share(Tier::Disk) }
    }

    /// The share of a tier.
    pub fn share(&self, tier: Tier) -> f64 {
        match tier {
            Tier::Gpu => self.gpu,
            Tier::Cpu => self.cpu,
            Tier::Disk => self.disk,
        }
    }

    /// Whole items per tier, out of `total`: shares rounded so that they add up, the remainder to the largest parts.
    pub fn round(&self, total: usize) -> [usize; 3] {
        let shares = [self.gpu, self.cpu, self.disk];
        let exact = shares.map(|share| share * total as f64);
        let mut whole = exact.map(|exact| (exact + 1e-9).floor() as usize);
        let mut order = [0, 1, 2];
        order.sort_by(|&a, &b| (exact[b] - exact[b].floor()).total_cmp(&(exact[a] - exact[a].floor())));
        let mut left = total.saturating_sub(whole.iter().sum());
        for index in order.into_iter().cycle().filter(|&index| shares[index] > 0.0).take(3 * total + 3) {
            if left == 0 {
                break;
            }
            whole[index] += 1;
            left -= 1;
        }
        whole
    }
}

/// `--schedule`: whether prompts and answers share passes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Prompts are computed beside the tokens of those who decode, and take the places of those who end.
    #[default]
    Mixed,
    /// A batch begins together: first all of its prompts, then its answers, and the next one when all have ended.
    Phased,
}

/// A placement policy, before rounding. Section 3 of the design has the search that finds one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Policy {
    /// Sequences in flight.
    pub sequences: usize,
    /// Prompt tokens in a pass.
    pub chunk_tokens: usize,
    /// Blocks of a pass, at most.
    pub blocks: usize,
    /// Rows of a block, at most.
    pub block_rows: usize,
    /// Stages whose streamed weights the device holds at once: one that computes, the others on their way.
    pub weight_slots: usize,
    /// Blocks whose streamed KV pages (and hidden states) the device holds at once.
    pub kv_slots: usize,
    /// Pages of the KV cache, over all tiers; 64 positions each.
    pub pages: usize,
    /// Streamed pages that a block may have, at most.
    pub block_pages: usize,
    /// Pages in files for sequences that are paused, beside those of the cache; who finds none there is computed again.
    #[serde(default)]
    pub paused_pages: usize,
    /// Decoder layers, and a head that is not resident.
    pub weights: Split,
    /// Pages of the KV cache.
    pub kv: Split,
    /// Hidden states between layers, by whole blocks.
    pub hidden: Split,
    /// Where the embedding table lies.
    pub embed: Tier,
    /// Where the head lies; streamed like a layer if that is not where it is computed.
    pub head: Tier,
    /// Weights on disk are read as compressed planes.
    pub compressed: bool,
    /// Whether prompts and answers share passes.
    #[serde(default)]
    pub schedule: Order,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_adds_up_and_follows_the_shares() {
        let split = Split { gpu: 0.2, cpu: 0.5, disk: 0.3 };
        assert_eq!(split.round(10), [2, 5, 3]);
        for total in 0..200 {
            let whole = split.round(total);
            assert_eq!(whole.iter().sum::<usize>(), total);
            for (whole, share) in whole.iter().zip([0.2, 0.5, 0.3]) {
                assert!((*whole as f64 - share * total as f64).abs() < 1.0 + 1e-6);
            }
        }
        assert_eq!(Split::all(Tier::Cpu).round(7), [0, 7, 0]);
    }
}
