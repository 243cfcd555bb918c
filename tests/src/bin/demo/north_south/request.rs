//! What the application and the gateway's access log say of one request.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use srcip_tests::{Family, PATIENCE, client};

use super::{Stage, scene::Scheme};
use crate::{
    screen::Screen,
    table::{View, Whose},
    views::parse_address,
};

/// What is known of one request.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The client's address.
    pub client: IpAddr,
    /// What it asked for.
    pub url: String,
    /// The address in the application's answer.
    pub origin: IpAddr,
    /// Whom the gateway had a connection with.
    pub remote: SocketAddr,
    /// Whom the gateway told the application of.
    pub forwarded_for: IpAddr,
    scheme: Scheme,
    /// The answer, as it came.
    answer: String,
    /// The gateway's log's line.
    line: Value,
}

/// Has curl ask for `/ip` at a Service's address, and looks into the gateway's log.
pub fn ask(stage: Stage<'_>, scheme: Scheme, family: Family) -> Result<Seen> {
    let scene = stage.scene;
    let url = scheme.url(family);
    // One request at a time: what comes next is its line.
    let lines = scene.gateway.log().lines().count();
    let answer = client::curl(&scene.cluster.client, &url)?;
    let json: Value =
        serde_json::from_str(&answer).with_context(|| format!("not the application's answer: {answer:?}"))?;
    let origin = json["origin"].as_str().context("no origin in the application's answer")?.parse()?;
    let line = next_line(stage, lines)?;
    let field = |name: &str| line[name].as_str().with_context(|| format!("no {name} in {line}"));
    let remote = parse_address(field("downstream_remote_address")?)?;
    let forwarded_for = field("x_forwarded_for")?.parse::<IpAddr>()?.to_canonical();
    let client = scene.cluster.client.address(family);
    Ok(Seen { client, url, origin, remote, forwarded_for, scheme, answer: answer.trim().to_owned(), line })
}

/// The line after so many lines of the gateway's log, which writes it a little later.
fn next_line(stage: Stage<'_>, lines: usize) -> Result<Value> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        stage.signals.check()?;
        let log = stage.scene.gateway.log();
        // Nothing of a line that is half written.
        let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
        if let Some(line) = whole.lines().nth(lines) {
            return serde_json::from_str(line).with_context(|| format!("not a line of a log: {line:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("no line for the request in the gateway's access log")
}

impl Seen {
    /// Whether everybody saw the client.
    pub fn is_kept(&self) -> bool {
        self.views().iter().all(|view| view.ip == view.expected)
    }

    /// What of it goes into the table.
    pub fn views(&self) -> [View; 3] {
        let family = if self.client.is_ipv4() { "" } else { "IPv6 " };
        let view = |name: &str, shown: String, ip: IpAddr| View {
            name: format!("{family}{} {name}", self.scheme.name().to_uppercase()),
            shown,
            ip,
            expected: self.client,
            whose: Whose::Client,
        };
        [
            view("application's answer", self.origin.to_string(), self.origin),
            view("downstream_remote_address", self.remote.to_string(), self.remote.ip()),
            view("x_forwarded_for", self.forwarded_for.to_string(), self.forwarded_for),
        ]
    }

    /// Shows where that comes from.
    pub fn show(&self, screen: Screen, hiding: IpAddr) -> Result<()> {
        let show = |indent: &str, text: &str| {
            screen.show(format_args!("{indent}{}", screen.highlight(text, self.client, hiding)))
        };
        screen.show(format_args!("  client$ curl {}{}", self.scheme.option(), self.url))?;
        show("    ", &self.answer)?;
        screen.show(format_args!("  the gateway's access log"))?;
        let line = serde_json::to_string_pretty(&self.line)?;
        line.lines().try_for_each(|line| show("    ", line))?;
        Ok(screen.show(format_args!(""))?)
    }
}
