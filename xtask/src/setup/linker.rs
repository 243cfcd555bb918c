//! bpf-linker, which makes one eBPF object of what the compiler leaves as LLVM bitcode.
//!
//! It reads the bitcode with the LLVM it was linked with itself, so that one must be as new as the
//! compiler's.

use std::{env, ops::RangeInclusive, path::PathBuf, process::Command};

use anyhow::{Context as _, Result, bail};

use super::apt::{self, Wish};
use crate::shell;

const NAME: &str = "bpf-linker";
const VERSION: &str = "0.13.0";

/// What this version of bpf-linker can be linked with.
const SUPPORTED: RangeInclusive<u32> = 21..=23;

/// How bpf-linker is going to be installed.
#[derive(Debug)]
pub struct Plan {
    llvm: u32,
    needed: u32,
    prefix: PathBuf,
}

/// What to do to have a bpf-linker for a compiler with this LLVM; nothing if it is there.
pub fn plan(needed: u32) -> Result<Option<Plan>> {
    if is_fit(needed)? {
        return Ok(None);
    }
    let usable = needed.max(*SUPPORTED.start())..=*SUPPORTED.end();
    if usable.is_empty() {
        bail!(
            "the compiler of the eBPF programs has LLVM {needed}, and {NAME} {VERSION} can be linked with \
             {SUPPORTED:?}: name an older toolchain in SRCIP_BPF_TOOLCHAIN"
        );
    }
    if let Some((llvm, prefix)) = installed(usable.clone()) {
        return Ok(Some(Plan { llvm, needed, prefix }));
    }
    let mut llvm = *usable.start();
    if apt::is_here() {
        let mut offered = usable.clone();
        llvm = loop {
            match offered.next() {
                Some(llvm) if apt::offers(&package(llvm))? => break llvm,
                Some(_) => {}
                None => bail!(
                    "{NAME} links the eBPF programs with LLVM {}, which this system's release does not \
                     have: add the LLVM project's own package source for apt, or set LLVM_PREFIX to where \
                     such an LLVM is, or put a {NAME} {VERSION} on PATH (the project offers built ones)",
                    usable.clone().map(|llvm| llvm.to_string()).collect::<Vec<_>>().join(" or "),
                ),
            }
        };
    }
    Ok(Some(Plan { llvm, needed, prefix: prefix_of(llvm) }))
}

fn package(llvm: u32) -> String {
    format!("llvm-{llvm}-dev")
}

fn prefix_of(llvm: u32) -> PathBuf {
    PathBuf::from(format!("/usr/lib/llvm-{llvm}"))
}

/// An LLVM to link with that is there already: the one that the user names, or a package's.
fn installed(usable: RangeInclusive<u32>) -> Option<(u32, PathBuf)> {
    let named = env::var_os("LLVM_PREFIX").map(PathBuf::from);
    let mut prefixes = named.into_iter().chain(usable.clone().map(prefix_of));
    prefixes.find_map(|prefix| {
        let version = shell::output(Command::new(prefix.join("bin/llvm-config")).arg("--version")).ok()?;
        let llvm = version.split('.').next()?.parse().ok()?;
        // A package without the development files has no such link.
        let library = prefix.join("lib/libLLVM.so");
        (usable.contains(&llvm) && library.exists()).then_some((llvm, prefix))
    })
}

impl Plan {
    /// The package it takes, if that is not installed.
    pub fn wish(&self) -> Option<Wish> {
        let why = format!("{NAME} links the eBPF programs with LLVM {}", self.llvm);
        (!self.prefix.join("lib/libLLVM.so").exists()).then(|| Wish::new(package(self.llvm), why))
    }

    /// Builds and installs it.
    pub fn carry_out(&self) -> Result<()> {
        shell::note(&format!(
            "installing {NAME} {VERSION} with cargo, linked with LLVM {}: it links the eBPF programs",
            self.llvm
        ));
        let mut command = shell::cargo();
        command
            .args(["install", NAME, "--version", VERSION, "--locked", "--force"])
            .args(["--no-default-features", "--features", &format!("llvm-{}", self.llvm), "--root"])
            .arg(shell::cargo_home()?)
            .env("LLVM_PREFIX", &self.prefix);
        shell::step(&mut command).with_context(|| {
            format!(
                "a {NAME} {VERSION} from elsewhere will do as well, on PATH (the project offers built ones)"
            )
        })?;
        if !is_fit(self.needed)? {
            bail!("{NAME} was installed, but not as {VERSION} with LLVM {} or later", self.needed);
        }
        Ok(())
    }
}

/// Whether the bpf-linker that builds will find can link what a compiler with this LLVM makes.
fn is_fit(needed: u32) -> Result<bool> {
    let own = shell::cargo_home()?.join("bin").join(NAME);
    let Some(path) = Some(own).filter(|path| shell::is_program(path)).or_else(|| shell::find_program(NAME))
    else {
        return Ok(false);
    };
    // It does not even start if its LLVM has been removed.
    let Ok(version) = shell::output(Command::new(&path).arg("--version")) else {
        return Ok(false);
    };
    let libraries = shell::output(Command::new("ldd").arg(&path)).unwrap_or_default();
    Ok(is_recent(&version) && linked_llvm(&libraries).unwrap_or(*SUPPORTED.end()) >= needed)
}

/// Whether this is the version that is wanted, or a later one.
fn is_recent(printed: &str) -> bool {
    let numbers =
        |text: &str| -> Option<Vec<u32>> { text.split('.').map(|part| part.parse().ok()).collect() };
    let version = printed.trim().strip_prefix(NAME).and_then(|version| numbers(version.trim()));
    version.is_some_and(|version| Some(version) >= numbers(VERSION))
}

/// The LLVM among the shared libraries of a program, as `ldd` lists them. The project's own builds have it
/// inside; theirs is the newest that the version supports.
fn linked_llvm(ldd: &str) -> Option<u32> {
    ldd.lines().find_map(|line| {
        let name = line.trim().strip_prefix("libLLVM")?;
        let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linked_llvm_is_read_from_ldd() {
        let list = |name: &str| {
            format!(
                "\tlinux-vdso.so.1 (0x00007f1d)\n\t{name} => /usr/lib/x (0x00007f1d)\n\tlibc.so.6 => /lib/y\n"
            )
        };
        assert_eq!(linked_llvm(&list("libLLVM.so.22.1")), Some(22));
        assert_eq!(linked_llvm(&list("libLLVM-14.so.1")), Some(14));
        assert_eq!(linked_llvm(&list("libLLVM-22.so")), Some(22));
        assert_eq!(linked_llvm(&list("libz.so.1")), None);
        assert_eq!(linked_llvm("\tstatically linked\n"), None);
    }

    #[test]
    fn an_older_version_is_replaced() {
        assert!(is_recent("bpf-linker 0.13.0\n"));
        assert!(is_recent("bpf-linker 0.13.1\n"));
        assert!(is_recent("bpf-linker 1.0.0\n"));
        assert!(!is_recent("bpf-linker 0.9.15\n"));
        assert!(!is_recent("another 0.13.0\n"));
        assert!(!is_recent(""));
    }
}
