//! The two set-ups: iptables REDIRECT, which meshes use by default, and srcip.

use anyhow::{Context as _, Result};
use srcip_tests::{
    Family, client,
    peer::APPLICATION_PORT,
    proxy::{PROXY_PORT, Proxy},
};

use crate::{
    Stage,
    sidecar::Sidecar,
    views::{Views, collect},
};

/// What was seen in one set-up.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Over IPv4.
    pub v4: Views,
    /// Over IPv6, where the set-up can do that.
    pub v6: Option<Views>,
}

/// The mesh's rule, to be added (`-A`) or deleted (`-D`).
fn redirect(family: Family, verb: &str) -> String {
    let iptables = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let to = format!("-j REDIRECT --to-ports {PROXY_PORT}");
    format!("{iptables} -t nat {verb} PREROUTING -p tcp ! --dport {PROXY_PORT} {to}")
}

/// Sets the sidecar up as a mesh does by default, looks, and removes it.
pub fn before(stage: &Stage<'_>) -> Result<Seen> {
    let Stage { hosts, sidecar, screen, .. } = *stage;
    let pod = &hosts.pod;
    screen.show(format_args!("{}", screen.bold("BEFORE: iptables REDIRECT")))?;
    let version = sidecar.version()?;
    screen.progress(format_args!("sidecar: {version}, connects to the application from 127.0.0.6"));
    // The node's kernel routes 127.0.0.6 by itself, but has no ::6.
    pod.ip("-6 addr add ::6/128 dev lo nodad")?;
    let families = sidecar.redirect_families();
    for &family in families {
        let command = redirect(family, "-A");
        screen.show(format_args!("  httpbin$ {command}"))?;
        pod.sh(&command)?;
    }
    let proxy = sidecar.start_redirect(pod)?;
    let seen = look(stage, &proxy, families).context("before")?;
    seen.v4.show(screen, sidecar)?;
    audit(stage).context("the audit before")?;
    proxy.kill();
    for &family in families {
        pod.sh(&redirect(family, "-D"))?;
    }
    pod.ip("-6 addr del ::6/128 dev lo")?;
    pod.wait_closed(PROXY_PORT)?;
    screen.progress(format_args!("removed the rules and the sidecar"));
    Ok(seen)
}

/// Sets the sidecar up with srcip, looks, and leaves it running.
pub fn after(stage: &Stage<'_>) -> Result<(Seen, Proxy)> {
    let Stage { hosts, sidecar, screen, .. } = *stage;
    screen.show(format_args!("{}", screen.bold("AFTER: srcip")))?;
    let how = match sidecar {
        Sidecar::Envoy => "original_src",
        Sidecar::Haproxy => "usesrc clientip",
    };
    screen.progress(format_args!("sidecar: {}, connects with the client's address ({how})", sidecar.name()));
    let proxy = sidecar.start_transparent(&hosts.pod)?;
    let srcip = hosts.world.srcip();
    let arguments = srcip.attach_arguments(&hosts.pod, "");
    let command = format!("srcip {} --pin-path {}", arguments.trim(), srcip.pin_path().display());
    let command =
        command.replace(" --cgroup", " \\\n      --cgroup").replace(" --pin-path", " \\\n      --pin-path");
    screen.show(format_args!("  node$ {command}"))?;
    screen.show(format_args!(
        "    (The last two keep this apart from the node's own srcip; a real pod needs neither.)"
    ))?;
    let attached = srcip.attach(&hosts.pod, "")?;
    // On two lines: what steers where, and how.
    screen.show(format_args!("    {}", attached.trim().replacen(", engine ", ",\n    engine ", 1)))?;
    let seen = look(stage, &proxy, &Family::BOTH).context("after")?;
    seen.v4.show(screen, sidecar)?;
    audit(stage).context("the audit after")?;
    Ok((seen, proxy))
}

/// Lets srcip tell what is wrong with the pod, if anything is.
fn audit(stage: &Stage<'_>) -> Result<()> {
    let Stage { hosts, screen, .. } = *stage;
    let netns = hosts.pod.path();
    screen.show(format_args!("  node$ srcip audit --netns {}", netns.display()))?;
    let to = hosts.pod.socket(Family::V4, APPLICATION_PORT);
    let traffic = || (0..3).try_for_each(|_| client::ask_once(&hosts.client, to).map(drop));
    let report = hosts.world.srcip().audit(&format!("--netns {}", netns.display()), traffic)?;
    let client = hosts.client.address(Family::V4);
    for line in report.lines() {
        let line = format!("    {line}");
        let line = screen.highlight(line.trim_end(), client, [127, 0, 0, 6].into());
        screen.show(format_args!("{line}"))?;
    }
    Ok(screen.show(format_args!(""))?)
}

fn look(stage: &Stage<'_>, proxy: &Proxy, families: &[Family]) -> Result<Seen> {
    let collect = |family| collect(stage, proxy, family);
    let v4 = collect(Family::V4)?;
    let v6 = families.contains(&Family::V6).then(|| collect(Family::V6)).transpose()?;
    Ok(Seen { v4, v6 })
}
