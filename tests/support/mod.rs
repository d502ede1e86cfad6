//! What several integration tests share: running the binary in a directory of its own.
#![allow(dead_code, missing_docs)]

pub mod jobs;
pub mod process;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// A directory that goes away with the test.
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Scratch(tempfile::tempdir().expect("a temporary directory"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and gives its path.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).expect("write");
        path
    }

    /// Writes JSON lines and gives the file's path.
    pub fn jsonl(&self, name: &str, lines: &[Value]) -> PathBuf {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        self.write(name, text)
    }
}

/// `tidemill` with these arguments, in an environment without its variables.
pub fn tidemill(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEMILL_")) {
        command.env_remove(name);
    }
    command.args(arguments);
    command
}

/// `tidemill generate`; extra arguments come last.
pub fn generate(model: &str, input: &Path, output: &Path, extra: &[&str]) -> Output {
    let (input, output) = (input.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    let mut command = tidemill(&["generate", "--model", model, "--input", input, "--output", output]);
    command.args(extra).output().expect("the binary runs")
}

/// Runs `generate` and asserts its exit code.
pub fn generate_ok(model: &str, input: &Path, output: &Path, extra: &[&str], code: i32) -> String {
    let result = generate(model, input, output, extra);
    let said = String::from_utf8_lossy(&result.stderr).into_owned();
    assert_eq!(result.status.code(), Some(code), "{said}");
    said
}

/// The lines of a JSONL file.
pub fn read_jsonl(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("read");
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect()
}

/// A directory below tests/goldens.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}
