//! `srcip detach`

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Args;

use super::{output, privileges};
use crate::{
    dataplane::{Dataplane, detach::Detached, error::Error, record::Record},
    netns::{Netns, NetnsError},
};

/// Stop steering and leave nothing behind.
///
/// New connections go to the application at once. The return route stays until the proxy's connections
/// to the application have ended, or the time for that is up; then everything is removed and the
/// sysctl gets its old value back.
#[derive(Debug, Args)]
pub(super) struct Detach {
    #[command(flatten)]
    target: Target,
    /// How long to wait for upstream connections to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, conflicts_with = "now")]
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
        privileges::require("detach")?;
        let drain = Duration::from_secs(if self.now { 0 } else { self.drain });
        let records = self.target.records(dataplane)?;
        if records.is_empty() {
            // Also what an interrupted first attach left.
            dataplane.cleanup()?;
            eprintln!("nothing is attached");
        }
        for record in records {
            let name = &record.name;
            let mut told = None;
            let outcome = dataplane.detach(&record, drain, |left| {
                if told != Some(left) {
                    eprintln!("{name}: waiting for {left} upstream connections to end");
                    told = Some(left);
                }
            })?;
            match outcome {
                Detached::Clean => output::print(format!("{name} detached\n").as_bytes())?,
                Detached::Cut(left) => {
                    eprintln!("warning: {name}: {left} upstream connections were cut off");
                    output::print(format!("{name} detached\n").as_bytes())?;
                }
                Detached::Reattached => {
                    eprintln!("{name} was attached again meanwhile and stays attached");
                }
            }
        }
        Ok(())
    }
}

impl Target {
    fn records(&self, dataplane: &Dataplane) -> Result<Vec<Record>, Error> {
        match (&self.netns, &self.name) {
            (Some(path), _) => match Netns::open(path) {
                Ok(netns) => {
                    let cookie = netns.cookie()?;
                    dataplane.find_cookie(cookie, &path.display().to_string()).map(|r| vec![r])
                }
                // Gone, but perhaps still known by that path.
                Err(error @ (NetnsError::NotFound(_) | NetnsError::NotANetns(_))) => {
                    let known = dataplane.records()?.into_iter().find(|r| r.netns == *path);
                    known.map(|record| vec![record]).ok_or(error.into())
                }
                Err(error) => Err(error.into()),
            },
            (None, Some(name)) => dataplane.find_name(name).map(|record| vec![record]),
            (None, None) => dataplane.records(),
        }
    }
}
