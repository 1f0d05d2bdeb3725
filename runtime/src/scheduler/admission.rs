//! Who may come in, and who never can.

use super::group::{Group, NewGroup, Sequence};
use super::order::Rank;
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
        if cache.can_allocate(&[Prompt { tokens: &new.prompt, salt: self.salt, use_prefix_cache: false }])
            == Admission::Never
        {
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

    /// Admits the head of the queue, if it can be now; refuses it if it can never be.
    pub(super) fn admit_head(
        &mut self,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<Admitted, CacheError> {
        let Some(id) = self.waiting.first().map(|rank| rank.id()) else { return Ok(Admitted::No) };
        let (alone, most, salt) = (self.resident.is_empty(), self.most_sequences(), self.salt);
        let seats = self.groups.get(&id).map_or(0, |head| head.seats);
        if self.resident_sequences + seats > most {
            return Ok(Admitted::No);
        }
        // Samples that wait for their group's prompt have been promised their blocks.
        let residents = self.resident.iter().filter_map(|rank| self.groups.get(&rank.id()));
        let promised: usize = residents.map(|group| growth(group, cache)).sum();
        let Some(head) = self.groups.get_mut(&id) else { return Ok(Admitted::No) };
        // Alone, it may use what the watermark or its own growth would keep free.
        if !alone && !has_room(head, promised, salt, cache) {
            return Ok(Admitted::No);
        }
        match enter(head, salt, cache) {
            Ok(cached_tokens) => {
                self.waiting.pop_first();
                head.rank = head.rank.admitted();
                head.resident = true;
                self.resident.insert(head.rank);
                self.resident_sequences += head.seats;
                if std::mem::replace(&mut head.admitted_before, true) {
                    schedule.returned.push(id);
                } else {
                    schedule.admitted.push((id, cached_tokens));
                }
                Ok(Admitted::Yes(id))
            }
            // Blocks whose copies are under way are free, and readable, in the next step.
            Err(CacheError::Pending(_)) => Ok(Admitted::No),
            Err(CacheError::OutOfBlocks { .. }) if !alone || cache.device_usage().pending > 0 => {
                Ok(Admitted::No)
            }
            Err(CacheError::OutOfBlocks { .. }) => {
                if !self.reclaim(cache)? {
                    self.refuse(id, schedule, cache)?;
                }
                Ok(Admitted::AskAgain)
            }
            Err(error) => Err(error),
        }
    }

    /// Somebody swapped out may hold blocks on the device that were once shared. Where nobody else has any to
    /// give, the last such group gives up all of its blocks and will be recomputed. `false` if there is none.
    pub(super) fn reclaim(&mut self, cache: &mut dyn CacheManager) -> Result<bool, CacheError> {
        let holds = |rank: &&Rank| self.groups.get(&rank.id()).is_some_and(|group| !group.held().is_empty());
        let last = self.waiting.iter().rev().find(holds).map(|rank| rank.id());
        match last.and_then(|id| self.groups.get_mut(&id)) {
            Some(group) => rebuild::give_up(group, cache).map(|()| true),
            None => Ok(false),
        }
    }

    /// Lets a group go that can never fit.
    pub(super) fn refuse(
        &mut self,
        id: RequestId,
        schedule: &mut Schedule,
        cache: &mut dyn CacheManager,
    ) -> Result<(), CacheError> {
        let Some(mut group) = self.take(id) else { return Ok(()) };
        schedule.refused.push((id, exceeds_cache(&group, cache)));
        group.release(cache)
    }
}

/// The first of a group's sequences to come in, and what it brings: all that is computed before another is forked from
/// it.
fn leader(group: &Group, salt: u64) -> Option<(usize, Prompt<'_>)> {
    let index = group.sequences.iter().position(|sequence| !sequence.finished)?;
    let tokens = &group.sequences.get(index)?.tokens;
    let tokens = tokens.get(..group.goal(index)).unwrap_or(tokens);
    let use_prefix_cache = group.prompt_rows_done >= group.prompt_rows_wanted;
    Some((index, Prompt { tokens, salt, use_prefix_cache }))
}

/// Whether a group can come in beside others, to which `promised` blocks belong, and have a token more.
fn has_room(group: &Group, promised: usize, salt: u64, cache: &dyn CacheManager) -> bool {
    let swapped = group.held();
    let admission = if swapped.is_empty() {
        leader(group, salt).map_or(Admission::Never, |(_, prompt)| cache.can_allocate(&[prompt]))
    } else {
        cache.can_swap_in(&swapped)
    };
    // What the cache answers covers one prompt and its next token.
    let covered = group.seats == 1 && promised == 0 && swapped.is_empty();
    admission == Admission::Now && (covered || demand(group, cache) + promised <= cache.device_usage().free)
}

/// Brings a group into the cache. Returns how many of its tokens were there already.
fn enter(group: &mut Group, salt: u64, cache: &mut dyn CacheManager) -> Result<usize, CacheError> {
    let swapped = group.held();
    if !swapped.is_empty() {
        cache.swap_in(&swapped)?;
        // Where it was preempted while a step of its own was under way, that step could not fork those that waited for it:
        // what the cache was not told of is computed again, and its end forks them.
        if group.rebuilding() {
            for sequence in
                group.sequences.iter_mut().filter(|sequence| !sequence.finished && sequence.slots > 0)
            {
                sequence.planned = sequence.planned.min(cache.computed(sequence.id).unwrap_or(0));
            }
        }
        return Ok(0);
    }
    let Some((index, prompt)) = leader(group, salt) else { return Ok(0) };
    let slots = prompt.tokens.len();
    let Some(id) = group.sequences.get(index).map(|sequence| sequence.id) else { return Ok(0) };
    let cached_tokens = cache.allocate(id, prompt)?.cached_tokens;
    if let Some(sequence) = group.sequences.get_mut(index) {
        (sequence.slots, sequence.planned) = (slots, cached_tokens);
    }
    Ok(cached_tokens)
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
