//! What must hold after every operation, and what the memory must hold whenever all copies are carried out.

use std::collections::BTreeSet;

use pagewise_kvcache::{CacheManager, NO_BLOCK, Prompt, SequenceId};

use super::Machine;
use super::memory::digests;

impl Machine {
    /// The sequences and their tables, for people.
    pub(crate) fn describe(&self) -> String {
        let groups = self.cache.config().groups.len();
        let mut lines: Vec<String> = Vec::new();
        for (&sequence, known) in &self.known {
            let tables: Vec<_> = (0..groups).map(|group| self.cache.block_table(sequence, group)).collect();
            let (len, computed) = (known.tokens.len(), known.computed);
            lines.push(format!("    {}: {computed}/{len} computed, {tables:?}", sequence.0));
        }
        lines.push(format!("    device {:?}", self.cache.device_usage()));
        lines.join("\n")
    }

    /// Counts, lengths, windows and pins.
    pub(super) fn check_state(&self) {
        self.cache.audit().unwrap();
        for usage in [self.cache.device_usage(), self.cache.host_usage()] {
            assert_eq!(usage.free + usage.used + usage.pending, usage.total, "{usage:?}");
        }
        let config = self.cache.config();
        assert_eq!(self.cache.sequences().count(), self.known.len());
        for (&sequence, known) in &self.known {
            assert_eq!(self.cache.len(sequence), Some(known.tokens.len()));
            assert_eq!(self.cache.computed(sequence), Some(known.computed));
            assert_eq!(self.cache.is_swapped_out(sequence), Some(known.swapped_out));
            for (group, kv_group) in config.groups.iter().enumerate() {
                let Some(table) = self.cache.block_table(sequence, group) else {
                    assert!(known.swapped_out);
                    continue;
                };
                assert!(!known.swapped_out);
                assert_eq!(table.len(), known.tokens.len().div_ceil(config.block_size));
                if let Some(window) = kv_group.window {
                    let computed = &table[..known.computed.div_ceil(config.block_size)];
                    let held = computed.iter().filter(|&&block| block != NO_BLOCK).count();
                    assert!(held <= window / config.block_size + 3, "window {window} holds {held} blocks");
                }
            }
        }
        if self.cache.device_usage().pending == 0 {
            self.check_pins();
        }
    }

    /// A pinned prefix is found, whatever has happened since.
    fn check_pins(&self) {
        for pin in &self.pins {
            let mut longer = pin.tokens.clone();
            longer.push(0);
            let prompt = Prompt { tokens: &longer, salt: pin.salt, use_prefix_cache: true };
            assert!(self.cache.cached_tokens(&prompt) >= pin.tokens.len(), "a pinned prefix was lost");
        }
    }

    /// Every token that a running sequence can still see is where its block tables say. To be called when
    /// all copies are carried out.
    pub(super) fn verify_contents(&self) {
        let config = self.cache.config();
        for (&sequence, known) in &self.known {
            for (group, kv_group) in config.groups.iter().enumerate() {
                let Some(table) = self.cache.block_table(sequence, group) else { continue };
                let digests = digests(known.salt, group, &known.tokens[..known.computed]);
                let first = kv_group.window.map_or(0, |window| (known.computed + 1).saturating_sub(window));
                for (position, &digest) in digests.iter().enumerate().skip(first) {
                    let block = table[position / config.block_size];
                    assert_ne!(
                        block, NO_BLOCK,
                        "{sequence:?} still sees position {position} in group {group}"
                    );
                    assert_eq!(
                        self.memory.read(block, position % config.block_size),
                        digest,
                        "{sequence:?} finds something else at position {position} of group {group}, block {block}"
                    );
                }
            }
        }
    }

    /// Distinct device blocks that running sequences hold.
    pub(super) fn distinct_blocks(&self, sequences: &[SequenceId]) -> usize {
        let groups = self.cache.config().groups.len();
        let tables = sequences.iter().flat_map(|&sequence| {
            (0..groups).filter_map(move |group| self.cache.block_table(sequence, group))
        });
        tables.flatten().filter(|&&block| block != NO_BLOCK).collect::<BTreeSet<_>>().len()
    }
}
