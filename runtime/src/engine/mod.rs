//! Requests in, events out. Owns the requests' state and the loop that ties scheduler, cache manager,
//! executor and sampler together; decides when a completion ends and what text may be shown. Does not plan
//! steps, compute logits or read files.
//!
//! A step, in order: schedule, take the block ops, execute, confirm the block ops, report what was computed,
//! sample, emit events. Steps are synchronous: when [`Engine::step`] returns, cache and requests agree.

mod config;
mod detokenize;
mod logits;
mod state;
mod step;
mod stop;

pub use config::{EngineConfig, EngineError, EngineStats};
pub use detokenize::{Detokenize, DetokenizerFactory};

use crate::executor::Executor;
use crate::request::{Event, Request, RequestError, RequestId, RequestOutput};
use crate::sampling::Sampler;
use crate::scheduler::{NewGroup, Scheduler};
use crate::text::Tokenizer;
use pagewise_kvcache::CacheManager;
use rustc_hash::FxHashMap;
use state::RequestState;
use step::Failure;

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
    stats: EngineStats,
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
        Self {
            scheduler: Scheduler::new(config.scheduler()),
            config,
            cache: manager,
            executor,
            detokenizer,
            samplers: Vec::new(),
            requests: FxHashMap::default(),
            next_request: 0,
            stats: EngineStats::default(),
        }
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
        let Request { prompt, params } = request;
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
        let best_of = params.best_of.is_some();
        let name_best_of = |error: RequestError| match error.param {
            Some("n") if best_of => RequestError { param: Some("best_of"), ..error },
            _ => error,
        };
        self.scheduler.check_samples(params.samples()).map_err(name_best_of)?;
        let id = RequestId(self.next_request);
        let state = RequestState::new(&prompt, params, self.detokenizer.as_ref());
        let group = NewGroup {
            id,
            samples: state.samples.len(),
            prompt_logits: state.prompt_logprobs.is_some(),
            prompt,
        };
        self.scheduler.add(group, &*self.cache).map_err(name_best_of)?;
        self.next_request += 1;
        self.requests.insert(id, state);
        Ok(id)
    }

    /// Ends a request without a further event. What it holds comes free at the next step. `false` if it has
    /// ended already.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let known = self.requests.remove(&id).is_some();
        if known {
            self.scheduler.cancel(id);
            self.stats.cancelled += 1;
        }
        known
    }

    /// Whether [`step`](Self::step) has anything to do.
    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    /// Counters since the engine was made, and what it holds now.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            scheduler: self.scheduler.stats(),
            device_blocks: self.cache.device_usage(),
            cache: self.cache.stats(),
            ..self.stats
        }
    }

    /// Runs one step for all requests that fit into it.
    ///
    /// Where the executor fails, the requests in the cache fail with an event each and the cache is emptied;
    /// those that wait go on with the next step.
    ///
    /// # Errors
    /// [`EngineError`]: the engine's own books are wrong. The requests in the cache are gone.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        let mut events = Vec::new();
        match self.try_step(&mut events) {
            Ok(()) => Ok(events),
            Err(Failure::Executor(reason)) => {
                tracing::error!(%reason, "the step failed; its requests fail with it");
                let error = RequestError {
                    param: None,
                    message: format!("the model could not compute a step: {reason}"),
                };
                // Copies that the device never finished must not stay pending.
                let confirmed = self.cache.abandon_block_ops();
                let (dropped, freed) = self.scheduler.drop_resident(&mut *self.cache);
                for id in dropped {
                    self.fail(id, error.clone(), &mut events);
                }
                confirmed.and(freed)?;
                Ok(events)
            }
            Err(Failure::Engine(error)) => {
                let (dropped, _) = self.scheduler.drop_resident(&mut *self.cache);
                for id in dropped {
                    self.requests.remove(&id);
                    self.stats.failed += 1;
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
        self.requests.remove(&request);
        self.stats.failed += 1;
        events.push(Event::Failed { request, error });
    }
}
