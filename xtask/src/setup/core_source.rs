//! The compiler for the eBPF programs: it needs the source of `core`, there is no built one for eBPF.
//!
//! The active toolchain, if it has the source or rustup can add it; else the distribution's compiler, which
//! is packaged together with its source, linked as a toolchain of rustup. `srcip-user/build.rs` looks at the
//! same two, in the same order.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Wish};
use crate::shell;

/// What the distribution's compiler is linked as.
pub const LINKED_TOOLCHAIN: &str = "srcip-bpf";

/// Where the distribution installs its compiler.
const DISTRIBUTION_PREFIX: &str = "/usr";
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";
const DISTRIBUTION_CARGO: &str = "/usr/bin/cargo";

/// The toolchain that builds the eBPF programs.
#[derive(Debug, PartialEq, Eq)]
pub struct BpfToolchain {
    /// Its name to rustup; none is the active one, which builds all the rest.
    pub name: Option<String>,
    /// `srcip-user/build.rs` would not choose it by itself, and has to be told.
    pub told: bool,
    /// The major version of its LLVM.
    pub llvm: u32,
}

/// A compiler, as far as it matters here.
#[derive(Debug)]
struct Compiler {
    release: (u32, u32),
    llvm: u32,
    has_core: bool,
}

impl Compiler {
    fn active() -> Result<Self> {
        Self::ask(&["rustc"])
    }

    fn of_toolchain(name: &str) -> Result<Self> {
        Self::ask(&["rustup", "run", name, "rustc"])
    }

    fn ask(rustc: &[&str]) -> Result<Self> {
        let rustc = |arguments: &[&str]| {
            let mut command = Command::new(rustc[0]);
            shell::output(command.current_dir(shell::checkout()).args(&rustc[1..]).args(arguments))
        };
        let about = rustc(&["-vV"])?;
        let release = version_line(&about, "release").context("`rustc -vV` tells no release")?;
        let (llvm, _) = version_line(&about, "LLVM version").context("`rustc -vV` tells no LLVM version")?;
        let sysroot = rustc(&["--print", "sysroot"])?;
        let core = PathBuf::from(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        Ok(Self { release, llvm, has_core: core.is_dir() })
    }

    /// Whether it can build the eBPF programs.
    fn is_fit(&self) -> bool {
        let needed = version(env!("CARGO_PKG_RUST_VERSION")).expect("Cargo.toml has a rust-version");
        self.has_core && self.release >= needed
    }
}

/// Major and minor of a line `NAME: 22.1.2` of `rustc -vV`.
fn version_line(about: &str, name: &str) -> Option<(u32, u32)> {
    about.lines().find_map(|line| version(line.strip_prefix(name)?.strip_prefix(": ")?))
}

fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether the active compiler has the source of `core`.
pub fn active_has_core() -> Result<bool> {
    Ok(Compiler::active()?.has_core)
}

/// Finds the toolchain for the eBPF programs; installs one if there is none.
pub fn ensure() -> Result<BpfToolchain> {
    if let Ok(name) = env::var("SRCIP_BPF_TOOLCHAIN") {
        return named(name);
    }
    match env::var("SRCIP_CORE_SOURCE").as_deref() {
        Err(_) | Ok("") => {}
        Ok("distribution") => {
            let toolchain = distribution()?;
            return Ok(BpfToolchain { told: toolchain.name.is_some(), ..toolchain });
        }
        Ok(other) => bail!("SRCIP_CORE_SOURCE can be `distribution`, not `{other}`"),
    }
    let active = Compiler::active()?;
    if active.has_core {
        return Ok(BpfToolchain { name: None, told: false, llvm: active.llvm });
    }
    // Linked by an earlier run: asking rustup's server again would only take time.
    if let Some(toolchain) = linked() {
        return Ok(toolchain);
    }
    if add_rust_src(&[]) {
        let active = Compiler::active()?;
        if active.has_core {
            return Ok(BpfToolchain { name: None, told: false, llvm: active.llvm });
        }
    }
    distribution()
}

/// The toolchain that the user has named.
fn named(name: String) -> Result<BpfToolchain> {
    let mut compiler = Compiler::of_toolchain(&name)
        .with_context(|| format!("SRCIP_BPF_TOOLCHAIN names the toolchain {name}"))?;
    if !compiler.has_core && add_rust_src(&["--toolchain", &name]) {
        compiler = Compiler::of_toolchain(&name)?;
    }
    if !compiler.is_fit() {
        bail!(
            "the toolchain {name}, named in SRCIP_BPF_TOOLCHAIN, is too old or lacks the source of core: \
             needed are Rust {} and `rustup component add rust-src --toolchain {name}`",
            env!("CARGO_PKG_RUST_VERSION")
        );
    }
    Ok(BpfToolchain { name: Some(name), told: false, llvm: compiler.llvm })
}

fn add_rust_src(toolchain: &[&str]) -> bool {
    if shell::find_program("rustup").is_none() {
        return false;
    }
    shell::note("adding rust-src with rustup: the eBPF programs need core built from source");
    let mut command = Command::new("rustup");
    command.current_dir(shell::checkout()).args(["component", "add", "rust-src"]).args(toolchain);
    match shell::step(&mut command) {
        Ok(()) => true,
        Err(error) => {
            shell::note(&format!("rustup could not: {error:#}"));
            false
        }
    }
}

/// The distribution's compiler, if it is linked already.
fn linked() -> Option<BpfToolchain> {
    let compiler = Compiler::of_toolchain(LINKED_TOOLCHAIN).ok().filter(Compiler::is_fit)?;
    Some(BpfToolchain { name: Some(LINKED_TOOLCHAIN.to_owned()), told: false, llvm: compiler.llvm })
}

/// The distribution's compiler, installed and linked if need be.
fn distribution() -> Result<BpfToolchain> {
    if let Some(toolchain) = linked() {
        return Ok(toolchain);
    }
    let advice = "the source of core is missing: where rustup's server can be reached, \
                  `rustup component add rust-src` adds it";
    let why = "a compiler together with the source of core, for the eBPF programs";
    let packages = ["rustc-web", "cargo-web", "rust-web-src"];
    let has_cargo = shell::is_program(Path::new(DISTRIBUTION_CARGO));
    if !has_cargo || !Compiler::ask(&[DISTRIBUTION_RUSTC]).is_ok_and(|compiler| compiler.is_fit()) {
        apt::install(&packages.map(|package| Wish::new(package, why))).context(advice)?;
    }
    if shell::find_program("rustup").is_none() {
        // Then the distribution's compiler is the only one, and now it has the source.
        let compiler = Compiler::active()?;
        if !compiler.is_fit() {
            bail!("{advice}; this compiler is not the distribution's");
        }
        return Ok(BpfToolchain { name: None, told: false, llvm: compiler.llvm });
    }
    shell::note(&format!("linking {DISTRIBUTION_PREFIX} as rustup's toolchain {LINKED_TOOLCHAIN}"));
    shell::output(Command::new("rustup").args(["toolchain", "link", LINKED_TOOLCHAIN, DISTRIBUTION_PREFIX]))?;
    linked().with_context(|| {
        let needed = env!("CARGO_PKG_RUST_VERSION");
        format!("the distribution's compiler is older than {needed}, or lacks the source of core; {advice}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: &str = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\ncommit-hash: 59807616e\n\
                         host: x86_64-unknown-linux-gnu\nrelease: 1.95.0\nLLVM version: 22.1.2\n";

    #[test]
    fn versions_are_read_from_rustc() {
        assert_eq!(version_line(ABOUT, "release"), Some((1, 95)));
        assert_eq!(version_line(ABOUT, "LLVM version"), Some((22, 1)));
        assert_eq!(version_line("release: 1.97.0-nightly\n", "release"), Some((1, 97)));
        assert_eq!(version_line("rustc 1.95.0\n", "LLVM version"), None);
        assert_eq!(version_line("LLVM version: unknown\n", "LLVM version"), None);
    }

    #[test]
    fn a_compiler_without_source_or_too_old_is_not_fit() {
        let needed = version(env!("CARGO_PKG_RUST_VERSION")).unwrap();
        let compiler = |release, has_core| Compiler { release, llvm: 22, has_core };
        assert!(compiler(needed, true).is_fit());
        assert!(compiler((2, 0), true).is_fit());
        assert!(!compiler(needed, false).is_fit());
        assert!(!compiler((1, 9), true).is_fit(), "1.9 is older than 1.95");
    }
}
