//! What srcip's image is made of: its programs, its licences, and nothing else.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use object::read::elf::{ElfFile64, ProgramHeader as _};

use crate::{layout::Image, tree::Tree};

const LICENCES: [(&str, &str); 3] = [
    ("LICENSE-APACHE", include_str!("../../../LICENSE-APACHE")),
    ("LICENSE-GPL2", include_str!("../../../LICENSE-GPL2")),
    ("LICENSE-MIT", include_str!("../../../LICENSE-MIT")),
];

/// The image with these programs in its root, of which `srcip` is what a container starts. The processor
/// is theirs.
pub fn image(programs: &[PathBuf]) -> Result<Image> {
    let mut tree = Tree::default();
    for (name, text) in LICENCES {
        tree.bytes(Path::new("licenses").join(name), text, 0o644);
    }
    for program in programs {
        let name = program.file_name().with_context(|| format!("{} names no file", program.display()))?;
        tree.copy(name, program, 0o755);
    }
    let labels = [
        ("title", "srcip"),
        ("description", "Keeps the client's IP address visible to applications in a service mesh"),
        ("version", env!("CARGO_PKG_VERSION")),
        ("licenses", "(MIT OR Apache-2.0) AND (MIT OR GPL-2.0-only)"),
    ];
    Ok(Image {
        tree,
        architecture: architecture(programs.first().context("an image without programs")?)?.to_owned(),
        entrypoint: vec!["/srcip".to_owned()],
        // The programs need capabilities, which a runtime gives to root alone.
        user: "0".to_owned(),
        stop_signal: "SIGTERM".to_owned(),
        labels: labels.map(|(k, v)| (format!("org.opencontainers.image.{k}"), v.to_owned())).into(),
        compressed: true,
    })
}

/// Fails for a program that does not run by itself: nothing in the image would load its libraries.
pub fn ensure_static(program: &Path) -> Result<()> {
    let data = std::fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    let elf = parse(program, &data)?;
    let has_interpreter =
        elf.elf_program_headers().iter().any(|h| h.p_type(elf.endian()) == object::elf::PT_INTERP);
    ensure!(
        !has_interpreter,
        "{} needs shared libraries, and the image has none: build it for a target that links statically, \
         as `cargo xtask image` does",
        program.display()
    );
    Ok(())
}

/// The processor a program is for, by Go's name.
fn architecture(program: &Path) -> Result<&'static str> {
    let data = std::fs::read(program).with_context(|| format!("reading {}", program.display()))?;
    match object::Object::architecture(&parse(program, &data)?) {
        object::Architecture::X86_64 => Ok("amd64"),
        object::Architecture::Aarch64 => Ok("arm64"),
        other => anyhow::bail!("{} is for {other:?}; srcip runs on amd64 and arm64", program.display()),
    }
}

fn parse<'data>(program: &Path, data: &'data [u8]) -> Result<ElfFile64<'data>> {
    ElfFile64::parse(data).with_context(|| format!("{} is no 64-bit program for Linux", program.display()))
}
