//! Says which capabilities are missing, before the kernel says EPERM to something obscure.

use std::fs;

use anyhow::{Result, bail};

/// A capability, by number (linux/capability.h).
struct Capability {
    number: u32,
    name: &'static str,
    /// What it is needed for.
    why: &'static str,
    /// Whether the kernel takes `CAP_SYS_ADMIN` in its place (`bpf_capable`, `perfmon_capable`).
    implied: bool,
}

const SYS_ADMIN: u32 = 21;

/// What every verb needs that looks at connections.
const WATCHING: [Capability; 3] = [
    Capability {
        number: SYS_ADMIN,
        name: "CAP_SYS_ADMIN",
        why: "enter a pod's network namespace",
        implied: false,
    },
    Capability {
        number: 38,
        name: "CAP_PERFMON",
        why: "run the iterator over a pod's sockets; CAP_SYS_ADMIN does instead",
        implied: true,
    },
    Capability {
        number: 39,
        name: "CAP_BPF",
        why: "load programs and open pinned maps; CAP_SYS_ADMIN does instead",
        implied: true,
    },
];

/// What those need besides that change something.
const STEERING: Capability = Capability {
    number: 12,
    name: "CAP_NET_ADMIN",
    why: "rules and routes of pods, programs on their devices",
    implied: false,
};

/// The capabilities, needed for steering, that this process does not have.
pub fn missing() -> Vec<(&'static str, &'static str)> {
    missing_of(&[&STEERING].into_iter().chain(&WATCHING).collect::<Vec<_>>())
}

fn missing_of(needed: &[&Capability]) -> Vec<(&'static str, &'static str)> {
    let effective = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        // Nothing to go by: let the kernel decide.
        .unwrap_or(u64::MAX);
    let has = |number: u32| effective >> number & 1 == 1;
    needed
        .iter()
        .filter(|capability| !(has(capability.number) || capability.implied && has(SYS_ADMIN)))
        .map(|capability| (capability.name, capability.why))
        .collect()
}

/// Fails if a capability is missing that looking at connections takes.
pub fn require_watching(verb: &str) -> Result<()> {
    refuse(verb, &missing_of(&WATCHING.iter().collect::<Vec<_>>()))
}

/// Fails if a capability is missing that steering takes.
pub fn require(verb: &str) -> Result<()> {
    refuse(verb, &missing())
}

fn refuse(verb: &str, missing: &[(&str, &str)]) -> Result<()> {
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<_> = missing.iter().map(|(name, why)| format!("{name} ({why})")).collect();
    bail!(
        "`srcip {verb}` needs capabilities that this process does not have: {}; run it as root \
         (`sudo srcip {verb} ...`), or give the container these capabilities",
        list.join(", ")
    )
}
