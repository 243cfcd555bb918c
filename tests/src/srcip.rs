//! The command under test.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::host::Host;

/// The binary, next to ours: `target/PROFILE/srcip`.
pub fn binary(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    // Test binaries are one directory deeper.
    let directory = own.ancestors().skip(1).find(|path| path.join(name).is_file());
    directory.unwrap_or(Path::new("target/debug")).join(name)
}

/// One instance, by its pin path, on the test's cgroup.
#[derive(Debug, Clone)]
pub struct Srcip {
    pin_path: PathBuf,
    cgroup: PathBuf,
}

impl Srcip {
    pub(crate) fn new(pin_path: PathBuf, cgroup: PathBuf) -> Self {
        Self { pin_path, cgroup }
    }

    /// Where its maps and links are.
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// The command with arguments separated by blanks.
    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(binary("srcip"));
        command.args(arguments.split_whitespace()).arg("--pin-path").arg(&self.pin_path);
        command.env_remove("SRCIP_PIN_PATH");
        command
    }

    /// Runs it, whatever comes of it.
    pub fn output(&self, arguments: &str) -> Result<Output> {
        self.command(arguments).output().context("starting srcip")
    }

    /// Runs it and expects success; returns what it printed on stdout.
    pub fn run(&self, arguments: &str) -> Result<String> {
        let output = self.output(arguments)?;
        if !output.status.success() {
            bail!(
                "srcip {arguments} failed with {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs it and expects failure; returns what it printed on stderr.
    pub fn fail(&self, arguments: &str) -> Result<String> {
        let output = self.output(arguments)?;
        if output.status.success() {
            bail!("srcip {arguments} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// The arguments that attach a pod, on the test's cgroup.
    pub fn attach_arguments(&self, pod: &Host, options: &str) -> String {
        let cgroup = if options.contains("--cgroup") {
            String::new()
        } else {
            format!("--cgroup {}", self.cgroup.display())
        };
        format!("attach --netns {} --proxy-port 15006 {cgroup} {options}", pod.path().display())
    }

    /// Attaches a pod.
    pub fn attach(&self, pod: &Host, options: &str) -> Result<String> {
        self.run(&self.attach_arguments(pod, options))
    }

    /// Detaches a pod.
    pub fn detach(&self, pod: &Host, options: &str) -> Result<String> {
        self.run(&format!("detach --netns {} {options}", pod.path().display()))
    }

    /// Runs `srcip audit` while `traffic` goes on; returns what it printed.
    pub fn audit(&self, options: &str, traffic: impl FnOnce() -> Result<()>) -> Result<String> {
        let arguments = format!("audit --duration 60s --cgroup {} {options}", self.cgroup.display());
        let mut command = self.command(&arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("starting srcip")?;
        let mut stderr = BufReader::new(child.stderr.take().context("a pipe")?);
        let mut line = String::new();
        stderr.read_line(&mut line)?;
        if !line.starts_with("looking on") {
            stderr.read_to_string(&mut line)?;
            child.wait()?;
            bail!("srcip {arguments}: {line}");
        }
        let result = traffic();
        // What has happened by now is told of.
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
        let output = child.wait_with_output()?;
        result?;
        if !output.status.success() {
            bail!("srcip {arguments} failed with {}", output.status);
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The status of a pod's attachment.
    pub fn status(&self, pod: &Host) -> Result<Value> {
        let status: Value = serde_json::from_str(&self.run("status -o json")?)?;
        let path = pod.path();
        status["attachments"]
            .as_array()
            .and_then(|all| all.iter().find(|a| a["netns"].as_str() == path.to_str()))
            .cloned()
            .with_context(|| format!("{} is not in the status: {status}", pod.name()))
    }

    /// One counter of a pod.
    pub fn counter(&self, pod: &Host, name: &str) -> Result<u64> {
        let status = self.status(pod)?;
        status["counters"][name].as_u64().with_context(|| format!("no counter {name}: {status}"))
    }
}
