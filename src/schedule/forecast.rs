//! How many pages the sequences in flight will hold, from how long each is expected to go on.
//!
//! Every sequence grows by a token a pass until it ends and gives back what it alone holds. Over some stretches of
//! time the expected change is summed; the greatest sum is what must be free now. Where lengths are certain this is no
//! more than reserving for each, and less where they end at different times. Where they are not, more may be needed
//! than is expected, and somebody is paused: that computes 3 to 7 % of rows twice, where keeping a standard deviation
//! free leaves a tenth of the cache empty (bench_results/ragged-job.md).
//!
//! **Invariant:** within a stretch a sequence counts as alive as at its beginning and as long as at its end, so with
//! certain lengths the forecast is never too low.

/// Ends of the stretches, in tokens from now.
const ENDS: [usize; 20] =
    [2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 1 << 32];

/// Pages needed beyond those that are held now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forecast {
    expected: [f64; ENDS.len()],
}

impl Forecast {
    /// Adds a sequence that alone holds some pages: those that it will hold more while its prompt is read, those that
    /// it will hold more (or fewer) after so many further tokens, and the probability that it goes on for more than so
    /// many.
    pub fn add(
        &mut self,
        alone: usize,
        reading: usize,
        grown: impl Fn(usize) -> isize,
        goes_on: impl Fn(usize) -> f64,
    ) {
        let (mut from, down) = (0, alone as f64);
        for (stretch, &end) in ENDS.iter().enumerate() {
            let (alive, up) = (goes_on(from), grown(end) as f64);
            // Whoever asks again finds it still reading, however many passes that takes.
            let up = if stretch == 0 { up.max(reading as f64) } else { up };
            self.expected[stretch] += alive * up - (1.0 - alive) * down;
            from = end;
        }
    }

    /// Pages that must be free, or could be freed, now.
    pub fn peak(&self) -> f64 {
        self.expected.into_iter().fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGE: usize = 64;

    /// Adds a sequence of `len` positions that ends after `left` more.
    fn add(forecast: &mut Forecast, len: usize, left: usize) {
        let held = len.div_ceil(PAGE);
        let grown = |more: usize| ((len + more.min(left)).div_ceil(PAGE) - held) as isize;
        forecast.add(held, 0, grown, |more| if more < left { 1.0 } else { 0.0 });
    }

    #[test]
    fn sequences_that_end_make_room_for_those_that_grow() {
        let mut forecast = Forecast::default();
        // 20 pages go back after 64 tokens, before the other has taken 16 more.
        add(&mut forecast, 20 * PAGE, 64);
        add(&mut forecast, PAGE, 16 * PAGE);
        assert!(forecast.peak() <= 3.0, "{}", forecast.peak());
    }

    #[test]
    fn uncertain_lengths_need_less_than_the_longest_and_more_than_the_mean() {
        let (mut forecast, count, mean) = (Forecast::default(), 100, 64.0);
        for _ in 0..count {
            forecast.add(1, 0, |more| (more.min(1024) / PAGE) as isize, |more| (-(more as f64) / mean).exp());
        }
        let peak = forecast.peak();
        assert!(peak > 20.0 && peak < 100.0, "{peak}");
    }

    #[test]
    fn prompts_that_shrink_make_room_for_those_that_grow() {
        let mut forecast = Forecast::default();
        // It needs 8 pages more for its prompt and has 6 fewer then, when the other takes 10.
        forecast.add(2, 8, |_| 2, |_| 1.0);
        assert_eq!(forecast.peak(), 8.0);
        forecast.add(12, 0, |more| if more < 64 { 0 } else { -6 }, |_| 1.0);
        forecast.add(1, 0, |more| if more < 64 { 0 } else { 10 }, |_| 1.0);
        assert_eq!(forecast.peak(), 8.0);
        forecast.add(1, 0, |more| if more < 64 { 0 } else { 10 }, |_| 1.0);
        assert_eq!(forecast.peak(), 16.0);
    }

    proptest! {
        /// Whatever sequences there are, if all lengths are certain nothing ever needs more than the forecast, nor does
        /// the forecast ask for more than a reservation for each.
        #[test]
        fn certain_lengths_never_need_more(sequences in prop::collection::vec((1usize..3000, 1usize..5000), 1..40)) {
            let mut forecast = Forecast::default();
            sequences.iter().for_each(|&(len, left)| add(&mut forecast, len, left));
            let pages = |positions: usize| positions.div_ceil(PAGE) as f64;
            let held: f64 = sequences.iter().map(|&(len, _)| pages(len)).sum();
            let at = |time: usize| -> f64 {
                let going = sequences.iter().filter(|&&(_, left)| time < left);
                going.map(|&(len, _)| pages(len + time)).sum()
            };
            let most = (0..5000).map(at).fold(held, f64::max);
            let reserved: f64 = sequences.iter().map(|&(len, left)| pages(len + left)).sum();
            prop_assert!(held + forecast.peak() >= most, "{} and {most}", held + forecast.peak());
            prop_assert!(held + forecast.peak() <= reserved);
        }
    }
}
