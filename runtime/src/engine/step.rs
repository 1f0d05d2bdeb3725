//! One step of the engine, from the schedule to the events.

use super::logits::LogitCursor;
use super::metrics::Outcome;
use super::state::{Choice, Step};
use super::{Engine, EngineError};
use crate::executor::StepOutput;
use crate::request::{Event, FinishReason, RequestError, RequestId};
use crate::sampling::beam::BeamStep;
use crate::sampling::{NoUsableLogit, Sampler};
use crate::scheduler::Schedule;
use pagewise_kvcache::CacheError;
use rayon::prelude::*;
use std::time::Duration;

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
        let started = (self.clock)();
        let expired = self.expire(started, events)?;
        let schedule = self.scheduler.schedule(&mut *self.cache)?;
        let scheduled = (self.clock)();
        self.note_schedule(&schedule, scheduled);
        for (id, error) in &schedule.refused {
            self.fail(*id, error.clone(), events);
        }
        if schedule.is_idle() {
            // Block ops are taken in every step, so every step confirms them.
            self.cache.confirm_block_ops()?;
            let stuck = !expired && schedule.refused.is_empty() && self.scheduler.has_work();
            return if stuck { Err(Failure::Engine(EngineError::Stalled)) } else { Ok(()) };
        }

        let output =
            self.executor.execute(&schedule.plan).map_err(|error| Failure::Executor(error.to_string()))?;
        check_shape(&schedule, &output, self.config.vocab_size).map_err(Failure::Executor)?;
        let executed = (self.clock)();
        self.cache.confirm_block_ops()?;
        self.scheduler.commit(&schedule, &mut *self.cache)?;
        self.read_logits(&schedule, &output, events)?;
        let times = [started, scheduled, executed, (self.clock)()];
        self.note_step(&schedule, times);
        self.scheduler.recycle(schedule);
        Ok(())
    }

    /// Fails the requests whose time is over.
    fn expire(&mut self, now: Duration, events: &mut Vec<Event>) -> Result<bool, CacheError> {
        let mut expired = false;
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            self.scheduler.remove(id, &mut *self.cache)?;
            let message = format!(
                "the deadline passed {:.3} s ago and the request was not done; give it more time or send less at once",
                (now - deadline).as_secs_f64()
            );
            self.fail(id, RequestError { param: Some("deadline"), message }, events);
            expired = true;
        }
        Ok(expired)
    }

    /// Hands every logit row to whom it belongs: prompt log-probabilities, then the next tokens.
    fn read_logits(
        &mut self,
        schedule: &Schedule,
        output: &StepOutput,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        let now = (self.clock)();
        let mut cursor = LogitCursor::new(output);
        let mut wanted = Vec::with_capacity(schedule.chunks.len());
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            let rows = cursor.take(chunk.logit_rows());
            let Some(state) = self.requests.get_mut(&of.request) else { continue };
            state.read_prompt_rows(chunk, &rows);
            let Some(row) = rows.last().filter(|_| of.next_token) else { continue };
            // The prompt's last row gives the first token of every sample.
            let first_rows = state.first_rows();
            if first_rows > 1 && state.is_new() {
                self.scheduler.branch(of.request, &vec![0; first_rows], &mut *self.cache)?;
                wanted.extend((0..first_rows).map(|index| (of.request, index, row)));
            } else {
                wanted.push((of.request, of.index, row));
            }
        }
        events.reserve(wanted.len());
        for ((id, index, _), choice) in wanted.iter().zip(self.choose(&wanted)) {
            self.next_token((*id, *index), choice, now, events)?;
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
        (id, index): (RequestId, usize),
        choice: Result<Option<Choice>, NoUsableLogit>,
        now: Duration,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        // An earlier sample of the group may have failed the request.
        let Some(state) = self.requests.get_mut(&id) else { return Ok(()) };
        let chosen = match choice {
            Ok(Some(Choice::Token(chosen))) => chosen,
            Ok(Some(Choice::Beam(offer))) => {
                state.metrics.first_token.get_or_insert(now);
                let step = state.beams.as_mut().and_then(|beams| beams.offer(index, offer));
                return step.map_or(Ok(()), |step| self.beam_step(id, step, events));
            }
            Ok(None) => return Ok(()),
            Err(error) => {
                let message = format!("no token could be chosen after {} of them: {error}", state.len(index));
                self.scheduler.remove(id, &mut *self.cache)?;
                self.fail(id, RequestError { param: None, message }, events);
                return Ok(());
            }
        };
        let Some(step) = state.advance(index, chosen, &self.config.eos_token_ids) else { return Ok(()) };
        state.metrics.first_token.get_or_insert(now);
        state.metrics.generated_tokens += 1;
        let streams = state.streams();
        let Step { token_id, text, finish_reason } = step;
        self.metrics.stats.generated_tokens += 1;
        self.scheduler.push_token(id, index, token_id);
        if streams {
            events.push(Event::Token { request: id, index, token_id, text });
        }
        match finish_reason {
            Some(reason) => self.finish_sample(id, index, reason, events),
            None => Ok(()),
        }
    }

    /// Lets the beams that run on take the places of the old ones, or ends the search.
    fn beam_step(
        &mut self,
        id: RequestId,
        step: BeamStep,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        let Some(state) = self.requests.get_mut(&id) else { return Ok(()) };
        let BeamStep::Continue(kept) = step else {
            self.scheduler.remove(id, &mut *self.cache)?;
            self.finish(id, events);
            return Ok(());
        };
        state.metrics.generated_tokens += kept.len();
        self.metrics.stats.generated_tokens += kept.len() as u64;
        let parents: Vec<usize> = kept.iter().map(|beam| beam.parent).collect();
        self.scheduler.branch(id, &parents, &mut *self.cache)?;
        for (index, beam) in kept.iter().enumerate() {
            self.scheduler.push_token(id, index, beam.token_id);
        }
        Ok(())
    }

    fn finish_sample(
        &mut self,
        id: RequestId,
        index: usize,
        reason: FinishReason,
        events: &mut Vec<Event>,
    ) -> Result<(), CacheError> {
        let Some(finished) = self.scheduler.finish_sequence(id, index, &mut *self.cache)? else {
            return Ok(());
        };
        if let Some(state) = self.requests.get_mut(&id) {
            state.finish(index, finished.completion, reason);
        }
        if finished.group_done {
            self.finish(id, events);
        }
        Ok(())
    }

    fn finish(&mut self, request: RequestId, events: &mut Vec<Event>) {
        let Some(state) = self.end(request, Outcome::Finished) else { return };
        if let Some(name) = &state.prefix {
            self.prefixes.pin(name, self.scheduler.salt(), &mut *self.cache);
        }
        let output = state.into_output(self.detokenizer.as_ref());
        events.push(Event::Finished { request, output });
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
