//! `cargo xtask image`: srcip's container image, for `ctr images import`; no container engine takes part.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Result, bail};

use crate::{
    setup::{
        self, Ready, Scope,
        apt::{self, Wish},
    },
    shell,
};

/// The programs in it: `srcip-user`'s.
const PROGRAMS: [&str; 2] = ["srcip", "srcip-cni"];

const USAGE: &str = "\
usage: cargo xtask image [--output FILE] [--tag NAME] [--debug]

Builds srcip without shared libraries, and writes a container image with nothing but its programs and
licences: an OCI image layout in a tar file. Building it needs no container engine and no registry.

  --output FILE  the archive to write [default: target/release/srcip-image.tar]
  --tag NAME     the image's name and tag [default: srcip:VERSION]
  --debug        build without optimisations, as the tests do

Then, on a node:

  ctr --namespace k8s.io images import FILE
";

/// How the image is built.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Without optimisations.
    debug: bool,
    output: PathBuf,
    tag: String,
}

impl Options {
    fn new(debug: bool) -> Self {
        let profile = if debug { "debug" } else { "release" };
        Self {
            debug,
            output: shell::target_dir().join(profile).join("srcip-image.tar"),
            tag: concat!("srcip:", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }

    /// The image that the tests run: beside their programs.
    pub fn for_tests() -> Self {
        Self::new(true)
    }

    fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self::new(arguments.iter().any(|argument| argument == "--debug"));
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match (argument.as_str(), arguments.as_slice().first()) {
                ("--debug", _) => continue,
                ("--output", Some(file)) => options.output = env::current_dir()?.join(file),
                ("--tag", Some(name)) => name.clone_into(&mut options.tag),
                ("--output" | "--tag", None) => bail!("{argument} needs a value\n\n{USAGE}"),
                _ => bail!("there is no option `{argument}`\n\n{USAGE}"),
            }
            arguments.next();
        }
        Ok(options)
    }
}

/// Installs what building takes, builds, and writes the image.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    if arguments.iter().any(|argument| matches!(argument.as_str(), "-h" | "--help")) {
        print!("{USAGE}");
        return Ok(ExitCode::SUCCESS);
    }
    let options = Options::parse(arguments)?;
    build(&setup::ensure(Scope::Build)?, &options)?;
    Ok(ExitCode::SUCCESS)
}

/// Builds srcip and writes the image.
pub fn build(ready: &Ready, options: &Options) -> Result<()> {
    let target = Target::find()?;
    let mut command = ready.cargo()?;
    command.args(["build", "--package", "srcip-user", "--target", &target.name]);
    command.args(PROGRAMS.iter().flat_map(|program| ["--bin", program]));
    if !options.debug {
        command.arg("--release");
    }
    if let Some(flags) = target.flags {
        command.env("RUSTFLAGS", flags);
    }
    shell::run(&mut command)?;

    let profile = if options.debug { "debug" } else { "release" };
    let built = shell::target_dir().join(&target.name).join(profile);
    let mut command = ready.cargo()?;
    command.args(["run", "--quiet", "--package", "srcip-image", "--"]);
    command.arg("--output").arg(&options.output).args(["--tag", &options.tag]);
    command.args(PROGRAMS.iter().map(|program| built.join(program)));
    shell::run(&mut command)
}

/// What to build for.
struct Target {
    name: String,
    /// What the compiler has to be told to link statically.
    flags: Option<&'static str>,
}

impl Target {
    /// The one that links statically by itself, if what it takes is installed or can be; else the usual
    /// one, told to.
    fn find() -> Result<Self> {
        let name = format!("{}-unknown-linux-musl", env::consts::ARCH);
        if let Err(error) = Self::install(&name) {
            let name = format!("{}-unknown-linux-gnu", env::consts::ARCH);
            shell::note(&format!("building for {name} instead: {error:#}"));
            return Ok(Self { name, flags: Some("-C target-feature=+crt-static") });
        }
        Ok(Self { name, flags: None })
    }

    fn install(name: &str) -> Result<()> {
        let sysroot = shell::output(Command::new("rustc").args(["--print", "sysroot"]))?;
        if !Path::new(sysroot.trim()).join("lib/rustlib").join(name).is_dir() {
            shell::note(&format!("adding the target {name} with rustup: the image has no shared libraries"));
            shell::step(Command::new("rustup").args(["target", "add", name]))?;
        }
        let compiler = format!("{}-linux-musl-gcc", env::consts::ARCH);
        if shell::find_program(&compiler).is_none() {
            apt::install(&[Wish::new(
                "musl-tools",
                "the C part of TLS goes into the image without libraries",
            )])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Options> {
        Options::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_not_given_has_a_default() {
        let options = parsed("").unwrap();
        assert!(options.output.ends_with("release/srcip-image.tar") && options.tag.starts_with("srcip:"));
        assert!(parsed("--debug").unwrap().output.ends_with("debug/srcip-image.tar"));
        let options = parsed("--tag registry.example/srcip:1 --output /tmp/it.tar --debug").unwrap();
        let output = PathBuf::from("/tmp/it.tar");
        assert_eq!(options, Options { debug: true, output, tag: "registry.example/srcip:1".to_owned() });
    }

    #[test]
    fn what_is_not_understood_is_named() {
        assert!(parsed("--tag").unwrap_err().to_string().starts_with("--tag needs a value"));
        assert!(parsed("--push").unwrap_err().to_string().starts_with("there is no option `--push`"));
    }
}
