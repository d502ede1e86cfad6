//! Metrics against vectors that HELM, `rouge_score` and NLTK gave (scripts/ecosystem/make_vectors.py).
#![allow(missing_docs)]

use serde_json::Value;
use tidemill::eval::stem::stem;
use tidemill::eval::text::Score;

fn vectors() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/metrics.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("read")).expect("JSON")
}

#[test]
fn texts_compare_as_helm_compares_them() {
    let vectors = vectors();
    let names: Vec<&str> = vectors["metrics"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(names.len(), Score::ALL.len());
    let rows = vectors["rows"].as_array().unwrap();
    assert!(rows.len() > 100);
    for row in rows {
        let (gold, answer) = (row[0].as_str().unwrap(), row[1].as_str().unwrap());
        for (name, expected) in names.iter().zip(row[2].as_array().unwrap()) {
            let found = Score::named(name).expect("a known name").of(gold, answer);
            let expected = expected.as_f64().unwrap();
            assert!((found - expected).abs() < 1e-12, "{name} of {gold:?} and {answer:?}: {found}, not {expected}");
        }
    }
}

#[test]
fn words_stem_as_nltk_stems_them() {
    let vectors = vectors();
    let stems = vectors["stems"].as_object().unwrap();
    assert!(stems.len() > 400);
    for (word, expected) in stems {
        assert_eq!(stem(word), expected.as_str().unwrap(), "{word}");
    }
}
