//! What several integration tests share: running the binary in a directory of its own.
#![allow(dead_code, missing_docs)]

pub mod cuda;
pub mod jobs;
pub mod policies;
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
    let mut command = Command::new(place("TIDEMILL_TEST_BINARY", env!("CARGO_BIN_EXE_tidemill")));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("TIDEMILL_")) {
        command.env_remove(name);
    }
    // What is measured or packed on the way is the tests' own.
    command.env("TIDEMILL_CACHE_DIR", scratch_root().join("cache"));
    // A card that this machine may have is for the tests that ask for one.
    command.env("TIDEMILL_DEVICE", "host");
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
    place("TIDEMILL_TEST_ROOT", env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// Where tests may keep files from run to run.
pub fn scratch_root() -> PathBuf {
    place("TIDEMILL_TEST_SCRATCH", env!("CARGO_TARGET_TMPDIR"))
}

/// A place that was known when the tests were built, unless they run elsewhere (scripts/gpu_check.sh).
fn place(variable: &str, built: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| built.into(), PathBuf::from)
}

/// A copy of a golden model that a test may damage.
pub fn copy_model(name: &str, scratch: &Scratch) -> PathBuf {
    let copy = scratch.path(name);
    fs::create_dir_all(&copy).expect("create");
    for entry in fs::read_dir(golden(name)).expect("a golden model") {
        let entry = entry.expect("entry");
        fs::copy(entry.path(), copy.join(entry.file_name())).expect("copy");
    }
    copy
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_str(&fs::read_to_string(path).expect("read")).expect("JSON");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("write");
}

/// What a refusal said on standard error. It comes with this exit code, `error:` first, nothing on standard output
/// and no panic.
pub fn refused(result: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&result.stderr).into_owned();
    assert_eq!(result.status.code(), Some(code), "{said}");
    assert!(result.stdout.is_empty(), "{}", String::from_utf8_lossy(&result.stdout));
    assert!(said.lines().any(|line| line.starts_with("error: ")), "{said}");
    assert!(!said.contains("panicked"), "{said}");
    said
}

/// The text after `hint: `.
pub fn hint(said: &str) -> String {
    let hint = said.lines().find_map(|line| line.strip_prefix("hint: "));
    hint.unwrap_or_else(|| panic!("no hint: {said}")).to_owned()
}

/// Tells that a test cannot run here.
pub fn skip(why: &str) {
    use std::io::Write;
    writeln!(std::io::stderr(), "SKIPPED: {why}").expect("standard error");
}
