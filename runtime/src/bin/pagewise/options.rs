//! The options that `generate` and `chat` share: where the model comes from and how it continues a prompt.

use std::num::NonZeroUsize;

use clap::{Args, ValueEnum};
use pagewise_attention::{DType, MAX_BLOCK_SIZE};
use pagewise_runtime::load::{BackendChoice, CacheSize, LoadFormat, LoadOptions};
use pagewise_runtime::request::{EarlyStopping, SamplingParams};
use pagewise_runtime::scheduler::Preemption;

use crate::Failure;

/// Where the model comes from and what it runs on.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and memory")]
pub(crate) struct ModelOptions {
    /// A Hugging Face model directory, or a model's id on the hub
    #[arg(long, value_name = "DIR|HUB-ID")]
    model: String,
    /// What computes
    #[arg(long, value_enum, default_value_t = BackendName::Auto)]
    backend: BackendName,
    /// Type of the weights; auto keeps them as stored, another value converts them while loading
    #[arg(long, value_enum, default_value_t = DTypeName::Auto)]
    dtype: DTypeName,
    /// Type of the KV cache; auto is the type of the weights. fp8 halves its memory and what attention reads, and rounds
    /// keys and values to 3 bits (fp8_e4m3, also fp8) or 2 bits of significand
    #[arg(long, value_enum, default_value_t = KvDTypeName::Auto)]
    kv_dtype: KvDTypeName,
    /// Tokens a block of the KV cache: a power of two
    #[arg(long, value_name = "TOKENS", default_value = "16", value_parser = parse_block_size)]
    block_size: usize,
    /// Blocks of the KV cache [default: on the CPU as many as the longest sequences can need, within a quarter of the
    /// memory; on GPUs what --gpu-memory-utilization leaves]
    #[arg(long, value_name = "N", conflicts_with = "kv_memory")]
    kv_blocks: Option<NonZeroUsize>,
    /// Memory of the KV cache, such as 512MiB or 2GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    kv_memory: Option<u64>,
    /// Host memory for the blocks of sequences that make room for others, such as 4GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0")]
    swap_space: u64,
    /// How a request makes room for others when the cache is full: its tokens are computed again, or its blocks are
    /// moved to --swap-space; auto takes what is quicker as measured
    #[arg(long, value_enum, default_value_t = PreemptionName::Auto)]
    preemption: PreemptionName,
    /// Most sequences in one step
    #[arg(long, value_name = "N", default_value = "256")]
    max_num_seqs: NonZeroUsize,
    /// Most tokens in one step; longer prompts are computed in chunks [default: 512 on the CPU, 8192 on GPUs]
    #[arg(long, value_name = "N")]
    max_batch_tokens: Option<NonZeroUsize>,
    /// Share of a GPU's memory that may be used in all, for weights, activations and KV cache
    #[arg(long, value_name = "SHARE", default_value = "0.9", value_parser = parse_share)]
    gpu_memory_utilization: f64,
    /// Launch every kernel of a decode by itself instead of replaying CUDA graphs: slower, and of use for profilers
    #[arg(long)]
    no_cuda_graphs: bool,
    /// Longest sequence, prompt and answer together [default: the model's own limit]
    #[arg(long, value_name = "TOKENS")]
    max_model_len: Option<NonZeroUsize>,
    /// Compute every prompt afresh, even where its beginning is in the cache
    #[arg(long)]
    no_prefix_cache: bool,
    /// CPU threads [default: one a core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Where weights come from: the directory's safetensors files, or made up from a fixed seed
    #[arg(long, value_enum, default_value_t = LoadFormatName::Auto)]
    load_format: LoadFormatName,
}

impl ModelOptions {
    /// The library's form of these options.
    pub(crate) fn load_options(&self) -> LoadOptions {
        LoadOptions {
            backend: self.backend.into(),
            dtype: self.dtype.into(),
            kv_dtype: self.kv_dtype.into(),
            block_size: self.block_size,
            cache_size: match (self.kv_blocks, self.kv_memory) {
                (Some(blocks), _) => CacheSize::Blocks(blocks.get()),
                (None, Some(bytes)) => CacheSize::Bytes(bytes),
                (None, None) => CacheSize::Auto,
            },
            swap_space: self.swap_space,
            preemption: self.preemption.into(),
            max_num_seqs: self.max_num_seqs.get(),
            max_batch_tokens: self.max_batch_tokens.map(NonZeroUsize::get),
            gpu_memory_utilization: self.gpu_memory_utilization,
            cuda_graphs: !self.no_cuda_graphs,
            max_model_len: self.max_model_len.map(NonZeroUsize::get),
            prefix_cache: !self.no_prefix_cache,
            threads: self.threads.map(NonZeroUsize::get),
            load_format: match self.load_format {
                LoadFormatName::Auto => LoadFormat::Auto,
                LoadFormatName::Dummy => LoadFormat::Dummy,
            },
            ..LoadOptions::new(self.model.as_str())
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BackendName {
    Auto,
    Cpu,
    Wgpu,
    Cuda,
}

impl From<BackendName> for BackendChoice {
    fn from(name: BackendName) -> Self {
        match name {
            BackendName::Auto => Self::Auto,
            BackendName::Cpu => Self::Cpu,
            BackendName::Wgpu => Self::Wgpu,
            BackendName::Cuda => Self::Cuda,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum KvDTypeName {
    Auto,
    F32,
    F16,
    Bf16,
    #[value(name = "fp8_e4m3", alias = "fp8")]
    F8E4M3,
    #[value(name = "fp8_e5m2")]
    F8E5M2,
}

impl From<KvDTypeName> for Option<DType> {
    fn from(name: KvDTypeName) -> Self {
        match name {
            KvDTypeName::Auto => None,
            KvDTypeName::F32 => Some(DType::F32),
            KvDTypeName::F16 => Some(DType::F16),
            KvDTypeName::Bf16 => Some(DType::Bf16),
            KvDTypeName::F8E4M3 => Some(DType::F8E4M3),
            KvDTypeName::F8E5M2 => Some(DType::F8E5M2),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DTypeName {
    Auto,
    F32,
    F16,
    Bf16,
}

impl From<DTypeName> for Option<DType> {
    fn from(name: DTypeName) -> Self {
        match name {
            DTypeName::Auto => None,
            DTypeName::F32 => Some(DType::F32),
            DTypeName::F16 => Some(DType::F16),
            DTypeName::Bf16 => Some(DType::Bf16),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PreemptionName {
    Auto,
    Recompute,
    Swap,
}

impl From<PreemptionName> for Preemption {
    fn from(name: PreemptionName) -> Self {
        match name {
            PreemptionName::Auto => Self::Auto,
            PreemptionName::Recompute => Self::Recompute,
            PreemptionName::Swap => Self::Swap,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoadFormatName {
    Auto,
    Dummy,
}

/// How a prompt is continued. What is `None` is left to a default: a line's fields fall back to the command
/// line's options, those to the model's own defaults.
#[derive(Args, Clone, Debug, Default, PartialEq)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingOptions {
    /// Most tokens to generate [default: 16; in a chat 1024]
    #[arg(long, value_name = "N")]
    pub(crate) max_tokens: Option<usize>,
    /// Divides the logits; 0 always takes the likeliest token [default: the model's, else 1]
    #[arg(long, value_name = "T", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) temperature: Option<f32>,
    /// Samples from the fewest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) top_p: Option<f32>,
    /// Samples from the K likeliest tokens; 0 is off
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Samples from tokens at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) min_p: Option<f32>,
    /// Makes sampling repeatable [default: another one each time]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Completions to return
    #[arg(short, long, value_name = "N")]
    pub(crate) n: Option<usize>,
    /// Completions to sample, of which the n likeliest return
    #[arg(long, value_name = "N")]
    pub(crate) best_of: Option<usize>,
    /// Text that ends a completion and is left out of it; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Option<Vec<String>>,
    /// Tokens that end a completion, beside the model's end tokens
    #[arg(long, value_name = "ID,...", value_delimiter = ',')]
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    /// Do not stop at the model's end tokens
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    pub(crate) ignore_eos: Option<bool>,
    /// Log-probabilities of each generated token and of this many of the likeliest (in --json)
    #[arg(long, value_name = "N")]
    pub(crate) logprobs: Option<usize>,
    /// The same for the prompt's tokens
    #[arg(long, value_name = "N")]
    pub(crate) prompt_logprobs: Option<usize>,
    /// Makes tokens of the prompt and the completion less likely; 1 is off
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the completion holds
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtracted once for each time that the completion holds the token
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Added to the logits of these tokens
    #[arg(long, value_name = "ID:X,...", value_delimiter = ',', value_parser = parse_bias)]
    pub(crate) logit_bias: Option<Vec<(u32, f32)>>,
    /// Search with this many beams instead of sampling
    #[arg(long, value_name = "N")]
    pub(crate) beam_width: Option<usize>,
    /// Exponent of the length by which a beam's score is divided
    #[arg(long, value_name = "X", value_parser = parse_finite, allow_negative_numbers = true)]
    pub(crate) length_penalty: Option<f32>,
    /// When a beam search ends: true, false or never
    #[arg(long, value_name = "WHEN", value_parser = parse_early_stopping)]
    pub(crate) early_stopping: Option<EarlyStopping>,
}

impl SamplingOptions {
    /// These options where they are given, else those of `defaults`.
    pub(crate) fn or(self, defaults: &Self) -> Self {
        Self {
            max_tokens: self.max_tokens.or(defaults.max_tokens),
            temperature: self.temperature.or(defaults.temperature),
            top_p: self.top_p.or(defaults.top_p),
            top_k: self.top_k.or(defaults.top_k),
            min_p: self.min_p.or(defaults.min_p),
            seed: self.seed.or(defaults.seed),
            n: self.n.or(defaults.n),
            best_of: self.best_of.or(defaults.best_of),
            stop: self.stop.or_else(|| defaults.stop.clone()),
            stop_token_ids: self.stop_token_ids.or_else(|| defaults.stop_token_ids.clone()),
            ignore_eos: self.ignore_eos.or(defaults.ignore_eos),
            logprobs: self.logprobs.or(defaults.logprobs),
            prompt_logprobs: self.prompt_logprobs.or(defaults.prompt_logprobs),
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(defaults.frequency_penalty),
            logit_bias: self.logit_bias.or_else(|| defaults.logit_bias.clone()),
            beam_width: self.beam_width.or(defaults.beam_width),
            length_penalty: self.length_penalty.or(defaults.length_penalty),
            early_stopping: self.early_stopping.or(defaults.early_stopping),
        }
    }

    /// Refuses values that no model could take.
    ///
    /// # Errors
    /// [`Failure::Usage`] naming the option.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let checked = self.clone().into_params(SamplingParams::default()).validate(usize::MAX);
        checked.map_err(|error| match error.param {
            Some(param) => Failure::Usage(format!("--{}: {}", param.replace('_', "-"), error.message)),
            None => Failure::Usage(error.message),
        })
    }

    /// These options where they are given, else those of `base`.
    pub(crate) fn into_params(self, base: SamplingParams) -> SamplingParams {
        SamplingParams {
            max_tokens: self.max_tokens.unwrap_or(base.max_tokens),
            temperature: self.temperature.unwrap_or(base.temperature),
            top_p: self.top_p.unwrap_or(base.top_p),
            top_k: self.top_k.unwrap_or(base.top_k),
            min_p: self.min_p.unwrap_or(base.min_p),
            seed: self.seed.or(base.seed),
            n: self.n.unwrap_or(base.n),
            best_of: self.best_of.or(base.best_of),
            stop: self.stop.unwrap_or(base.stop),
            stop_token_ids: self.stop_token_ids.unwrap_or(base.stop_token_ids),
            ignore_eos: self.ignore_eos.unwrap_or(base.ignore_eos),
            logprobs: self.logprobs.or(base.logprobs),
            prompt_logprobs: self.prompt_logprobs.or(base.prompt_logprobs),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(base.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(base.frequency_penalty),
            logit_bias: self.logit_bias.unwrap_or(base.logit_bias),
            beam_width: self.beam_width.or(base.beam_width),
            length_penalty: self.length_penalty.unwrap_or(base.length_penalty),
            early_stopping: self.early_stopping.unwrap_or(base.early_stopping),
        }
    }
}

/// A power of two that a block of the cache can hold.
fn parse_block_size(text: &str) -> Result<usize, String> {
    let size = text.parse::<usize>().ok().filter(|size| size.is_power_of_two() && *size <= MAX_BLOCK_SIZE);
    size.ok_or_else(|| format!("it must be a power of two from 1 to {MAX_BLOCK_SIZE}"))
}

/// `2GiB`, `1.5GB`, `512M` (MiB) or plain bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let refuse = || {
        format!("'{text}' is not a size; write bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB")
    };
    let trimmed = text.trim();
    let end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let factor: u64 = match unit.as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(refuse()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(refuse);
    }
    let bytes = number.parse::<f64>().map_err(|_| refuse())? * factor as f64;
    // Above 2^63 it is no memory of this world, and the conversion would saturate.
    if bytes < 9.0e18 { Ok(bytes as u64) } else { Err(refuse()) }
}

/// More than 0 and at most 1.
fn parse_share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|share| *share > 0.0 && *share <= 1.0);
    share.ok_or_else(|| "it must be more than 0 and at most 1".to_owned())
}

/// A number that is neither NaN nor infinite.
fn parse_finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(number),
        _ => Err("not a finite number".to_owned()),
    }
}

/// `ID:X`
fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let parsed = text.split_once(':').and_then(|(id, bias)| {
        let id = id.trim().parse().ok()?;
        Some((id, parse_finite(bias.trim()).ok()?))
    });
    parsed.ok_or_else(|| "not of the form ID:X, a token id and a finite number".to_owned())
}

fn parse_early_stopping(text: &str) -> Result<EarlyStopping, String> {
    match text {
        "true" => Ok(EarlyStopping::True),
        "false" => Ok(EarlyStopping::False),
        "never" => Ok(EarlyStopping::Never),
        _ => Err("use true, false or never".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("2 gib"), Ok(2 << 30));
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("1.5GB"), Ok(1_500_000_000));
        assert_eq!(parse_size("0.5k"), Ok(512));
        for bad in
            ["", "GiB", "-1", "1..5", "2XB", "1e3", "99999999999999999999", "20000000TiB", "NaN", "1.5.2G"]
        {
            assert!(parse_size(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_are_finite() {
        assert_eq!(parse_finite("-0.5"), Ok(-0.5));
        for bad in ["NaN", "inf", "-inf", "1e39", "", "x"] {
            assert!(parse_finite(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse_bias("7:-2.5"), Ok((7, -2.5)));
        for bad in ["7", "7:", ":1", "-1:1", "7:nan"] {
            assert!(parse_bias(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_line_overrides_the_command_line_which_overrides_the_model() {
        let base = SamplingParams { temperature: 0.6, top_k: 50, ..SamplingParams::default() };
        let command_line =
            SamplingOptions { temperature: Some(0.3), seed: Some(1), ..SamplingOptions::default() };
        let line = SamplingOptions { seed: Some(2), ignore_eos: Some(false), ..SamplingOptions::default() };
        let params = line.or(&command_line).into_params(base);
        assert_eq!((params.temperature, params.top_k, params.seed), (0.3, 50, Some(2)));
    }
}
