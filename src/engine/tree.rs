//! Pages of tokens as a tree: a node stands for all tokens from its root to its own.
//!
//! **Invariant:** whoever walks the same tokens from the same root finds the same nodes, until they are removed.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::{Index, IndexMut};

use crate::kv::layout::PAGE_POSITIONS;

/// The number of a node.
pub type NodeId = u32;
type Tile = Box<[u32]>;

/// A tree with several roots, and what its nodes know.
#[derive(Debug, Default)]
pub struct Tree<R, N> {
    nodes: Vec<Node<R, N>>,
    /// Numbers of nodes that are gone.
    free: Vec<NodeId>,
    children: HashMap<(Parent<R>, Tile), NodeId>,
}

#[derive(Debug)]
struct Node<R, N> {
    parent: Parent<R>,
    tokens: Tile,
    value: N,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Parent<R> {
    Root(R),
    Node(NodeId),
}

impl<R: Copy + Eq + Hash, N: Default> Tree<R, N> {
    /// The nodes of the whole pages of `tokens`; what is missing is added.
    pub fn walk(&mut self, root: R, tokens: &[u32]) -> Vec<NodeId> {
        let mut parent = Parent::Root(root);
        let tiles = tokens.chunks_exact(PAGE_POSITIONS);
        tiles
            .map(|tile| {
                let key = (parent, Tile::from(tile));
                let node = self.children.get(&key).copied().unwrap_or_else(|| self.add(key));
                parent = Parent::Node(node);
                node
            })
            .collect()
    }

    fn add(&mut self, key: (Parent<R>, Tile)) -> NodeId {
        let node = Node { parent: key.0, tokens: key.1.clone(), value: N::default() };
        let id = match self.free.pop() {
            Some(id) => {
                self.nodes[id as usize] = node;
                id
            }
            None => {
                self.nodes.push(node);
                NodeId::try_from(self.nodes.len() - 1).expect("node numbers are 32 bits wide")
            }
        };
        self.children.insert(key, id);
        id
    }

    /// Removes a node that nothing comes after.
    pub fn remove(&mut self, id: NodeId) {
        let node = &mut self.nodes[id as usize];
        let key = (node.parent, std::mem::take(&mut node.tokens));
        node.value = N::default();
        self.children.remove(&key);
        self.free.push(id);
    }

    /// How many nodes come before a node.
    pub fn depth(&self, mut id: NodeId) -> usize {
        let mut depth = 0;
        while let Parent::Node(parent) = self.nodes[id as usize].parent {
            (id, depth) = (parent, depth + 1);
        }
        depth
    }

    /// All nodes; those that are gone know nothing.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &N)> {
        (0..).zip(self.nodes.iter().map(|node| &node.value))
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.children.is_empty()
    }
}

impl<R, N> Index<NodeId> for Tree<R, N> {
    type Output = N;

    fn index(&self, id: NodeId) -> &N {
        &self.nodes[id as usize].value
    }
}

impl<R, N> IndexMut<NodeId> for Tree<R, N> {
    fn index_mut(&mut self, id: NodeId) -> &mut N {
        &mut self.nodes[id as usize].value
    }
}
