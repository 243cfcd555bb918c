//! Writes srcip's image from programs that have been built; `cargo xtask image` builds and calls this.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use srcip_image::srcip;

/// Writes srcip's container image.
#[derive(Parser)]
struct Arguments {
    /// The archive to write.
    #[arg(long)]
    output: PathBuf,
    /// The image's name, with its tag.
    #[arg(long)]
    tag: String,
    /// The programs that go into it, linked statically.
    #[arg(required = true)]
    programs: Vec<PathBuf>,
}

fn main() -> Result<()> {
    let Arguments { output, tag, programs } = Arguments::parse();
    programs.iter().try_for_each(|program| srcip::ensure_static(program))?;
    let image = srcip::image(&programs)?;
    let written = image.write(&tag, &output)?;
    println!(
        "image {} written to {}: linux/{}, {}, {:.1} MiB ({:.1} MiB unpacked)",
        written.name,
        output.display(),
        image.architecture,
        written.digest,
        mebibytes(written.size),
        mebibytes(written.unpacked),
    );
    Ok(())
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
