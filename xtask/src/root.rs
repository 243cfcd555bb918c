//! Starting programs as root: as they are if we are root, else through sudo, which asks if it must.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::shell;

/// Of the environment, what our own programs look at; sudo would drop it.
const KEPT: [&str; 11] = [
    "CARGO_MANIFEST_DIR",
    "CI",
    "NO_COLOR",
    "RUST_BACKTRACE",
    "RUST_LOG",
    "RUST_TEST_NOCAPTURE",
    "RUST_TEST_THREADS",
    "SRCIP_EBPF_OBJECT",
    "SRCIP_ENVOY",
    "SRCIP_KUBECTL",
    "SRCIP_PIN_PATH",
];

/// Whether we are root.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}

/// A command that runs a program as root, with the part of the environment that our programs look at.
pub fn command(program: impl AsRef<OsStr>) -> Result<Command> {
    if is_root() {
        return Ok(Command::new(program));
    }
    let program = program.as_ref();
    if shell::find_program("sudo").is_none() {
        bail!("`{}` needs root, and there is no sudo here: run this as root", program.display());
    }
    let kept: Vec<_> = KEPT.into_iter().filter(|name| env::var_os(name).is_some()).collect();
    let mut command = Command::new("sudo");
    command.arg(format!("--preserve-env={}", kept.join(","))).arg("--").arg(program);
    Ok(command)
}

/// Lets sudo ask for the password now, while nothing else writes to the terminal.
pub fn authenticate() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    let mut quietly = Command::new("sudo");
    quietly.args(["-n", "true"]).stdin(Stdio::null()).stderr(Stdio::null());
    match quietly.status() {
        Ok(status) if status.success() => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("this needs root, and there is no sudo"),
        _ => shell::run(Command::new("sudo").arg("-v")),
    }
}

/// Becomes a program that runs as root: signals and the exit code are its own from then on.
pub fn exec(program: &Path, arguments: &[String]) -> Result<std::convert::Infallible> {
    let error = command(program)?.args(arguments).exec();
    Err(error).with_context(|| format!("starting {}", program.display()))
}
