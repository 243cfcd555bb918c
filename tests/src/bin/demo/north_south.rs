//! Traffic that enters a cluster: an ingress gateway behind Services under `externalTrafficPolicy: Cluster`,
//! first with kube-proxy's rules alone, then with srcip beside them.
//!
//! - [`scene`]: the client, the nodes, the gateway and the application behind it.
//! - [`request`]: what the application and the gateway say of one request.
//! - [`watch`]: goes on asking.

mod request;
mod scene;
mod watch;

use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use srcip_tests::{
    Family,
    cluster::{agent::Agents, balancer, kube_proxy},
    world::World,
};

use crate::{
    screen::Screen,
    signals::Signals,
    table::{self, View},
};
use request::{Seen, ask};
use scene::{SCHEMES, Scene};

/// The node that the load balancer sends the client to while we look: one without the gateway.
const ENTRY_NODE: u8 = 2;

/// The port of a client that might come.
const EXAMPLE_PORT: u16 = 50_000;

/// What the steps work with.
#[derive(Clone, Copy, Debug)]
struct Stage<'a> {
    scene: &'a Scene,
    screen: Screen,
    signals: &'a Signals,
}

/// Shows both set-ups in an empty world and, unless it is to be done once, goes on with traffic.
pub fn demonstrate(world: World, screen: Screen, signals: &Signals, once: bool) -> Result<()> {
    let scene = Scene::create(world)?;
    let stage = Stage { scene: &scene, screen, signals };
    signals.check()?;
    scene.draw(screen)?;
    let before = before(stage)?;
    signals.check()?;
    let (after, _agents) = after(stage)?;
    signals.check()?;
    let [before, after] =
        [before, after].map(|seen| seen.iter().flat_map(Seen::views).collect::<Vec<View>>());
    table::print(screen, &before.iter().cloned().map(Some).zip(after.iter().cloned()).collect::<Vec<_>>())?;
    screen.show(format_args!("\nkept: the client's address; lost: a node's"))?;
    screen.show(format_args!(
        "downstream_remote_address, x_forwarded_for: fields of the gateway's access log"
    ))?;
    let verdict = table::verdict(&before, &after);
    if once {
        return verdict;
    }
    if let Err(error) = verdict {
        screen.progress(format_args!("warning: {error:#}"));
    }
    watch::run(stage)
}

/// kube-proxy's rules alone.
fn before(stage: Stage<'_>) -> Result<Vec<Seen>> {
    let Stage { scene, screen, .. } = stage;
    screen.show(format_args!("{}", screen.bold("BEFORE: kube-proxy's iptables rules")))?;
    kube_proxy::install(&scene.cluster, &scene.services())?;
    balancer::route(&scene.cluster, &[ENTRY_NODE])?;
    let rules = scene.cluster.node(ENTRY_NODE).host.sh("iptables -t nat -S")?;
    screen.show(format_args!(
        "  node {ENTRY_NODE}$ iptables -t nat -S | grep -e KUBE-MARK-MASQ -e MASQUERADE"
    ))?;
    for rule in rules.lines().filter(|rule| {
        rule.starts_with("-A") && (rule.contains("KUBE-MARK-MASQ") || rule.contains("MASQUERADE"))
    }) {
        screen.show(format_args!("    {rule}"))?;
    }
    look(stage).context("before")
}

/// The same rules, and srcip on every node.
fn after(stage: Stage<'_>) -> Result<(Vec<Seen>, Agents)> {
    let Stage { scene, screen, .. } = stage;
    screen.show(format_args!("{}", screen.bold("AFTER: srcip, beside the same rules")))?;
    screen.progress(format_args!("the Services ask for it: srcip.io/north-south: \"true\""));
    screen.show(format_args!("  each node$ srcip agent --uplink eth0"))?;
    screen.show(format_args!(
        "    (With options that keep this apart from the machine's own, and a directory for an API.)"
    ))?;
    let agents = Agents::start(&scene.cluster, &scene.services(), "")?;
    let seen = look(stage).context("after")?;
    let srcip = Agents::srcip(&scene.cluster, ENTRY_NODE);
    let https = scene.services()[1].dialled(Family::V4);
    let client = SocketAddr::new(scene.cluster.client.address(Family::V4), EXAMPLE_PORT);
    for command in ["status".to_owned(), format!("explain --from {client} --to {https}")] {
        screen.show(format_args!("  node {ENTRY_NODE}$ srcip {command}"))?;
        for line in srcip.run(&command)?.lines() {
            screen.show(format_args!("{}", format!("    {line}").trim_end()))?;
        }
        screen.show(format_args!(""))?;
    }
    Ok((seen, agents))
}

/// Asks once for each scheme and family, and shows where the last of them comes from.
fn look(stage: Stage<'_>) -> Result<Vec<Seen>> {
    let mut all = Vec::new();
    for family in Family::BOTH {
        for scheme in SCHEMES {
            stage.signals.check()?;
            let seen = ask(stage, scheme, family)?;
            if family == Family::V4 {
                let hiding = stage.scene.cluster.node(ENTRY_NODE).host.address(family);
                seen.show(stage.screen, hiding)?;
            }
            all.push(seen);
        }
    }
    Ok(all)
}
