//! A card to test on: a real one, else the emulator of tests/emulator, built here.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tidemill::device::cuda::card;

/// Set in the process that runs with the emulator's libraries.
const EMULATED: &str = "TIDEMILL_EMULATED";

/// Whether the machine has a card of its own.
pub fn is_real() -> bool {
    std::env::var_os(EMULATED).is_none() && card::facts().is_ok()
}

/// The directory of the emulator's libraries, built when they are first asked for; none, with the reason, where they
/// cannot be.
pub fn emulator() -> Result<&'static Path, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let script = root.join("tests/emulator/build.sh");
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        let output = Command::new("bash").arg(script).arg(&directory).output();
        let output = output.map_err(|error| format!("bash: {error}"))?;
        if output.status.success() { Ok(directory) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    });
    built.as_deref().map_err(Clone::clone)
}

/// Tells that a test cannot run, which `REQUIRE_GPU=1` does not accept.
pub fn skip(why: &str) {
    assert!(std::env::var_os("REQUIRE_GPU").is_none(), "REQUIRE_GPU is set, but {why}");
    super::skip(why);
}

/// Runs a test where there is a card: here, or, for the emulator, in a process of its own that finds its libraries.
pub fn with_card(test: &str, body: impl FnOnce()) {
    if std::env::var_os(EMULATED).is_some() || is_real() {
        return body();
    }
    match emulator() {
        Err(why) => skip(&format!("there is no card, and the emulator cannot be built: {why}")),
        Ok(libraries) => {
            let mut command = Command::new(std::env::current_exe().expect("a test binary"));
            command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
            let output = command.env("LD_LIBRARY_PATH", libraries).env(EMULATED, "1").output().expect("it runs");
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
        }
    }
}
