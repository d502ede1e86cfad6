//! Who goes into a pass, and into which of its blocks.
//!
//! The engine composes its passes here, and the planner those that it expects, so that they are the same.
//!
//! **Invariant:** every sequence that decodes is offered a row; prompts share what the chunk leaves, first come first
//! served; nobody is in two blocks of a pass.

use crate::policy::Order;

/// Takes sequences into a pass that is being made.
pub trait Fill {
    /// Why a sequence could not be taken.
    type Error;

    /// Begins a block.
    fn open_block(&mut self);

    /// Puts up to `most` new positions of a sequence into the block; gives how many it had room for.
    ///
    /// # Errors
    /// Whatever making room meets.
    fn take_up(&mut self, sequence: usize, most: usize) -> Result<usize, Self::Error>;
}

/// Sequences that want to be in a pass, and what it may carry.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    /// Sequences whose next row is a generated token.
    pub decoding: Vec<usize>,
    /// Sequences with prompt tokens left, in order of arrival.
    pub prompts: Vec<usize>,
    /// Prompt tokens that they have left.
    pub prompt_tokens: usize,
    /// Blocks of the pass, at most.
    pub blocks: usize,
    /// Prompt tokens of the pass, at most.
    pub chunk_tokens: usize,
    /// Whether answers go on while there are prompts.
    pub order: Order,
}

impl Wishes {
    /// Composes a pass.
    ///
    /// Every block gets its share of the sequences that decode and of the prompt tokens, so that blocks take equally
    /// long and stream equally many pages. What the blocks have no room for waits for the next pass.
    ///
    /// # Errors
    /// The first of `fill`.
    pub fn compose<F: Fill>(&self, fill: &mut F) -> Result<(), F::Error> {
        let alone = self.order == Order::Phased && !self.prompts.is_empty();
        let decoding = if alone { &[][..] } else { &self.decoding[..] };
        let total = decoding.len();
        let blocks = self.blocks.min(total + self.prompt_tokens).max(1);
        let share = |total: usize, block: usize, parts: usize| total * (block + 1).min(parts) / parts;
        // Fewer prompts than blocks take larger shares, so that the last ones are not cut ever thinner.
        let takers = blocks.min(self.prompts.len()).max(1);
        let (mut offered, mut waiting) = (0, Vec::new());
        let (mut prompts, mut prompt_tokens) = (self.prompts.iter().peekable(), 0);
        for block in 0..blocks {
            fill.open_block();
            let upto = share(total, block, blocks);
            // Those that found no room in the block before go first.
            waiting.extend(&decoding[offered..upto]);
            offered = upto;
            for sequence in std::mem::take(&mut waiting) {
                if fill.take_up(sequence, 1)? == 0 {
                    waiting.push(sequence);
                }
            }
            let upto = share(self.chunk_tokens, block, takers);
            while prompt_tokens < upto {
                let Some(&&sequence) = prompts.peek() else { break };
                let taken = fill.take_up(sequence, upto - prompt_tokens)?;
                if taken == 0 {
                    break;
                }
                prompt_tokens += taken;
                prompts.next();
            }
        }
        Ok(())
    }
}
