//! Who may come in, and who never can.

use super::group::{Group, NewGroup};
use super::{Schedule, Scheduler};
use crate::request::RequestError;
use pagewise_kvcache::{Admission, CacheError, CacheManager, Prompt};

impl Scheduler {
    /// Refuses what can never be served.
    pub(super) fn check(&self, new: &NewGroup, cache: &dyn CacheManager) -> Result<(), RequestError> {
        let refuse = |param: &'static str, message: String| Err(RequestError { param: Some(param), message });
        let length = new.prompt.len();
        if length == 0 {
            return refuse("prompt", "the prompt is empty; it needs at least one token".into());
        }
        let longest = self.config.max_model_len;
        if length >= longest {
            let message = format!(
                "the prompt has {length} tokens, but the model's context holds {longest}, the completion included; \
                 shorten the prompt or raise --max-model-len"
            );
            return refuse("prompt", message);
        }
        self.check_samples(new.samples)?;
        if cache.can_allocate(&[self.prompt(&new.prompt, false)]) == Admission::Never {
            return Err(prompt_exceeds_cache(length, cache));
        }
        Ok(())
    }

    /// Whether so many samples of one prompt may ever run together. Asked before anything is made for each.
    ///
    /// # Errors
    /// [`RequestError`] on `n`.
    pub(crate) fn check_samples(&self, samples: usize) -> Result<(), RequestError> {
        let most = self.most_sequences();
        if samples <= most {
            return Ok(());
        }
        let message = format!(
            "{samples} completions are to be sampled together, but only {most} sequences may run at a time; lower n or \
             best_of, or raise --max-num-seqs and --max-batch-tokens"
        );
        Err(RequestError { param: Some("n"), message })
    }

    /// Sequences that may be resident: each needs a token of the budget in every step.
    pub(super) fn most_sequences(&self) -> usize {
        self.config.max_num_seqs.min(self.config.max_batch_tokens)
    }

    fn prompt<'a>(&self, tokens: &'a [u32], use_prefix_cache: bool) -> Prompt<'a> {
        Prompt { tokens, salt: self.salt, use_prefix_cache }
    }

    /// Admits the head of the queue, if it can be now; refuses it if it can never be. `true` while the next
    /// in line should be asked as well.
    pub(super) fn admit_head(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<Option<Admitted>, CacheError> {
        let Some((_, head)) = self.waiting.first_key_value() else { return Ok(None) };
        let samples = head.unfinished();
        if self.resident_sequences + samples > self.most_sequences() {
            return Ok(None);
        }
        let Some(leader) = head.sequences.iter().find(|sequence| !sequence.finished) else { return Ok(None) };
        let length = if samples == 1 { leader.tokens.len() } else { head.prompt_len };
        let use_prefix_cache = head.prompt_rows_done >= head.prompt_rows_wanted;
        let prompt = self.prompt(leader.tokens.get(..length).unwrap_or_default(), use_prefix_cache);

        let alone = self.resident.is_empty();
        // Samples that wait for their group's prompt have been promised their blocks.
        let promised: usize =
            self.resident.values().filter(|group| !group.forked).map(|group| growth(group, cache)).sum();
        let crowded = |free: usize| (samples > 1 || promised > 0) && demand(head, cache) + promised > free;
        let admission = match cache.can_allocate(&[prompt]) {
            // Alone, it may use what the watermark or the growth of its samples would keep free.
            Admission::Now if !alone && crowded(cache.device_usage().free) => Admission::Later,
            Admission::Later if alone && cache.device_usage().pending == 0 => Admission::Now,
            answer => answer,
        };
        if admission == Admission::Later {
            return Ok(None);
        }
        let allocated = match admission {
            Admission::Never => Err(CacheError::OutOfBlocks { wanted: 0, free: 0 }),
            _ => cache.allocate(leader.id, prompt),
        };
        let allocation = match allocated {
            Ok(allocation) => allocation,
            Err(CacheError::OutOfBlocks { .. }) => {
                let Some((id, group)) = self.waiting.pop_first() else { return Ok(None) };
                schedule.refused.push((id, exceeds_cache(&group, cache)));
                return Ok(Some(Admitted::Refused));
            }
            Err(error) => return Err(error),
        };

        let Some((id, mut group)) = self.waiting.pop_first() else { return Ok(None) };
        group.forked = samples == 1;
        if let Some(leader) = group.sequences.iter_mut().find(|sequence| !sequence.finished) {
            leader.slots = length;
            leader.computed = allocation.cached_tokens;
        }
        if !std::mem::replace(&mut group.admitted_before, true) {
            schedule.admitted.push((id, allocation.cached_tokens));
        }
        self.resident_sequences += samples;
        self.resident.insert(id, group);
        Ok(Some(Admitted::Resident))
    }
}

/// What became of the head of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    Resident,
    Refused,
}

/// Blocks of a group once each of its sequences has room for one token more: the prompt's full blocks once, the
/// rest for each. An upper bound where a sliding window or the prefix cache saves some.
fn demand(group: &Group, cache: &dyn CacheManager) -> usize {
    let config = cache.config();
    let shared = group.prompt_len / config.block_size.max(1);
    let unfinished = group.sequences.iter().filter(|sequence| !sequence.finished);
    let own =
        unfinished.map(|sequence| (sequence.tokens.len() + 1).div_ceil(config.block_size.max(1)) - shared);
    (shared + own.sum::<usize>()) * config.groups.len()
}

/// What a group of which only the leader is in the cache will take when the others join.
fn growth(group: &Group, cache: &dyn CacheManager) -> usize {
    let config = cache.config();
    let held = group.prompt_len.div_ceil(config.block_size.max(1)) * config.groups.len();
    demand(group, cache).saturating_sub(held)
}

fn cache_size(cache: &dyn CacheManager) -> String {
    let config = cache.config();
    format!("{} blocks of {} tokens", config.device_blocks, config.block_size)
}

fn prompt_exceeds_cache(prompt_len: usize, cache: &dyn CacheManager) -> RequestError {
    let message = format!(
        "the prompt has {prompt_len} tokens, which with one more to generate never fit into the cache of {}; shorten \
         it or raise --kv-blocks or --kv-memory",
        cache_size(cache)
    );
    RequestError { param: Some("prompt"), message }
}

/// Why a group cannot go on even with the whole cache to itself.
pub(super) fn exceeds_cache(group: &Group, cache: &dyn CacheManager) -> RequestError {
    let generated: usize =
        group.sequences.iter().map(|s| s.tokens.len().saturating_sub(group.prompt_len)).sum();
    if generated == 0 && group.sequences.len() == 1 {
        return prompt_exceeds_cache(group.prompt_len, cache);
    }
    let completions = match group.sequences.len() {
        1 => String::new(),
        n => format!(" in {n} completions"),
    };
    let message = format!(
        "the request has grown to a prompt of {} and {generated} generated tokens{completions}, which fill the whole \
         cache of {}; lower max_tokens or n, or raise --kv-blocks or --kv-memory",
        group.prompt_len,
        cache_size(cache)
    );
    RequestError { param: Some("max_tokens"), message }
}
