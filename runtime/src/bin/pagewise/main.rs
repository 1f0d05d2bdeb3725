//! The command line `pagewise`: reads the options, calls the command, turns failures into exit codes.
//!
//! Exit codes: 0 done, 1 failed (or some lines were not served), 2 the options were wrong.

mod bench;
mod chat;
mod conformance;
mod doctor;
mod generate;
mod jsonl;
mod loading;
mod options;
mod prompt;

use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Language models on PagedAttention.
#[derive(Debug, Parser)]
#[command(name = "pagewise", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say on stderr what is done; -vv says more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    Generate(generate::GenerateArgs),
    Chat(chat::ChatArgs),
    /// Measure how fast the engine is
    Bench(bench::Bench),
    Doctor(doctor::DoctorArgs),
    Conformance(conformance::ConformanceArgs),
}

/// Why a command did not do what it was asked for.
#[derive(Debug)]
enum Failure {
    /// The options contradict each other or cannot be.
    Usage(String),
    /// Anything else, in one sentence.
    Error(String),
    /// It has been said already, line by line.
    Reported,
    /// Nobody reads our output any more.
    OutputClosed,
}

impl Failure {
    fn error(message: impl Display) -> Self {
        Self::Error(message.to_string())
    }

    /// A failure to write results.
    fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::OutputClosed
        } else {
            Self::Error(format!("standard output cannot be written: {error}"))
        }
    }
}

fn main() -> ExitCode {
    // Exits by itself: with 0 after --help and --version, with 2 after a usage error.
    let cli = Cli::parse();
    log_to_stderr(cli.verbose);
    let done = match cli.command {
        Command::Generate(args) => generate::run(&args, cli.verbose),
        Command::Chat(args) => chat::run(&args, cli.verbose),
        Command::Bench(args) => args.run(),
        Command::Doctor(args) => doctor::run(&args),
        Command::Conformance(args) => conformance::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(message)) => {
            eprintln!("error: {message}\n\nFor more information, try '--help'.");
            ExitCode::from(2)
        }
        Err(Failure::Error(message)) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
        Err(Failure::Reported | Failure::OutputClosed) => ExitCode::FAILURE,
    }
}

/// Our own crates' messages from the level that `-v` asks for; `RUST_LOG`, where it is set, decides instead.
fn log_to_stderr(verbose: u8) {
    let ours = match verbose {
        0 => "warn,wgpu_hal=off,wgpu_core=off,naga=off",
        1 => "warn,pagewise=info",
        2 => "warn,pagewise=debug",
        _ => "info,pagewise=trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(ours));
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(colours)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_last_of_a_repeated_option_wins() {
        let cli = Cli::try_parse_from([
            "pagewise",
            "chat",
            "--model",
            "a",
            "--temperature",
            "0.2",
            "hi",
            "--temperature",
            "1",
            "--model",
            "b",
        ]);
        let Command::Chat(args) = cli.unwrap().command else { panic!("chat was asked for") };
        assert_eq!(args.sampling().temperature, Some(1.0));
        assert_eq!(args.load_options().model, "b");
    }

    #[test]
    fn stop_texts_add_up_and_negative_numbers_are_values() {
        let args = [
            "pagewise",
            "generate",
            "hi",
            "--model",
            "a",
            "--stop",
            "x",
            "--stop",
            "y",
            "--presence-penalty",
            "-1",
        ];
        let Command::Generate(args) = Cli::try_parse_from(args).unwrap().command else {
            panic!("not generate")
        };
        let sampling = args.sampling;
        assert_eq!(sampling.stop, Some(vec!["x".to_owned(), "y".to_owned()]));
        assert_eq!((sampling.presence_penalty, sampling.ignore_eos), (Some(-1.0), None));
    }
}
