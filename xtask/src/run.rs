//! `cargo xtask run`: srcip at work, on hosts made for it.

use std::process::ExitCode;

use anyhow::Result;

use crate::{
    build, root,
    setup::{self, Scope},
    shell,
};

/// Builds and becomes the demonstration or, after `--`, the command itself.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let (scope, program, arguments) = match arguments {
        [dashes, rest @ ..] if dashes == "--" => (Scope::Build, "srcip", rest),
        all if build::asks_for_help(all) => return build::show_help("srcip-demo", all),
        all => (Scope::Run, "srcip-demo", all),
    };
    let ready = setup::ensure(scope)?;
    build::build(&ready, false)?;
    match root::exec(&shell::target_dir().join("debug").join(program), arguments)? {}
}
