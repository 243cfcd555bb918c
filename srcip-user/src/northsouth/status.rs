//! What is programmed and what has been counted, to be shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde::Serialize;
use srcip_common::northsouth::counter::{Counts, ServiceCounter};

use super::{
    dataplane::read,
    desired::{
        Endpoint, EndpointState, Frontend, FrontendAddress, Place, Protocol, ReturnPath, ServicePort,
        TrafficPolicy,
    },
};
use crate::dataplane::error::Result;

/// All of it, as the kernel has it. The names in JSON are stable.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Status {
    /// The ports of Services, by name.
    pub services: Vec<ServiceStatus>,
    /// What has been counted of all of them.
    pub counters: BTreeMap<&'static str, u64>,
}

impl Status {
    /// Reads it from the instance at `pin_path`; `None` if there is no north-south.
    pub fn read(pin_path: &Path) -> Result<Option<Self>> {
        let (Some(services), Some(counts), Some(counters)) =
            (read::programmed(pin_path)?, read::counts(pin_path)?, read::counters(pin_path)?)
        else {
            return Ok(None);
        };
        let service = |service: &ServicePort| ServiceStatus::new(service, counts.get(&service.name));
        Ok(Some(Self { services: services.iter().map(service).collect(), counters }))
    }
}

/// One port of a Service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ServiceStatus {
    /// `NAMESPACE/NAME:PORT`.
    pub name: String,
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// Where it is dialled: `ADDRESS:PORT`, or `node:PORT`.
    pub frontends: Vec<String>,
    /// `Cluster` or `Local`.
    pub policy: &'static str,
    /// How long a client stays with its endpoint, in seconds.
    pub affinity_seconds: Option<u64>,
    /// Who may use the addresses of the load balancer; empty: everybody.
    pub source_ranges: Vec<String>,
    /// `direct` or `tunnel`.
    pub return_path: &'static str,
    /// What stands behind it.
    pub endpoints: Vec<EndpointStatus>,
    /// What has been counted of it here, since it has been handled; empty if that is not known, as what handles it is
    /// an earlier version, which does not count.
    pub counters: BTreeMap<&'static str, u64>,
}

/// A pod's port behind a Service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct EndpointStatus {
    /// `ADDRESS:PORT`.
    pub address: String,
    /// Whether new connections that come to this node go there.
    pub takes_new: bool,
    /// `ready` or `terminating`.
    pub state: &'static str,
    /// By which node's address it is reached; nothing if it is on this one.
    pub node: Option<String>,
}

impl ServiceStatus {
    fn new(service: &ServicePort, counts: Option<&Counts>) -> Self {
        let takes_new = service.takes_new();
        let protocol = service.frontends.first().map(|frontend| frontend.protocol);
        // A NodePort has an entry for each family.
        let mut seen = BTreeSet::new();
        let frontends = service.frontends.iter().map(frontend);
        let frontends = frontends.filter(|text| seen.insert(text.clone())).collect();
        Self {
            name: service.name.to_string(),
            protocol: if protocol == Some(Protocol::Udp) { "udp" } else { "tcp" },
            frontends,
            policy: match service.policy {
                TrafficPolicy::Cluster => "Cluster",
                TrafficPolicy::Local => "Local",
            },
            affinity_seconds: service.affinity.map(|affinity| affinity.as_secs()),
            source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
            return_path: match service.return_path {
                ReturnPath::Direct => "direct",
                ReturnPath::Tunnel => "tunnel",
            },
            endpoints: service.endpoints.iter().map(|e| EndpointStatus::new(e, takes_new(e))).collect(),
            counters: ServiceCounter::ALL
                .iter()
                .map(|c| c.name())
                .zip(counts.copied().into_iter().flatten())
                .collect(),
        }
    }
}

impl EndpointStatus {
    fn new(endpoint: &Endpoint, takes_new: bool) -> Self {
        Self {
            address: std::net::SocketAddr::new(endpoint.address.0, endpoint.port).to_string(),
            takes_new,
            state: match endpoint.state {
                EndpointState::Ready => "ready",
                EndpointState::ServingTerminating => "terminating",
            },
            node: match endpoint.place {
                Place::Local => None,
                Place::Remote(node) => Some(node.0.to_string()),
            },
        }
    }
}

fn frontend(frontend: &Frontend) -> String {
    let Frontend { address, port, .. } = *frontend;
    match address {
        FrontendAddress::ANY_NODE_V4 | FrontendAddress::ANY_NODE_V6 => format!("node:{port}"),
        FrontendAddress(address) => std::net::SocketAddr::new(address, port).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::northsouth::desired::{EndpointAddress, NodeAddress, ServiceName};

    #[test]
    fn names_in_json_are_stable() {
        let name = ServiceName::new("shop/web:http").unwrap();
        let at = |address, port| Frontend { address, port, protocol: Protocol::Tcp, restricted: false };
        let endpoint = |address: &str, state, place| Endpoint {
            address: EndpointAddress(address.parse().unwrap()),
            port: 8080,
            state,
            place,
        };
        let service = ServicePort {
            name,
            frontends: vec![
                at(FrontendAddress::ANY_NODE_V4, 30080),
                at(FrontendAddress::ANY_NODE_V6, 30080),
                at(FrontendAddress("2001:db8::1".parse().unwrap()), 80),
            ],
            policy: TrafficPolicy::Cluster,
            affinity: Some(Duration::from_secs(60)),
            source_ranges: vec!["10.0.0.0/8".parse().unwrap()],
            endpoints: vec![
                endpoint("10.1.1.1", EndpointState::Ready, Place::Local),
                endpoint(
                    "10.1.2.1",
                    EndpointState::ServingTerminating,
                    Place::Remote(NodeAddress("10.0.0.2".parse().unwrap())),
                ),
            ],
            return_path: ReturnPath::Direct,
        };
        let status = Status {
            services: vec![ServiceStatus::new(&service, Some(&[1, 2, 3, 4, 5, 6, 7, 8]))],
            counters: [("dropped", 3)].into(),
        };
        assert_eq!(
            serde_json::to_value(&status).unwrap(),
            json!({
                "services": [{
                    "name": "shop/web:http", "protocol": "tcp",
                    "frontends": ["node:30080", "[2001:db8::1]:80"],
                    "policy": "Cluster", "affinity_seconds": 60, "source_ranges": ["10.0.0.0/8"],
                    "return_path": "direct",
                    "endpoints": [
                        {"address": "10.1.1.1:8080", "takes_new": true, "state": "ready", "node": null},
                        {"address": "10.1.2.1:8080", "takes_new": false, "state": "terminating", "node": "10.0.0.2"},
                    ],
                    "counters": {
                        "new_flows": 1, "new_flows_handed_on": 2, "new_flows_received": 3,
                        "request_bytes": 4, "reply_bytes": 5,
                        "dropped_no_endpoint": 6, "dropped_source_range": 7, "dropped_collision": 8,
                    },
                }],
                "counters": {"dropped": 3},
            })
        );
    }
}
