//! Many things measured in turn, and the median of each.
//!
//! Machines drift and are shared, so repetitions of one thing are spread over the whole time rather than made in a row.
//!
//! **Invariant:** everything is measured at least once, however long that takes; after that no round begins that would
//! not end in time.

use std::time::{Duration, Instant};

/// Repetitions after which more would tell nothing new.
const MOST_ROUNDS: u32 = 15;

/// Samples of every probe, in the order of `probes`; a probe may decline to give one.
pub fn rounds<P: Copy, E>(
    probes: &[P],
    budget: Duration,
    mut sample: impl FnMut(P) -> Result<Option<f64>, E>,
) -> Result<Vec<Vec<f64>>, E> {
    let began = Instant::now();
    let mut samples = vec![Vec::new(); probes.len()];
    for round in 1..=MOST_ROUNDS {
        for (probe, samples) in probes.iter().zip(&mut samples) {
            samples.extend(sample(*probe)?);
        }
        if began.elapsed() * (round + 1) / round > budget {
            break;
        }
    }
    Ok(samples)
}

/// The middle value, or the mean of the two in the middle; none of nothing.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// Seconds of `work`, and what it gives.
pub fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let began = Instant::now();
    let result = work();
    // A clock that has not moved must not make a rate infinite.
    (began.elapsed().as_secs_f64().max(1e-9), result)
}

/// Seconds per repetition of `work`, repeated for `least` at least.
pub fn repeated(least: Duration, mut work: impl FnMut()) -> f64 {
    let began = Instant::now();
    let mut repetitions = 0;
    loop {
        work();
        repetitions += 1;
        let elapsed = began.elapsed();
        if elapsed >= least {
            return elapsed.as_secs_f64().max(1e-9) / f64::from(repetitions);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn medians_ignore_what_is_far_out() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 100.0, 2.0]), Some(3.0));
    }

    #[test]
    fn probes_take_turns_and_may_decline() {
        let mut order = Vec::new();
        let samples = rounds(&['a', 'b'], Duration::from_secs(3600), |probe| {
            order.push(probe);
            Ok::<_, Infallible>((probe == 'a').then_some(1.0))
        });
        let samples = samples.unwrap();
        assert_eq!(order[..4], ['a', 'b', 'a', 'b']);
        assert_eq!((samples[0].len(), samples[1].len()), (MOST_ROUNDS as usize, 0));
    }

    #[test]
    fn one_round_is_made_without_any_time() {
        let samples = rounds(&[1.0, 2.0], Duration::ZERO, |probe| Ok::<_, Infallible>(Some(probe)));
        assert_eq!(samples.unwrap(), [[1.0], [2.0]]);
    }
}
