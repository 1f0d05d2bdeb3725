//! One step of the engine, from the schedule to the events.

use super::logits::LogitCursor;
use super::state::{Choice, Step};
use super::{Engine, EngineError};
use crate::executor::StepOutput;
use crate::request::{Event, FinishReason, RequestError, RequestId};
use crate::sampling::{NoUsableLogit, Sampler};
use crate::scheduler::{NextToken, Schedule};
use pagewise_kvcache::CacheError;
use rayon::prelude::*;

/// From this many logits a step their tokens are chosen on several threads: about a tenth of a millisecond.
const PARALLEL_LOGITS: usize = 1 << 17;

/// Why a step ended early.
pub(super) enum Failure {
    /// The device or the plan: the cache's content is lost.
    Executor(String),
    Engine(EngineError),
}

impl From<CacheError> for Failure {
    fn from(error: CacheError) -> Self {
        Self::Engine(EngineError::Cache(error))
    }
}

impl Engine {
    /// Schedules, executes, commits, samples.
    pub(super) fn try_step(&mut self, events: &mut Vec<Event>) -> Result<(), Failure> {
        let schedule = self.scheduler.schedule(&mut *self.cache)?;
        for &(id, cached_tokens) in &schedule.admitted {
            if let Some(state) = self.requests.get_mut(&id) {
                state.cached_tokens = cached_tokens;
                self.stats.cached_tokens += cached_tokens as u64;
            }
        }
        for (id, error) in &schedule.refused {
            self.fail(*id, error.clone(), events);
        }
        if schedule.is_idle() {
            // Block ops are taken in every step, so every step confirms them.
            self.cache.confirm_block_ops()?;
            let stuck = schedule.refused.is_empty() && self.scheduler.has_work();
            return if stuck { Err(Failure::Engine(EngineError::Stalled)) } else { Ok(()) };
        }

        let output =
            self.executor.execute(&schedule.plan).map_err(|error| Failure::Executor(error.to_string()))?;
        check_shape(&schedule, &output, self.config.vocab_size).map_err(Failure::Executor)?;
        self.cache.confirm_block_ops()?;
        self.scheduler.commit(&schedule, &mut *self.cache)?;
        self.stats.steps += 1;
        self.stats.computed_tokens += schedule.plan.num_tokens() as u64;
        self.read_logits(&schedule, &output, events)?;
        Ok(())
    }

    /// Hands every logit row to whom it belongs: prompt log-probabilities, then the next tokens.
    fn read_logits(
        &mut self,
        schedule: &Schedule,
        output: &StepOutput,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        let mut cursor = LogitCursor::new(output);
        let mut wanted = Vec::with_capacity(schedule.chunks.len());
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            let rows = cursor.take(chunk.logit_rows());
            let Some(state) = self.requests.get_mut(&of.request) else { continue };
            state.read_prompt_rows(chunk, &rows);
            let Some(row) = rows.last() else { continue };
            let samples = match of.next_token {
                NextToken::None => continue,
                NextToken::Sample => of.sample..of.sample + 1,
                NextToken::Group => 0..state.samples.len(),
            };
            wanted.extend(samples.map(|index| (of.request, index, row)));
        }
        for ((id, index, _), choice) in wanted.iter().zip(self.choose(&wanted)) {
            self.next_token(*id, *index, choice, events)?;
        }
        Ok(())
    }

    /// Chooses the next token of each of these completions, on several threads where that pays.
    fn choose(
        &mut self,
        wanted: &[(RequestId, usize, &[f32])],
    ) -> Vec<Result<Option<Choice>, NoUsableLogit>> {
        let logits: usize = wanted.iter().map(|(_, _, row)| row.len()).sum();
        let threads =
            if logits < PARALLEL_LOGITS { 1 } else { rayon::current_num_threads().min(wanted.len()) };
        if self.samplers.len() < threads {
            self.samplers.resize_with(threads, Sampler::default);
        }
        let requests = &self.requests;
        let choose = |sampler: &mut Sampler, &(id, index, row): &(RequestId, usize, &[f32])| {
            requests.get(&id).map_or(Ok(None), |state| state.choose(index, row, sampler))
        };
        match self.samplers.as_mut_slice() {
            [sampler, ..] if threads == 1 => wanted.iter().map(|wanted| choose(sampler, wanted)).collect(),
            samplers => {
                let share = wanted.len().div_ceil(threads.max(1)).max(1);
                let choices = wanted.par_chunks(share).zip(samplers).flat_map_iter(|(wanted, sampler)| {
                    wanted.iter().map(|wanted| choose(sampler, wanted)).collect::<Vec<_>>()
                });
                choices.collect()
            }
        }
    }

    /// Adds a chosen token to its completion, and does all that follows from it.
    fn next_token(
        &mut self,
        id: RequestId,
        index: usize,
        choice: Result<Option<Choice>, NoUsableLogit>,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        // An earlier sample of the group may have failed the request.
        let Some(state) = self.requests.get_mut(&id) else { return Ok(()) };
        let choice = match choice {
            Ok(Some(choice)) => choice,
            Ok(None) => return Ok(()),
            Err(error) => {
                let message = format!("no token could be chosen after {} of them: {error}", state.len(index));
                self.scheduler.remove(id, &mut *self.cache)?;
                self.fail(id, RequestError { param: None, message }, events);
                return Ok(());
            }
        };
        let limit =
            state.params.max_tokens.min(self.config.max_model_len.saturating_sub(state.prompt_tokens));
        let Some(step) = state.advance(index, choice, limit, &self.config.eos_token_ids) else {
            return Ok(());
        };
        let streams = state.streams();
        let Step { token_id, text, finish_reason } = step;
        self.stats.generated_tokens += 1;
        self.scheduler.push_token(id, index, token_id);
        if streams {
            events.push(Event::Token { request: id, index, token_id, text });
        }
        match finish_reason {
            Some(reason) => self.finish_sample(id, index, reason, events),
            None => Ok(()),
        }
    }

    fn finish_sample(
        &mut self,
        id: RequestId,
        index: usize,
        reason: FinishReason,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        let Some(finished) = self.scheduler.finish_sample(id, index, &mut *self.cache)? else {
            return Ok(());
        };
        if let Some(state) = self.requests.get_mut(&id) {
            state.finish(index, finished.completion, reason);
        }
        if finished.group_done
            && let Some(state) = self.requests.remove(&id)
        {
            self.stats.finished += 1;
            events.push(Event::Finished { request: id, output: state.into_output() });
        }
        Ok(())
    }
}

/// An executor must answer with the rows that the plan asked for.
fn check_shape(schedule: &Schedule, output: &StepOutput, vocab_size: usize) -> Result<(), String> {
    let rows: usize = schedule.plan.chunks.iter().map(|chunk| chunk.logit_rows()).sum();
    if (rows > 0 && output.vocab_size != vocab_size)
        || Some(output.logits.len()) != rows.checked_mul(vocab_size)
    {
        return Err(format!(
            "it gave {} logits in rows of {}, where {rows} rows of {vocab_size} were asked for",
            output.logits.len(),
            output.vocab_size
        ));
    }
    Ok(())
}
