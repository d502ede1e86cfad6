//! Groups of 64 weights as small integers: `w = scale * code + offset`, scale and offset in f16.
//!
//! The baseline is FlexGen's (arXiv 2303.06865, section 5): the least weight is code 0, the greatest the last code.
//! Here the range is also clipped by a few ratios, and for each the scale and offset are fitted by least squares to the
//! codes that it gives; what leaves the least squared error is taken. No data but the weights is used.
//!
//! **Invariant:** codes are the nearest ones under the stored, rounded scale and offset, and a group's result depends
//! on its own weights alone. [`Grid::decode`] is one fused multiply-add, on every device.

use half::f16;

/// Weights of a group, along the input.
pub const GROUP: usize = 64;

/// Shares of the range that are tried.
const CLIPS: [f32; 6] = [1.0, 0.94, 0.88, 0.82, 0.76, 0.7];

/// How a group is to be decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// From one code to the next.
    pub scale: f16,
    /// What code 0 stands for.
    pub offset: f16,
}

impl Grid {
    /// What a code stands for.
    pub fn decode(&self, code: u8) -> f32 {
        f32::from(code).mul_add(self.scale.to_f32(), self.offset.to_f32())
    }
}

/// Codes while they are chosen: conversions would take most of the time.
type Codes = [f32; GROUP];

/// The sum of sixteen sums, in few steps that wait for each other.
#[inline(always)]
fn total(mut sums: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    sums[0]
}

/// How well `codes` stand for `weights`: the sum of squared differences.
#[inline(always)]
fn error(weights: &[f32], codes: &Codes, grid: Grid) -> f32 {
    let (scale, offset) = (grid.scale.to_f32(), grid.offset.to_f32());
    let square = |(&weight, &code): (&f32, &f32)| {
        let off = code * scale + offset - weight;
        off * off
    };
    // Sixteen sums, so that they can be made side by side.
    let mut sums = [0f32; 16];
    for (weights, codes) in weights.chunks(16).zip(codes.chunks(16)) {
        for ((sum, weight), code) in sums.iter_mut().zip(weights).zip(codes) {
            *sum += square((weight, code));
        }
    }
    total(sums)
}

/// The nearest codes.
#[inline(always)]
fn quantize(weights: &[f32], grid: Grid, most: f32, codes: &mut Codes) {
    let (scale, offset) = (grid.scale.to_f32(), grid.offset.to_f32());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, weight) in codes.iter_mut().zip(weights) {
        // Comparisons as the processor has them: nothing here is NaN.
        let steps = (weight - offset) * inverse;
        let steps = if steps > 0.0 { steps } else { 0.0 };
        let steps = if steps < most { steps } else { most };
        // With 2^23 added there are no bits left for fractions.
        *code = (steps + 8_388_608.0) - 8_388_608.0;
    }
}

/// The straight line through (code, weight) with the least squared error; a level one through the mean if all codes are
/// alike.
#[inline(always)]
fn fit(weights: &[f32], codes: &Codes) -> Grid {
    let count = weights.len() as f32;
    let (mut sum_code, mut sum_weight, mut squares, mut products) = ([0f32; 16], [0f32; 16], [0f32; 16], [0f32; 16]);
    for (weights, codes) in weights.chunks(16).zip(codes.chunks(16)) {
        for (lane, (&weight, &code)) in weights.iter().zip(codes).enumerate() {
            sum_code[lane] += code;
            sum_weight[lane] += weight;
            squares[lane] += code * code;
            products[lane] += code * weight;
        }
    }
    let (sum_code, sum_weight, squares, products) =
        (total(sum_code), total(sum_weight), total(squares), total(products));
    let spread = squares - sum_code * sum_code / count;
    let scale = (products - sum_code * sum_weight / count) / spread;
    // Without a spread this is no number, or without bounds.
    let scale = if spread > 0.0 && scale > 0.0 { scale } else { 0.0 };
    grid(scale, (sum_weight - scale * sum_code) / count)
}

/// Rounded to what is stored, within the range of f16.
fn grid(scale: f32, offset: f32) -> Grid {
    let round = |value: f32| f16::from_f32(value.clamp(-65_504.0, 65_504.0));
    Grid { scale: round(scale), offset: round(offset) }
}

/// Encodes up to 64 weights with codes up to `most` (15 or 255); codes past the weights become 0.
///
/// # Errors
/// The index of a weight that is not a finite number.
pub fn encode(weights: &[f32], most: u8, codes: &mut [u8; GROUP]) -> Result<Grid, usize> {
    match <&[f32; GROUP]>::try_from(weights) {
        // Loops of a known length are made of vectors.
        Ok(whole) => encode_some(whole, most, codes),
        Err(_) => encode_some(weights, most, codes),
    }
}

#[inline(always)]
fn encode_some(weights: &[f32], most: u8, codes: &mut [u8; GROUP]) -> Result<Grid, usize> {
    assert!(!weights.is_empty() && weights.len() <= GROUP);
    // Sixteen of each, so that they can be made side by side.
    let (mut lows, mut highs, mut poison) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16], [0f32; 16]);
    for weights in weights.chunks(16) {
        for (lane, &weight) in weights.iter().enumerate() {
            lows[lane] = if weight < lows[lane] { weight } else { lows[lane] };
            highs[lane] = if weight > highs[lane] { weight } else { highs[lane] };
            // Of what is not finite this is NaN.
            poison[lane] += 0.0 * weight;
        }
    }
    if poison.iter().any(|poison| poison.is_nan()) {
        return Err(weights.iter().position(|weight| !weight.is_finite()).expect("one of them is not"));
    }
    let low = lows.into_iter().fold(f32::INFINITY, f32::min);
    let high = highs.into_iter().fold(f32::NEG_INFINITY, f32::max);
    codes.fill(0);
    let most = f32::from(most);
    if low == high {
        // What rounding the offset loses, the scale takes up.
        let offset = grid(0.0, low).offset;
        let rest = grid(low - offset.to_f32(), 0.0).scale;
        codes[..weights.len()].fill(1);
        return Ok(Grid { scale: rest, offset });
    }
    let middle = 0.5 * low + 0.5 * high;
    let mut tried = [0f32; GROUP];
    // All are made before the best is taken: a choice in between would stop the processor from working ahead.
    let candidates = CLIPS.map(|clip| {
        let half = clip * (0.5 * high - 0.5 * low);
        let plain = grid(2.0 * half / most, middle - half);
        quantize(weights, plain, most, &mut tried);
        let plain_error = error(weights, &tried, plain);
        let fitted = fit(weights, &tried);
        quantize(weights, fitted, most, &mut tried);
        [(plain, plain_error), (fitted, error(weights, &tried, fitted))]
    });
    let mut best = (grid(0.0, middle), f32::INFINITY);
    for &candidate in candidates.as_flattened() {
        if candidate.1 < best.1 {
            best = candidate;
        }
    }
    quantize(weights, best.0, most, &mut tried);
    codes.iter_mut().zip(&tried[..weights.len()]).for_each(|(code, tried)| *code = *tried as u8);
    Ok(best.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    fn normals(seed: u64, count: usize) -> Vec<f32> {
        (0..count.div_ceil(4) as u64).flat_map(|i| Philox::new(seed, 0).normals(i)).take(count).collect()
    }

    fn squared_error(weights: &[f32], codes: &[u8], grid: Grid) -> f64 {
        weights.iter().zip(codes).map(|(&weight, &code)| f64::from(grid.decode(code) - weight).powi(2)).sum()
    }

    /// FlexGen's choice, with scale and offset rounded as ours are.
    fn min_max(weights: &[f32], most: u8) -> f64 {
        let (low, high) = weights.iter().fold((f32::MAX, f32::MIN), |(low, high), &w| (low.min(w), high.max(w)));
        let grid = grid((high - low) / f32::from(most), low);
        let mut codes = [0.0; GROUP];
        quantize(weights, grid, f32::from(most), &mut codes);
        squared_error(weights, &codes.map(|code| code as u8), grid)
    }

    #[test]
    fn never_worse_than_the_least_and_greatest_and_mostly_better() {
        for most in [15, 255] {
            let (mut ours, mut baseline) = (0.0, 0.0);
            for case in 0..400 {
                let mut weights = normals(case, if case % 5 == 0 { 37 } else { GROUP });
                let scale = [1.0, 1e-3, 300.0][case as usize % 3];
                weights.iter_mut().for_each(|weight| *weight *= scale);
                if case % 7 == 0 {
                    weights[5] = 12.0 * scale;
                }
                let mut codes = [0; GROUP];
                let grid = encode(&weights, most, &mut codes).unwrap();
                let (error, simple) = (squared_error(&weights, &codes, grid), min_max(&weights, most));
                assert!(error <= simple * 1.001, "case {case}: {error} {simple}");
                assert!(codes.iter().all(|&code| code <= most));
                let each = f64::from(scale * scale);
                (ours, baseline) = (ours + error / each, baseline + simple / each);
            }
            let better = if most == 15 { 0.9 } else { 0.98 };
            assert!(ours < better * baseline, "{most}: {ours} {baseline}");
        }
    }

    #[test]
    fn codes_are_the_nearest() {
        for case in 0..50 {
            let weights = normals(case, GROUP);
            let mut codes = [0; GROUP];
            let grid = encode(&weights, 15, &mut codes).unwrap();
            for (&weight, &code) in weights.iter().zip(&codes) {
                let chosen = (grid.decode(code) - weight).abs();
                let best = (0..16).map(|code| (grid.decode(code) - weight).abs()).fold(f32::MAX, f32::min);
                assert!(chosen <= best * 1.0001 + 1e-6, "{weight}: {chosen} {best}");
            }
        }
    }

    #[test]
    fn extremes_stay_finite_and_near() {
        let near = |weights: &[f32], most: u8, tolerance: f32| {
            let mut codes = [0; GROUP];
            let grid = encode(weights, most, &mut codes).unwrap();
            for (&weight, &code) in weights.iter().zip(&codes) {
                let got = grid.decode(code);
                assert!((got - weight).abs() <= tolerance, "{weight} became {got}");
            }
        };
        near(&[0.0; 64], 15, 0.0);
        near(&[0.1; 64], 15, 1e-6);
        near(&[-3.25; 9], 255, 0.0);
        // Below what f16 can step by.
        near(&[1e-40, -1e-40, 0.0, 3e-39], 15, 1e-7);
        near(&[65_000.0, -65_000.0], 15, 100.0);
        near(&[1e-3, 1e-3 + 1e-9], 255, 2e-6);
        let mut outlier = [0.001; 64];
        outlier[3] = 50.0;
        near(&outlier, 255, 0.2);
    }

    #[test]
    fn what_is_not_a_number_is_refused() {
        let mut weights = [0.5; 64];
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            weights[17] = wrong;
            assert_eq!(encode(&weights, 15, &mut [0; GROUP]), Err(17));
        }
    }
}
