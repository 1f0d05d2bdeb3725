//! From a row of logits to a token. Owns the validation of sampling parameters, the random numbers, the
//! processing of logits, the filters and log-probabilities. Does not know requests, caches or text.
//!
//! # Order
//!
//! 1. Log-probabilities, where asked for, are those of the model's own distribution: taken from the logits
//!    before anything below touches them.
//! 2. `logit_bias` is added.
//! 3. `repetition_penalty` divides positive and multiplies negative logits of tokens that the prompt or the
//!    completion holds (Keskar et al. 2019, CTRL, section 4.1).
//! 4. `frequency_penalty` × occurrences and `presence_penalty` are subtracted from the logits of tokens that
//!    the completion holds.
//! 5. With `temperature` 0 the largest logit wins, the lower id among equals. Otherwise logits are divided by
//!    the temperature.
//! 6. `top_k` keeps the k likeliest tokens, the lower ids among equals.
//! 7. `top_p` keeps the smallest set of likeliest tokens that holds this share of what is left (Holtzman et
//!    al. 2019, section 3.1); the token that crosses the line stays.
//! 8. `min_p` keeps tokens at least this fraction as likely as the likeliest.
//! 9. One uniform number per token picks from what is left, walking ids upwards.
//!
//! A NaN logit counts as −∞: its token is never chosen. A row without any usable logit is an error.
//!
//! The uniform number is a pure function of (seed, sample index, position), so a completion is the same
//! whatever else is in the batch and however often it was preempted: see [`random`].
//!
//! A beam search does not sample: of the order above it takes steps 2 to 4, applied to log-probabilities instead of
//! logits, and then goes by the rules of [`beam`].

pub mod beam;
mod candidates;
mod logprobs;
mod penalties;
pub mod random;
mod sampler;
#[cfg(test)]
mod tests;
mod validate;
mod weights;

pub use logprobs::LogSoftmax;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) use logprobs::Normaliser;
pub use penalties::TokenCounts;
pub use sampler::{Draw, NoUsableLogit, Sampler};
