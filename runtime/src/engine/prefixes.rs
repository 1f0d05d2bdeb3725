//! Prefixes that are registered by name: computed once, pinned in the cache, named by requests.

use super::{Engine, EngineError};
use crate::request::{Event, Request, RequestError, SamplingParams};
use pagewise_kvcache::{CacheManager, PinId, Prompt};
use rustc_hash::FxHashMap;

/// What is registered.
#[derive(Default)]
pub(super) struct Prefixes {
    by_name: FxHashMap<String, Prefix>,
}

struct Prefix {
    tokens: Vec<u32>,
    /// `None` while its content is lost: then the next request that has computed it pins it again.
    pin: Option<PinId>,
}

/// Why a prefix could not be registered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrefixError {
    /// It cannot be served.
    #[error(transparent)]
    Refused(#[from] RequestError),
    /// The engine broke while computing it.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl Prefixes {
    /// Puts a named prefix before a request's prompt.
    pub(super) fn expand(&self, request: &mut Request) -> Result<(), RequestError> {
        let Some(name) = &request.prefix else { return Ok(()) };
        let Some(prefix) = self.by_name.get(name) else {
            let message = format!("no prefix {name:?} is registered; register it first");
            return Err(RequestError { param: Some("prefix"), message });
        };
        request.prompt.splice(..0, prefix.tokens.iter().copied());
        Ok(())
    }

    /// Pins a prefix whose content is in the cache, unless it is pinned.
    pub(super) fn pin(&mut self, name: &str, salt: u64, cache: &mut dyn CacheManager) {
        if let Some(Prefix { tokens, pin }) = self.by_name.get_mut(name)
            && pin.is_none()
        {
            *pin = cache.pin_prefix(Prompt { tokens, salt, use_prefix_cache: true }).ok().map(|pin| pin.id);
        }
    }

    /// The cache's content is lost.
    pub(super) fn forget_content(&mut self, cache: &mut dyn CacheManager) {
        for pin in self.by_name.values_mut().filter_map(|prefix| prefix.pin.take()) {
            // A pin that is gone already pins nothing.
            _ = cache.unpin_prefix(pin);
        }
    }
}

impl Engine {
    /// Computes a prefix and keeps its full blocks in the cache until it is unregistered: requests that name it
    /// ([`Request::prefix`]) never compute them again. Runs the engine until the prefix is there; the events and
    /// figures of other requests come with the next [`step`](Self::step). A name that is registered already is replaced.
    ///
    /// # Errors
    /// [`PrefixError::Refused`] where the prefix fills no block or does not fit beside what is pinned already.
    pub fn register_prefix(&mut self, name: &str, tokens: Vec<u32>) -> Result<(), PrefixError> {
        let block_size = self.cache.config().block_size;
        let refuse = |message: String| Err(RequestError { param: Some("prefix"), message }.into());
        if !self.cache.config().prefix_cache {
            return refuse(
                "the prefix cache is off (--no-prefix-cache); there is nothing to keep it in".into(),
            );
        }
        if tokens.len() < block_size {
            return refuse(format!(
                "a prefix of {} tokens fills no block of {block_size}; only full blocks are shared",
                tokens.len()
            ));
        }
        self.unregister_prefix(name);
        let params = SamplingParams { max_tokens: 1, temperature: 0.0, ..SamplingParams::default() };
        let id = self.add(Request::new(tokens.clone(), params))?;
        let mut result = Err(RequestError { param: Some("prefix"), message: "it was lost".into() });
        let (mut held, mut ended) = (Vec::new(), Vec::new());
        while self.has_work() && self.requests.contains_key(&id) {
            for event in self.step()? {
                match event {
                    Event::Finished { request, .. } if request == id => result = Ok(()),
                    Event::Failed { request, error } if request == id => result = Err(error),
                    Event::Token { request, .. } if request == id => {}
                    other => held.push(other),
                }
            }
            ended.append(&mut self.metrics.ended);
        }
        self.held_events.extend(held);
        self.ended.splice(..0, ended);
        result?;
        self.prefixes.by_name.insert(name.to_owned(), Prefix { tokens, pin: None });
        self.prefixes.pin(name, self.scheduler.salt(), &mut *self.cache);
        Ok(())
    }

    /// Lets a prefix go; requests that name it and run already are not touched. `false` if there is none.
    pub fn unregister_prefix(&mut self, name: &str) -> bool {
        let prefix = self.prefixes.by_name.remove(name);
        if let Some(pin) = prefix.as_ref().and_then(|prefix| prefix.pin) {
            _ = self.cache.unpin_prefix(pin);
        }
        prefix.is_some()
    }
}
