//! Packages of Debian and its relatives.

use std::{
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail};

use crate::{root, shell};

/// Packages that start a service when they are installed, and its name.
const SERVICES: [(&str, &str); 4] = [
    ("containerd", "containerd"),
    ("haproxy", "haproxy"),
    ("nginx-light", "nginx"),
    ("prometheus", "prometheus"),
];

/// A package to install, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// Its name.
    pub package: String,
    /// Completes `installing it: ...`.
    pub why: String,
}

impl Wish {
    /// Wishes for a package.
    pub fn new(package: impl Into<String>, why: impl Into<String>) -> Self {
        Self { package: package.into(), why: why.into() }
    }
}

/// Whether this system installs its packages with apt.
pub fn is_here() -> bool {
    shell::find_program("apt-get").is_some()
}

/// Whether a package of this name could be installed. Fetches the package lists first.
pub fn offers(package: &str) -> Result<bool> {
    update()?;
    let policy = shell::output(Command::new("apt-cache").args(["policy", package]))?;
    Ok(has_candidate(&policy))
}

fn has_candidate(policy: &str) -> bool {
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"));
    candidate.is_some_and(|version| version.trim() != "(none)")
}

/// Installs packages, all in one go.
pub fn install(wishes: &[Wish]) -> Result<()> {
    if wishes.is_empty() {
        return Ok(());
    }
    if !is_here() {
        bail!("there is no apt-get here. Install by hand what these Debian packages have:{}", list(wishes));
    }
    if let Err(error) = update().and_then(|()| fetch_and_unpack(wishes)) {
        bail!("{error:#}\nInstall by hand what is missing of these, and try again:{}", list(wishes));
    }
    stop_services(wishes);
    Ok(())
}

fn fetch_and_unpack(wishes: &[Wish]) -> Result<()> {
    for Wish { package, why } in wishes {
        shell::note(&format!("installing {package} with apt: {why}"));
    }
    let mut command = apt_get()?;
    // Nothing that is installed may go: a compiler from another package would, for one.
    command
        .args(["install", "--yes", "--no-install-recommends", "--no-remove"])
        .args(["-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Options::=--force-confold"])
        .args(wishes.iter().map(|wish| &wish.package));
    shell::step(&mut command)
}

fn list(wishes: &[Wish]) -> String {
    wishes.iter().map(|Wish { package, why }| format!("\n  {package}: {why}")).collect()
}

/// Fetches the package lists, once. A source that cannot be reached may not matter: installing will tell.
fn update() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let mut command = apt_get()?;
    shell::note("fetching apt's package lists");
    if let Err(error) = shell::step(command.arg("update")) {
        shell::note(&format!("going on with the package lists there are: {error:#}"));
    }
    Ok(())
}

fn apt_get() -> Result<Command> {
    root::authenticate().context("installing packages takes root")?;
    let mut command = root::command("env")?;
    // With init scripts, RUNLEVEL=1 keeps a package from starting its service.
    command.args(["DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get"]);
    Ok(command)
}

/// Of what was just installed, only the programs are wanted; systemd has started their services.
fn stop_services(wishes: &[Wish]) {
    if !Path::new("/run/systemd/system").is_dir() {
        return;
    }
    for (package, service) in SERVICES {
        if !wishes.iter().any(|wish| wish.package == package) {
            continue;
        }
        shell::note(&format!("disabling the service {service} that came with {package}: not needed"));
        let disabled = root::command("systemctl").and_then(|mut command| {
            command.args(["disable", "--now", &format!("{service}.service")]);
            shell::step(&mut command)
        });
        if let Err(error) = disabled {
            shell::note(&format!("{error:#}; `systemctl disable --now {service}` as root would do it"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_package_with_a_candidate_is_offered() {
        let offered = "llvm-22-dev:\n  Installed: (none)\n  Candidate: 1:22.1.8-1\n  Version table:\n";
        let virtual_only = "bpftool:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n";
        assert!(has_candidate(offered));
        assert!(!has_candidate(virtual_only));
        assert!(!has_candidate(""), "apt-cache prints nothing for an unknown name");
    }

    #[test]
    fn the_list_for_installing_by_hand_has_the_reasons() {
        let wishes = [Wish::new("a", "for b"), Wish::new("c", "for d")];
        assert_eq!(list(&wishes), "\n  a: for b\n  c: for d");
    }
}
