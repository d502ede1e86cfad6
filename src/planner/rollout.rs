//! A finite job as the passes it takes: filling up, steady, draining.
//!
//! **Invariant:** passes are composed as the engine composes them: every sequence that decodes has a row in every
//! pass, prompts share what the chunk leaves, first come first served, and nobody begins beyond the places.

use std::collections::VecDeque;

use super::job::{Job, PassLoad};

/// Sequences that are followed one by one, in places; what is beyond goes at the steady rate.
const ROUNDS: usize = 6;

/// Seconds and passes of a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rollout {
    /// Seconds from the first pass to the last.
    pub secs: f64,
    /// How many passes.
    pub passes: f64,
}

/// Sequences of a pass that became ready to decode together.
struct Cohort {
    count: usize,
    left: usize,
}

/// Runs `job` with `sequences` places and `chunk_tokens` prompt tokens a pass; `price` gives the seconds of a pass.
pub fn rollout(job: &Job, sequences: usize, chunk_tokens: usize, price: &mut dyn FnMut(&PassLoad) -> f64) -> Rollout {
    let followed = job.requests.min(ROUNDS * sequences);
    let steps = (job.gen_len.round() as usize).max(1);
    let mut cohorts: VecDeque<Cohort> = VecDeque::new();
    let (mut waiting, mut prefilling, mut decoding) = (followed, 0, 0);
    // Prompt tokens of the first prompt in line that are done.
    let mut done = 0.0;
    let mut total = Rollout { secs: 0.0, passes: 0.0 };
    // Passes with a full house, for the rest of the job.
    let mut steady = Rollout { secs: 0.0, passes: 0.0 };
    let mut steady_prompts = 0.0;
    while waiting + prefilling + decoding > 0 {
        let begin = waiting.min(sequences - prefilling - decoding);
        (waiting, prefilling) = (waiting - begin, prefilling + begin);
        let tokens = (prefilling as f64 * job.fresh_len - done).min(chunk_tokens as f64);
        let prompts = ((done + tokens) / job.fresh_len + 1e-9).floor().min(prefilling as f64);
        let load = PassLoad { prompt_tokens: tokens, prompts, decodes: decoding as f64 };
        let secs = price(&load);
        total = Rollout { secs: total.secs + secs, passes: total.passes + 1.0 };
        done += tokens - prompts * job.fresh_len;
        // The last of a few rounds, with somebody still waiting: as steady as it gets.
        let begun = followed - waiting;
        if waiting > 0 && begun > (ROUNDS / 2) * sequences {
            steady = Rollout { secs: steady.secs + secs, passes: steady.passes + 1.0 };
            steady_prompts += tokens / job.fresh_len;
        }
        cohorts.iter_mut().for_each(|cohort| cohort.left -= 1);
        while cohorts.front().is_some_and(|cohort| cohort.left == 0) {
            decoding -= cohorts.pop_front().map_or(0, |cohort| cohort.count);
        }
        prefilling -= prompts as usize;
        if steps > 1 && prompts > 0.0 {
            cohorts.push_back(Cohort { count: prompts as usize, left: steps - 1 });
            decoding += prompts as usize;
        }
    }
    let rest = (job.requests - followed) as f64;
    if rest > 0.0 && steady_prompts > 0.0 {
        let factor = rest / steady_prompts;
        total = Rollout { secs: total.secs + factor * steady.secs, passes: total.passes + factor * steady.passes };
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_computed_once() {
        for (requests, sequences, chunk) in [(1, 1, 64), (10, 4, 64), (100, 16, 2000), (500, 64, 300), (64, 64, 5000)] {
            let job = Job::uniform(requests, 100, 10);
            let (mut prompt, mut prompts, mut decodes) = (0.0, 0.0, 0.0);
            let result = rollout(&job, sequences, chunk, &mut |load| {
                prompt += load.prompt_tokens;
                prompts += load.prompts;
                decodes += load.decodes;
                assert!(load.decodes <= sequences as f64 && load.prompt_tokens <= chunk as f64);
                1.0
            });
            let followed = requests.min(ROUNDS * sequences) as f64;
            assert!((prompt - 100.0 * followed).abs() < 1e-6, "{prompt}");
            assert_eq!((prompts, decodes), (followed, 9.0 * followed));
            assert!(result.secs >= result.passes);
        }
    }

    #[test]
    fn long_jobs_go_on_at_the_steady_rate() {
        let rate = |requests: usize| {
            let job = Job::uniform(requests, 100, 10);
            let secs = rollout(&job, 50, job.balanced_chunk(50), &mut |load| load.rows()).secs;
            secs / requests as f64
        };
        // Seconds are rows here, so every request takes its own, however many there are.
        assert!((rate(100_000) / rate(100) - 1.0).abs() < 0.01, "{} {}", rate(100_000), rate(100));
    }
}
