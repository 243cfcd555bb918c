//! Ratios of new connections per second: what telemetry costs, and what north-south gains.
//!
//! What is compared is measured in turn, many times, on hosts made of network namespaces, and each turn gives one
//! ratio: whatever else the machine is doing, it does to all.
//!
//! - [`telemetry`]: with telemetry on, against off.
//! - [`north_south`]: Services that srcip handles, against kube-proxy's iptables rules.

mod north_south;
mod telemetry;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;

use crate::telemetry::{Records, Setup};

/// Measures what telemetry costs, or what north-south gains over kube-proxy, as ratios of connection rates.
#[derive(Debug, Parser)]
#[command(name = "srcip-bench", version)]
struct Arguments {
    /// Measure north-south against kube-proxy's iptables rules, with 1, 1,000 and 10,000 Services.
    #[arg(long, conflicts_with_all = ["records", "setup"])]
    north_south: bool,
    /// How many times all are measured.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 1500)]
    milliseconds: u64,
    /// Connections at a time.
    #[arg(long, default_value_t = 16)]
    threads: usize,
    /// What becomes of the records.
    #[arg(long, value_enum, default_value = "count")]
    records: Records,
    /// Fail if a ratio of rates is lower.
    #[arg(long, value_name = "RATIO")]
    at_least: Option<f64>,
    /// The set-ups.
    #[arg(long, value_enum, default_values = ["direct", "sidecar"])]
    setup: Vec<Setup>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "--rounds 0 measures nothing");
    if arguments.north_south { north_south::run(arguments) } else { telemetry::run(arguments) }
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q).round() as usize]
}
