//! Where a sweep's results come from.
//!
//! **Invariant:** a commit is named only if the program was made from just its files.

use std::path::Path;
use std::process::Command;

use crate::bench::sweep::Machine;
use crate::hardware::Hardware;

/// What the program is made from.
const SOURCES: [&str; 5] = ["src", "kernels", "demo", "Cargo.toml", "Cargo.lock"];

/// The commit that this program was built from: that of the tree that it was compiled in, if nothing there has changed
/// since.
pub fn commit() -> Option<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(arguments).arg("--").args(SOURCES).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let modified = |path: &Path| std::fs::metadata(path).and_then(|data| data.modified()).ok();
    let built = modified(&std::env::current_exe().ok()?)?;
    let sources = git(&["ls-files"])?;
    let older = |name: &str| modified(&root.join(name)).is_some_and(|changed| changed <= built);
    if sources.is_empty() || !sources.lines().all(older) || !git(&["status", "--porcelain"])?.is_empty() {
        return None;
    }
    // The last commit that touched any of them: the same program, whatever came later.
    git(&["log", "-1", "--format=%H"]).map(|commit| commit.trim().to_owned()).filter(|commit| !commit.is_empty())
}

/// This machine, or the one that a file describes.
pub fn machine(hardware: &Hardware, card: Option<String>, this: bool) -> Machine {
    let kernel = || std::fs::read_to_string("/proc/sys/kernel/osrelease").ok();
    Machine {
        name: hardware.name.clone(),
        cpu: hardware.cpu.name.clone(),
        threads: this.then(rayon::current_num_threads),
        memory_bytes: hardware.cpu.memory_bytes,
        gpu: if this { card } else { hardware.gpu.as_ref().map(|gpu| gpu.name.clone()) },
        kernel: if this { kernel().map(|text| text.trim().to_owned()) } else { None },
    }
}
