//! `cargo xtask lint`: formatting, and clippy on every crate; a warning is an error.

use std::{
    env,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    setup::{self, Ready, Scope, apt, apt::Wish},
    shell,
};

/// The distribution's clippy, of the same build as the compiler `srcip-bpf` stands for.
const DISTRIBUTION_CLIPPY: &str = "rust-web-clippy";

/// Runs all three even if one finds something: who fixes one thing wants to know the others.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    if !arguments.is_empty() {
        bail!("usage: cargo xtask lint");
    }
    let ready = setup::ensure(Scope::Build)?;
    add_components()?;
    let lints = [
        ("formatting", format as fn(&Ready) -> Result<()>),
        ("clippy", clippy),
        ("clippy on the eBPF programs", clippy_ebpf),
    ];
    let mut failed = Vec::new();
    for (name, lint) in lints {
        shell::note(&format!("checking: {name}"));
        if let Err(error) = lint(&ready) {
            shell::note(&format!("error: {error:#}"));
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint: {}", failed.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}

fn add_components() -> Result<()> {
    for (component, tool) in [("clippy", "clippy"), ("rustfmt", "fmt")] {
        if shell::output(shell::cargo().args([tool, "--version"])).is_ok() {
            continue;
        }
        shell::note(&format!("adding {component} with rustup: `cargo {tool}` is part of the lint"));
        shell::step(Command::new("rustup").args(["component", "add", component]))
            .with_context(|| format!("`cargo {tool}` has to come with the compiler that cargo uses"))?;
    }
    Ok(())
}

fn format(_: &Ready) -> Result<()> {
    shell::run(shell::cargo().args(["fmt", "--all", "--check"])).context("`cargo fmt --all` puts it right")
}

fn clippy(ready: &Ready) -> Result<()> {
    let mut command = ready.cargo()?;
    command.args(["clippy", "--workspace", "--exclude", "srcip-ebpf", "--all-targets"]);
    shell::run(command.args(["--", "-D", "warnings"]))
}

/// The eBPF crate compiles for its own target only, with `core` built from source.
fn clippy_ebpf(ready: &Ready) -> Result<()> {
    let endian = if cfg!(target_endian = "big") { "bpfeb" } else { "bpfel" };
    let mut command = ebpf_cargo(ready)?;
    command
        .args(["clippy", "--package", "srcip-ebpf", "--release", "-Z", "build-std=core"])
        .args(["--target", &format!("{endian}-unknown-none"), "--target-dir"])
        .arg(shell::target_dir().join("ebpf-lint"))
        .args(["--", "-D", "warnings"])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH));
    shell::run(&mut command)
}

/// A cargo that has both clippy and the source of `core`.
fn ebpf_cargo(ready: &Ready) -> Result<Command> {
    let Some(toolchain) = ready.bpf_toolchain() else {
        return ready.cargo();
    };
    let named = || -> Result<Command> {
        let mut command = Command::new("rustup");
        command.current_dir(shell::checkout()).args(["run", toolchain, "cargo"]);
        ready.prepare(&mut command)?;
        Ok(command)
    };
    let has_clippy = || -> Result<bool> { Ok(shell::output(named()?.args(["clippy", "--version"])).is_ok()) };
    if has_clippy()? {
        return named();
    }
    if setup::core_source::active_has_core()? {
        return ready.cargo();
    }
    if toolchain == setup::core_source::LINKED_TOOLCHAIN {
        apt::install(&[Wish::new(DISTRIBUTION_CLIPPY, "clippy for the compiler of the eBPF programs")])?;
        if has_clippy()? {
            return named();
        }
    }
    bail!(
        "the eBPF programs were not linted: neither the toolchain {toolchain} has clippy nor the active one \
         the source of core (`rustup component add rust-src`)"
    )
}
