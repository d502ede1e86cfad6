//! The command line: arguments as typed, resolved, run.
//!
//! **Invariant:** standard output carries data alone; everything said to the user goes to standard error through
//! this module.

mod calibrate;
mod config;
mod devices;
mod doctor;
mod estimate;
mod eval;
mod exact;
mod flags;
mod generate;
mod lossy;
mod pack;
mod plan;
mod planning;
mod progress;
mod replanning;
mod resources;
mod say;
mod signals;
mod stats;
mod sweep;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::error::Result;

/// Runs language models that are bigger than the GPU over large batches of prompts.
#[derive(Parser)]
#[command(name = "tidemill", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Complete every prompt of a JSONL file.
    Generate(Box<generate::Arguments>),
    /// Answer lines of standard input on standard output as they finish: for Ray, Spark, HELM, lm-eval.
    Worker(Box<worker::Arguments>),
    /// Evaluate a model on scenarios of HELM and on task files.
    Eval(Box<eval::Arguments>),
    /// Predict and measure a grid of batches, lengths, budgets and numerics; draw what comes of it.
    Sweep(Box<sweep::Arguments>),
    /// Write a model in the layout that it is computed from, a file per layer.
    Pack(pack::Arguments),
    /// Measure what this machine computes, copies and reads: the profile that plans are made with.
    Calibrate(calibrate::Arguments),
    /// Say what this machine offers: CPU, memory, disk, GPU.
    Doctor(doctor::Arguments),
    /// Say what a job would take on a machine; needs no weights.
    Plan(Box<plan::Arguments>),
    /// Write a model with seeded Gaussian weights in the shape of a configuration.
    Synth {
        /// A Hugging Face config.json.
        #[arg(long, value_name = "CONFIG.json")]
        config: PathBuf,
        /// Which weights.
        #[arg(long, value_name = "N")]
        seed: u64,
        /// The directory to make.
        #[arg(long, value_name = "DIR")]
        output: PathBuf,
    },
    /// Put the outputs of all shards of a job together.
    Merge {
        /// The file to make.
        #[arg(long, value_name = "FILE")]
        output: PathBuf,
        /// The shards' outputs.
        #[arg(required = true, value_name = "SHARD")]
        shards: Vec<PathBuf>,
    },
}

/// Parses the arguments, runs the command, says what went wrong; gives the exit code of design section 8.
pub fn main() -> ExitCode {
    // Commands that share the flags of `generate` do not show those that they refuse.
    let hide = |command: clap::Command, foreign: &[&'static str]| {
        foreign.iter().fold(command, |command, flag| command.mut_arg(*flag, |arg| arg.hide(true)))
    };
    let command = Arguments::command()
        .mut_subcommand("worker", |command| hide(command, &generate::WORKER_FOREIGN))
        .mut_subcommand("eval", |command| {
            let output = |arg: clap::Arg| arg.value_name("DIR").help("The directory for the results");
            hide(command, &eval::FOREIGN).mut_arg("output", output)
        })
        .mut_subcommand("sweep", |command| {
            let output = |arg: clap::Arg| arg.value_name("DIR").help("The directory for results.jsonl and report.html");
            let seed = |arg: clap::Arg| arg.help("Keys the prompts [default: 0]");
            hide(command, &sweep::FOREIGN).mut_arg("output", output).mut_arg("seed", seed)
        });
    let arguments = Arguments::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    match run(arguments.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say::error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Generate(arguments) => generate::run(*arguments),
        Command::Eval(arguments) => eval::run(*arguments),
        Command::Worker(arguments) => worker::run(*arguments),
        Command::Sweep(arguments) => sweep::run(*arguments),
        Command::Pack(arguments) => pack::run(&arguments),
        Command::Calibrate(arguments) => calibrate::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Plan(arguments) => plan::run(*arguments),
        Command::Synth { config, seed, output } => {
            crate::model::synth_files::write_directory(&config, seed, &output)?;
            say::line(&format!("synthetic model written to {}", output.display()));
            Ok(0)
        }
        Command::Merge { output, shards } => {
            let summary = crate::job::merge(&output, &shards)?;
            say::line(&format!("merged {} lines, {} failed", summary.succeeded + summary.failed, summary.failed));
            Ok(summary.exit_code())
        }
    }
}
