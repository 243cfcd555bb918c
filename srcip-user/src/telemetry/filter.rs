//! Which connections are wanted.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::record::{Leg, Record};

/// All conditions have to hold; one that is empty always does.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Networks of clients: the origin, or the end that connected.
    pub from: Vec<IpNet>,
    /// Networks of destinations.
    pub to: Vec<IpNet>,
    /// Ports of destinations: where the client wanted to go, or where the proxy went.
    pub ports: Vec<u16>,
    /// Pods by name.
    pub workloads: Vec<String>,
    /// Kinds of connections.
    pub legs: Vec<Leg>,
    /// Only connections whose origin does not reach the application.
    pub lost: bool,
    /// Turns all of it round.
    pub not: bool,
}

impl Filter {
    /// Whether a record is wanted.
    pub fn wants(&self, record: &Record) -> bool {
        self.matches(record) != self.not
    }

    fn matches(&self, record: &Record) -> bool {
        let origin = record.origin.map(|a| a.0);
        let remote = record.downstream_remote_address.map(|a| a.0);
        let local = record.downstream_local_address.map(|a| a.0);
        let upstream = record.upstream_local_address.map(|a| a.0);
        let host = record.upstream_host.map(|a| a.0);
        within(&self.from, &[origin, remote, upstream])
            && within(&self.to, &[local, host])
            && any(&self.ports, |port| [local, host].iter().flatten().any(|to| to.port() == *port))
            && any(&self.workloads, |name| **name == *record.workload)
            && any(&self.legs, |leg| *leg == record.leg)
            && (!self.lost || record.preserved == Some(false))
    }
}

fn any<T>(conditions: &[T], holds: impl Fn(&T) -> bool) -> bool {
    conditions.is_empty() || conditions.iter().any(holds)
}

fn within(networks: &[IpNet], addresses: &[Option<SocketAddr>]) -> bool {
    any(networks, |network| addresses.iter().flatten().any(|address| network.contains(&address.ip())))
}

/// A network, or an address that stands for itself.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let address = text.parse::<IpAddr>().map(IpNet::from);
    address.or_else(|_| text.parse::<IpNet>()).map_err(|_| {
        format!("{text:?} is neither an address nor a network: expected 10.0.0.1, 10.0.0.0/8 or fd00::/8")
    })
}
