//! The stemmer of ROUGE: Porter's algorithm (1980) with the departures of NLTK, which `rouge_score` uses.
//!
//! **Invariant:** words of lower-case ASCII letters and digits stem as NLTK's `PorterStemmer` stems them.

/// A word that does not follow the rules.
const IRREGULAR: [(&str, &str); 15] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
];

/// Suffixes and what replaces them where something is left to pronounce.
const DERIVATIONS: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
];

const ENDINGS: [(&str, &str); 7] =
    [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")];

const TAILS: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
];

/// The stem of a word of lower-case ASCII letters and digits.
pub fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == word) {
        return (*stem).to_owned();
    }
    if word == "succeed" || word.len() <= 2 {
        return word.to_owned();
    }
    let word = participle(plural(word.to_owned()));
    let word = derivation(final_y(word));
    let word = match ENDINGS.iter().find(|(suffix, _)| word.ends_with(suffix)) {
        Some((suffix, other)) => replaced(&word, suffix, other, |stem| measure(stem) > 0),
        None => word,
    };
    double_l(final_e(tail(word)))
}

/// Which letters are consonants; `y` is one unless it follows one.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for letter in word.bytes() {
        flags.push(match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => flags.last().is_none_or(|before| !before),
            _ => true,
        });
    }
    flags
}

/// How often a vowel is followed by a consonant.
fn measure(word: &str) -> usize {
    consonants(word).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

/// Whether the last three letters are consonant, vowel and consonant other than w, x, y; or the only two vowel and
/// consonant.
fn ends_short(word: &str) -> bool {
    let last = word.bytes().last();
    match &consonants(word)[..] {
        [.., true, false, true] => !matches!(last, Some(b'w' | b'x' | b'y')),
        [false, true] => true,
        _ => false,
    }
}

/// The word with another suffix if what is left fulfils a condition, else as it is.
fn replaced(word: &str, suffix: &str, other: &str, condition: impl Fn(&str) -> bool) -> String {
    match word.strip_suffix(suffix) {
        Some(stem) if condition(stem) => format!("{stem}{other}"),
        _ => word.to_owned(),
    }
}

fn plural(word: String) -> String {
    let always = |_: &str| true;
    if word.ends_with("ies") {
        return replaced(&word, "ies", if word.len() == 4 { "ie" } else { "i" }, always);
    }
    if word.ends_with("sses") {
        return replaced(&word, "sses", "ss", always);
    }
    if word.ends_with("ss") { word } else { replaced(&word, "s", "", always) }
}

fn participle(word: String) -> String {
    if word.ends_with("ied") {
        return replaced(&word, "ied", if word.len() == 4 { "ie" } else { "i" }, |_| true);
    }
    if word.ends_with("eed") {
        return replaced(&word, "eed", "ee", |stem| measure(stem) > 0);
    }
    let stems = ["ed", "ing"].into_iter().filter_map(|suffix| word.strip_suffix(suffix));
    let Some(stem) = stems.into_iter().find(|stem| consonants(stem).contains(&false)) else { return word };
    if ["at", "bl", "iz"].iter().any(|end| stem.ends_with(end)) {
        return format!("{stem}e");
    }
    let doubled = match stem.as_bytes() {
        [.., a, b] => a == b && consonants(stem).last() == Some(&true),
        _ => false,
    };
    if doubled {
        let stays = stem.ends_with(['l', 's', 'z']);
        return stem[..stem.len() - usize::from(!stays)].to_owned();
    }
    if measure(stem) == 1 && ends_short(stem) { format!("{stem}e") } else { stem.to_owned() }
}

fn final_y(word: String) -> String {
    replaced(&word, "y", "i", |stem| stem.len() > 1 && consonants(stem).last() == Some(&true))
}

fn derivation(word: String) -> String {
    let positive = |stem: &str| measure(stem) > 0;
    if let Some(stem) = word.strip_suffix("alli").filter(|stem| positive(stem)) {
        return derivation(format!("{stem}al"));
    }
    match DERIVATIONS.iter().find(|(suffix, _)| word.ends_with(suffix)) {
        Some((suffix, other)) => replaced(&word, suffix, other, positive),
        None => replaced(&word, "logi", "log", |stem| positive(&format!("{stem}l"))),
    }
}

fn tail(word: String) -> String {
    match TAILS.iter().find(|suffix| word.ends_with(**suffix)) {
        Some(&"ion") => replaced(&word, "ion", "", |stem| measure(stem) > 1 && stem.ends_with(['s', 't'])),
        Some(suffix) => replaced(&word, suffix, "", |stem| measure(stem) > 1),
        None => word,
    }
}

fn final_e(word: String) -> String {
    replaced(&word, "e", "", |stem| measure(stem) > 1 || (measure(stem) == 1 && !ends_short(stem)))
}

fn double_l(word: String) -> String {
    replaced(&word, "ll", "l", |stem| measure(&format!("{stem}l")) > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_paper() {
        let cases = [
            ("caresses", "caress"),
            ("ponies", "poni"),
            ("ties", "tie"),
            ("cats", "cat"),
            ("agreed", "agre"),
            ("plastered", "plaster"),
            ("motoring", "motor"),
            ("conflated", "conflat"),
            ("hopping", "hop"),
            ("hissing", "hiss"),
            ("filing", "file"),
            ("happy", "happi"),
            ("enjoy", "enjoy"),
            ("relational", "relat"),
            ("vietnamization", "vietnam"),
            ("hopefulness", "hope"),
            ("adjustment", "adjust"),
            ("adoption", "adopt"),
            ("controll", "control"),
            ("rate", "rate"),
            ("cease", "ceas"),
        ];
        for (word, expected) in cases {
            assert_eq!(stem(word), expected, "{word}");
        }
    }
}
