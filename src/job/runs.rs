//! Long yes/no sequences, one per line of a job, kept small.
//!
//! **Invariant:** no run but the first is empty, so equal sequences are equal values.

use serde::{Deserialize, Serialize};

/// A sequence of booleans as alternating run lengths, the first run being of `false`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Runs(Vec<u64>);

impl Runs {
    /// Appends one value.
    pub fn push(&mut self, value: bool) {
        self.extend(value, 1);
    }

    /// Appends a value `count` times.
    pub fn extend(&mut self, value: bool, count: u64) {
        if count == 0 {
            return;
        }
        let last_value = self.0.len().checked_sub(1).map(|last| last % 2 == 1);
        if last_value == Some(value) {
            *self.0.last_mut().expect("a last run has a value") += count;
        } else {
            if last_value.is_none() && value {
                self.0.push(0);
            }
            self.0.push(count);
        }
    }

    /// How many values there are.
    pub fn len(&self) -> u64 {
        self.0.iter().sum()
    }

    /// How many of them are `true`.
    pub fn ones(&self) -> u64 {
        self.0.iter().skip(1).step_by(2).sum()
    }

    /// The run lengths.
    pub fn lengths(&self) -> &[u64] {
        &self.0
    }

    /// A sequence from run lengths; none unless they are as [`Runs::lengths`] gives them.
    pub fn from_lengths(lengths: Vec<u64>) -> Option<Self> {
        let sound = lengths.iter().skip(1).all(|&length| length > 0)
            && lengths.iter().try_fold(0u64, |sum, &length| sum.checked_add(length)).is_some();
        sound.then_some(Runs(lengths))
    }

    /// The values one by one.
    pub fn into_values(self) -> Values {
        Values { lengths: self.0.into_iter(), left: 0, value: true }
    }
}

/// The values of a [`Runs`], one by one.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    lengths: std::vec::IntoIter<u64>,
    left: u64,
    value: bool,
}

impl Iterator for Values {
    type Item = bool;

    fn next(&mut self) -> Option<bool> {
        while self.left == 0 {
            self.left = self.lengths.next()?;
            self.value = !self.value;
        }
        self.left -= 1;
        Some(self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back() {
        for bits in 0u32..256 {
            let values: Vec<bool> = (0..8).map(|i| bits >> i & 1 == 1).collect();
            let mut runs = Runs::default();
            values.iter().for_each(|&value| runs.push(value));
            assert_eq!(runs.len(), 8);
            assert_eq!(runs.ones(), u64::from(bits.count_ones()));
            assert_eq!(Runs::from_lengths(runs.lengths().to_vec()), Some(runs.clone()));
            assert_eq!(runs.into_values().collect::<Vec<_>>(), values);
        }
    }
}
