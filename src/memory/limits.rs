//! What the machine and its control groups let this process use.
//!
//! **Invariant:** an unreadable or absent limit counts as no limit; nothing here fails.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes of main memory that can still be used: the smaller of what the kernel calls available and what the
/// control group (v1 or v2) has left.
pub fn available_memory() -> u64 {
    let system = meminfo("MemAvailable").unwrap_or(u64::MAX);
    control_group_room().map_or(system, |room| room.min(system))
}

/// Bytes of main memory that the system has.
pub fn total_memory() -> Option<u64> {
    meminfo("MemTotal")
}

/// The default of `--cpu-memory`: 70 % of the smaller of available memory and the control group's limit.
pub fn default_cpu_memory() -> u64 {
    available_memory() / 10 * 7
}

/// Peak resident anonymous and shared memory of this process, in bytes.
pub fn peak_resident() -> u64 {
    status_field("VmHWM").unwrap_or(0)
}

fn status_field(name: &str) -> Option<u64> {
    kib_field(&fs::read_to_string("/proc/self/status").ok()?, name)
}

fn meminfo(name: &str) -> Option<u64> {
    kib_field(&fs::read_to_string("/proc/meminfo").ok()?, name)
}

fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Bytes that the process's control groups have left, the least over them and their ancestors; none without limit.
pub fn control_group_room() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    groups.lines().filter_map(group_room).min()
}

/// Room of one line `id:controllers:path` of /proc/self/cgroup.
fn group_room(line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let (root, limit, usage) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
        list if list.split(',').any(|c| c == "memory") => {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        }
        _ => return None,
    };
    let mut directory = PathBuf::from(root).join(path.trim_start_matches('/'));
    let mut least = None;
    while directory.starts_with(root) {
        if let (Some(limit), Some(usage)) = (number(&directory.join(limit)), number(&directory.join(usage))) {
            let cache = reclaimable(&directory);
            let room = limit.saturating_sub(usage.saturating_sub(cache));
            least = Some(least.map_or(room, |least: u64| least.min(room)));
        }
        if !directory.pop() {
            break;
        }
    }
    least
}

/// Page cache that the kernel gives back under pressure.
fn reclaimable(directory: &Path) -> u64 {
    let Ok(stat) = fs::read_to_string(directory.join("memory.stat")) else { return 0 };
    let field = |name: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    // Version 1 counts children under a name of its own.
    field("total_inactive_file").max(field("inactive_file"))
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_kib_fields() {
        assert_eq!(kib_field("MemTotal: 5 kB\nMemAvailable:   12 kB\n", "MemAvailable"), Some(12 * 1024));
        assert_eq!(kib_field("MemTotal: x kB\n", "MemTotal"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(available_memory() > 1 << 20);
        assert!(peak_resident() > 0);
    }
}
