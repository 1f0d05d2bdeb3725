//! Who may come in, and who never can.

use super::group::{Group, NewGroup, Sequence};
use super::{Schedule, Scheduler, rebuild};
use crate::request::{RequestError, RequestId};
use pagewise_kvcache::{Admission, CacheError, CacheManager, Prompt};

/// What became of the head of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admitted {
    /// It is resident.
    Yes(RequestId),
    /// It left, or something else made room: the next in line should be asked.
    AskAgain,
    /// It has to wait, or there is none.
    No,
}

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
        self.check_width(new.width, "n")?;
        if cache.can_allocate(&[self.prompt(&new.prompt, false)]) == Admission::Never {
            return Err(prompt_exceeds_cache(length, cache));
        }
        Ok(())
    }

    /// Whether so many sequences of one prompt may ever run together. Asked before anything is made for each.
    ///
    /// # Errors
    /// [`RequestError`] on `param`, which asks for them.
    pub(crate) fn check_width(&self, width: usize, param: &'static str) -> Result<(), RequestError> {
        let most = self.most_sequences();
        if width <= most {
            return Ok(());
        }
        let message = format!(
            "{width} sequences are to run together, but only {most} may run at a time; lower {param}, or raise \
             --max-num-seqs and --max-batch-tokens"
        );
        Err(RequestError { param: Some(param), message })
    }

    /// Sequences that may be resident: each needs a token of the budget in every step.
    pub(super) fn most_sequences(&self) -> usize {
        self.config.max_num_seqs.min(self.config.max_batch_tokens)
    }

    fn prompt<'a>(&self, tokens: &'a [u32], use_prefix_cache: bool) -> Prompt<'a> {
        Prompt { tokens, salt: self.salt, use_prefix_cache }
    }

    /// Admits the head of the queue, if it can be now; refuses it if it can never be.
    pub(super) fn admit_head(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<Admitted, CacheError> {
        let alone = self.resident.is_empty();
        // Samples that wait for their group's prompt have been promised their blocks.
        let promised: usize = self.resident.values().map(|group| growth(group, cache)).sum();
        let most = self.most_sequences();
        let Some(mut head) = self.waiting.first_entry() else { return Ok(Admitted::No) };
        let head = head.get_mut();
        if self.resident_sequences + head.seats > most {
            return Ok(Admitted::No);
        }
        let swapped = head.held();
        let crowded = (head.seats > 1 || promised > 0 || !swapped.is_empty())
            && demand(head, cache) + promised > cache.device_usage().free;
        let Some(leader) = head.sequences.iter().position(|sequence| !sequence.finished) else {
            return Ok(Admitted::No);
        };
        let goal = head.goal(leader);
        let use_prefix_cache = head.prompt_rows_done >= head.prompt_rows_wanted;
        let salt = self.salt;
        let Some(leader) = head.sequences.get_mut(leader) else { return Ok(Admitted::No) };
        let tokens = leader.tokens.get(..goal.min(leader.tokens.len())).unwrap_or_default();
        let prompt = Prompt { tokens, salt, use_prefix_cache };
        let admission =
            if swapped.is_empty() { cache.can_allocate(&[prompt]) } else { cache.can_swap_in(&swapped) };
        // Alone, it may use what the watermark or its own growth would keep free.
        if !alone && (admission != Admission::Now || crowded) {
            return Ok(Admitted::No);
        }
        let entered = if swapped.is_empty() {
            cache.allocate(leader.id, prompt).map(|allocation| {
                leader.slots = tokens.len();
                leader.planned = allocation.cached_tokens;
                Some(allocation.cached_tokens)
            })
        } else {
            cache.swap_in(&swapped).map(|()| None)
        };
        match entered {
            Ok(cached_tokens) => {
                let Some((_, mut group)) = self.waiting.pop_first() else { return Ok(Admitted::No) };
                let id = group.id();
                group.rank = group.rank.admitted();
                if !std::mem::replace(&mut group.admitted_before, true) {
                    schedule.admitted.push((id, cached_tokens.unwrap_or(0)));
                }
                self.resident_sequences += group.seats;
                self.ranks.insert(id, group.rank);
                self.resident.insert(group.rank, group);
                Ok(Admitted::Yes(id))
            }
            // Blocks whose copies are under way are free, and readable, in the next step.
            Err(CacheError::Pending(_)) => Ok(Admitted::No),
            Err(CacheError::OutOfBlocks { .. }) if cache.device_usage().pending > 0 => Ok(Admitted::No),
            Err(CacheError::OutOfBlocks { .. }) if !alone => Ok(Admitted::No),
            Err(CacheError::OutOfBlocks { .. }) => {
                if !self.reclaim(cache)? {
                    let Some((_, group)) = self.waiting.pop_first() else { return Ok(Admitted::No) };
                    self.refuse(group, schedule, cache)?;
                }
                Ok(Admitted::AskAgain)
            }
            Err(error) => Err(error),
        }
    }

    /// Somebody swapped out may hold blocks on the device that were once shared. Where nobody else has any to
    /// give, the last such group gives up all of its blocks and will be recomputed. `false` if there is none.
    pub(super) fn reclaim(&mut self, cache: &mut dyn CacheManager) -> Result<bool, CacheError> {
        let mut waiting = self.waiting.values_mut().rev();
        match waiting.find(|group| group.sequences.iter().any(|sequence| sequence.slots > 0)) {
            Some(group) => rebuild::give_up(group, cache).map(|()| true),
            None => Ok(false),
        }
    }

    /// Lets a group go that can never fit. It is in neither map any more.
    pub(super) fn refuse(
        &mut self,
        mut group: Group,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<(), CacheError> {
        self.ranks.remove(&group.id());
        schedule.refused.push((group.id(), exceeds_cache(&group, cache)));
        group.release(cache)
    }
}

/// Blocks of a group once each of its sequences has room for one token more: what is shared once, the rest for
/// each. An upper bound where a sliding window or the prefix cache saves some.
pub(super) fn demand(group: &Group, cache: &dyn CacheManager) -> usize {
    let config = cache.config();
    let block_size = config.block_size.max(1);
    let own = |len: usize, shared: usize| (len + 1).div_ceil(block_size) - shared / block_size;
    let present: usize =
        group.unfinished().map(|sequence| own(sequence.len(), rebuild::shared(sequence))).sum();
    let absent = group.seats.saturating_sub(group.unfinished().count());
    (present + absent * own(group.prompt_len, group.prompt_len)) * config.groups.len()
}

/// What a resident group will take when those of its sequences that are not in the cache yet have come in.
fn growth(group: &Group, cache: &dyn CacheManager) -> usize {
    let unsplit = group.seats > 1 && group.sequences.len() == 1;
    if !unsplit && !group.rebuilding() {
        return 0;
    }
    let config = cache.config();
    let block_size = config.block_size.max(1);
    let held = |sequence: &Sequence| match sequence.slots {
        0 => 0,
        slots => slots.div_ceil(block_size) - rebuild::shared(sequence).min(slots) / block_size,
    };
    let held: usize = group.unfinished().map(held).sum();
    demand(group, cache).saturating_sub(held * config.groups.len())
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
fn exceeds_cache(group: &Group, cache: &dyn CacheManager) -> RequestError {
    let generated: usize =
        group.sequences.iter().map(|s| s.tokens.len().saturating_sub(group.prompt_len)).sum();
    if generated == 0 && group.seats == 1 {
        return prompt_exceeds_cache(group.prompt_len, cache);
    }
    let sequences = match group.sequences.len() {
        1 => String::new(),
        n => format!(" in {n} sequences"),
    };
    let message = format!(
        "the request has grown to a prompt of {} and {generated} generated tokens{sequences}, which fill the whole \
         cache of {}; lower max_tokens, n or beam_width, or raise --kv-blocks or --kv-memory",
        group.prompt_len,
        cache_size(cache)
    );
    RequestError { param: Some("max_tokens"), message }
}
