//! Images for the tests' pods, made of programs of this machine and the libraries they need.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use srcip_image::{layout::Image, tree::Tree};

use crate::{process::sh, proxy::envoy, srcip::binary};

/// What holds a pod's namespaces.
pub const PAUSE: &str = "tests.srcip.example/pause:1";
/// The application and its clients: this package's `srcip-peer`.
pub const PEER: &str = "tests.srcip.example/peer:1";
/// Envoy.
pub const ENVOY: &str = "tests.srcip.example/envoy:1";

/// Writes [`PAUSE`], [`PEER`] or [`ENVOY`] into `directory`; returns the archive.
pub fn write(name: &str, directory: &Path) -> Result<PathBuf> {
    let (program, arguments) = match name {
        PAUSE => (binary("srcip-peer"), ["pause"].as_slice()),
        PEER => (binary("srcip-peer"), [].as_slice()),
        ENVOY => (
            envoy().context("no Envoy: `cargo xtask setup` installs it, or name one in SRCIP_ENVOY")?,
            [].as_slice(),
        ),
        other => anyhow::bail!("there is no recipe for the image {other}"),
    };
    let mut tree = Tree::default();
    // Everybody may write there, as on any system.
    tree.directory("tmp", 0o1777);
    tree.copy("program", &program, 0o755);
    for library in libraries(&program)? {
        tree.copy(&library, &library, 0o755);
    }
    let entrypoint = ["/program"].iter().chain(arguments).map(|&word| word.to_owned()).collect();
    let image = Image {
        tree,
        architecture: match std::env::consts::ARCH {
            "aarch64" => "arm64",
            _ => "amd64",
        }
        .to_owned(),
        entrypoint,
        user: "0".to_owned(),
        stop_signal: "SIGTERM".to_owned(),
        labels: BTreeMap::new(),
        compressed: false,
    };
    let short = name.rsplit(['/', ':']).nth(1).unwrap_or(name);
    let path = directory.join(format!("{short}.tar"));
    image.write(name, &path)?;
    Ok(path)
}

/// The image that `cargo xtask test` has built, as `cargo xtask image --debug` does.
pub fn srcip() -> Result<PathBuf> {
    let path = binary("srcip-image.tar");
    ensure!(path.is_file(), "{} is not there; `cargo xtask image --debug` writes it", path.display());
    Ok(path)
}

/// The shared libraries of a program, and what loads them, by their paths.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = sh(&format!("ldd {}", program.display()))?;
    Ok(paths(&text))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f…)`, `/lib64/ld-linux-x86-64.so.2 (0x7f…)`.
fn paths(ldd: &str) -> Vec<PathBuf> {
    let words = ldd.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    words.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_is_known_by_its_path() {
        let text = "\tlinux-vdso.so.1 (0x00007f3d)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f3d)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f3d)\n";
        assert_eq!(paths(text), ["/lib/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from));
    }
}
