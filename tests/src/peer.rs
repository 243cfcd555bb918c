//! The application, and clients in numbers: processes of their own, from this package's `srcip-peer`.
//!
//! As processes they are in the test's cgroup, where srcip's hooks see them, and have descriptors of
//! their own.

use std::{net::SocketAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result};

use crate::{host::Host, process::Process, srcip::binary};

/// Where applications listen unless a test says otherwise.
pub const APPLICATION_PORT: u16 = 8000;

/// Starts an HTTP application on `addresses` and waits until it listens.
pub fn application(host: &Host, addresses: &[&str]) -> Result<Process> {
    start(host, "httpbin", addresses)
}

/// Starts a TCP application, which greets with the ends of the connection and then echoes.
pub fn echo(host: &Host, addresses: &[&str]) -> Result<Process> {
    start(host, "echo", addresses)
}

fn start(host: &Host, verb: &str, addresses: &[&str]) -> Result<Process> {
    let mut command = host.command(&binary("srcip-peer").display().to_string())?;
    command.arg(verb).args(addresses);
    let mut process = host.start(&format!("{verb}-{}", addresses.join("-").replace(':', ".")), command)?;
    process.wait_until("listens", |process| process.log().contains("listening"))?;
    Ok(process)
}

/// Clients that hold their connections until dropped.
#[derive(Debug)]
pub struct Holders {
    process: Process,
}

/// Opens `count` connections from `host` to the TCP application at `to`, `at_once` at a time, and
/// holds them. From each address of `from` in turn, if any.
pub fn hold(
    host: &Host,
    from: &[std::net::IpAddr],
    to: SocketAddr,
    count: usize,
    at_once: usize,
) -> Result<Holders> {
    let mut command = host.command(&binary("srcip-peer").display().to_string())?;
    command.args(["hold", &to.to_string(), "--count", &count.to_string()]);
    command.args(["--at-once", &at_once.to_string()]);
    for address in from {
        command.args(["--from", &address.to_string()]);
    }
    command.stdin(Stdio::piped());
    let process = host.start(&format!("hold-{to}-{count}"), command)?;
    Ok(Holders { process })
}

/// How opening connections went.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Opened {
    /// Connections that stand, and whose application sees the client's address.
    pub good: usize,
    /// The errors of the others.
    pub errors: Vec<String>,
}

impl Holders {
    /// Waits until all have been tried.
    pub fn opened(&mut self) -> Result<Opened> {
        self.process.wait_until("has opened its connections", |p| p.log().contains("opened "))?;
        self.outcome("opened ")
    }

    /// Sends something on each connection and expects it back.
    pub fn check(&mut self) -> Result<Opened> {
        self.process.tell("check")?;
        self.process.wait_until("has checked its connections", |p| p.log().contains("checked "))?;
        self.outcome("checked ")
    }

    fn outcome(&self, prefix: &str) -> Result<Opened> {
        let log = self.process.log();
        let good = log.lines().find_map(|line| line.strip_prefix(prefix));
        let errors = log.lines().filter_map(|line| line.strip_prefix("error: "));
        Ok(Opened { good: good.context("no outcome")?.parse()?, errors: errors.map(str::to_owned).collect() })
    }

    /// Closes them all and waits.
    pub fn close(mut self) -> Result<()> {
        self.process.tell("close")?;
        self.process.wait(Duration::from_secs(60)).map(drop)
    }
}
