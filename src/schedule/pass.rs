//! What a pass carries: ragged token segments over all layers.
//!
//! **Invariant:** the rows of a pass are its segments in order, packed without padding; a row is one position of
//! one sequence.

use crate::kv::pages::{PageId, Segment};

/// One trip over all layers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// The token of every row.
    pub tokens: Vec<u32>,
    /// The position of every row in its sequence.
    pub positions: Vec<u32>,
    /// The sequence length that position scaling goes by: the prompt's for its tokens, position + 1 after it.
    pub rope_lens: Vec<u32>,
    /// Which rows continue which sequence.
    pub segments: Vec<Segment>,
}

/// A sequence's next tokens, to be put into a pass.
pub struct Run<'a> {
    /// All tokens of the sequence so far.
    pub tokens: &'a [u32],
    /// Which of them to compute.
    pub range: std::ops::Range<usize>,
    /// How many of the tokens are prompt.
    pub prompt_len: usize,
    /// The sequence's pages, covering `range`.
    pub pages: &'a [PageId],
}

impl Pass {
    /// Forgets all rows, keeping the memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.rope_lens.clear();
        self.segments.clear();
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Appends a segment; gives its first row.
    pub fn push(&mut self, run: &Run<'_>) -> usize {
        let first_row = self.rows();
        assert!(!run.range.is_empty() && run.range.end <= run.tokens.len());
        for position in run.range.clone() {
            let generated = position >= run.prompt_len;
            self.tokens.push(run.tokens[position]);
            self.positions.push(position as u32);
            self.rope_lens.push(if generated { position + 1 } else { run.prompt_len } as u32);
        }
        self.segments.push(Segment {
            first_row,
            len: run.range.len(),
            start: run.range.start,
            pages: run.pages.to_vec(),
        });
        first_row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_rows_go_by_the_prompts_length_and_generated_rows_by_their_own() {
        let mut pass = Pass::default();
        let tokens = [5, 6, 7, 8, 9];
        let run = Run { tokens: &tokens, range: 1..5, prompt_len: 3, pages: &[0] };
        assert_eq!(pass.push(&run), 0);
        assert_eq!(pass.positions, [1, 2, 3, 4]);
        assert_eq!(pass.rope_lens, [3, 3, 4, 5]);
        assert_eq!(pass.push(&Run { range: 0..1, ..run }), 4);
    }
}
