//! What three witnesses say of one connection: the application, its socket, the sidecar's access log.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use srcip_tests::{Family, PATIENCE, client, peer::APPLICATION_PORT, proxy::Proxy};

use crate::{Stage, hosts::Hosts, screen::Screen, sidecar::Sidecar};

/// Lists the pod's connections to the application's port. The sidecar's own are among them.
fn ss() -> String {
    format!("ss -Htnp state established sport = :{APPLICATION_PORT}")
}

/// What is known of one connection.
#[derive(Clone, Debug)]
pub struct Views {
    /// The client's end.
    pub client: SocketAddr,
    /// Where the client connected to.
    pub destination: SocketAddr,
    /// The address in the application's answer.
    pub origin: IpAddr,
    /// The other end of the application's socket.
    pub peer: SocketAddr,
    /// The sidecar's access log.
    pub log: AccessLog,
    /// Where all this comes from.
    pub evidence: Evidence,
}

/// What the three printed.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// The answer, as it came.
    answer: String,
    /// The socket, as `ss` prints it.
    socket: String,
    /// The log's line.
    line: Value,
}

/// The addresses in a line of the access log.
#[derive(Clone, Copy, Debug)]
pub struct AccessLog {
    pub downstream_remote: SocketAddr,
    pub downstream_local: SocketAddr,
    pub upstream_local: SocketAddr,
    pub upstream_host: SocketAddr,
}

/// Makes a connection from the client and asks all three while it is open.
pub fn collect(stage: &Stage<'_>, proxy: &Proxy, family: Family) -> Result<Views> {
    let hosts = stage.hosts;
    let destination = hosts.pod.socket(family, APPLICATION_PORT);
    let mut connection =
        client::connect(&hosts.client, destination).context("no connection to the application")?;
    let client = connection.local_addr()?;
    let answer = client::http_get(&mut connection, "/ip").context("no answer from the application")?.body;
    let json: Value = serde_json::from_str(&answer).context("the application's answer")?;
    let origin = json["origin"].as_str().context("no origin in the application's answer")?.parse()?;
    let (socket, peer) = application_socket(hosts, destination)?;
    let (line, log) = access_log_of(stage, proxy, client)?;
    let evidence = Evidence { answer: answer.trim().to_owned(), socket, line };
    Ok(Views { client, destination, origin, peer, log, evidence })
}

/// The application's socket at `destination`, as `ss` shows it in the pod, and its other end.
fn application_socket(hosts: &Hosts, destination: SocketAddr) -> Result<(String, SocketAddr)> {
    let listing = hosts.pod.sh(&ss())?;
    let owner = format!("pid={},", hosts.application.pid());
    for line in listing.lines().filter(|line| line.contains(&owner)) {
        let fields: Vec<_> = line.split_whitespace().collect();
        if let [_, _, local, remote, _] = fields[..]
            && parse_address(local)? == destination
        {
            return Ok((fields[2..].join(" "), parse_address(remote)?));
        }
    }
    bail!("the application has no connection at {destination}:\n{listing}")
}

/// The line that tells of the connection from `client`; proxies write it a little later.
fn access_log_of(stage: &Stage<'_>, proxy: &Proxy, client: SocketAddr) -> Result<(Value, AccessLog)> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        stage.signals.check()?;
        for line in stage.sidecar.access_log(proxy).lines() {
            let Ok(json) = serde_json::from_str::<Value>(line) else { continue };
            let field = |name: &str| {
                let text = json[name].as_str().with_context(|| format!("no {name} in {line}"))?;
                parse_address(text)
            };
            if field("downstream_remote_address").is_ok_and(|remote| remote == client) {
                let log = AccessLog {
                    downstream_remote: field("downstream_remote_address")?,
                    downstream_local: field("downstream_local_address")?,
                    upstream_local: field("upstream_local_address")?,
                    upstream_host: field("upstream_host")?,
                };
                return Ok((json, log));
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("no line for the connection from {client} in the access log of {}", stage.sidecar.name())
}

/// An address and a port: `10.0.0.1:80`, `[fd00::1]:80`, `[::ffff:10.0.0.1]:80`, and HAProxy's `fd00::1:80`.
pub fn parse_address(text: &str) -> Result<SocketAddr> {
    let (ip, port) = text.rsplit_once(':').with_context(|| format!("no port in {text:?}"))?;
    let ip: IpAddr = ip.trim_matches(['[', ']']).parse().with_context(|| text.to_owned())?;
    Ok(SocketAddr::new(ip.to_canonical(), port.parse().with_context(|| text.to_owned())?))
}

impl Views {
    /// Shows where they come from.
    pub fn show(&self, screen: Screen, sidecar: Sidecar) -> Result<()> {
        let show = |indent: &str, text: &str| {
            let text = screen.highlight(text, self.client.ip(), [127, 0, 0, 6].into());
            screen.show(format_args!("{indent}{text}"))
        };
        screen.show(format_args!("  sleep: GET http://{}/ip", self.destination))?;
        show("    ", &self.evidence.answer)?;
        screen.show(format_args!("  httpbin$ {}", ss()))?;
        show("    ", &self.evidence.socket)?;
        screen.show(format_args!("  {}'s access log", sidecar.name()))?;
        let line = serde_json::to_string_pretty(&self.evidence.line)?;
        line.lines().try_for_each(|line| show("    ", line))?;
        Ok(screen.show(format_args!(""))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_every_program_writes_them() {
        let v4 = "10.133.1.1:40000".parse().unwrap();
        for text in ["10.133.1.1:40000", "[::ffff:10.133.1.1]:40000", "::ffff:10.133.1.1:40000"] {
            assert_eq!(parse_address(text).unwrap(), v4, "{text}");
        }
        let v6 = "[fd13:37::1:1]:40000".parse().unwrap();
        for text in ["[fd13:37::1:1]:40000", "fd13:37::1:1:40000"] {
            assert_eq!(parse_address(text).unwrap(), v6, "{text}");
        }
        for text in ["", "-:-", "10.133.1.1"] {
            assert!(parse_address(text).is_err(), "{text:?}");
        }
    }
}
