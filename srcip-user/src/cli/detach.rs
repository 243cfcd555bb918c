//! `srcip detach`

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;

use super::output;
use crate::dataplane::{Dataplane, detach::Detached, error::Error, record::Record};

/// Stop steering and leave nothing behind.
///
/// New connections go to the application at once. The return route stays until the proxy's connections
/// to the application have ended, or the time for that is up; then everything is removed and
/// the sysctls get their old values back.
#[derive(Debug, Args)]
pub(super) struct Detach {
    #[command(flatten)]
    target: Target,
    /// How long to wait for upstream connections to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, conflicts_with = "now",
          value_parser = clap::value_parser!(u64).range(..=86_400))]
    drain: u64,
    /// Do not wait.
    #[arg(long)]
    now: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// The pod's network namespace.
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// The name it was attached by.
    #[arg(long)]
    name: Option<String>,
    /// All pods of this instance.
    #[arg(long)]
    all: bool,
}

impl Detach {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("detach")?;
        let deadline = Instant::now() + Duration::from_secs(if self.now { 0 } else { self.drain });
        let records = self.target.records(dataplane)?;
        if records.is_empty() {
            // Also what an interrupted first attach left.
            dataplane.cleanup()?;
            eprintln!("nothing is attached");
        }
        // First all stop, then all drain, at the same time. An error with one leaves the others to be done.
        let mut failed = None;
        let stopped: Vec<_> = records
            .iter()
            .filter(|record| dataplane.stop(record).map_err(|error| failed = Some(error)).is_ok())
            .collect();
        for record in stopped {
            if let Err(error) = finish(dataplane, record, deadline) {
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), |error| Err(error.into()))
    }
}

fn finish(dataplane: &Dataplane, record: &Record, deadline: Instant) -> Result<(), Error> {
    let name = &record.name;
    let mut told = None;
    let outcome = dataplane.finish_detach(record, deadline, |left| {
        if told != Some(left) {
            eprintln!("{name}: waiting for {left} upstream connections to end");
            told = Some(left);
        }
    })?;
    match outcome {
        Detached::Clean => {}
        Detached::Cut(left) => eprintln!("warning: {name}: {left} upstream connections were cut off"),
        Detached::Reattached => {
            eprintln!("{name} was attached again meanwhile and stays attached");
            return Ok(());
        }
    }
    let printed = output::print(format!("{name} detached\n").as_bytes());
    printed.map_err(|source| Error::File { action: "write to", path: "/dev/stdout".into(), source })
}

impl Target {
    fn records(&self, dataplane: &Dataplane) -> Result<Vec<Record>, Error> {
        match (&self.netns, &self.name) {
            (Some(path), _) => dataplane.find_netns_path(path).map(|record| vec![record]),
            (None, Some(name)) => dataplane.find_name(name).map(|record| vec![record]),
            (None, None) => dataplane.records(),
        }
    }
}
