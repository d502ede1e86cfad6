//! Names of lines that are taken.
//!
//! **Invariant:** a name is held as 96 bits of its hash. In a job a name is taken for good; in a worker until its line
//! is answered, so that memory follows the lines in flight.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest, Sha256};

/// 96 bits of a name's SHA-256: 10 million lines agree by chance with a probability below 1e-14.
type Name = [u32; 3];

/// The names that are taken.
#[derive(Debug)]
pub(crate) enum Ids {
    /// All that were read.
    All(HashSet<Name>),
    /// Those of lines that are not answered.
    InFlight(InFlight),
}

/// Names of lines in flight, with how many lines bear each; shared between who reads and who answers.
#[derive(Clone, Debug, Default)]
pub(crate) struct InFlight(Arc<Mutex<HashMap<Name, u32>>>);

impl Ids {
    /// A job's.
    pub fn all() -> Self {
        Ids::All(HashSet::new())
    }

    /// Takes a name; false if it was taken before.
    pub fn take(&mut self, custom_id: &str) -> bool {
        match self {
            Ids::All(seen) => seen.insert(name(custom_id)),
            Ids::InFlight(lines) => lines.change(custom_id, |count| count + 1) == 1,
        }
    }
}

impl InFlight {
    /// Gives back the name of a line that is answered.
    pub fn release(&self, custom_id: &str) {
        self.change(custom_id, |count| count.saturating_sub(1));
    }

    fn change(&self, custom_id: &str, change: impl FnOnce(u32) -> u32) -> u32 {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let name = name(custom_id);
        let count = change(lines.get(&name).copied().unwrap_or(0));
        if count == 0 {
            lines.remove(&name)
        } else {
            lines.insert(name, count)
        };
        count
    }
}

fn name(custom_id: &str) -> Name {
    let digest: [u8; 32] = Sha256::digest(custom_id.as_bytes()).into();
    std::array::from_fn(|word| u32::from_le_bytes(std::array::from_fn(|byte| digest[4 * word + byte])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_free_again_when_all_its_lines_are_answered() {
        let lines = InFlight::default();
        let mut ids = Ids::InFlight(lines.clone());
        assert!(ids.take("a") && ids.take("b"));
        assert!(!ids.take("a"));
        lines.release("a");
        assert!(!ids.take("a"), "one of them is still in flight");
        (0..3).for_each(|_| lines.release("a"));
        assert!(ids.take("a"));
        lines.release("a");
        lines.release("b");
        assert!(lines.0.lock().unwrap().is_empty());
    }
}
