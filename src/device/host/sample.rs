//! Drawing and scoring tokens from logits.
//!
//! **Invariant:** candidates are weighed in ascending id with one order of sums, so a draw depends on its row and
//! its rule alone.

use std::cmp::Ordering;

use super::isa::Isa;
use super::softmax::{exponentials, log_normalizer};
use crate::device::sampling::{Draw, Drawn, GREEDY_BELOW, Problem, SampleRule, Target};

/// Answers one question to one row.
pub fn draw(isa: Isa, logits: &[f32], draw: &Draw) -> Drawn {
    let normalizer = log_normalizer(isa, logits);
    let token = match &draw.target {
        Target::Score(token) => Some(*token),
        Target::Sample(rule) => sample(isa, logits, rule),
    };
    let problem =
        if normalizer.is_nan() { Some(Problem::NotFinite) } else { token.is_none().then_some(Problem::NoneAllowed) };
    let token = token.unwrap_or(0);
    let logprob = |token: u32| (f64::from(logits[token as usize]) - normalizer) as f32;
    let top = most_probable(logits, draw.top).into_iter().map(|token| (token, logprob(token))).collect();
    Drawn { token, logprob: logprob(token), top, problem }
}

/// Descending by value, then ascending by id.
fn by_rank(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering {
    move |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

/// The `count` tokens with the greatest logits, best first.
fn most_probable(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, by_rank(logits));
        ids.truncate(count);
    }
    ids.sort_unstable_by(by_rank(logits));
    ids
}

/// The first token with the greatest logit.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] || logits[best].is_nan() {
            best = token;
        }
    }
    best as u32
}

/// The token drawn; none when the rule excludes all.
fn sample(isa: Isa, logits: &[f32], rule: &SampleRule) -> Option<u32> {
    let adjusted = adjust(logits, rule);
    let logits = adjusted.as_deref().unwrap_or(logits);
    let best = greedy(logits);
    let max = logits[best as usize];
    if max == f32::NEG_INFINITY {
        return None;
    }
    if rule.temperature < GREEDY_BELOW || !max.is_finite() {
        return Some(best);
    }
    let mut weights = vec![0f32; logits.len()];
    exponentials(isa, logits, max, 1.0 / rule.temperature, &mut weights);
    // The best token weighs exactly exp(0) = 1, so min_p compares weights directly.
    if rule.min_p > 0.0 {
        weights.iter_mut().filter(|weight| **weight < rule.min_p).for_each(|weight| *weight = 0.0);
    }
    if rule.top_k > 0 && (rule.top_k as usize) < weights.len() {
        keep_top_k(&mut weights, rule.top_k as usize);
    }
    if rule.top_p < 1.0 {
        keep_top_p(&mut weights, f64::from(rule.top_p));
    }
    pick(&weights, rule.uniform).or(Some(best))
}

/// Logits after masks, bias and penalties; none when the rule changes nothing.
fn adjust(logits: &[f32], rule: &SampleRule) -> Option<Vec<f32>> {
    let penalised = rule.repetition_penalty != 1.0 || rule.frequency_penalty != 0.0 || rule.presence_penalty != 0.0;
    if rule.allowed.is_none() && rule.banned.is_empty() && rule.bias.is_empty() && !penalised {
        return None;
    }
    let mut adjusted = match &rule.allowed {
        None => logits.to_vec(),
        Some(allowed) => {
            let mut only = vec![f32::NEG_INFINITY; logits.len()];
            allowed.iter().for_each(|&token| only[token as usize] = logits[token as usize]);
            only
        }
    };
    for &token in rule.banned.iter().filter(|token| (**token as usize) < logits.len()) {
        adjusted[token as usize] = f32::NEG_INFINITY;
    }
    for &(token, bias) in rule.bias.iter() {
        adjusted[token as usize] += bias;
    }
    if penalised {
        for count in rule.counts.iter() {
            let logit = &mut adjusted[count.token as usize];
            *logit = if *logit > 0.0 { *logit / rule.repetition_penalty } else { *logit * rule.repetition_penalty };
            *logit -= rule.frequency_penalty * count.output as f32;
            if count.output > 0 {
                *logit -= rule.presence_penalty;
            }
        }
    }
    Some(adjusted)
}

/// Zeroes all but the `count` greatest weights; ties with the last are kept.
fn keep_top_k(weights: &mut [f32], count: usize) {
    let mut sorted = weights.to_vec();
    let (_, least, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    let least = *least;
    weights.iter_mut().filter(|weight| **weight < least).for_each(|weight| *weight = 0.0);
}

/// Keeps the smallest set of greatest weights whose mass reaches `top_p`, at least one. Going up from the least
/// weight, a token is dropped while the mass up to and including it is at most 1 - top_p.
fn keep_top_p(weights: &mut [f32], top_p: f64) {
    let mut ids: Vec<u32> = (0..weights.len() as u32).filter(|&id| weights[id as usize] > 0.0).collect();
    ids.sort_unstable_by(|a, b| by_rank(weights)(b, a));
    let total: f64 = ids.iter().map(|&id| f64::from(weights[id as usize])).sum();
    let mut mass = 0.0;
    for &id in &ids[..ids.len().saturating_sub(1)] {
        mass += f64::from(weights[id as usize]);
        if mass > (1.0 - top_p) * total {
            break;
        }
        weights[id as usize] = 0.0;
    }
}

/// The token at `uniform` of the total weight, counting up from id 0.
fn pick(weights: &[f32], uniform: f64) -> Option<u32> {
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let target = uniform * total;
    let mut mass = 0.0;
    let mut last = None;
    for (token, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        mass += f64::from(weight);
        last = Some(token as u32);
        if mass > target {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::sampling::TokenCount;
    use crate::rng::Philox;

    fn rule() -> SampleRule {
        SampleRule {
            allowed: None,
            banned: Arc::from([]),
            bias: Arc::from([]),
            counts: Arc::from([]),
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            temperature: 1.0,
            min_p: 0.0,
            top_k: 0,
            top_p: 1.0,
            uniform: 0.0,
        }
    }

    const LOGITS: [f32; 10] = [0.3, -1.2, 2.0, 0.9, 0.9, -3.0, 1.4, 0.0, -0.5, 1.1];

    /// Exact probabilities by a plain f64 reading of the definitions.
    fn exact(rule: &SampleRule) -> Vec<f64> {
        let mut logits: Vec<f64> = LOGITS.iter().map(|&l| f64::from(l)).collect();
        for (token, logit) in logits.iter_mut().enumerate() {
            let token = token as u32;
            if rule.allowed.as_ref().is_some_and(|allowed| !allowed.contains(&token)) || rule.banned.contains(&token) {
                *logit = f64::NEG_INFINITY;
            }
            *logit += rule.bias.iter().filter(|b| b.0 == token).map(|b| f64::from(b.1)).sum::<f64>();
            if let Some(count) = rule.counts.iter().find(|count| count.token == token) {
                let r = f64::from(rule.repetition_penalty);
                *logit = if *logit > 0.0 { *logit / r } else { *logit * r };
                *logit -= f64::from(rule.frequency_penalty) * f64::from(count.output);
                *logit -= if count.output > 0 { f64::from(rule.presence_penalty) } else { 0.0 };
            }
            *logit /= f64::from(rule.temperature);
        }
        let softmax = |logits: &[f64]| {
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exp: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
            let sum: f64 = exp.iter().sum();
            exp.into_iter().map(|e| e / sum).collect::<Vec<_>>()
        };
        let mask = |keep: &dyn Fn(usize) -> bool, logits: &mut [f64]| {
            logits.iter_mut().enumerate().filter(|(i, _)| !keep(*i)).for_each(|(_, l)| *l = f64::NEG_INFINITY);
        };
        let p = softmax(&logits);
        let best = p.iter().copied().fold(0.0, f64::max);
        mask(&|i| p[i] >= f64::from(rule.min_p) * best, &mut logits);
        if rule.top_k > 0 {
            let mut sorted = logits.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let least = sorted[rule.top_k as usize - 1];
            let copy = logits.clone();
            mask(&|i| copy[i] >= least, &mut logits);
        }
        let p = softmax(&logits);
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[a].total_cmp(&p[b]).then(b.cmp(&a)));
        let mut mass = 0.0;
        let mut dropped = Vec::new();
        for &i in &order[..order.len() - 1] {
            mass += p[i];
            if mass <= 1.0 - f64::from(rule.top_p) {
                dropped.push(i);
            }
        }
        mask(&|i| !dropped.contains(&i), &mut logits);
        softmax(&logits)
    }

    /// Chi-square of 40,000 draws against the exact probabilities, for every filter and penalty.
    #[test]
    fn draws_follow_the_exact_distribution() {
        let counts: Arc<[TokenCount]> =
            [(2, 3), (6, 1), (5, 1), (7, 0)].map(|(token, output)| TokenCount { token, output }).into();
        let rules = [
            rule(),
            SampleRule { temperature: 0.5, ..rule() },
            SampleRule { temperature: 1.7, top_k: 4, ..rule() },
            SampleRule { top_k: 4, ..rule() },
            SampleRule { top_p: 0.7, ..rule() },
            SampleRule { min_p: 0.3, ..rule() },
            SampleRule { min_p: 0.1, top_k: 6, top_p: 0.8, temperature: 1.3, ..rule() },
            SampleRule { repetition_penalty: 1.5, counts: counts.clone(), ..rule() },
            SampleRule { frequency_penalty: 0.4, counts: counts.clone(), ..rule() },
            SampleRule { presence_penalty: -0.8, counts: counts.clone(), ..rule() },
            SampleRule { bias: Arc::from([(5, 4.0), (2, -1.0)]), ..rule() },
            SampleRule { allowed: Some(Arc::from([1, 3, 5])), ..rule() },
            SampleRule { banned: Arc::from([2, 6]), top_p: 0.9, ..rule() },
        ];
        let draws = 40_000;
        for (index, rule) in rules.iter().enumerate() {
            let exact = exact(rule);
            let mut seen = [0u32; LOGITS.len()];
            let stream = Philox::new(11, index as u64);
            for i in 0..draws {
                let rule = SampleRule { uniform: stream.uniform(i), ..rule.clone() };
                seen[sample(Isa::detect(), &LOGITS, &rule).unwrap() as usize] += 1;
            }
            let mut chi_square = 0.0;
            let mut kinds = 0;
            for (token, (&seen, &p)) in seen.iter().zip(&exact).enumerate() {
                let expected = p * draws as f64;
                if p == 0.0 {
                    assert_eq!(seen, 0, "rule {index} drew token {token}, which it excludes");
                } else {
                    chi_square += (f64::from(seen) - expected).powi(2) / expected;
                    kinds += 1;
                }
            }
            // The 99.9 % quantile of chi-square with 9 degrees of freedom is 27.9; fewer degrees have less.
            let bound = [0.1, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9][kinds - 1];
            assert!(chi_square < bound, "rule {index}: chi-square {chi_square} over {kinds} tokens");
        }
    }

    #[test]
    fn scores_are_the_log_softmax_and_ties_go_to_the_lower_id() {
        let isa = Isa::detect();
        let drawn = draw(isa, &LOGITS, &Draw { row: 0, target: Target::Score(4), top: 4 });
        let total: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        assert!((f64::from(drawn.logprob) - (0.9 - total.ln())).abs() < 1e-6);
        let ids: Vec<u32> = drawn.top.iter().map(|top| top.0).collect();
        assert_eq!(ids, [2, 6, 9, 3]);
        let greedy = SampleRule { temperature: 0.0, banned: Arc::from([2, 6, 9]), ..rule() };
        assert_eq!(sample(isa, &LOGITS, &greedy), Some(3));
        let nothing = SampleRule { allowed: Some(Arc::from([1])), banned: Arc::from([1]), ..rule() };
        let drawn = draw(isa, &LOGITS, &Draw { row: 0, target: Target::Sample(nothing), top: 0 });
        assert_eq!(drawn.problem, Some(Problem::NoneAllowed));
    }

    #[test]
    fn a_logit_that_is_not_finite_shows() {
        for bad in [f32::NAN, f32::INFINITY] {
            let logits = [0.0, bad, 1.0];
            let drawn = draw(Isa::detect(), &logits, &Draw { row: 0, target: Target::Sample(rule()), top: 0 });
            assert_eq!(drawn.problem, Some(Problem::NotFinite));
        }
    }
}
