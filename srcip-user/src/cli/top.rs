//! `srcip top`

use anyhow::{Context as _, Result};
use clap::Args;

use super::{
    observe::{SelectionArgs, TargetArgs},
    output::colour,
};
use crate::{
    dataplane::Dataplane,
    signals::Ending,
    telemetry::{filter::Filter, observer::Observer},
    top::{run::run, terminal::Screen},
};

/// Watch clients and workloads live: who connects, how often, and whether the application sees it.
///
/// Counts connections into pods that open from now on; no agent is needed. What is lost, and what the
/// application sees instead, is in red and in words. Bytes and round-trip times are known when a connection
/// ends, and count from then on. Rates are averages over five seconds. A proxy connects to the application
/// a moment after the client has connected to it; until then it is unknown what the application sees.
///
/// Keys: q quits, Tab switches between clients and workloads, arrows move, s and < > choose the column to
/// order by, r reverses, / filters by text, p pauses, ? tells them all.
#[derive(Debug, Args)]
pub(super) struct Top {
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    target: TargetArgs,
}

impl Top {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        Screen::check()?;
        crate::privileges::require_watching("top")?;
        // Before the terminal is taken over, so that no signal leaves it in disorder.
        let ending = Ending::watch().context("failed to catch signals")?;
        let mut observer = Observer::start(dataplane, &self.target.options()?)?;
        run(&mut observer, &Filter::from(self.selection), colour(&std::io::stdout()), &ending)
    }
}
