//! `pagewise bench engine`: how fast the engine reads prompts and writes tokens.
//!
//! Prompts are random token ids, answers have a fixed length (end tokens are ignored), sampling is greedy and
//! the prefix cache is off, so that every token is computed and nothing depends on what the model says.

use std::io;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use pagewise_runtime::load::LoadedModel;
use pagewise_runtime::request::{Request, SamplingParams};
use serde_json::json;

use crate::loading::load_model;
use crate::options::ModelOptions;
use crate::{Failure, generate};

/// What to measure.
#[derive(Args, Debug)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Tokens a second of the engine, without tokenizer and network
    #[command(after_help = "Examples:
  pagewise bench engine --model models/SmolLM2-135M-Instruct
  pagewise bench engine --model models/SmolLM2-135M-Instruct --parallel 1,16 --threads 2 --json")]
    Engine(EngineBench),
}

#[derive(Args, Debug)]
struct EngineBench {
    #[command(flatten)]
    model: ModelOptions,
    /// Tokens of each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    prompt_tokens: u32,
    /// Tokens to generate for each prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    new_tokens: u32,
    /// Requests at once; several numbers are measured one after the other
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    parallel: Vec<u32>,
    /// Times to measure each; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Print one JSON line for each number of requests
    #[arg(long)]
    json: bool,
}

/// Medians of one number of requests.
struct Figures {
    parallel: u32,
    /// Prompt tokens over the time to everyone's first token.
    prompt_per_second: f64,
    /// Further tokens over the time that they take.
    decode_per_second: f64,
    /// Generated tokens over all time.
    generated_per_second: f64,
    /// Milliseconds until the first request of one token is done.
    first_token_ms: f64,
}

impl Bench {
    /// Measures and prints.
    ///
    /// # Errors
    /// [`Failure`] if the model cannot be loaded or a request fails.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let What::Engine(bench) = self.what;
        let mut options = bench.model.load_options();
        options.prefix_cache = false;
        let mut model = load_model(&options, 0)?;
        for &parallel in &bench.parallel {
            let figures = bench.measure(&mut model, parallel)?;
            let line = if bench.json {
                bench.json_line(&model, &figures).to_string()
            } else {
                format!(
                    "{:4} x ({} + {}): prompt {:7.1} tok/s, decode {:7.1} tok/s, generated over all time {:7.1} tok/s, first token {:6.1} ms",
                    figures.parallel,
                    bench.prompt_tokens,
                    bench.new_tokens,
                    figures.prompt_per_second,
                    figures.decode_per_second,
                    figures.generated_per_second,
                    figures.first_token_ms
                )
            };
            generate::write(&mut io::stdout().lock(), &format!("{line}\n"))?;
        }
        Ok(())
    }
}

impl EngineBench {
    fn measure(&self, model: &mut LoadedModel, parallel: u32) -> Result<Figures, Failure> {
        let vocab_size = model.config.vocab_size as u64;
        let mut seed = u64::from(parallel);
        let (mut prompt, mut decode, mut generated, mut first) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        // One short run first: pages of weights and cache are touched, threads are awake.
        self.time(model, 1, 2, vocab_size, &mut seed)?;
        for _ in 0..self.repeat {
            let to_first = self.time(model, parallel, 1, vocab_size, &mut seed)?;
            let all = self.time(model, parallel, self.new_tokens, vocab_size, &mut seed)?;
            let tokens = |each: u32| f64::from(parallel) * f64::from(each);
            prompt.push(tokens(self.prompt_tokens) / to_first.as_secs_f64());
            let rest = all.saturating_sub(to_first).as_secs_f64().max(1e-9);
            decode.push(tokens(self.new_tokens - 1) / rest);
            generated.push(tokens(self.new_tokens) / all.as_secs_f64());
            first.push(1e3 * to_first.as_secs_f64() / f64::from(parallel));
        }
        Ok(Figures {
            parallel,
            prompt_per_second: median(prompt),
            decode_per_second: median(decode),
            generated_per_second: median(generated),
            first_token_ms: median(first),
        })
    }

    fn time(
        &self,
        model: &mut LoadedModel,
        parallel: u32,
        new_tokens: u32,
        vocab_size: u64,
        seed: &mut u64,
    ) -> Result<Duration, Failure> {
        let mut token = || {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((*seed >> 33) % vocab_size.max(1)) as u32
        };
        let params = SamplingParams {
            max_tokens: new_tokens as usize,
            temperature: 0.0,
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let requests = (0..parallel)
            .map(|_| Request::new((0..self.prompt_tokens).map(|_| token()).collect(), params.clone()))
            .collect();
        let started = Instant::now();
        let outputs = model.engine.generate(requests).map_err(|error| Failure::error(error.to_string()))?;
        let taken = started.elapsed();
        for output in outputs {
            let output = output.map_err(|error| Failure::error(error.to_string()))?;
            if output.usage.completion_tokens != new_tokens as usize {
                return Err(Failure::error("bench: a request ended early".to_owned()));
            }
        }
        Ok(taken)
    }

    fn json_line(&self, model: &LoadedModel, figures: &Figures) -> serde_json::Value {
        json!({
            "backend": model.backend,
            "parallel": figures.parallel,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "repeat": self.repeat,
            "prompt_tok_s": figures.prompt_per_second,
            "decode_tok_s": figures.decode_per_second,
            "generated_tok_s": figures.generated_per_second,
            "first_token_ms": figures.first_token_ms,
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
