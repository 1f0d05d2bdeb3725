//! `pagewise chat`: one turn, or a conversation at the terminal.

use std::io;

use clap::Args;
use pagewise_runtime::load::{LoadOptions, LoadedModel};
use pagewise_runtime::request::{Event, FinishReason};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::generate::{report, write};
use crate::jsonl::{Message, Prompt};
use crate::options::{ModelOptions, SamplingOptions};
use crate::{Failure, loading, prompt};

/// Longest answer, unless --max-tokens says otherwise.
const MAX_TOKENS: usize = 1024;

const EXAMPLES: &str = "\
Examples:
  pagewise chat \"Why is the sky blue?\" --model ./SmolLM2-135M-Instruct
  pagewise chat --model ./SmolLM2-135M-Instruct --system \"Answer in one sentence.\" --temperature 0

In a conversation, /clear forgets what was said and /quit (or the end of input) ends it.";

/// Talk to a model through its chat template
#[derive(Args, Debug)]
#[command(args_override_self = true, after_help = EXAMPLES)]
pub(crate) struct ChatArgs {
    /// What to answer; without it a conversation begins
    message: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    model: ModelOptions,
}

impl ChatArgs {
    /// What was said of sampling.
    pub(crate) fn sampling(&self) -> SamplingOptions {
        let defaults = SamplingOptions { max_tokens: Some(MAX_TOKENS), ..SamplingOptions::default() };
        self.sampling.clone().or(&defaults)
    }

    /// What was said of the model.
    pub(crate) fn load_options(&self) -> LoadOptions {
        self.model.load_options()
    }
}

/// Runs the command.
pub(crate) fn run(args: &ChatArgs, verbose: u8) -> Result<(), Failure> {
    let sampling = args.sampling();
    if sampling.n.is_some_and(|n| n != 1) {
        return Err(Failure::Usage(
            "--n: a chat has one answer; use `pagewise generate` for more".to_owned(),
        ));
    }
    sampling.check()?;
    let model = loading::load_model(&args.load_options(), verbose)?;
    let mut chat = Chat { model, sampling, system: args.system.clone(), messages: Vec::new() };
    chat.clear();
    match &args.message {
        Some(message) => chat.turn(message),
        None => converse(&mut chat),
    }
}

fn converse(chat: &mut Chat) -> Result<(), Failure> {
    let terminal = |error: ReadlineError| Failure::error(format!("the terminal cannot be read: {error}"));
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    eprintln!("{}. /clear forgets what was said, /quit ends.", chat.model.backend);
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(terminal(error)),
        };
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => return Ok(()),
            "/clear" => chat.clear(),
            command if command.starts_with('/') => {
                eprintln!("{command} is unknown; there are /clear and /quit");
            }
            message => {
                // Without a history a line is as good; it only cannot be called back.
                let _ = editor.add_history_entry(message);
                match chat.turn(message) {
                    Err(Failure::Error(message)) => {
                        eprintln!("error: {message}\n/clear forgets what was said and makes room.");
                    }
                    done => done?,
                }
            }
        }
    }
}

struct Chat {
    model: LoadedModel,
    sampling: SamplingOptions,
    system: Option<String>,
    messages: Vec<Message>,
}

impl Chat {
    fn clear(&mut self) {
        let system = self.system.iter().map(|content| message("system", content));
        self.messages = system.collect();
    }

    /// One message and its answer, which is written as it comes. A turn that fails leaves no trace.
    fn turn(&mut self, text: &str) -> Result<(), Failure> {
        let before = self.messages.len();
        self.messages.push(message("user", text));
        let answered = self.answer();
        if answered.is_err() {
            self.messages.truncate(before);
        }
        self.messages.extend(answered?.map(|answer| message("assistant", &answer)));
        Ok(())
    }

    fn answer(&mut self) -> Result<Option<String>, Failure> {
        let prompt = Prompt::Messages(self.messages.clone());
        let added = prompt::add(&mut self.model, &prompt, self.sampling.clone());
        added.map_err(|error| Failure::Error(error.message))?;
        let engine = &mut self.model.engine;
        let mut out = io::stdout().lock();
        let mut streamed = false;
        let mut answer = None;
        while engine.has_work() {
            let events = engine.step().map_err(Failure::error)?;
            report(engine.metrics());
            for event in events {
                match event {
                    Event::Token { text, .. } => {
                        streamed = true;
                        write(&mut out, &text)?;
                    }
                    Event::Failed { error, .. } => return Err(Failure::error(error)),
                    Event::Finished { output, .. } => {
                        let Some(completion) = output.outputs.into_iter().next() else { continue };
                        let text = completion.text.unwrap_or_default();
                        if !streamed {
                            write(&mut out, &text)?;
                        }
                        write(&mut out, "\n")?;
                        if completion.finish_reason == FinishReason::Length {
                            eprintln!("(cut off at {} tokens)", completion.token_ids.len());
                        }
                        answer = Some(text);
                    }
                }
            }
        }
        Ok(answer)
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}
