//! `cargo xtask bench`: what telemetry costs and what north-south gains, measured in turn with and without it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    build, root,
    setup::{self, Scope},
    shell,
};

/// Builds with optimisations, and becomes the benchmark.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    if build::asks_for_help(arguments) {
        return build::show_help("srcip-bench", arguments);
    }
    let ready = setup::ensure(Scope::Test)?;
    build::build(&ready, true)?;
    match root::exec(&shell::target_dir().join("release/srcip-bench"), arguments)? {}
}
