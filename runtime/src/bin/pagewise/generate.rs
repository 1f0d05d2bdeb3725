//! `pagewise generate`: continues one prompt, or every line of a file as one batch.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use pagewise_runtime::engine::Metrics;
use pagewise_runtime::load::LoadedModel;
use pagewise_runtime::request::{Completion, Event, RequestId, RequestOutput};

use crate::jsonl::{self, LineError, Prompt};
use crate::options::{ModelOptions, SamplingOptions};
use crate::{Failure, loading, prompt};

const EXAMPLES: &str = "\
Examples:
  pagewise generate \"Once upon a time\" --model ./SmolLM2-135M --max-tokens 64
  pagewise generate --prompts batch.jsonl --json --model ./SmolLM2-135M-Instruct --temperature 0
  echo '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}], \"n\": 2}' |
      pagewise generate --prompts - --json --model ./SmolLM2-135M-Instruct

A line of --prompts is a JSON object with one of \"prompt\" (text), \"prompt_token_ids\" (a list)
and \"messages\" (a chat), and any of the sampling options under their names here, with _ for -.
Options of the command line are the lines' defaults. With --json one line comes out for each that
goes in, in order; a line that cannot be served gives {\"index\", \"error\"} in its place, and the
exit code is 1.";

/// Continue a prompt, or a file of prompts as one batch
#[derive(Args, Debug)]
#[command(args_override_self = true, after_help = EXAMPLES)]
pub(crate) struct GenerateArgs {
    /// Text to continue, as it is: without a chat template
    #[arg(required_unless_present = "prompts")]
    prompt: Option<String>,
    /// A file of prompts, one JSON object a line; - is standard input
    #[arg(long, value_name = "FILE.jsonl|-", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
    /// Write one JSON object a prompt to stdout
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingOptions,
    #[command(flatten)]
    model: ModelOptions,
}

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs, verbose: u8) -> Result<(), Failure> {
    args.sampling.check()?;
    let options = args.model.load_options();
    match (&args.prompt, &args.prompts) {
        (Some(text), _) => {
            let mut model = loading::load_model(&options, verbose)?;
            one(&mut model, text, args)
        }
        (None, Some(path)) => {
            let file = read(path)?;
            let mut model = loading::load_model(&options, verbose)?;
            batch(&mut model, &file, args)
        }
        (None, None) => Err(Failure::Usage("give a PROMPT or --prompts".to_owned())),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    if path == Path::new("-") {
        let mut input = Vec::new();
        let done = io::stdin().lock().read_to_end(&mut input);
        return done
            .map(|_| input)
            .map_err(|error| Failure::error(format!("standard input cannot be read: {error}")));
    }
    std::fs::read(path)
        .map_err(|error| Failure::error(format!("--prompts: {} cannot be read: {error}", path.display())))
}

/// A prompt of the command line. Its failure is the command's.
fn one(model: &mut LoadedModel, text: &str, args: &GenerateArgs) -> Result<(), Failure> {
    let refuse = |error: LineError| Failure::Error(error.message);
    let id = prompt::add(model, &Prompt::Text(text.to_owned()), args.sampling.clone()).map_err(refuse)?;
    // Several completions would run into each other.
    let stream = !args.json && args.sampling.n.unwrap_or(1) == 1;
    let mut out = io::stdout().lock();
    let mut streamed = false;
    while model.engine.has_work() {
        let events = model.engine.step().map_err(Failure::error)?;
        report(model.engine.metrics());
        for event in events {
            match event {
                Event::Token { text, .. } if stream => {
                    streamed = true;
                    write(&mut out, &text)?;
                }
                Event::Finished { request, output } if request == id => {
                    let rest = match (args.json, streamed) {
                        (true, _) => jsonl::output_line(0, &output) + "\n",
                        (false, true) => "\n".to_owned(),
                        (false, false) => plain(&output),
                    };
                    write(&mut out, &rest)?;
                }
                Event::Failed { error, .. } => return Err(Failure::error(error)),
                Event::Token { .. } | Event::Finished { .. } => {}
            }
        }
    }
    Ok(())
}

/// All lines of a file at once; results leave in the order of the lines.
fn batch(model: &mut LoadedModel, file: &[u8], args: &GenerateArgs) -> Result<(), Failure> {
    let mut results = Results::new(args.json);
    // Of each request its line, and the field of the line that holds the prompt.
    let mut running: HashMap<RequestId, (usize, &'static str)> = HashMap::new();
    let started = Instant::now();
    for (index, line) in jsonl::split_lines(file).into_iter().enumerate() {
        let added = jsonl::parse_line(line).and_then(|line| {
            let id = prompt::add(model, &line.prompt, line.sampling.or(&args.sampling))?;
            Ok((id, line.prompt.field()))
        });
        match added {
            Ok((id, field)) => {
                running.insert(id, (index, field));
            }
            Err(error) => results.add(index, Err(error))?,
        }
    }
    while model.engine.has_work() {
        let events = match model.engine.step() {
            Ok(events) => events,
            Err(error) => {
                // Nothing that runs can go on.
                for (index, _) in running.into_values() {
                    results.add(index, Err(LineError::new(None, error.to_string())))?;
                }
                return Err(Failure::error(error));
            }
        };
        report(model.engine.metrics());
        for event in events {
            let (request, result) = match event {
                Event::Token { .. } => continue,
                Event::Finished { request, output } => (request, Ok(output)),
                Event::Failed { request, error } => (request, Err(error)),
            };
            if let Some((index, field)) = running.remove(&request) {
                results.add(index, result.map_err(|error| prompt::line_error(error, field)))?;
            }
        }
    }
    let stats = model.engine.stats();
    tracing::info!(
        lines = results.next,
        seconds = started.elapsed().as_secs_f64(),
        steps = stats.steps,
        computed_tokens = stats.computed_tokens,
        generated_tokens = stats.generated_tokens,
        preemptions = stats.scheduler.preemptions,
        swaps = stats.scheduler.swaps,
        "batch served"
    );
    if results.failed { Err(Failure::Reported) } else { Ok(()) }
}

/// Holds results back until those of all lines before them are written.
struct Results {
    json: bool,
    out: io::StdoutLock<'static>,
    next: usize,
    waiting: BTreeMap<usize, Result<RequestOutput, LineError>>,
    failed: bool,
}

impl Results {
    fn new(json: bool) -> Self {
        Self { json, out: io::stdout().lock(), next: 0, waiting: BTreeMap::new(), failed: false }
    }

    fn add(&mut self, index: usize, result: Result<RequestOutput, LineError>) -> Result<(), Failure> {
        self.waiting.insert(index, result);
        while let Some(result) = self.waiting.remove(&self.next) {
            self.write(self.next, &result)?;
            self.next += 1;
        }
        Ok(())
    }

    fn write(&mut self, index: usize, result: &Result<RequestOutput, LineError>) -> Result<(), Failure> {
        self.failed |= result.is_err();
        let text = match result {
            Ok(output) if self.json => jsonl::output_line(index, output) + "\n",
            Err(error) if self.json => jsonl::error_line(index, error) + "\n",
            Ok(output) => plain(output),
            Err(error) => {
                eprintln!("error: line {}: {}", index + 1, error.message);
                return Ok(());
            }
        };
        write(&mut self.out, &text)
    }
}

/// The texts of a result, each ended by a newline; token ids where there is no tokenizer.
fn plain(output: &RequestOutput) -> String {
    let text = |completion: &Completion| match &completion.text {
        Some(text) => format!("{text}\n"),
        None => {
            format!("{}\n", completion.token_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
        }
    };
    output.outputs.iter().map(text).collect()
}

/// Writes at once, so that a reader sees each piece as it comes.
pub(crate) fn write(out: &mut impl Write, text: &str) -> Result<(), Failure> {
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|error| Failure::output(&error))
}

/// Says in the log what the last step did, and how long the requests took that ended in it.
pub(crate) fn report(metrics: &Metrics) {
    for request in &metrics.ended {
        let seconds = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64();
        tracing::info!(
            request = request.request.0,
            outcome = ?request.outcome,
            prompt_tokens = request.prompt_tokens,
            cached_tokens = request.cached_tokens,
            generated_tokens = request.generated_tokens,
            preemptions = request.preemptions,
            queued_s = seconds(request.queued()),
            first_token_s = seconds(request.time_to_first_token()),
            seconds = seconds(request.latency()),
            "request ended"
        );
    }
    let (step, blocks, queue) = (&metrics.step, &metrics.stats.device_blocks, &metrics.stats.scheduler);
    tracing::debug!(
        step = step.id,
        sequences = step.sequences,
        prefill_tokens = step.prefill_tokens,
        decode_tokens = step.decode_tokens,
        waiting = queue.waiting,
        blocks_used = blocks.used,
        blocks = blocks.total,
        swapped_out = step.swapped_out_blocks,
        swapped_in = step.swapped_in_blocks,
        copied = step.copied_blocks,
        preempted = step.preempted,
        schedule_us = step.schedule.as_micros() as u64,
        execute_us = step.execute.as_micros() as u64,
        sample_us = step.sample.as_micros() as u64,
        "step"
    );
}
