//! A running `srcip observe`, line by line, and whether its program is there.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    path::Path,
    process::{Child, ExitStatus, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

use crate::{PATIENCE, process::sh, srcip::Srcip, world::World};

/// How many watching programs are attached to a cgroup.
pub fn programs(cgroup: &Path) -> Result<usize> {
    Ok(sh(&format!("bpftool cgroup show {}", cgroup.display()))?.matches("srcip_watch").count())
}

/// Waits until there are that many.
pub fn wait_for_programs(cgroup: &Path, count: usize) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while programs(cgroup)? != count {
        ensure!(Instant::now() < deadline, "{} programs, not {count}", programs(cgroup)?);
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A running `srcip observe -f`. Dropping it ends it.
#[derive(Debug)]
pub struct Observe {
    child: Child,
    lines: Option<Receiver<String>>,
}

impl Observe {
    /// Starts it on the world's cgroup and waits until its program is attached.
    pub fn start(world: &World, srcip: &Srcip, arguments: &str) -> Result<Self> {
        let mut observe = Self::start_unread(world, srcip, arguments)?;
        let stdout = observe.child.stdout.take().context("a pipe")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            // Until it ends, or nobody wants them any more.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        observe.lines = Some(lines);
        Ok(observe)
    }

    /// The same with nobody who reads what it prints.
    pub fn start_unread(world: &World, srcip: &Srcip, arguments: &str) -> Result<Self> {
        let before = programs(world.cgroup())?;
        let mut command =
            srcip.command(&format!("observe -f --cgroup {} {arguments}", world.cgroup().display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().context("starting srcip observe")?;
        let observe = Self { child, lines: None };
        wait_for_programs(world.cgroup(), before + 1)?;
        Ok(observe)
    }

    /// Its next line.
    pub fn line(&self) -> Result<String> {
        let lines = self.lines.as_ref().context("nobody reads")?;
        lines.recv_timeout(PATIENCE).context("no further line")
    }

    /// The next line that is as wanted; others are passed over.
    pub fn find(&self, wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut seen = Vec::new();
        loop {
            let line = self.line().with_context(|| format!("only these: {seen:#?}"))?;
            if wanted(&line) {
                return Ok(line);
            }
            seen.push(line);
        }
    }

    /// The same of JSON.
    pub fn find_json(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let line = self.find(|line| serde_json::from_str(line).is_ok_and(|value| wanted(&value)))?;
        Ok(serde_json::from_str(&line)?)
    }

    /// The lines that are left, after its end.
    pub fn rest(&self) -> Vec<String> {
        self.lines.iter().flat_map(Receiver::iter).collect()
    }

    /// Stops reading, as `head` does.
    pub fn close_pipe(&mut self) {
        drop(self.child.stdout.take());
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// Waits for its end; what it printed on stderr comes with it.
    pub fn wait(&mut self) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() > deadline => bail!("srcip observe does not end"),
                None => thread::sleep(Duration::from_millis(5)),
            }
        };
        let mut said = String::new();
        self.child.stderr.take().context("a pipe")?.read_to_string(&mut said)?;
        Ok((status, said))
    }
}

impl Drop for Observe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
