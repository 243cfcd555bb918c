//! `cargo xtask test`: every test there is. Those of the data plane load eBPF programs, and run as root.

use std::{
    env,
    io::{self, IsTerminal as _, Read as _, Write as _},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    build, image, root,
    setup::{self, Ready, Scope},
    shell,
};

mod failure;
mod report;

use failure::Failure;
use report::{Counts, TestBinary};

/// The module of the integration tests that measure the machine.
const ALONE: &str = "alone::";

/// Which tests to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    All,
    Unit,
    Integration,
}

/// Builds and runs the tests; the last line that is printed sums them up.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let (choice, arguments) = parse(arguments)?;
    let ready = setup::ensure(if choice == Choice::Unit { Scope::Build } else { Scope::Test })?;
    // The integration tests start srcip itself.
    build::build(&ready, false)?;
    if choice != Choice::Unit {
        // Also in a container.
        image::build(&ready, &image::Options::for_tests())?;
    }

    let mut total = Counts::default();
    let (mut failed, mut failures) = (Vec::new(), Vec::new());
    let mut add = |name: String, (counts, reasons): (Counts, Vec<Failure>)| {
        total += counts;
        failures.extend(reasons);
        if counts.failed > 0 && !failed.contains(&name) {
            failed.push(name);
        }
    };
    let (integration, unit): (Vec<_>, Vec<_>) =
        build_tests(&ready, choice)?.into_iter().partition(needs_root);
    if choice != Choice::Integration {
        for binary in &unit {
            let name = source(binary);
            shell::note(&format!("running {name}"));
            add(name, run_tests(&mut Command::new(&binary.executable), Some(binary), &arguments)?);
        }
        shell::note("running the examples in the documentation");
        let mut command = ready.cargo()?;
        command.args(["test", "--workspace", "--exclude", "srcip-ebpf", "--no-fail-fast", "--doc", "--"]);
        add("the examples in the documentation".to_owned(), run_tests(&mut command, None, &arguments)?);
    }
    if choice != Choice::Unit {
        for binary in &integration {
            let name = source(binary);
            shell::note(&format!("running {name} as root"));
            for arguments in passes(&arguments) {
                add(
                    name.clone(),
                    run_tests(&mut root::command(&binary.executable)?, Some(binary), &arguments)?,
                );
            }
        }
    }
    for failure in &failures {
        shell::note(&format!("failed: {failure}"));
    }
    if !failed.is_empty() {
        shell::note(&format!("error: tests failed in {}", failed.join(", ")));
    }
    if total.passed + total.failed == 0 {
        shell::note("error: no test ran");
    }
    println!("{total}");
    Ok(if total.failed == 0 && total.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn source(binary: &TestBinary) -> String {
    let path = binary.source.strip_prefix(shell::checkout()).unwrap_or(&binary.source);
    path.display().to_string()
}

/// Our own options, and what is for the test programs.
fn parse(arguments: &[String]) -> Result<(Choice, Vec<String>)> {
    let mut choice = Choice::All;
    let mut rest = Vec::new();
    let mut arguments = arguments.iter();
    for argument in arguments.by_ref() {
        let chosen = match argument.as_str() {
            "--unit" => Choice::Unit,
            "--integration" => Choice::Integration,
            // Cargo has it between its own arguments and the test program's; ours are told apart anyway.
            "--" => break,
            _ => {
                rest.push(argument.clone());
                continue;
            }
        };
        if choice != Choice::All && choice != chosen {
            bail!("--unit and --integration exclude each other; without either, all tests run");
        }
        choice = chosen;
    }
    rest.extend(arguments.cloned());
    Ok((choice, rest))
}

/// What measures the machine has it for itself: those tests come after all others, one at a time. Whoever names
/// tests gets these, all at once.
fn passes(arguments: &[String]) -> Vec<Vec<String>> {
    if arguments.iter().any(|argument| !argument.starts_with('-')) {
        return vec![arguments.to_vec()];
    }
    let with = |more: &[&str]| {
        arguments.iter().cloned().chain(more.iter().map(|&argument| argument.to_owned())).collect()
    };
    vec![with(&["--skip", ALONE]), with(&["--test-threads=1", ALONE])]
}

/// Test programs see a pipe and would leave out the colours.
fn libtest_arguments(arguments: &[String]) -> Vec<String> {
    let mut arguments = arguments.to_vec();
    let colours = io::stdout().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    if colours && !arguments.iter().any(|argument| argument.starts_with("--color")) {
        arguments.push("--color=always".to_owned());
    }
    arguments
}

/// The tests that make network namespaces and load eBPF programs.
fn needs_root(binary: &TestBinary) -> bool {
    binary.is_integration && binary.package == shell::checkout().join("tests")
}

/// Builds the tests, always with the same set of packages: with another, features would differ and
/// dependencies be built again.
fn build_tests(ready: &Ready, choice: Choice) -> Result<Vec<TestBinary>> {
    let mut command = ready.cargo()?;
    command.args(["test", "--workspace", "--exclude", "srcip-ebpf", "--no-run"]);
    command.arg("--message-format=json-render-diagnostics");
    if choice == Choice::Integration {
        command.args(["--test", "integration"]);
    }
    let output = command.stderr(Stdio::inherit()).output().context("starting cargo")?;
    if !output.status.success() {
        bail!("`{}` failed with {}", shell::describe(&command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(TestBinary::parse).collect())
}

/// Runs tests, passes on what they print, counts them and tells why those that failed did.
fn run_tests(
    command: &mut Command,
    binary: Option<&TestBinary>,
    arguments: &[String],
) -> Result<(Counts, Vec<Failure>)> {
    command.args(libtest_arguments(arguments));
    if let Some(binary) = binary {
        // As cargo would: some tests look for files next to their Cargo.toml.
        command.current_dir(&binary.package).env("CARGO_MANIFEST_DIR", &binary.package);
    }
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting `{}`", shell::describe(command)))?;
    let mut pipe = child.stdout.take().context("the output is piped")?;
    let mut output = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let length = pipe.read(&mut chunk)?;
        if length == 0 {
            break;
        }
        // Not line by line: a test's name is shown while it runs.
        io::stdout().write_all(&chunk[..length])?;
        io::stdout().flush()?;
        output.extend_from_slice(&chunk[..length]);
    }
    let status = child.wait()?;
    let output = String::from_utf8_lossy(&output);
    let counts = Counts::of_run(&output, status.success());
    if !status.success() {
        shell::note(&format!("error: `{}` ended with {status}", shell::describe(command)));
    } else if counts.failed > 0 {
        shell::note(&format!("error: `{}` ended without a result", shell::describe(command)));
    }
    Ok((counts, Failure::all(&output)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<(Choice, String)> {
        let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
        parse(&arguments).map(|(choice, rest)| (choice, rest.join(" ")))
    }

    #[test]
    fn what_measures_the_machine_has_it_for_itself() {
        let passes = |line: &str| {
            let arguments: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            passes(&arguments).into_iter().map(|pass| pass.join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(
            passes("--nocapture"),
            ["--nocapture --skip alone::", "--nocapture --test-threads=1 alone::"]
        );
        assert_eq!(passes("tcp"), ["tcp"]);
    }

    #[test]
    fn our_options_are_told_from_the_test_programs() {
        assert_eq!(parsed("").unwrap(), (Choice::All, String::new()));
        assert_eq!(parsed("tcp --unit --nocapture").unwrap(), (Choice::Unit, "tcp --nocapture".to_owned()));
        assert_eq!(
            parsed("--integration tcp -- --exact --unit").unwrap(),
            (Choice::Integration, "tcp --exact --unit".to_owned())
        );
        assert!(parsed("--unit --integration").is_err());
    }
}
