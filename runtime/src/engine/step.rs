//! One step of the engine, from the schedule to the events.

use super::logits::LogitCursor;
use super::metrics::Outcome;
use super::state::{Choice, Step};
use super::{Engine, EngineError};
use crate::executor::{Row, RowWanted, StepOutput};
use crate::request::{Event, FinishReason, RequestError, RequestId};
use crate::sampling::beam::BeamStep;
use crate::sampling::{NoUsableLogit, Sampler};
use crate::scheduler::{Schedule, ScheduledChunk};
use pagewise_kvcache::CacheError;
use rayon::prelude::*;
use std::time::Duration;

/// From this many logits a step their tokens are chosen on several threads: about a tenth of a millisecond.
const PARALLEL_LOGITS: usize = 1 << 17;

/// A step that the executor computes.
pub(super) struct Begun {
    schedule: Schedule,
    /// The device chooses all next tokens.
    all_chosen: bool,
    started: Duration,
    scheduled: Duration,
}

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
    /// Begins a step where none is under way, begins the next one where that can be planned already, and reads the
    /// first.
    pub(super) fn try_step(&mut self, events: &mut Vec<Event>) -> Result<(), Failure> {
        let Some(step) =
            self.under_way.take().map_or_else(|| self.begin(false, events), |step| Ok(Some(step)))?
        else {
            return Ok(());
        };
        if step.all_chosen && self.executor.runs_ahead() {
            let requests = &self.requests;
            let goes_on =
                |of: &ScheduledChunk| requests.get(&of.request).is_some_and(|state| state.goes_on(of.index));
            self.scheduler.run_ahead(&step.schedule, goes_on);
            self.under_way = self.begin(true, events)?;
        }
        self.finish_step(step, events)
    }

    /// Schedules a step and hands it to the executor. `None` if there is nothing to do.
    fn begin(&mut self, ahead: bool, events: &mut Vec<Event>) -> Result<Option<Begun>, Failure> {
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
            if ahead {
                self.unconfirmed += 1;
                return Ok(None);
            }
            self.cache.confirm_block_ops()?;
            let moved = expired || !schedule.refused.is_empty() || !schedule.returned.is_empty();
            let stuck = !moved && self.scheduler.has_work();
            if stuck {
                let state = self.scheduler.report(&*self.cache);
                return Err(Failure::Engine(EngineError::Stalled { state }));
            }
            return Ok(None);
        }
        let (wanted, all_chosen) = self.wanted(&schedule);
        self.executor.begin(&schedule.plan, &wanted).map_err(|error| Failure::Executor(error.to_string()))?;
        Ok(Some(Begun { schedule, all_chosen, started, scheduled }))
    }

    /// What is wanted of each logit row; and whether the device chooses all next tokens, and those behind them can be
    /// described before they are known.
    fn wanted(&self, schedule: &Schedule) -> (Vec<RowWanted>, bool) {
        let mut wanted = Vec::with_capacity(schedule.chunks.len());
        let mut all_chosen = true;
        for (chunk, of) in schedule.plan.chunks.iter().zip(&schedule.chunks) {
            let rows = chunk.logit_rows();
            let Some(state) = self.requests.get(&of.request) else {
                // Its end has been seen already.
                wanted.resize(wanted.len() + rows, RowWanted::Nothing);
                continue;
            };
            let known = |row: RowWanted| if self.executor.answers(&row) { row } else { RowWanted::Logits };
            let before = rows.saturating_sub(usize::from(of.next_token));
            wanted.extend((0..before).map(|row| known(state.prompt_row_wanted(chunk.start + row + 1))));
            if of.next_token {
                let next = known(state.wanted(of.index, chunk.start + chunk.tokens.len()));
                all_chosen &= next.can_run_ahead();
                wanted.push(next);
            }
        }
        (wanted, all_chosen)
    }

    /// Waits for a step, commits it and reads its rows.
    fn finish_step(&mut self, step: Begun, events: &mut Vec<Event>) -> Result<(), Failure> {
        let Begun { schedule, started, scheduled, .. } = step;
        let output = self.executor.finish().map_err(|error| Failure::Executor(error.to_string()))?;
        check_shape(&schedule, &output, self.config.vocab_size).map_err(Failure::Executor)?;
        let executed = (self.clock)();
        for _ in 0..=std::mem::take(&mut self.unconfirmed) {
            self.cache.confirm_block_ops()?;
        }
        self.scheduler.commit(&schedule, &mut *self.cache)?;
        self.read_rows(&schedule, &output, events)?;
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
    fn read_rows(
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
        wanted: &[(RequestId, usize, Row<'_>)],
    ) -> Vec<Result<Option<Choice>, NoUsableLogit>> {
        let len = |row: &Row<'_>| if let Row::Logits(row) = row { row.len() } else { 0 };
        let logits: usize = wanted.iter().map(|(_, _, row)| len(row)).sum();
        let threads =
            if logits < PARALLEL_LOGITS { 1 } else { rayon::current_num_threads().min(wanted.len()) };
        if self.samplers.len() < threads {
            self.samplers.resize_with(threads, Sampler::default);
        }
        let requests = &self.requests;
        let choose = |sampler: &mut Sampler, &(id, index, row): &(RequestId, usize, Row<'_>)| {
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
    let whole = (0..rows).all(|row| output.row(row).is_some());
    if output.rows.len() != rows || !whole || (rows > 0 && output.vocab_size != vocab_size) {
        return Err(format!(
            "it gave {} rows and {} logits in rows of {}, where {rows} rows of {vocab_size} were asked for",
            output.rows.len(),
            output.logits.len(),
            output.vocab_size
        ));
    }
    Ok(())
}
