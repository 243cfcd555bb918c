//! `cargo xtask build`: all programs, the eBPF ones inside them.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::{
    setup::{self, Ready, Scope},
    shell,
};

/// Installs what building takes, and builds.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let release = match arguments {
        [] => false,
        [flag] if flag == "--release" => true,
        _ => bail!("usage: cargo xtask build [--release]"),
    };
    let ready = setup::ensure(Scope::Build)?;
    build(&ready, release)?;
    Ok(ExitCode::SUCCESS)
}

/// Builds the programs into `target/debug` or `target/release`.
pub fn build(ready: &Ready, release: bool) -> Result<()> {
    let mut command = ready.cargo()?;
    command.args(["build", "--bins"]);
    if release {
        command.arg("--release");
    }
    shell::run(&mut command)
}
