//! ROUGE (Lin 2004) as `rouge_score` computes it, with its stemmer: what HELM reports for summaries.
//!
//! **Invariant:** scores are F-measures in [0, 1]; a text without words scores 0.

use std::collections::HashMap;

use super::stem::stem;

/// Which units are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Units {
    /// Runs of this many words.
    Words(usize),
    /// The longest common subsequence of words.
    Subsequence,
}

/// The F-measure of `found` against `wanted`.
pub fn rouge(units: Units, wanted: &str, found: &str) -> f64 {
    let (wanted, found) = (words(wanted), words(found));
    let (common, of_wanted, of_found) = match units {
        Units::Words(count) => {
            let (wanted, found) = (counted(&wanted, count), counted(&found, count));
            let common = wanted.iter().map(|(run, times)| (*times).min(found.get(run).copied().unwrap_or(0))).sum();
            (common, wanted.values().sum(), found.values().sum())
        }
        Units::Subsequence => (longest(&wanted, &found), wanted.len(), found.len()),
    };
    let share = |of: usize| common as f64 / of.max(1) as f64;
    let (precision, recall) = (share(of_found), share(of_wanted));
    if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

/// Stems of the words; those of three letters and less stay as they are.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()).filter(|word| !word.is_empty());
    words.map(|word| if word.len() > 3 { stem(word) } else { word.to_owned() }).collect()
}

fn counted(words: &[String], count: usize) -> HashMap<&[String], usize> {
    let mut runs = HashMap::new();
    for run in words.windows(count) {
        *runs.entry(run).or_insert(0) += 1;
    }
    runs
}

/// The length of the longest common subsequence; time |a| x |b|, memory |b|.
fn longest(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (column, other) in b.iter().enumerate() {
            let above = row[column + 1];
            row[column + 1] = if word == other { diagonal + 1 } else { above.max(row[column]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
