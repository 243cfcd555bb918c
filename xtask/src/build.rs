//! `cargo xtask build`: all programs, the eBPF ones inside them.

use std::process::{Command, ExitCode};

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

/// Whether a program of ours is only to say what it can do.
pub fn asks_for_help(arguments: &[String]) -> bool {
    arguments.iter().any(|argument| matches!(&**argument, "-h" | "--help"))
}

/// Has a program say so. That takes no root, none of what it works with, and no optimised build, which takes
/// minutes.
pub fn show_help(program: &str, arguments: &[String]) -> Result<ExitCode> {
    build(&setup::ensure(Scope::Build)?, false)?;
    shell::run(Command::new(shell::target_dir().join("debug").join(program)).args(arguments))?;
    Ok(ExitCode::SUCCESS)
}
