//! Says which capabilities are missing, before the kernel says EPERM to something obscure.

use std::fs;

use anyhow::{Result, bail};

/// Capabilities srcip needs, by number (linux/capability.h), with the reason.
const NEEDED: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "attach to network namespaces, cgroups and devices; routes and rules"),
    (21, "CAP_SYS_ADMIN", "enter a pod's network namespace"),
    (38, "CAP_PERFMON", "run the iterator over a pod's sockets"),
    (39, "CAP_BPF", "load programs and open pinned maps"),
];

/// The needed capabilities that this process does not have.
pub fn missing() -> Vec<(&'static str, &'static str)> {
    let effective = fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        })
        // Nothing to go by: let the kernel decide.
        .unwrap_or(u64::MAX);
    NEEDED
        .into_iter()
        .filter(|(number, ..)| effective >> number & 1 == 0)
        .map(|(_, name, why)| (name, why))
        .collect()
}

/// Fails if a capability is missing.
pub fn require(verb: &str) -> Result<()> {
    let missing = missing();
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
