//! The demonstration: one mesh, first as it is set up by default, then with srcip, and what the
//! application, its sockets and the sidecar's access log say of the client in each.
//!
//! - [`hosts`]: a client, a node and a pod, made of network namespaces.
//! - [`sidecar`]: Envoy, or HAProxy where there is none.
//! - [`before_after`]: the two set-ups.
//! - [`views`]: what the three say of one connection.
//! - [`comparison`]: both set-ups side by side. [`table`]: how that looks, and whether it is as it should be.
//! - [`watch`]: goes on sending traffic.
//! - [`north_south`]: the same for traffic from outside a cluster, with kube-proxy's rules in place of a mesh.
//! - [`signals`], [`screen`]: the terminal's two directions.

mod before_after;
mod comparison;
mod hosts;
mod north_south;
mod screen;
mod sidecar;
mod signals;
mod table;
mod views;
mod watch;

use std::{io, process::ExitCode};

use anyhow::Result;
use clap::Parser;
use srcip_tests::world::World;

use crate::{
    hosts::Hosts,
    screen::Screen,
    sidecar::{Choice, Sidecar},
    signals::{Interrupted, Signals},
};

/// Shows what srcip does: a client, a pod and its sidecar, or a whole cluster, before and after.
///
/// The hosts are network namespaces of this machine, the proxies are real ones. When the demonstration
/// ends, for whatever reason, it removes all of them.
#[derive(Debug, Parser)]
#[command(name = "srcip-demo", version)]
struct Arguments {
    /// Stop after the table; fail unless the client's address was lost before and is kept after.
    #[arg(long)]
    once: bool,
    /// The sidecar.
    #[arg(long, value_enum, default_value = "auto", conflicts_with = "north_south")]
    proxy: Choice,
    /// Show traffic that enters a cluster: three nodes, an ingress gateway, kube-proxy's rules before and srcip
    /// beside them after.
    #[arg(long)]
    north_south: bool,
}

/// What the steps of the demonstration work with.
#[derive(Clone, Copy, Debug)]
struct Stage<'a> {
    hosts: &'a Hosts,
    sidecar: Sidecar,
    screen: Screen,
    signals: &'a Signals,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let screen = Screen::new();
    // By the time it returns, everything is removed.
    let Err(error) = run(&arguments, screen) else { return ExitCode::SUCCESS };
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        // As shells report it.
        return ExitCode::from(128 + *signal as u8);
    }
    let broken_pipe = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    if !arguments.once && error.downcast_ref().is_some_and(broken_pipe) {
        // A reader that has seen enough (`srcip-demo | head`).
        return ExitCode::SUCCESS;
    }
    screen.progress(format_args!("error: {error:#}"));
    ExitCode::FAILURE
}

fn run(arguments: &Arguments, screen: Screen) -> Result<()> {
    let choice = if arguments.north_south { Choice::Envoy } else { arguments.proxy };
    let sidecar = Sidecar::choose(choice)?;
    let blocked = signals::block()?;
    screen.progress(format_args!("creating the hosts"));
    let world = World::new()?;
    let signals = Signals::watch(blocked, world.cgroup());
    let mut result = if arguments.north_south {
        north_south::demonstrate(world, screen, &signals, arguments.once)
    } else {
        Hosts::create(world).and_then(|hosts| {
            let stage = Stage { hosts: &hosts, sidecar, screen, signals: &signals };
            demonstrate(&stage, arguments)
        })
    };
    if result.is_err()
        && let Some(signal) = signals.received()
    {
        // What went wrong came of the signal, which ended the processes.
        screen.progress(format_args!("\ninterrupted by {signal}"));
        result = Err(Interrupted(signal).into());
    }
    screen.progress(format_args!("removed hosts, processes and srcip"));
    result
}

fn demonstrate(stage: &Stage<'_>, arguments: &Arguments) -> Result<()> {
    stage.signals.check()?;
    stage.hosts.draw(stage.screen, stage.sidecar, arguments.proxy)?;
    let before = before_after::before(stage)?;
    stage.signals.check()?;
    let (after, _proxy) = before_after::after(stage)?;
    stage.signals.check()?;
    comparison::print(stage, &before, &after)?;
    let verdict = comparison::verdict(&before, &after);
    if arguments.once {
        return verdict;
    }
    if let Err(error) = verdict {
        stage.screen.progress(format_args!("warning: {error:#}"));
    }
    watch::run(stage)
}
