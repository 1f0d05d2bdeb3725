//! The cache of an attention case: block tables, and numbers where a key may be read.

use super::super::oracle;
use super::super::{Buffer, CaseMask, Layout, Random, Tables};
use super::AttentionData;
use crate::KvStrides;

impl AttentionData {
    /// Block tables and what lies in the blocks.
    pub(super) fn make_cache(&mut self, random: &mut Random) {
        let mut free: Vec<i32> = (0..self.layout.num_blocks as i32).collect();
        random.shuffle(&mut free);
        let mut tables = self.plain_tables(free);
        let separate_values = self.allocate(random);
        for (sequence, table) in tables.iter_mut().enumerate() {
            self.fill_seen(sequence, table, separate_values, random);
        }
        self.lay_out(&tables, random);
    }

    /// Entries that nobody may follow: a block that there is not.
    fn wild(&self) -> [i32; 5] {
        let num_blocks = self.layout.num_blocks as i32;
        [i32::MIN, i32::MAX, num_blocks, num_blocks + 7, -77]
    }

    /// The tables, as they would be without tricks.
    fn plain_tables(&self, mut free: Vec<i32>) -> Vec<Vec<i32>> {
        let (case, block_size) = (&self.case, self.case.block_size);
        let mut tables: Vec<Vec<i32>> = Vec::new();
        let shortest = case.sequences.iter().map(|shape| shape.keys).filter(|&keys| keys > 0).min();
        let common = shortest.unwrap_or(0).div_ceil(block_size).div_ceil(2);
        let mut prefix: Vec<i32> = Vec::new();
        for shape in &case.sequences {
            let blocks = shape.keys.div_ceil(block_size);
            let mut table: Vec<i32> = Vec::new();
            if case.shared_prefix && blocks > 0 {
                table.extend(prefix.iter().take(blocks));
            }
            while table.len() < blocks {
                table.extend(free.pop());
            }
            if case.shared_prefix && prefix.is_empty() && blocks > 0 {
                prefix = table.iter().copied().take(common).collect();
            }
            tables.push(table);
        }
        tables
    }

    /// Numbers where a key may be read; entries that nobody may follow, without queries or behind a window, go wild.
    fn fill_seen(&mut self, sequence: usize, table: &mut [i32], separate_values: bool, random: &mut Random) {
        let (wild, block_size) = (self.wild(), self.case.block_size);
        let seen: Vec<bool> = oracle::seen_keys(self, sequence);
        let first = seen.iter().position(|&seen| seen).unwrap_or(seen.len());
        let last = seen.iter().rposition(|&seen| seen).map_or(0, |last| last + 1);
        let seen_blocks = first / block_size..last.div_ceil(block_size);
        let no_queries = self.case.sequences[sequence].queries == 0;
        let windowed = matches!(self.case.mask, CaseMask::Window(_));
        for key in 0..seen.len() {
            let unused = no_queries || (windowed && !(first..last).contains(&key));
            let within = windowed && seen_blocks.contains(&(key / block_size));
            if (unused && !within) || (self.case.poison_unseen && !seen[key]) {
                continue;
            }
            self.fill(table[key / block_size] as usize, key % block_size, separate_values, random);
        }
        for (index, entry) in table.iter_mut().enumerate() {
            if no_queries || (windowed && !seen_blocks.contains(&index)) {
                *entry = random.pick(-1, &wild);
            }
        }
    }

    /// The tables in the case's form.
    fn lay_out(&mut self, tables: &[Vec<i32>], random: &mut Random) {
        let wild = self.wild();
        match self.case.tables {
            Tables::Padded => {
                self.max_blocks = tables.iter().map(Vec::len).max().unwrap_or(0) + random.below(3);
                for table in tables {
                    self.entries.extend(table);
                    (table.len()..self.max_blocks).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                }
            }
            Tables::Csr => {
                (0..2).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                self.indptr.push(self.entries.len() as i32);
                for table in tables {
                    self.entries.extend(table);
                    (0..random.below(3)).for_each(|_| self.entries.push(random.pick(-1, &wild)));
                    self.indptr.push(self.entries.len() as i32);
                }
                self.entries.push(random.pick(-1, &wild));
            }
        }
    }

    /// Makes the poisoned buffers; says whether values have to be filled apart from keys.
    fn allocate(&mut self, random: &mut Random) -> bool {
        let (k_len, v_len) =
            (self.layout.k_extent(&self.config) as usize, self.layout.v_extent(&self.config) as usize);
        let dtype = self.config.kv_dtype;
        match self.case.layout {
            Layout::Shared => {
                self.k = Buffer::poisoned(dtype, k_len.max(v_len), random);
                false
            }
            Layout::Interleaved => {
                self.v_offset = self.case.block_size * self.config.kv_heads * self.config.head_dim_qk;
                self.k = Buffer::poisoned(dtype, k_len.max(self.v_offset + v_len), random);
                true
            }
            _ => {
                self.k = Buffer::poisoned(dtype, k_len, random);
                self.v = Some(Buffer::poisoned(dtype, v_len, random));
                true
            }
        }
    }

    /// Puts numbers where one token's keys and values belong.
    fn fill(&mut self, block: usize, place: usize, values: bool, random: &mut Random) {
        let reach = self.case.amplitude();
        let at = |strides: KvStrides, head: usize| {
            block * strides.block as usize + place * strides.token as usize + head * strides.head as usize
        };
        for head in 0..self.config.kv_heads {
            let scale = f64::from(self.k_scales[head]);
            let start = at(self.layout.k, head);
            for d in 0..self.config.head_dim_qk {
                self.k.set(start + d, random.uniform(-reach, reach) / scale);
            }
            if !values {
                continue;
            }
            let scale = f64::from(self.v_scales[head]);
            let start = at(self.layout.v, head);
            for d in 0..self.config.head_dim_v {
                // Not around 0, so that a wrong normalisation shows.
                let value = random.uniform(-1.0, 2.0) / scale;
                match &mut self.v {
                    Some(v) => v.set(start + d, value),
                    None => self.k.set(self.v_offset + start + d, value),
                }
            }
        }
    }
}
