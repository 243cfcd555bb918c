//! The real kubectl.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::process::run;

/// Where kubectl is: what `cargo xtask` found or installed.
pub fn kubectl() -> Result<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/kubectl");
    let named = env::var_os("SRCIP_KUBECTL").map(PathBuf::from);
    let found = [named, Some(installed)].into_iter().flatten().find(|path| path.is_file());
    found.context("no kubectl: `cargo xtask setup test` installs it, or name one in SRCIP_KUBECTL")
}

/// What it prints, asked with a kubeconfig; it keeps its files beside that.
pub fn ask(kubeconfig: &Path, arguments: &str) -> Result<String> {
    let home = kubeconfig.parent().context("a kubeconfig is in a directory")?;
    let mut command = Command::new(kubectl()?);
    command.arg("--kubeconfig").arg(kubeconfig).arg("--cache-dir").arg(home.join("kubectl-cache"));
    command.args(["--request-timeout", "30s"]).args(arguments.split_whitespace()).env("HOME", home);
    Ok(String::from_utf8_lossy(&run(&mut command)?.stdout).into_owned())
}
