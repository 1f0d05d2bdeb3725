//! The content of computed blocks: a tree whose node stands for "these tokens, after exactly those before".
//! It knows which block of each KV group holds that content on the device, if any; it does not know which
//! sequences use the block, nor when it is evicted.
//!
//! A node is found by a chained hash, `hash(node) = H(hash(parent), tokens)`, rooted in the salt, and a
//! find is *verified*: the tokens and the parent node itself are compared, so by induction the whole prefix
//! is, and colliding hashes can never hand one prompt another's keys and values. `H` is keyed at random in
//! each process, so that nobody can choose prompts that collide; nothing that can be observed depends on it.
//!
//! The hash index is intrusive: each node carries the link to the next one of its bucket. Work for a look-up
//! is O(tokens of the block), whatever the size of the tree.
//!
//! A node lives as long as something refers to it: a child, a block with its content, a sequence standing
//! at it, or a pin.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use crate::pool::{NO_NODE, NodeId};
use crate::{BlockId, NO_BLOCK};

/// The keyed hash function. All of them count as equal, because nothing observable depends on the key.
#[derive(Clone, Debug, Default)]
struct Keyed {
    state: RandomState,
    /// Tests only: every hash is the same, so that only verification keeps contents apart.
    collide: bool,
}

impl PartialEq for Keyed {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Keyed {
    fn hash(&self, parent: u64, tokens: &[u32]) -> u64 {
        if self.collide { 0 } else { self.state.hash_one((parent, tokens)) }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct Node {
    /// [`NO_NODE`] for the root of a salt.
    parent: NodeId,
    refs: u32,
    /// Chained hash; of a root, its salt.
    hash: u64,
    /// The next node of the bucket, or of the list of vacant nodes.
    next: NodeId,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PrefixTree {
    block_size: usize,
    groups: usize,
    nodes: Vec<Node>,
    /// For each node, side by side because they are read together: the block of each group, or [`NO_BLOCK`],
    /// then the tokens, one block's worth.
    contents: Vec<u32>,
    vacant: NodeId,
    /// First node of each bucket; a power of two many.
    buckets: Vec<NodeId>,
    /// Nodes in the buckets.
    indexed: usize,
    roots: HashMap<u64, NodeId>,
    keyed: Keyed,
}

impl PrefixTree {
    /// An empty tree whose index is good for `expected` nodes before it has to grow; `None` if there is no
    /// memory for the index.
    pub(crate) fn new(block_size: usize, groups: usize, expected: usize) -> Option<Self> {
        let size = expected.max(16).next_power_of_two();
        let mut buckets = Vec::new();
        buckets.try_reserve_exact(size).ok()?;
        buckets.resize(size, NO_NODE);
        Some(Self {
            block_size,
            groups,
            nodes: Vec::new(),
            contents: Vec::new(),
            vacant: NO_NODE,
            buckets,
            indexed: 0,
            roots: HashMap::new(),
            keyed: Keyed::default(),
        })
    }

    /// The root of a salt, if anything is known under it.
    pub(crate) fn root(&self, salt: u64) -> Option<NodeId> {
        self.roots.get(&salt).copied()
    }

    /// The root of a salt with one more reference, made if need be.
    pub(crate) fn acquire_root(&mut self, salt: u64) -> NodeId {
        let root = match self.root(salt) {
            Some(root) => root,
            None => {
                let root = self.insert(Node { parent: NO_NODE, refs: 0, hash: salt, next: NO_NODE }, &[]);
                self.roots.insert(salt, root);
                root
            }
        };
        self.acquire(root);
        root
    }

    /// The node of `tokens` (one block's worth) after `parent`.
    pub(crate) fn child(&self, parent: NodeId, tokens: &[u32]) -> Option<NodeId> {
        self.find(parent, tokens, self.child_hash(parent, tokens))
    }

    /// The node of `tokens` after `parent` with one more reference, made if need be.
    pub(crate) fn acquire_child(&mut self, parent: NodeId, tokens: &[u32]) -> NodeId {
        let hash = self.child_hash(parent, tokens);
        let child = match self.find(parent, tokens, hash) {
            Some(child) => child,
            None => {
                self.acquire(parent);
                self.grow_index();
                let bucket = self.bucket(hash);
                let next = self.buckets[bucket];
                let child = self.insert(Node { parent, refs: 0, hash, next }, tokens);
                self.buckets[bucket] = child;
                self.indexed += 1;
                child
            }
        };
        self.acquire(child);
        child
    }

    pub(crate) fn acquire(&mut self, node: NodeId) {
        self.nodes[node as usize].refs += 1;
    }

    /// Drops a reference; a node without any vanishes, and with it those of its ancestors that only it kept
    /// (each node is removed once for the once it was made).
    pub(crate) fn release(&mut self, mut node: NodeId) {
        loop {
            let Node { parent, refs, hash, .. } = &mut self.nodes[node as usize];
            *refs -= 1;
            if *refs > 0 {
                return;
            }
            let (parent, hash) = (*parent, *hash);
            if parent == NO_NODE {
                self.roots.remove(&hash);
            } else {
                self.unlink(node, hash);
            }
            self.nodes[node as usize].next = self.vacant;
            self.vacant = node;
            if parent == NO_NODE {
                return;
            }
            node = parent;
        }
    }

    /// The node before, or [`NO_NODE`] for a root.
    pub(crate) fn parent(&self, node: NodeId) -> NodeId {
        self.nodes[node as usize].parent
    }

    /// The block's worth of tokens of a node that is not a root.
    pub(crate) fn tokens(&self, node: NodeId) -> &[u32] {
        let start = self.content(node) + self.groups;
        &self.contents[start..start + self.block_size]
    }

    /// The block that holds the node's content in a group, or [`NO_BLOCK`].
    pub(crate) fn block(&self, node: NodeId, group: usize) -> BlockId {
        self.contents[self.content(node) + group]
    }

    /// Notes where the node's content is in a group; there must be none yet.
    pub(crate) fn set_block(&mut self, node: NodeId, group: usize, block: BlockId) {
        let at = self.content(node) + group;
        let slot = &mut self.contents[at];
        debug_assert_eq!(*slot, NO_BLOCK, "node {node} already has a block");
        *slot = block;
        self.acquire(node);
    }

    /// Forgets that `block` holds the node's content.
    pub(crate) fn clear_block(&mut self, node: NodeId, block: BlockId) {
        let start = self.content(node);
        if let Some(slot) = self.contents[start..start + self.groups].iter_mut().find(|slot| **slot == block)
        {
            *slot = NO_BLOCK;
            self.release(node);
        }
    }

    /// Where the node's part of `contents` begins.
    fn content(&self, node: NodeId) -> usize {
        node as usize * (self.groups + self.block_size)
    }

    fn child_hash(&self, parent: NodeId, tokens: &[u32]) -> u64 {
        self.keyed.hash(self.nodes[parent as usize].hash, tokens)
    }

    fn bucket(&self, hash: u64) -> usize {
        hash as usize & (self.buckets.len() - 1)
    }

    fn find(&self, parent: NodeId, tokens: &[u32], hash: u64) -> Option<NodeId> {
        let mut id = self.buckets[self.bucket(hash)];
        while id != NO_NODE {
            let node = &self.nodes[id as usize];
            if node.hash == hash && node.parent == parent && self.tokens(id) == tokens {
                return Some(id);
            }
            id = node.next;
        }
        None
    }

    fn insert(&mut self, node: Node, tokens: &[u32]) -> NodeId {
        let id = self.vacant;
        if id == NO_NODE {
            let id = self.nodes.len();
            self.nodes.push(node);
            self.contents.resize(self.contents.len() + self.groups, NO_BLOCK);
            self.contents.extend_from_slice(tokens);
            self.contents.resize((id + 1) * (self.groups + self.block_size), 0);
            return id as NodeId;
        }
        self.vacant = self.nodes[id as usize].next;
        self.nodes[id as usize] = node;
        let start = self.content(id) + self.groups;
        self.contents[start..start + tokens.len()].copy_from_slice(tokens);
        id
    }

    fn unlink(&mut self, node: NodeId, hash: u64) {
        let next = self.nodes[node as usize].next;
        let bucket = self.bucket(hash);
        if self.buckets[bucket] == node {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.nodes[before as usize].next != node {
                before = self.nodes[before as usize].next;
            }
            self.nodes[before as usize].next = next;
        }
        self.indexed -= 1;
    }

    /// Keeps at most one node a bucket on average. Doubling costs O(1) for each node ever added; it happens
    /// only when windows leave more nodes without a block than the pool has blocks.
    fn grow_index(&mut self) {
        if self.indexed < self.buckets.len() {
            return;
        }
        let old = std::mem::take(&mut self.buckets);
        self.buckets = vec![NO_NODE; old.len() * 2];
        for mut id in old {
            while id != NO_NODE {
                let Node { hash, next, .. } = self.nodes[id as usize];
                let bucket = self.bucket(hash);
                self.nodes[id as usize].next = self.buckets[bucket];
                self.buckets[bucket] = id;
                id = next;
            }
        }
    }

    /// Every node in use, in no particular order; for [`audit`](crate::KvCacheManager::audit).
    pub(crate) fn live(&self) -> impl Iterator<Item = NodeId> + '_ {
        let known = |id: NodeId| (id != NO_NODE).then_some(id);
        let indexed = self.buckets.iter().flat_map(move |&head| {
            std::iter::successors(known(head), move |&id| known(self.nodes[id as usize].next))
        });
        self.roots.values().copied().chain(indexed)
    }

    pub(crate) fn refs(&self, node: NodeId) -> u32 {
        self.nodes[node as usize].refs
    }

    /// Makes every hash collide, so that only verification keeps contents apart.
    #[cfg(test)]
    pub(crate) fn collide(&mut self) {
        self.keyed.collide = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_found_by_content_and_vanish_with_their_last_reference() {
        let mut tree = PrefixTree::new(2, 1, 4).unwrap();
        let root = tree.acquire_root(9);
        let a = tree.acquire_child(root, &[1, 2]);
        let b = tree.acquire_child(a, &[3, 4]);
        assert_eq!(tree.child(root, &[1, 2]), Some(a));
        assert_eq!(tree.child(root, &[3, 4]), None);
        assert_eq!(tree.child(a, &[3, 4]), Some(b));
        assert_eq!((tree.parent(b), tree.parent(a), tree.parent(root)), (a, root, NO_NODE));
        assert_eq!(tree.tokens(b), &[3, 4]);
        tree.release(a);
        tree.release(root);
        assert_eq!(tree.live().count(), 3, "b keeps its ancestors");
        tree.release(b);
        assert_eq!(tree.live().count(), 0);
        assert_eq!(tree.root(9), None);
    }

    #[test]
    fn colliding_hashes_never_mix_contents() {
        let mut tree = PrefixTree::new(1, 1, 4).unwrap();
        tree.collide();
        let (salt_a, salt_b) = (tree.acquire_root(1), tree.acquire_root(2));
        let mut nodes = Vec::new();
        for root in [salt_a, salt_b] {
            for token in 0..50 {
                nodes.push((root, token, tree.acquire_child(root, &[token])));
            }
        }
        for &(root, token, node) in &nodes {
            assert_eq!(tree.child(root, &[token]), Some(node));
            assert_eq!(tree.tokens(node), &[token]);
        }
        for &(root, token, node) in nodes.iter().step_by(2) {
            tree.release(node);
            assert_eq!(tree.child(root, &[token]), None);
        }
        for &(root, token, node) in nodes.iter().skip(1).step_by(2) {
            assert_eq!(tree.child(root, &[token]), Some(node));
        }
    }

    #[test]
    fn the_index_grows_with_the_nodes() {
        let mut tree = PrefixTree::new(1, 1, 1).unwrap();
        let root = tree.acquire_root(0);
        let nodes: Vec<_> = (0..1000).map(|token| tree.acquire_child(root, &[token])).collect();
        for (token, &node) in nodes.iter().enumerate() {
            assert_eq!(tree.child(root, &[token as u32]), Some(node));
        }
        assert!(tree.buckets.len() >= 1000);
    }

    #[test]
    fn a_node_remembers_one_block_for_each_group() {
        let mut tree = PrefixTree::new(1, 2, 1).unwrap();
        let root = tree.acquire_root(0);
        let node = tree.acquire_child(root, &[5]);
        tree.set_block(node, 0, 40);
        tree.set_block(node, 1, 41);
        tree.release(node);
        assert_eq!((tree.block(node, 0), tree.block(node, 1)), (40, 41));
        tree.clear_block(node, 40);
        assert_eq!((tree.block(node, 0), tree.block(node, 1)), (NO_BLOCK, 41));
        tree.clear_block(node, 41);
        assert_eq!(tree.child(root, &[5]), None);
    }
}
