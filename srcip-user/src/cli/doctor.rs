//! `srcip doctor`

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{
    attach::{parse_mark, parse_table},
    output::{Format, colour, print_data, print_table},
};
use crate::{
    doctor::{Check, Options, Report, Verdict},
    netns::Netns,
};

/// Tell what this node can run, what is missing, and how to get it.
///
/// Everything is tried out, nothing is guessed from version numbers. Exit code 0: all is well; 1: srcip
/// works, with limits; 2: it cannot work.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Also look at this pod's network namespace.
    #[arg(long, value_name = "PATH", conflicts_with = "pid")]
    netns: Option<PathBuf>,
    /// Also look at the network namespace of this process.
    #[arg(long, value_name = "PID")]
    pid: Option<u32>,
    /// The routing mark that would be used.
    #[arg(long, value_name = "N", default_value = "1337", value_parser = parse_mark)]
    mark: u32,
    /// The routing table that would be used.
    #[arg(long, value_name = "N", default_value = "133", value_parser = parse_table)]
    route_table: u32,
    /// How to print it.
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
    /// Leave the header of the table out.
    #[arg(long)]
    no_headers: bool,
}

impl DoctorArgs {
    pub(super) fn run(self) -> ExitCode {
        let netns = match (&self.netns, self.pid) {
            (Some(path), _) => Netns::open(path).map(Some),
            (None, Some(pid)) => Netns::of_process(pid).map(Some),
            (None, None) => Ok(None),
        };
        let netns = match netns {
            Ok(netns) => netns,
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::from(2);
            }
        };
        let report = Report::make(&Options { netns, mark: self.mark, route_table: self.route_table });
        let printed = match self.output {
            Format::Json | Format::Yaml => print_data(&report, self.output),
            Format::Table | Format::Wide => print_report(&report, !self.no_headers),
        };
        if let Err(error) = printed {
            eprintln!("error: {error:#}");
            return ExitCode::from(2);
        }
        ExitCode::from(match report.verdict {
            Verdict::Ok => 0,
            Verdict::Limited => 1,
            Verdict::Unable => 2,
        })
    }
}

fn print_report(report: &Report, headers: bool) -> anyhow::Result<()> {
    let colour = colour(&std::io::stdout());
    let rows: Vec<_> = report
        .checks
        .iter()
        .map(|Check { name, verdict, found, cure }| {
            let (word, code) = match verdict {
                Verdict::Ok => ("ok", 32),
                Verdict::Limited => ("limited", 33),
                Verdict::Unable => ("missing", 31),
            };
            let word = if colour { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() };
            vec![word, name.clone(), found.clone(), cure.clone().unwrap_or_default()]
        })
        .collect();
    // The colour codes come first in the row, and every row has as many: the columns stay aligned.
    print_table(&["RESULT", "CHECK", "FOUND", "CURE"], &rows, headers && !colour)?;
    eprintln!("{}", report.summary);
    Ok(())
}
