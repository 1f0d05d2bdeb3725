//! The operations: each decodes its arguments, says what the model expects, calls the cache, and compares.
//!
//! What the model cannot know is whether blocks are shared, so it cannot foresee every shortage. It knows
//! bounds: a call must succeed if there is room even without any sharing, and a refusal for want of room
//! must name more blocks than are free. That a refused call changes nothing is compared on whole states.

use pagewise_kvcache::{
    Admission, CacheError, CacheManager, KvCacheManager, Prompt, RebuildStep, SequenceId,
};

use super::memory::digests;
use super::{Kind, Known, Machine, Op, Pinned};

/// Few sequences, so that ids collide, groups overlap and unknown ones are named.
const SEQUENCES: u8 = 6;

fn sequence(arg: u8) -> SequenceId {
    SequenceId(u64::from(arg % SEQUENCES))
}

/// A text whose prefix is common: two letters, runs of three tokens.
fn text(seed: u8, len: usize) -> Vec<u32> {
    (0..len).map(|position| u32::from(seed >> (position / 3 % 8) & 1)).collect()
}

struct PromptText {
    tokens: Vec<u32>,
    salt: u64,
    use_prefix_cache: bool,
}

impl PromptText {
    /// `shape`: length in the low five bits, then salt and bypass.
    fn decode(seed: u8, shape: u8) -> Self {
        Self {
            tokens: text(seed, usize::from(shape & 31)),
            salt: u64::from(shape >> 5 & 1),
            use_prefix_cache: shape >> 6 != 3,
        }
    }

    fn prompt(&self) -> Prompt<'_> {
        Prompt { tokens: &self.tokens, salt: self.salt, use_prefix_cache: self.use_prefix_cache }
    }
}

impl Machine {
    /// The sequence that an operation means: mostly one that exists, sometimes any.
    fn existing(&self, arg: u8) -> SequenceId {
        let nth = self.known.keys().nth(usize::from(arg) % self.known.len().max(1));
        nth.copied().filter(|_| arg < 240).unwrap_or(sequence(arg))
    }

    /// The sequence that an operation is to make: mostly one that does not exist, sometimes any.
    fn vacant(&self, arg: u8) -> SequenceId {
        let mut candidates = (0..SEQUENCES).map(|step| sequence(arg.wrapping_add(step)));
        candidates.find(|id| !self.known.contains_key(id)).filter(|_| arg < 240).unwrap_or(sequence(arg))
    }

    /// The sequences of a mask: mostly only those that are where the operation wants them, sometimes any.
    fn group(&self, mask: u8, swapped_out: Option<bool>) -> Vec<SequenceId> {
        let fits = |id: &SequenceId| {
            let known = self.known.get(id);
            mask >= 240
                || known.is_some_and(|known| swapped_out.is_none_or(|wanted| known.swapped_out == wanted))
        };
        (0..SEQUENCES).filter(|bit| mask >> bit & 1 == 1).map(sequence).filter(fits).collect()
    }

    pub(crate) fn step(&mut self, op: Op) {
        self.case.extend(op.encode());
        let [a, b, c] = op.args;
        match op.kind {
            Kind::Allocate => self.allocate(self.vacant(a), &PromptText::decode(b, c)),
            Kind::AllocateGang => self.allocate_gang(a, b, c),
            Kind::Append => self.append(self.existing(a), usize::from(b % 12), c),
            Kind::Compute => self.compute(self.existing(a), usize::from(b % 16)),
            Kind::Fork => self.fork(self.existing(a), self.vacant(b)),
            Kind::Truncate => self.truncate(self.existing(a), usize::from(b)),
            Kind::Free => self.free(self.existing(a)),
            Kind::SwapOut => self.swap_out(&self.group(a, Some(false))),
            Kind::SwapIn => self.swap_in(&self.group(a, Some(true))),
            Kind::Take => self.take_and_execute(),
            Kind::Confirm => self.confirm(),
            Kind::Pin => self.pin(&PromptText::decode(a, b)),
            Kind::Unpin => self.unpin(usize::from(a)),
            Kind::Reset => self.reset(),
            Kind::Recompute => self.recompute(&self.group(a, None)),
        }
        self.check_state();
    }

    /// Calls the cache and insists that a refusal changes nothing.
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut KvCacheManager) -> Result<T, CacheError>,
    ) -> Result<T, CacheError> {
        let before = self.cache.clone();
        let result = call(&mut self.cache);
        if let Err(error) = &result {
            self.coverage.refusals += 1;
            assert!(self.cache == before, "refused with {error:?}, but something has changed");
            match *error {
                CacheError::OutOfBlocks { wanted, free } => {
                    assert!(wanted > free && free <= before.device_usage().free);
                }
                CacheError::OutOfHostBlocks { wanted, free } => {
                    assert!(wanted > free && free == before.host_usage().free);
                }
                _ => {}
            }
        }
        result
    }

    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.cache.config().block_size) * self.groups()
    }

    fn groups(&self) -> usize {
        self.cache.config().groups.len()
    }

    fn has_windows(&self) -> bool {
        self.cache.config().groups.iter().any(|group| group.window.is_some())
    }

    /// What the model says to a call on a sequence that must be on the device.
    fn on_device(&self, sequence: SequenceId) -> Result<&Known, CacheError> {
        match self.known.get(&sequence) {
            None => Err(CacheError::UnknownSequence(sequence)),
            Some(known) if known.swapped_out => Err(CacheError::NotOnDevice(sequence)),
            Some(known) => Ok(known),
        }
    }

    fn allocate(&mut self, sequence: SequenceId, text: &PromptText) {
        let prompt = text.prompt();
        let len = prompt.tokens.len();
        let admission = self.cache.can_allocate(&[prompt]);
        let cached = self.cache.cached_tokens(&prompt);
        let room = self.cache.device_usage().free;
        if admission == Admission::Never {
            assert!(self.blocks_for(len + 1) > self.cache.device_usage().total);
        }
        match self.call(|cache| cache.allocate(sequence, prompt)) {
            Ok(allocation) => {
                assert!(!self.known.contains_key(&sequence) && len > 0);
                assert_eq!(allocation.cached_tokens, cached);
                assert!(cached.is_multiple_of(self.cache.config().block_size) && cached < len);
                assert!(cached == 0 || text.use_prefix_cache && self.cache.config().prefix_cache);
                let known = Known {
                    tokens: text.tokens.clone(),
                    computed: cached,
                    salt: text.salt,
                    swapped_out: false,
                };
                self.known.insert(sequence, known);
                if admission == Admission::Now {
                    assert!(self.cache.can_append(sequence, 1), "admitted without room for a token");
                }
            }
            Err(CacheError::SequenceExists(_)) => assert!(self.known.contains_key(&sequence)),
            Err(CacheError::EmptyPrompt(_)) => assert_eq!(len, 0),
            Err(CacheError::OutOfBlocks { .. }) => {
                assert!(self.blocks_for(len) > room);
                assert_ne!(admission, Admission::Now);
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn allocate_gang(&mut self, seeds: u8, shapes: u8, other: u8) {
        let texts = [
            PromptText::decode(seeds, shapes),
            PromptText::decode(seeds ^ (other & 0xc0), shapes ^ other & 7),
        ];
        if texts.iter().any(|text| text.tokens.is_empty()) {
            return;
        }
        if self.cache.can_allocate(&[texts[0].prompt(), texts[1].prompt()]) == Admission::Now {
            let vacant: Vec<_> =
                (0..SEQUENCES).map(sequence).filter(|id| !self.known.contains_key(id)).collect();
            for (&sequence, text) in vacant.iter().zip(&texts) {
                self.allocate(sequence, text);
                assert!(self.known.contains_key(&sequence), "the gang was admitted");
            }
        }
    }

    fn append(&mut self, sequence: SequenceId, tokens: usize, seed: u8) {
        let expected = self.on_device(sequence).map(|known| known.tokens.len());
        let can = self.cache.can_append(sequence, tokens);
        let room = self.cache.device_usage().free;
        let result = self.call(|cache| cache.append(sequence, tokens));
        assert_eq!(can, result.is_ok());
        match (result, expected) {
            (Ok(()), Ok(_)) => {
                self.known.get_mut(&sequence).unwrap().tokens.extend(text(seed, tokens));
            }
            (Err(CacheError::OutOfBlocks { .. }), Ok(len)) => {
                let naive = self.blocks_for(len + tokens) - self.blocks_for(len) + self.groups();
                assert!(naive > room, "there was room without any sharing");
            }
            (result, expected) => assert_eq!(result.err(), expected.err()),
        }
    }

    /// A step of the model for one sequence: copies, writes, report.
    fn compute(&mut self, sequence: SequenceId, tokens: usize) {
        let Ok(known) = self.on_device(sequence).cloned() else {
            let expected = self.on_device(sequence).err();
            assert_eq!(self.call(|cache| cache.mark_computed(sequence, &[0])).err(), expected);
            return;
        };
        let left = known.tokens.len() - known.computed;
        if tokens > left && tokens < usize::MAX {
            let result = self.call(|cache| cache.mark_computed(sequence, &vec![0; tokens]));
            assert!(matches!(result, Err(CacheError::BeyondAllocated { .. })));
        }
        let until = known.computed + tokens.min(left);
        self.take_and_execute();
        self.write(sequence, known.computed, until);
        self.call(|cache| cache.mark_computed(sequence, &known.tokens[known.computed..until])).unwrap();
        self.known.get_mut(&sequence).unwrap().computed = until;
        self.verify_contents();
    }

    fn write(&mut self, sequence: SequenceId, from: usize, until: usize) {
        let block_size = self.cache.config().block_size;
        for group in 0..self.groups() {
            let known = &self.known[&sequence];
            let digests = digests(known.salt, group, &known.tokens[..until]);
            let table = self.cache.block_table(sequence, group).unwrap();
            for (position, &digest) in digests.iter().enumerate().skip(from) {
                self.memory.write(table[position / block_size], position % block_size, digest);
            }
        }
    }

    fn fork(&mut self, parent: SequenceId, child: SequenceId) {
        let usage = self.cache.device_usage();
        let expected = match self.on_device(parent) {
            Ok(_) if self.known.contains_key(&child) => Some(CacheError::SequenceExists(child)),
            Ok(_) => None,
            Err(error) => Some(error),
        };
        assert_eq!(self.call(|cache| cache.fork(parent, child)).err(), expected);
        if expected.is_none() {
            self.known.insert(child, self.known[&parent].clone());
        }
        assert_eq!(self.cache.device_usage(), usage, "fork takes no block");
    }

    fn truncate(&mut self, sequence: SequenceId, len: usize) {
        let Some(known) = self.known.get(&sequence) else {
            let result = self.call(|cache| cache.truncate(sequence, len));
            return assert_eq!(result, Err(CacheError::UnknownSequence(sequence)));
        };
        let len = len % (known.tokens.len() + 2);
        let (has, computed) = (known.tokens.len(), known.computed);
        match self.call(|cache| cache.truncate(sequence, len)) {
            Ok(()) => {
                let known = self.known.get_mut(&sequence).unwrap();
                known.tokens.truncate(len);
                known.computed = known.computed.min(len);
            }
            Err(CacheError::BeyondAllocated { .. }) => assert!(len > has),
            Err(CacheError::BehindWindow { .. }) => {
                assert!(self.has_windows() && len < computed);
                self.coverage.behind_window += 1;
            }
            Err(error) => panic!("{error:?}"),
        }
    }

    fn free(&mut self, sequence: SequenceId) {
        let expected = match self.known.remove(&sequence) {
            Some(_) => Ok(()),
            None => Err(CacheError::UnknownSequence(sequence)),
        };
        assert_eq!(self.call(|cache| cache.free(sequence)), expected);
    }

    fn swap_out(&mut self, group: &[SequenceId]) {
        let expected = group.iter().find_map(|&sequence| self.on_device(sequence).err());
        let (room, pending) = (self.cache.host_usage().free, self.cache.device_usage().pending);
        let naive: usize =
            group.iter().filter_map(|id| self.known.get(id)).map(|k| self.blocks_for(k.tokens.len())).sum();
        match self.call(|cache| cache.swap_out(group)) {
            Ok(()) => {
                assert_eq!(expected, None);
                for sequence in group {
                    self.known.get_mut(sequence).unwrap().swapped_out = true;
                }
                self.coverage.shared_swaps +=
                    u64::from(group.len() > 1 && self.cache.host_usage().pending < naive);
            }
            Err(CacheError::Pending(_)) => assert!(pending > 0 && expected.is_none()),
            Err(CacheError::OutOfHostBlocks { .. }) => assert!(naive > room && expected.is_none()),
            Err(error) => assert_eq!(Some(error), expected),
        }
    }

    fn swap_in(&mut self, group: &[SequenceId]) {
        let expected = group.iter().find_map(|id| match self.known.get(id) {
            None => Some(CacheError::UnknownSequence(*id)),
            Some(known) if !known.swapped_out => Some(CacheError::NotOnHost(*id)),
            Some(_) => None,
        });
        let admission = self.cache.can_swap_in(group);
        let (room, pending) = (self.cache.device_usage().free, self.cache.host_usage().pending);
        let naive: usize =
            group.iter().filter_map(|id| self.known.get(id)).map(|k| self.blocks_for(k.tokens.len())).sum();
        let result = self.call(|cache| cache.swap_in(group));
        if result.is_err() {
            assert_ne!(admission, Admission::Now);
        }
        match result {
            Ok(()) => {
                assert_eq!(expected, None);
                assert_ne!(admission, Admission::Never);
                for sequence in group {
                    self.known.get_mut(sequence).unwrap().swapped_out = false;
                }
            }
            Err(CacheError::Pending(_)) => {
                assert!(pending > 0 && expected.is_none() && admission == Admission::Later);
            }
            Err(CacheError::OutOfBlocks { .. }) => assert!(naive > room && expected.is_none()),
            Err(error) => {
                assert_eq!(Some(error), expected);
                assert_eq!(admission, Admission::Never);
            }
        }
    }

    pub(super) fn take_and_execute(&mut self) {
        let ops = self.cache.take_block_ops();
        self.memory.execute(ops);
        self.verify_contents();
    }

    fn confirm(&mut self) {
        if self.memory.unconfirmed() == 0 {
            let result = self.call(KvCacheManager::confirm_block_ops);
            return assert_eq!(result, Err(CacheError::NothingToConfirm));
        }
        while self.memory.unconfirmed() > 0 {
            self.memory.confirm();
            self.call(KvCacheManager::confirm_block_ops).unwrap();
        }
    }

    fn pin(&mut self, text: &PromptText) {
        match self.call(|cache| cache.pin_prefix(text.prompt())) {
            Ok(pin) => {
                assert!(pin.tokens > 0 && pin.tokens <= text.tokens.len());
                let tokens = text.tokens[..pin.tokens].to_vec();
                self.pins.push(Pinned { id: pin.id, tokens, salt: text.salt });
                self.coverage.pins += 1;
            }
            Err(error) => assert_eq!(error, CacheError::NotCached),
        }
    }

    fn unpin(&mut self, index: usize) {
        if !self.pins.is_empty() {
            let pin = self.pins.swap_remove(index % self.pins.len());
            self.call(|cache| cache.unpin_prefix(pin.id)).unwrap();
            assert!(matches!(self.call(|cache| cache.unpin_prefix(pin.id)), Err(CacheError::UnknownPin(_))));
        }
    }

    fn reset(&mut self) {
        let in_use = |usage: pagewise_kvcache::PoolUsage| usage.total - usage.free;
        let used = in_use(self.cache.device_usage()) + in_use(self.cache.host_usage());
        match self.call(KvCacheManager::reset_prefix_cache) {
            Ok(_) => {
                assert_eq!(used, 0);
                self.coverage.resets += 1;
            }
            Err(error) => assert_eq!(error, CacheError::InUse { used }),
        }
    }

    /// Drops a group and brings it back at once, as far as there is room.
    fn recompute(&mut self, group: &[SequenceId]) {
        if let Some(&unknown) = group.iter().find(|id| !self.known.contains_key(id)) {
            let result = self.call(|cache| cache.drop_for_recompute(group));
            return assert_eq!(result, Err(CacheError::UnknownSequence(unknown)));
        }
        self.take_and_execute();
        let all_on_device = group.iter().all(|id| !self.known[id].swapped_out);
        let before = self.distinct_blocks(group);
        let free_before = self.cache.device_usage().free;
        let plan = self.call(|cache| cache.drop_for_recompute(group)).unwrap();
        assert!(!all_on_device || plan.held_blocks == before);
        let room = self.cache.device_usage().free;
        assert_eq!(plan.freed_blocks, room - free_before);

        let wanted: Vec<_> = group.iter().map(|id| self.known.remove(id).unwrap()).collect();
        let copied = self.cache.stats().copied_blocks;
        let complete = plan.steps.iter().all(|&step| self.rebuild(step, group, &wanted));
        if !complete {
            assert!(self.has_windows() || room < plan.held_blocks, "it fitted before");
            for &sequence in group {
                if self.known.remove(&sequence).is_some() {
                    self.cache.free(sequence).unwrap();
                }
            }
            return;
        }
        assert_eq!(self.cache.stats().copied_blocks, copied, "rebuilding copies nothing");
        for (&sequence, wanted) in group.iter().zip(&wanted) {
            // A sequence that had no slots has nothing to come back to.
            let Some(known) = self.known.get(&sequence) else {
                assert!(wanted.tokens.is_empty());
                continue;
            };
            assert_eq!(known.tokens, wanted.tokens);
            assert!(known.computed >= wanted.computed, "prefix hits may only add to what is computed");
        }
        let held = self.distinct_blocks(group);
        assert!(held <= plan.held_blocks || self.has_windows(), "more blocks than before");
        for &sequence in group {
            self.compute(sequence, usize::MAX);
        }
        assert!(self.distinct_blocks(group) <= plan.held_blocks, "more blocks than before");
    }

    /// `false` if there is no room.
    fn rebuild(&mut self, step: RebuildStep, group: &[SequenceId], wanted: &[Known]) -> bool {
        match step {
            RebuildStep::Grow { sequence, len, computed } => {
                let index = group.iter().position(|&id| id == sequence).unwrap();
                let goal = &wanted[index];
                // With windows in chunks of a block, so that what they leave behind is free for the next.
                let chunk = if self.has_windows() { self.cache.config().block_size } else { len.max(1) };
                loop {
                    let has = self.known.get(&sequence).map_or(0, |known| known.tokens.len());
                    let until = len.min((has + chunk) / chunk * chunk).max(has);
                    let result = if let Some(known) = self.known.get(&sequence) {
                        assert_eq!(known.tokens, goal.tokens[..has], "forked from another text");
                        self.call(|cache| cache.append(sequence, until - has))
                    } else {
                        let prompt =
                            Prompt { tokens: &goal.tokens[..until], salt: goal.salt, use_prefix_cache: true };
                        self.call(|cache| cache.allocate(sequence, prompt)).map(drop)
                    };
                    if result.is_err() {
                        return false;
                    }
                    let found = self.cache.computed(sequence).unwrap();
                    let known =
                        Known { tokens: goal.tokens[..until].to_vec(), computed: found, ..goal.clone() };
                    self.known.insert(sequence, Known { swapped_out: false, ..known });
                    self.compute(sequence, computed.min(until).saturating_sub(found));
                    if until == len {
                        return true;
                    }
                }
            }
            RebuildStep::Fork { parent, child } => {
                self.fork(parent, child);
                self.coverage.rebuilt_forks += 1;
                true
            }
            RebuildStep::Truncate { sequence, len } => {
                self.call(|cache| cache.truncate(sequence, len)).unwrap();
                let known = self.known.get_mut(&sequence).unwrap();
                known.tokens.truncate(len);
                known.computed = known.computed.min(len);
                true
            }
        }
    }
}
