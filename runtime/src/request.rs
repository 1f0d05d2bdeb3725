//! What a caller asks for and what comes back. Plain data; the fields are those of the command line's JSON.

use std::time::Duration;

/// Identifies a request from [`Engine::add`](crate::engine::Engine::add) until it is finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A prompt and how to continue it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How to continue.
    pub params: SamplingParams,
    /// How it stands to others.
    pub urgency: Urgency,
    /// Name of a prefix registered with [`Engine::register_prefix`](crate::engine::Engine::register_prefix), which
    /// stands before the prompt.
    pub prefix: Option<String>,
}

impl Request {
    /// A request that waits its turn.
    pub fn new(prompt: Vec<u32>, params: SamplingParams) -> Self {
        Self { prompt, params, ..Self::default() }
    }
}

/// How a request stands to others. The default is first come, first served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Urgency {
    /// A lower number goes first.
    pub priority: i32,
    /// Time on the engine's clock by which it must have finished, or it fails. Among requests of one priority those
    /// with the earlier deadline go first, those without one last.
    pub deadline: Option<Duration>,
}

/// How a prompt is continued.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Most tokens to generate, at least 1.
    pub max_tokens: usize,
    /// Divides the logits before sampling; 0 is greedy.
    pub temperature: f32,
    /// Keeps the smallest set of likeliest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps the `k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Seed of the request's random numbers; `None` draws one.
    pub seed: Option<u64>,
    /// Completions to return: with `beam_width` the best hypotheses, at most so many.
    pub n: usize,
    /// Completions to sample, of which the `n` likeliest return; `None` is `n`.
    pub best_of: Option<usize>,
    /// Texts that end a completion and are left out of it.
    pub stop: Vec<String>,
    /// Tokens that end a completion, beside the model's end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    /// How many alternatives' log-probabilities to return for each generated token; `Some(0)` returns the
    /// token's own only.
    pub logprobs: Option<usize>,
    /// The same for the prompt's tokens.
    pub prompt_logprobs: Option<usize>,
    /// Divides positive logits and multiplies negative ones of tokens that the prompt or the completion
    /// holds; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the completion holds; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for each occurrence in the completion; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Beams to search with instead of sampling: the rules are those of [`beam`](crate::sampling::beam). Everything
    /// that only shapes sampling is then of no effect.
    pub beam_width: Option<usize>,
    /// Exponent of the length by which a beam's score is divided.
    pub length_penalty: f32,
    /// When a beam search ends.
    pub early_stopping: EarlyStopping,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: None,
            n: 1,
            best_of: None,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            beam_width: None,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::False,
        }
    }
}

/// When a beam search ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EarlyStopping {
    /// When the best running beam, scored at its present length, cannot improve on the worst finished one.
    #[default]
    False,
    /// As soon as there are enough finished hypotheses.
    True,
    /// As `False`, but scored at the length that favours the running beam most.
    Never,
}

/// A request that cannot be served as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// The field at fault, where one is.
    pub param: Option<&'static str>,
    /// What is wrong with it and what to do.
    pub message: String,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop token or a stop string came.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
}

/// A token with its log-probability: natural log, of the model's own distribution, before penalties,
/// temperature and filters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Which token.
    pub token_id: u32,
    /// Its log-probability.
    pub logprob: f32,
}

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionLogprobs {
    /// The token that stands there.
    pub token: TokenLogprob,
    /// The likeliest tokens, likeliest first; equal ones by lower id.
    pub top: Vec<TokenLogprob>,
}

/// One continuation.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Without end token and stop string; `None` where there is no tokenizer.
    pub text: Option<String>,
    /// Every generated token, an end or stop token included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry a generated token, where asked for.
    pub logprobs: Option<Vec<PositionLogprobs>>,
    /// Score of a beam: the sum of its log-probabilities over its length to the power of `length_penalty`.
    pub score: Option<f32>,
}

/// Tokens counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Generated, all completions together.
    pub completion_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: usize,
}

/// A finished request.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestOutput {
    /// `n` of them.
    pub outputs: Vec<Completion>,
    /// One entry a prompt token, where asked for; the first is `None`.
    pub prompt_logprobs: Option<Vec<Option<PositionLogprobs>>>,
    /// Tokens counted.
    pub usage: Usage,
}

/// What happens while requests run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was generated: not with `best_of` and beams, where the best are known at the end. Texts of one completion joined give its [`Completion::text`].
    Token {
        /// Of which request.
        request: RequestId,
        /// Of which of its completions.
        index: usize,
        /// Which token.
        token_id: u32,
        /// What can be shown now: whole characters only, and nothing that may become a stop string.
        text: String,
    },
    /// All completions have ended.
    Finished {
        /// Which request.
        request: RequestId,
        /// Everything that was generated.
        output: RequestOutput,
    },
    /// The request cannot be served; the others go on.
    Failed {
        /// Which request.
        request: RequestId,
        /// Why.
        error: RequestError,
    },
}
