//! Goes on sending traffic until it is told to stop.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use srcip_tests::{
    Family,
    client::{self, Seen},
    peer::APPLICATION_PORT,
    srcip::Srcip,
};

use crate::{Stage, hosts::Hosts, screen::Screen};

/// Two connections a second.
const INTERVAL: Duration = Duration::from_millis(500);
/// How many of them between two looks at srcip's counter.
const COUNTER_EVERY: usize = 10;

/// Connects from the client again and again, over both families in turn.
pub fn run(stage: &Stage<'_>) -> Result<()> {
    let Stage { hosts, screen, signals, .. } = *stage;
    let srcip = hosts.world.srcip();
    screen
        .show(format_args!("\nTwo connections a second, until Ctrl-C. To look on from another terminal:"))?;
    screen.show(format_args!("  ip netns exec {} ss -tnp", hosts.pod.name()))?;
    screen.show(format_args!("  srcip status --pin-path {}\n", srcip.pin_path().display()))?;
    let header = line("TIME", "CLIENT", "DESTINATION", "APPLICATION SAW", "");
    screen.show(format_args!("{}", screen.bold(&header)))?;
    let start = Instant::now();
    let (mut all, mut kept) = (0, 0);
    for family in Family::BOTH.into_iter().cycle() {
        let to = hosts.pod.socket(family, APPLICATION_PORT);
        let made = connect(hosts, to);
        if signals.pause(Duration::ZERO).is_some() {
            break;
        }
        let time = format!("{:.1}s", start.elapsed().as_secs_f32());
        all += 1;
        match made {
            Ok((client, seen)) => {
                kept += usize::from(seen.peer.ip() == client.ip());
                print(screen, &time, client, to, seen)?;
            }
            Err(error) => {
                let line = line(&time, "-", &to.to_string(), "-", &format!("failed: {}", error.root_cause()));
                screen.show(format_args!("{}", screen.bad(&line)))?;
            }
        }
        if all % COUNTER_EVERY == 0 {
            screen.show(format_args!("{}", counter(hosts, &srcip)))?;
        }
        if signals.pause(INTERVAL).is_some() {
            break;
        }
    }
    Ok(screen.show(format_args!("\nconnections: {all}, with the client's address: {kept}"))?)
}

fn connect(hosts: &Hosts, to: SocketAddr) -> Result<(SocketAddr, Seen)> {
    let mut connection = client::connect(&hosts.client, to)?;
    Ok((connection.local_addr()?, client::ask(&mut connection)?))
}

fn print(screen: Screen, time: &str, client: SocketAddr, to: SocketAddr, seen: Seen) -> Result<()> {
    let kept = seen.peer.ip() == client.ip();
    let mark = match (kept, seen.proxied) {
        (true, true) => "kept",
        (true, false) => "kept, but not through the sidecar",
        (false, _) => "lost",
    };
    let line = line(time, &client.to_string(), &to.to_string(), &seen.peer.to_string(), mark);
    let line = if kept { screen.good(&line) } else { screen.bad(&line) };
    Ok(screen.show(format_args!("{line}"))?)
}

/// Columns for both families' addresses.
fn line(time: &str, client: &str, to: &str, seen: &str, mark: &str) -> String {
    format!("{time:<7} {client:<20}  {to:<19}  {seen:<20}  {mark}").trim_end().to_owned()
}

fn counter(hosts: &Hosts, srcip: &Srcip) -> String {
    match srcip.counter(&hosts.pod, "steered") {
        Ok(steered) => format!("        srcip: {steered} connections steered"),
        Err(_) => "        srcip: not attached".to_owned(),
    }
}
