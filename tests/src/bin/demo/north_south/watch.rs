//! Goes on asking until it is told to stop, through all nodes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::Value;
use srcip_tests::{
    Family,
    cluster::{agent::Agents, balancer},
};

use super::{
    Stage,
    request::{Seen, ask},
    scene::{SCHEMES, Scene, Scheme},
};
use crate::screen::Screen;

/// Two requests a second.
const INTERVAL: Duration = Duration::from_millis(500);
/// How many of them between two looks at srcip's counters.
const COUNTERS_EVERY: usize = 10;

/// Asks from the client again and again, for all schemes and families in turn.
pub fn run(stage: Stage<'_>) -> Result<()> {
    let Stage { scene, screen, signals } = stage;
    let nodes: Vec<_> = scene.cluster.nodes.iter().map(|node| node.number).collect();
    balancer::route(&scene.cluster, &nodes)?;
    screen.show(format_args!(
        "\nTwo requests a second by any of the nodes, until Ctrl-C. To ask from another terminal:"
    ))?;
    screen.show(format_args!(
        "  ip netns exec {} curl --insecure {}\n",
        scene.cluster.client.name(),
        Scheme::Https.url(Family::V4)
    ))?;
    let header = line("TIME", "URL", "GATEWAY SAW", "APPLICATION SAW", "");
    screen.show(format_args!("{}", screen.bold(&header)))?;
    let start = Instant::now();
    let (mut all, mut kept) = (0, 0);
    let turns = Family::BOTH.into_iter().flat_map(|family| SCHEMES.map(|scheme| (scheme, family)));
    for (scheme, family) in turns.collect::<Vec<_>>().into_iter().cycle() {
        let asked = ask(stage, scheme, family);
        if signals.pause(Duration::ZERO).is_some() {
            break;
        }
        let time = format!("{:.1}s", start.elapsed().as_secs_f32());
        all += 1;
        match asked {
            Ok(seen) => {
                kept += usize::from(seen.is_kept());
                print(screen, &time, &seen)?;
            }
            Err(error) => {
                let line =
                    line(&time, &scheme.url(family), "-", "-", &format!("failed: {}", error.root_cause()));
                screen.show(format_args!("{}", screen.bad(&line)))?;
            }
        }
        if all % COUNTERS_EVERY == 0 {
            let counters = counters(scene).unwrap_or_else(|error| format!("        srcip: {error:#}"));
            screen.show(format_args!("{counters}"))?;
        }
        if signals.pause(INTERVAL).is_some() {
            break;
        }
    }
    Ok(screen.show(format_args!("\nrequests: {all}, with the client's address: {kept}"))?)
}

fn print(screen: Screen, time: &str, seen: &Seen) -> Result<()> {
    let (kept, mark) = if seen.is_kept() { (true, "kept") } else { (false, "lost") };
    let line = line(time, &seen.url, &seen.remote.ip().to_string(), &seen.origin.to_string(), mark);
    let line = if kept { screen.good(&line) } else { screen.bad(&line) };
    Ok(screen.show(format_args!("{line}"))?)
}

/// Columns for both families' addresses.
fn line(time: &str, url: &str, gateway: &str, application: &str, mark: &str) -> String {
    format!("{time:<7} {url:<28}  {gateway:<17}  {application:<17}  {mark}").trim_end().to_owned()
}

/// Connections by the node that they came in by, which adds up to all of them, and how many it handed on.
fn counters(scene: &Scene) -> Result<String> {
    let mut text = "        srcip: connections:".to_owned();
    for node in &scene.cluster.nodes {
        let status = Agents::srcip(&scene.cluster, node.number).run("status -o json")?;
        let status: Value = serde_json::from_str(&status)?;
        let count = |name| status["north_south"]["counters"][name].as_u64().context("no count of flows");
        let (here, handed_on) = (count("new_flows")?, count("new_flows_handed_on")?);
        text += &format!(" {} by node {} ({handed_on} handed on),", here + handed_on, node.number);
    }
    Ok(text.trim_end_matches(',').to_owned())
}
