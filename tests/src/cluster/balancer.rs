//! A load balancer's stand-in: it asks the nodes' health check ports, and routes a Service's address to the
//! nodes that are well, each connection to one of them.

use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
};

use anyhow::{Context as _, Result};

use super::{Cluster, service::Service, vip};
use crate::{Family, client, host::Host};

/// What a node said of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Health {
    /// The HTTP status; 0 if nobody answered.
    pub status: u16,
    /// The head, in lower case.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Health {
    /// Whether traffic may be sent there.
    pub fn is_well(&self) -> bool {
        self.status == 200
    }
}

/// Asks a health check port from a host.
pub fn ask(from: &Host, to: SocketAddr) -> Health {
    try_ask(from, to).unwrap_or_else(|_| Health { status: 0, head: String::new(), body: String::new() })
}

fn try_ask(from: &Host, to: SocketAddr) -> Result<Health> {
    let mut stream = client::connect(from, to)?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    Ok(Health { status, head: head.to_lowercase(), body: body.to_owned() })
}

/// The numbers of the nodes that say they are well: of a Service under `Local`, those with endpoints; of any
/// other, all of them.
pub fn healthy(cluster: &Cluster, service: &Service) -> Vec<u8> {
    let is_well = |number: &u8| {
        let address = cluster.node(*number).host.socket(Family::V4, service.health_port);
        !service.local || ask(cluster.router(), address).is_well()
    };
    cluster.nodes.iter().map(|node| node.number).filter(is_well).collect()
}

/// Routes the Services' addresses to these nodes from now on.
pub fn route(cluster: &Cluster, nodes: &[u8]) -> Result<()> {
    for family in Family::BOTH {
        let hops: String = nodes
            .iter()
            .map(|number| format!(" nexthop via {}", cluster.node(*number).host.address(family)))
            .collect();
        let (vip, option) = (vip(family), if family == Family::V4 { "" } else { "-6 " });
        // `replace` adds to an IPv6 route instead. Without a route there is an answer, so no client waits.
        let _ = cluster.router().ip(&format!("{option}route del {vip}"));
        if nodes.is_empty() {
            cluster.router().ip(&format!("{option}route add unreachable {vip}"))?;
        } else {
            cluster.router().ip(&format!("{option}route add {vip}{hops}"))?;
        }
    }
    Ok(())
}

/// Asks, and routes to those that are well. Returns their numbers.
pub fn balance(cluster: &Cluster, service: &Service) -> Result<Vec<u8>> {
    let nodes = healthy(cluster, service);
    route(cluster, &nodes)?;
    Ok(nodes)
}
