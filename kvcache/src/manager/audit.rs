//! The recount: everything that the manager keeps as a counter, a list or a link is derived again from the
//! block tables and pins, and compared. O(pool); for tests, fuzzing and debugging.

use rustc_hash::FxHashMap;

use super::KvCacheManager;
use crate::NO_BLOCK;
use crate::pool::{BlockPool, NO_NODE};
use crate::sequence::{Entry, Place};

impl KvCacheManager {
    /// Checks that reference counts equal the references that exist, that every block is free, used or
    /// pending and in the right list, that prefix-cache entries and blocks point at each other, and that
    /// block tables have the shape their sequences' lengths ask for.
    ///
    /// It walks both pools: call it in tests and when hunting a bug, not while serving.
    ///
    /// # Errors
    /// One sentence that names the first contradiction.
    pub fn audit(&self) -> Result<(), String> {
        let memory = &self.memory;
        memory.device.audit("device")?;
        memory.host.audit("host")?;
        self.audit_shapes()?;
        self.audit_blocks()?;
        self.audit_tree()
    }

    fn audit_shapes(&self) -> Result<(), String> {
        for (id, sequence) in &self.sequences {
            let id = id.0;
            if sequence.computed > sequence.len {
                return Err(format!(
                    "sequence {id} has computed {} of {} tokens",
                    sequence.computed, sequence.len
                ));
            }
            for (group, table) in sequence.tables.iter().enumerate() {
                if table.entries.len() != self.geometry.blocks_for(sequence.len) {
                    return Err(format!(
                        "sequence {id} has {} entries in group {group} for {} tokens",
                        table.entries.len(),
                        sequence.len
                    ));
                }
                let visible = self.geometry.first_visible(group, sequence.computed).min(table.entries.len());
                if table.released > visible {
                    return Err(format!(
                        "sequence {id} has released {} entries of group {group}, but sees from {visible}",
                        table.released
                    ));
                }
                let (behind, live) = table.entries.split_at(table.released);
                if behind.iter().any(|&entry| entry != NO_BLOCK) || live.contains(&NO_BLOCK) {
                    return Err(format!("sequence {id} has a hole in its table of group {group}"));
                }
                let on_host = live.iter().any(|&entry| matches!(Entry::decode(entry), Some(Entry::Host(_))));
                if on_host && sequence.place == Place::Device {
                    return Err(format!("sequence {id} runs with a host block in group {group}"));
                }
            }
            let tail = if sequence.node == NO_NODE { 0 } else { self.geometry.offset(sequence.computed) };
            if sequence.tail.len() != tail {
                return Err(format!(
                    "sequence {id} remembers {} tail tokens, not {tail}",
                    sequence.tail.len()
                ));
            }
        }
        Ok(())
    }

    fn audit_blocks(&self) -> Result<(), String> {
        let (device, host) = (&self.memory.device, &self.memory.host);
        let mut refs = [vec![0_u32; device.total()], vec![0; host.total()]];
        let mut copies = refs.clone();
        let entries =
            self.sequences.values().flat_map(|sequence| &sequence.tables).flat_map(|table| table.live());
        let pinned = self.pins.values().flat_map(|pin| pin.parts().1);
        for &entry in entries.chain(pinned) {
            match Entry::decode(entry) {
                Some(Entry::Device(block)) => refs[0][block as usize] += 1,
                Some(Entry::Host(block)) => refs[1][block as usize] += 1,
                None => {}
            }
        }
        for ops in self.memory.copies.unconfirmed() {
            for copy in &ops.swap_out {
                copies[0][copy.src as usize] += 1;
                copies[1][copy.dst as usize] += 1;
            }
            for copy in &ops.swap_in {
                copies[1][copy.src as usize] += 1;
                copies[0][copy.dst as usize] += 1;
            }
            for copy in &ops.copy {
                copies[0][copy.src as usize] += 1;
                copies[0][copy.dst as usize] += 1;
            }
        }
        let pools: [(&str, &BlockPool); 2] = [("device", device), ("host", host)];
        for (index, (name, pool)) in pools.into_iter().enumerate() {
            for block in 0..pool.total() {
                let id = block as u32;
                if pool.refs(id) != refs[index][block] {
                    return Err(format!(
                        "{name} block {id} counts {} references, but {} exist",
                        pool.refs(id),
                        refs[index][block]
                    ));
                }
                if pool.is_pending(id) != (copies[index][block] > 0) {
                    return Err(format!(
                        "{name} block {id}: pending is {}, but {} copies are under way",
                        pool.is_pending(id),
                        copies[index][block]
                    ));
                }
            }
        }
        Ok(())
    }

    fn audit_tree(&self) -> Result<(), String> {
        let (tree, device) = (&self.memory.tree, &self.memory.device);
        let mut expected: FxHashMap<u32, u32> = FxHashMap::default();
        for node in tree.live() {
            expected.entry(node).or_default();
            if tree.parent(node) != NO_NODE {
                *expected.entry(tree.parent(node)).or_default() += 1;
            }
            for group in 0..self.geometry.groups() {
                let block = tree.block(node, group);
                if block != NO_BLOCK {
                    *expected.entry(node).or_default() += 1;
                    if device.node(block) != node {
                        return Err(format!(
                            "node {node} points at block {block}, which does not point back"
                        ));
                    }
                }
            }
        }
        let holders = self.sequences.values().map(|sequence| sequence.node);
        for node in holders.chain(self.pins.values().map(|pin| pin.parts().0)).filter(|&node| node != NO_NODE)
        {
            *expected.entry(node).or_default() += 1;
        }
        for (&node, &expected) in &expected {
            if tree.refs(node) != expected {
                return Err(format!(
                    "node {node} counts {} references, but {expected} exist",
                    tree.refs(node)
                ));
            }
        }
        for block in 0..device.total() as u32 {
            let node = device.node(block);
            if node != NO_NODE && !(0..self.geometry.groups()).any(|group| tree.block(node, group) == block) {
                return Err(format!("block {block} points at node {node}, which does not point back"));
            }
        }
        Ok(())
    }
}
