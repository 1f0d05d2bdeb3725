//! Requests in, events out. Owns the requests' state and the loop that ties scheduler, cache manager,
//! executor and sampler together; decides when a completion ends and what text may be shown. Does not plan
//! steps, compute logits or read files.
//!
//! A step, in order: schedule, take the block ops, execute, confirm the block ops, report what was computed,
//! sample, emit events. Where the device chooses the tokens itself, the next step is scheduled and begun before this
//! one is read, with placeholders for its tokens; otherwise, when [`Engine::step`] returns, cache and requests agree.

mod beams;
mod clock;
mod config;
mod detokenize;
mod logits;
mod metrics;
mod notes;
mod prefixes;
mod state;
mod step;
mod stop;

pub use clock::Clock;
pub use config::{EngineConfig, EngineError, EngineStats};
pub use detokenize::{Detokenize, DetokenizerFactory};
pub use metrics::{Metrics, Outcome, RequestMetrics, StepMetrics};
pub use prefixes::PrefixError;

use crate::executor::Executor;
use crate::request::{Event, Request, RequestError, RequestId, RequestOutput};
use crate::sampling::Sampler;
use crate::scheduler::{NewGroup, PreemptionCosts, Scheduler};
use crate::text::Tokenizer;
use pagewise_kvcache::CacheManager;
use prefixes::Prefixes;
use rustc_hash::FxHashMap;
use state::RequestState;
use std::collections::BTreeSet;
use std::time::Duration;
use step::{Begun, Failure};

/// Runs many requests at a time on one model.
pub struct Engine {
    config: EngineConfig,
    scheduler: Scheduler,
    cache: Box<dyn CacheManager + Send>,
    executor: Box<dyn Executor>,
    detokenizer: Option<DetokenizerFactory>,
    /// One for each thread that chooses tokens.
    samplers: Vec<Sampler>,
    requests: FxHashMap<RequestId, RequestState>,
    next_request: u64,
    clock: Clock,
    /// Of the requests that have one.
    deadlines: BTreeSet<(Duration, RequestId)>,
    prefixes: Prefixes,
    /// Came up while a prefix was computed; the next step returns them.
    held_events: Vec<Event>,
    costs: PreemptionCosts,
    metrics: Metrics,
    /// Requests that ended since the last step.
    ended: Vec<RequestMetrics>,
    /// The step that the device computes while the one before it is read.
    under_way: Option<Begun>,
    /// Empty lists of block ops that were taken while a step was under way, and are confirmed behind its own.
    unconfirmed: usize,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("config", &self.config)
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine without requests. `manager` and `executor` must be of the same block size, number of blocks
    /// and KV groups. Without a tokenizer completions have no text, and stop strings are refused.
    pub fn new(
        config: EngineConfig,
        manager: Box<dyn CacheManager + Send>,
        executor: Box<dyn Executor>,
        tokenizer: Option<Tokenizer>,
    ) -> Self {
        Self::with_detokenizer(config, manager, executor, tokenizer.map(detokenize::factory))
    }

    /// As [`new`](Self::new), with text made in another way than by a [`Tokenizer`].
    pub fn with_detokenizer(
        config: EngineConfig,
        manager: Box<dyn CacheManager + Send>,
        executor: Box<dyn Executor>,
        detokenizer: Option<DetokenizerFactory>,
    ) -> Self {
        let mut executor = executor;
        let costs = notes::measure_link(&*manager, &mut *executor);
        let mut scheduler = Scheduler::new(config.scheduler());
        scheduler.set_costs(costs);
        Self {
            scheduler,
            config,
            cache: manager,
            executor,
            detokenizer,
            samplers: Vec::new(),
            requests: FxHashMap::default(),
            next_request: 0,
            clock: clock::system(),
            deadlines: BTreeSet::new(),
            prefixes: Prefixes::default(),
            held_events: Vec::new(),
            costs,
            metrics: Metrics::default(),
            ended: Vec::new(),
            under_way: None,
            unconfirmed: 0,
        }
    }

    /// Reads time from another clock from now on.
    pub fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    /// Now, on the clock that deadlines are given on.
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// What it was made of.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Puts a request at the end of the queue. Its events come from [`step`](Self::step).
    ///
    /// # Errors
    /// [`RequestError`] naming the field at fault. `prompt_token_ids` means a token id outside of the
    /// vocabulary, `prompt` a prompt that is empty or too long.
    pub fn add(&mut self, request: Request) -> Result<RequestId, RequestError> {
        let mut request = request;
        self.prefixes.expand(&mut request)?;
        let Request { prompt, params, urgency, .. } = &request;
        let vocab_size = self.config.vocab_size;
        params.validate(vocab_size)?;
        if let Some(token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
            let message = format!("token id {token} is not in the vocabulary of {vocab_size} tokens");
            return Err(RequestError { param: Some("prompt_token_ids"), message });
        }
        if !params.stop.is_empty() && self.detokenizer.is_none() {
            let message =
                "stop strings need a tokenizer, which this model was loaded without; use stop_token_ids";
            return Err(RequestError { param: Some("stop"), message: message.into() });
        }
        self.scheduler.check_width(params.width(), params.width_param())?;
        let id = RequestId(self.next_request);
        let group = NewGroup {
            id,
            width: params.width(),
            beams: params.beam_width.is_some(),
            prompt_logits: params.prompt_logprobs.is_some(),
            urgency: *urgency,
            prompt: prompt.clone(),
        };
        self.scheduler.add(group, &*self.cache)?;
        self.next_request += 1;
        self.deadlines.extend(urgency.deadline.map(|deadline| (deadline, id)));
        let metrics = RequestMetrics {
            request: id,
            prompt_tokens: prompt.len(),
            arrived: (self.clock)(),
            ..RequestMetrics::default()
        };
        let state = RequestState::new(request, &self.config, self.detokenizer.as_ref(), metrics);
        self.requests.insert(id, state);
        Ok(id)
    }

    /// Ends a request without a further event. What it holds comes free at the next step. `false` if it has
    /// ended already.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let state = self.requests.remove(&id);
        if let Some(state) = &state {
            self.scheduler.cancel(id);
            self.metrics.stats.cancelled += 1;
            self.note_end(state, Outcome::Cancelled);
        }
        state.is_some()
    }

    /// Whether [`step`](Self::step) has anything to do.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work() || self.under_way.is_some() || !self.held_events.is_empty()
    }

    /// Counters since the engine was made, and what it holds now.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            scheduler: self.scheduler.stats(),
            device_blocks: self.cache.device_usage(),
            host_blocks: self.cache.host_usage(),
            cache: self.cache.stats(),
            ..self.metrics.stats
        }
    }

    /// What it did and how long that took, as of the end of the last step.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Runs one step for all requests that fit into it.
    ///
    /// Where the executor fails, the requests in the cache fail with an event each and the cache is emptied;
    /// those that wait go on with the next step.
    ///
    /// # Errors
    /// [`EngineError`]: the engine's own books are wrong. The requests in the cache are gone.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = std::mem::take(&mut self.held_events);
        let result = self.try_step(&mut events);
        let result = self.settle(result, &mut events);
        self.metrics.stats = self.stats();
        self.metrics.ended = std::mem::take(&mut self.ended);
        result.map(|()| events)
    }

    /// After a failed step: lets go of all that it touched.
    fn settle(&mut self, result: Result<(), Failure>, events: &mut Vec<Event>) -> Result<(), EngineError> {
        if result.is_err() {
            self.under_way = None;
            self.unconfirmed = 0;
        }
        match result {
            Ok(()) => Ok(()),
            Err(Failure::Executor(reason)) => {
                tracing::error!(%reason, "the step failed; its requests fail with it");
                let error = RequestError {
                    param: None,
                    message: format!("the model could not compute a step: {reason}"),
                };
                // Copies that the device never finished must not stay pending.
                while self.cache.abandon_block_ops().is_ok() {}
                let (dropped, freed) = self.scheduler.drop_resident(&mut *self.cache);
                self.prefixes.forget_content(&mut *self.cache);
                for id in dropped {
                    self.fail(id, error.clone(), events);
                }
                Ok(freed?)
            }
            Err(Failure::Engine(error)) => {
                let (dropped, _) = self.scheduler.drop_resident(&mut *self.cache);
                self.prefixes.forget_content(&mut *self.cache);
                for id in dropped {
                    self.end(id, Outcome::Failed);
                }
                // Where the step broke off is unknown: leave nothing pending.
                self.cache.take_block_ops();
                while self.cache.abandon_block_ops().is_ok() {}
                Err(error)
            }
        }
    }

    /// Runs requests to their end; results come in the order of the requests. Requests that were added before
    /// go on meanwhile, and their events are lost.
    ///
    /// # Errors
    /// [`EngineError`], see [`step`](Self::step). What goes wrong with a single request stands in its place.
    pub fn generate(
        &mut self,
        requests: Vec<Request>,
    ) -> Result<Vec<Result<RequestOutput, RequestError>>, EngineError> {
        let mut results: Vec<Option<Result<RequestOutput, RequestError>>> =
            Vec::with_capacity(requests.len());
        let mut places = FxHashMap::default();
        for (place, request) in requests.into_iter().enumerate() {
            let added = self.add(request).map(|id| places.insert(id, place));
            results.push(added.err().map(Err));
        }
        while !places.is_empty() {
            let events = match self.step() {
                Ok(events) => events,
                Err(error) => {
                    places.into_keys().for_each(|id| _ = self.cancel(id));
                    return Err(error);
                }
            };
            for event in events {
                let (id, result) = match event {
                    Event::Finished { request, output } => (request, Ok(output)),
                    Event::Failed { request, error } => (request, Err(error)),
                    Event::Token { .. } => continue,
                };
                if let Some(result_place) = places.remove(&id).and_then(|place| results.get_mut(place)) {
                    *result_place = Some(result);
                }
            }
        }
        let lost = || Err(RequestError { param: None, message: "the request was lost by the engine".into() });
        Ok(results.into_iter().map(|result| result.unwrap_or_else(lost)).collect())
    }

    /// Forgets a request that the scheduler has let go.
    fn fail(&mut self, request: RequestId, error: RequestError, events: &mut Vec<Event>) {
        self.end(request, Outcome::Failed);
        events.push(Event::Failed { request, error });
    }

    /// Takes a request out of the books that count it.
    fn end(&mut self, request: RequestId, outcome: Outcome) -> Option<RequestState> {
        let state = self.requests.remove(&request)?;
        match outcome {
            Outcome::Finished => self.metrics.stats.finished += 1,
            _ => self.metrics.stats.failed += 1,
        }
        self.note_end(&state, outcome);
        Some(state)
    }

    fn note_end(&mut self, state: &RequestState, outcome: Outcome) {
        if let Some(deadline) = state.deadline {
            self.deadlines.remove(&(deadline, state.metrics.request));
        }
        let metrics = RequestMetrics { outcome, ended: Some((self.clock)()), ..state.metrics.clone() };
        self.ended.push(metrics);
    }
}
