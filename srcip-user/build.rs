//! Builds the eBPF programs and leaves them where `include_bytes_aligned!` finds them.
//!
//! They need `core` built from source for the BPF target. The compiler that builds the rest does it, if
//! it has its `rust-src` component; else a toolchain that `cargo xtask` has linked as `srcip-bpf`.

use std::{env, path::Path, process::Command};

use anyhow::{Context as _, Result, bail};
use aya_build::{Package, Toolchain};

/// What `cargo xtask` links a distribution's compiler as, where rustup's server cannot be reached.
const LINKED_TOOLCHAIN: &str = "srcip-bpf";

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=SRCIP_BPF_TOOLCHAIN");
    let toolchain = toolchain()?;
    // SAFETY: nothing else runs in this process yet.
    unsafe {
        // `-Z build-std` is an unstable option; this lets any compiler take it, for the eBPF crate alone.
        env::set_var("RUSTC_BOOTSTRAP", "1");
        // aya-build shows every line of the inner build as a warning of the outer one.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../srcip-ebpf");
    let root_dir = root.to_str().context("the checkout's path is not UTF-8")?;
    println!("cargo:rerun-if-changed={root_dir}/../srcip-common/src");
    let package = Package { name: "srcip-ebpf", root_dir, ..Default::default() };
    aya_build::build_ebpf([package], Toolchain::Custom(&toolchain))
        .context("building the eBPF programs; `cargo xtask setup` installs what that takes")
}

fn toolchain() -> Result<String> {
    if let Ok(named) = env::var("SRCIP_BPF_TOOLCHAIN") {
        return Ok(named);
    }
    let active = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".to_owned());
    for name in [active.as_str(), LINKED_TOOLCHAIN] {
        if has_core_source(name) {
            return Ok(name.to_owned());
        }
    }
    bail!(
        "no toolchain has core's source: neither {active} nor {LINKED_TOOLCHAIN}. \
         Run `cargo xtask setup`, or `rustup component add rust-src`"
    )
}

fn has_core_source(toolchain: &str) -> bool {
    let mut rustc = Command::new("rustup");
    rustc.args(["run", toolchain, "rustc", "--print", "sysroot"]);
    // Without rustup there is only one compiler, whatever it is called.
    let output = rustc.output().or_else(|_| Command::new("rustc").args(["--print", "sysroot"]).output());
    output.is_ok_and(|output| {
        let sysroot = String::from_utf8_lossy(&output.stdout);
        output.status.success()
            && Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core").is_dir()
    })
}
