//! The application, and clients in numbers: processes of their own, from this package's `srcip-peer`.
//!
//! As processes they are in the test's cgroup, where srcip's hooks see them, and have descriptors of
//! their own.

use std::{
    net::{IpAddr, SocketAddr},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result};

use crate::{
    PATIENCE,
    client::Seen,
    host::Host,
    process::{Process, run},
    srcip::binary,
};

/// Tells logs apart.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Where applications listen unless a test says otherwise.
pub const APPLICATION_PORT: u16 = 8000;

/// Starts an HTTP application on `addresses` and waits until it listens.
pub fn application(host: &Host, addresses: &[&str]) -> Result<Process> {
    start(host, "httpbin", addresses)
}

/// The same behind proxies that it believes, as httpbin does: `/ip` says whom they name as the client.
pub fn forwarded(host: &Host, addresses: &[&str]) -> Result<Process> {
    start(host, "forwarded", addresses)
}

/// Starts a TCP application, which greets with the ends of the connection and then echoes.
pub fn echo(host: &Host, addresses: &[&str]) -> Result<Process> {
    start(host, "echo", addresses)
}

fn start(host: &Host, verb: &str, addresses: &[&str]) -> Result<Process> {
    let mut command = host.command(&binary("srcip-peer").display().to_string())?;
    command.arg(verb).args(addresses);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut process = host.start(&format!("{verb}-{number}"), command)?;
    process.wait_until("listens", |process| process.log().contains("listening"))?;
    Ok(process)
}

/// What came of hammering.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hammered {
    /// How many connections there were.
    pub count: usize,
    /// Within which time 99 of 100 of them had been greeted.
    pub p99: Duration,
}

/// Opens connections from `host` to a TCP application as fast as it goes.
pub fn hammer(host: &Host, to: SocketAddr, threads: usize, time: Duration) -> Result<Hammered> {
    let mut command = host.command(&binary("srcip-peer").display().to_string())?;
    command.args(["hammer", &to.to_string(), "--threads", &threads.to_string()]);
    command.args(["--milliseconds", &time.as_millis().to_string()]);
    let text = String::from_utf8(run(&mut command)?.stdout)?;
    let words: Vec<_> = text.split_whitespace().collect();
    let ["opened", count, "p99", p99] = words[..] else { anyhow::bail!("not an outcome: {text:?}") };
    Ok(Hammered { count: count.parse()?, p99: Duration::from_micros(p99.parse()?) })
}

/// Asks the HTTP application at `to` once, from a process on `host`: what a pod does itself, so that
/// srcip's hooks see it.
pub fn ask(host: &Host, from: Option<SocketAddr>, to: SocketAddr) -> Result<Seen> {
    let mut command = host.command(&binary("srcip-peer").display().to_string())?;
    command.args(["ask", &to.to_string()]);
    if let Some(from) = from {
        command.args(["--from", &from.to_string()]);
    }
    let output = run(&mut command)?;
    let text = String::from_utf8(output.stdout)?;
    let words: Vec<_> = text.split_whitespace().collect();
    let [peer, local, proxied] = words[..] else { anyhow::bail!("not an answer: {text:?}") };
    Ok(Seen { peer: peer.parse()?, local: local.parse()?, proxied: proxied.parse()? })
}

/// Clients that hold their connections until dropped.
#[derive(Debug)]
pub struct Holders {
    process: Process,
}

/// What clients are to do.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Where to connect to.
    pub to: SocketAddr,
    /// How many connections.
    pub count: usize,
    /// How many attempts are under way at a time.
    pub at_once: usize,
    /// Local addresses, each in turn; empty for the host's own.
    pub from: Vec<IpAddr>,
    /// The first connection's local port; the next one's is the next.
    pub from_port: Option<u16>,
}

impl Clients {
    /// `count` connections to the TCP application at `to`.
    pub fn new(to: SocketAddr, count: usize, at_once: usize) -> Self {
        Self { to, count, at_once, from: Vec::new(), from_port: None }
    }

    fn start(&self, host: &Host, verb: &str) -> Result<Process> {
        let mut command = host.command(&binary("srcip-peer").display().to_string())?;
        command.args([verb, &self.to.to_string(), "--count", &self.count.to_string()]);
        command.args(["--at-once", &self.at_once.to_string()]);
        for address in &self.from {
            command.args(["--from", &address.to_string()]);
        }
        if let Some(port) = self.from_port {
            command.args(["--from-port", &port.to_string()]);
        }
        command.stdin(Stdio::piped());
        host.start(&format!("{verb}-{}", NUMBER.fetch_add(1, Ordering::Relaxed)), command)
    }

    /// Opens them from `host` and holds them.
    pub fn hold(&self, host: &Host) -> Result<Holders> {
        Ok(Holders { process: self.start(host, "hold")? })
    }

    /// Opens them from `host`, closing each one once the application has greeted it.
    pub fn visit(&self, host: &Host) -> Result<Opened> {
        let mut process = self.start(host, "visit")?;
        process.wait(Duration::from_secs(300))?;
        outcome(&process, "opened ")
    }
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
        outcome(&self.process, "opened ")
    }

    /// Sends something on each connection and expects it back.
    pub fn check(&mut self) -> Result<Opened> {
        self.process.tell("check")?;
        self.process.wait_until("has checked its connections", |p| p.log().contains("checked "))?;
        outcome(&self.process, "checked ")
    }

    /// Closes them all and waits.
    pub fn close(mut self) -> Result<()> {
        self.process.tell("close")?;
        self.process.wait(PATIENCE).map(drop)
    }
}

fn outcome(process: &Process, prefix: &str) -> Result<Opened> {
    let log = process.log();
    let good = log.lines().find_map(|line| line.strip_prefix(prefix));
    let errors = log.lines().filter_map(|line| line.strip_prefix("error: "));
    Ok(Opened {
        good: good.with_context(|| format!("no outcome: {log}"))?.parse()?,
        errors: errors.map(str::to_owned).collect(),
    })
}
