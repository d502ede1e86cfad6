//! What `tidemill doctor` says of cards.
//!
//! **Invariant:** nothing is changed on the card: no context is made.

use super::card::{self, Problem, library_hint};
use super::cublas::Cublas;
use super::libraries::Which;
use super::nvrtc::Nvrtc;
use crate::error::Bytes;

/// Lines on card, driver and libraries: what was found and where, or what is missing and what to do about it.
pub fn lines() -> Vec<String> {
    let facts = match card::facts() {
        Ok(facts) => facts,
        Err(problem) => {
            let hint = match &problem {
                Problem::Absent(_) => None,
                Problem::Unusable { hint, .. } => Some(format!("hint: {hint}")),
            };
            return [format!("none: {problem}")].into_iter().chain(hint).collect();
        }
    };
    let version = |major: i32, minor: i32| format!("{major}.{minor}");
    let mut lines = vec![
        format!(
            "{}, compute capability {}, {}",
            facts.name,
            version(facts.capability / 10, facts.capability % 10),
            Bytes(facts.memory_bytes),
        ),
        format!(
            "driver: CUDA {}, {}",
            version(facts.driver / 1000, facts.driver % 1000 / 10),
            card::driver_path().map_or("unknown where".into(), |path| path.display().to_string()),
        ),
    ];
    let mut usable = true;
    let mut library = |which: Which, found: Result<String, String>| match found {
        Ok(found) => lines.push(format!("{}: {found}", which.name())),
        Err(what) => {
            usable = false;
            lines.push(format!("{}: missing: {what}", which.name()));
            lines.push(format!("hint: {}", library_hint(which, facts.major())));
        }
    };
    let nvrtc = Nvrtc::open(facts.major());
    let described = |(major, minor), path: &std::path::Path| format!("{}, {}", version(major, minor), path.display());
    library(Which::Nvrtc, nvrtc.map(|nvrtc| described(nvrtc.version, &nvrtc.path)));
    let cublas = Cublas::open(facts.major());
    library(Which::Cublas, cublas.map(|cublas| described(cublas.version, &cublas.path)));
    lines.push(format!("--device cuda: {}", if usable { "yes" } else { "no" }));
    lines
}
