//! How an answer compares with a reference: HELM's definitions (formats, section 2.4).
//!
//! **Invariant:** every score is in [0, 1]; an empty answer matches nothing.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use fancy_regex::Regex;

use super::rouge::{Units, rouge};

/// A comparison of an answer with a reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Equal but for space around.
    Exact,
    /// Equal as words without case, punctuation and articles.
    QuasiExact,
    /// The answer begins with the reference.
    Prefix,
    /// The answer begins with the reference, as words.
    QuasiPrefix,
    /// The share of words in common.
    F1,
    /// Equal as sets of things (`The answer is a and b.`).
    SetExact,
    /// Intersection over union of such sets.
    SetIou,
    /// The share of things in common.
    SetF1,
    /// Runs of words in common.
    Rouge(Units),
}

impl Score {
    /// Names as HELM writes them.
    pub const ALL: [(&'static str, Score); 11] = [
        ("exact_match", Score::Exact),
        ("quasi_exact_match", Score::QuasiExact),
        ("prefix_exact_match", Score::Prefix),
        ("quasi_prefix_exact_match", Score::QuasiPrefix),
        ("f1_score", Score::F1),
        ("rouge_1", Score::Rouge(Units::Words(1))),
        ("rouge_2", Score::Rouge(Units::Words(2))),
        ("rouge_l", Score::Rouge(Units::Subsequence)),
        ("exact_set_match", Score::SetExact),
        ("iou_set_match", Score::SetIou),
        ("f1_set_match", Score::SetF1),
    ];

    /// The score of a name.
    pub fn named(name: &str) -> Option<Score> {
        Score::ALL.iter().find(|(known, _)| *known == name).map(|(_, score)| *score)
    }

    /// How well `answer` does against `reference`.
    pub fn of(self, reference: &str, answer: &str) -> f64 {
        let yes = |holds: bool| if holds { 1.0 } else { 0.0 };
        let given = !answer.is_empty();
        match self {
            Score::Exact => yes(given && strip(reference) == strip(answer)),
            Score::QuasiExact => yes(given && normalized(reference) == normalized(answer)),
            Score::Prefix => yes(given && strip(answer).starts_with(strip(reference))),
            Score::QuasiPrefix => yes(given && normalized(answer).starts_with(&normalized(reference))),
            Score::F1 => {
                let (reference, answer) = (normalized(reference), normalized(answer));
                f_measure(&set(reference.split(' ')), &set(answer.split(' ')))
            }
            Score::SetExact => yes(things(reference) == things(first_line(answer))),
            Score::SetIou | Score::SetF1 => {
                let (reference, answer) = (things(reference), things(first_line(answer)));
                if reference.is_empty() {
                    return yes(answer.is_empty());
                }
                let common = reference.intersection(&answer).count() as f64;
                match self {
                    Score::SetIou => common / reference.union(&answer).count() as f64,
                    _ => 2.0 * common / (reference.len() + answer.len()) as f64,
                }
            }
            Score::Rouge(units) => rouge(units, reference, answer),
        }
    }
}

/// What Python takes for space.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// A text without space around.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// Lower case, without ASCII punctuation and English articles, single spaces.
pub fn normalized(text: &str) -> String {
    static ARTICLE: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?<![\p{L}\p{N}_])(?:a|an|the)(?![\p{L}\p{N}_])").expect("the pattern is valid"));
    let bare: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let bare = ARTICLE.replace_all(&bare, " ");
    bare.split(is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn set<'a>(words: impl Iterator<Item = &'a str>) -> BTreeSet<&'a str> {
    words.filter(|word| !word.is_empty()).collect()
}

fn f_measure(reference: &BTreeSet<&str>, answer: &BTreeSet<&str>) -> f64 {
    let common = reference.intersection(answer).count() as f64;
    let share = |of: &BTreeSet<&str>| if of.is_empty() { 0.0 } else { common / of.len() as f64 };
    let (precision, recall) = (share(answer), share(reference));
    if precision + recall > 0.0 { 2.0 * precision * recall / (precision + recall) } else { 0.0 }
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or_default()
}

/// The things that a sentence such as `Carol is big and red.` names.
fn things(text: &str) -> BTreeSet<String> {
    if text == "Nothing." {
        return BTreeSet::new();
    }
    let text = text.replace('.', "");
    let last = text.rsplit(" is ").next().unwrap_or_default();
    last.split(" and ").map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_normalized_as_helm_does() {
        for (text, expected) in [
            ("The U.S.A.", "usa"),
            ("  An apple, a day! ", "apple day"),
            ("theatre a-the b", "theatre athe b"),
            ("don't", "dont"),
            ("“a” — an", "“ ” —"),
        ] {
            assert_eq!(normalized(text), expected);
        }
    }

    #[test]
    fn words_in_common() {
        assert!((Score::F1.of("the cat sat", "a cat sat down") - 0.8).abs() < 1e-12);
        assert!((Score::F1.of("x x y", "x") - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(Score::F1.of("the", "x"), 0.0);
    }

    proptest! {
        #[test]
        fn scores_are_shares_and_a_text_matches_itself(a in "[a-c the.\\PC]{0,24}", b in "[a-c the.\\PC]{0,24}") {
            for (name, score) in Score::ALL {
                let value = score.of(&a, &b);
                prop_assert!((0.0..=1.0).contains(&value), "{} {}", name, value);
            }
            for score in [Score::Exact, Score::QuasiExact, Score::Prefix, Score::QuasiPrefix] {
                prop_assert_eq!(score.of(&a, &a), if a.is_empty() { 0.0 } else { 1.0 });
            }
            prop_assert_eq!(Score::Rouge(Units::Words(1)).of(&a, &b), Score::Rouge(Units::Words(1)).of(&b, &a));
        }
    }
}
