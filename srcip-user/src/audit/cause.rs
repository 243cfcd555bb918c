//! From what was seen of a connection to why its application does not see the client, or how it does.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Pod, Service};
use serde::Serialize;

use super::{
    cluster::{Cluster, full_name, policy},
    netfilter::{Interception, Mode},
};
use crate::{
    northsouth::select::{Choice, Selection},
    telemetry::{
        join::is_sidecar_source,
        record::{Leg, Record},
        workload::Workload,
    },
};

/// Why an application sees the address it sees. A connection can lose its client at more than one place.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(tag = "cause", rename_all = "kebab-case")]
pub enum Cause {
    /// It sees the client.
    Preserved {
        /// What keeps the address.
        by: Keeper,
    },
    /// The sidecar gets connections by REDIRECT and dials from loopback.
    SidecarRedirect {
        /// The proxy's port.
        proxy_port: u16,
    },
    /// A proxy in the pod dials from loopback; no rules were found that bring it its connections.
    SidecarLoopback,
    /// The connection was steered with the client's address, but the proxy dials from another one.
    ProxyNotTransparent,
    /// A proxy in the pod dials from the pod's own address.
    ProxyOwnAddress,
    /// A node put its own address in place of the client's.
    Snat {
        /// The node.
        node: String,
        /// Services that let traffic in under the policy that does so.
        services: Vec<ServiceName>,
        /// Those of them that ask for srcip's north-south already.
        north_south: Vec<ServiceName>,
    },
    /// The client is the node itself: a kubelet's probe, or a process on the host's network.
    NodeItself {
        /// The node.
        node: String,
    },
    /// A load balancer ended the connection and opened one of its own.
    LoadBalancer {
        /// The Service whose annotations turn PROXY protocol on, if one does.
        proxy_protocol: Option<ServiceName>,
    },
    /// Another pod that takes traffic from outside did.
    Gateway {
        /// That pod.
        pod: String,
    },
}

/// What keeps a client's address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keeper {
    /// Nothing on the way changes it.
    DirectRouting,
    /// A Service with `externalTrafficPolicy: Local`.
    LocalPolicy,
    /// srcip, for a Service that asks for its north-south.
    NorthSouth,
    /// srcip, and a proxy with original source.
    Srcip,
    /// iptables TPROXY, and a proxy with original source.
    Tproxy,
    /// A proxy with original source, however it gets its connections.
    OriginalSource,
}

impl Keeper {
    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::DirectRouting => "direct-routing",
            Self::LocalPolicy => "local-policy",
            Self::NorthSouth => "north-south",
            Self::Srcip => "srcip",
            Self::Tproxy => "tproxy",
            Self::OriginalSource => "original-source",
        }
    }
}

/// A Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct ServiceName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

impl std::fmt::Display for ServiceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl From<&Service> for ServiceName {
    fn from(service: &Service) -> Self {
        Self {
            namespace: service.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
            name: service.metadata.name.clone().unwrap_or_default(),
        }
    }
}

impl Cause {
    /// Its name, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Preserved { .. } => "preserved",
            Self::SidecarRedirect { .. } => "sidecar-redirect",
            Self::SidecarLoopback => "sidecar-loopback",
            Self::ProxyNotTransparent => "proxy-not-transparent",
            Self::ProxyOwnAddress => "proxy-own-address",
            Self::Snat { .. } => "snat",
            Self::NodeItself { .. } => "node-itself",
            Self::LoadBalancer { .. } => "load-balancer",
            Self::Gateway { .. } => "gateway",
        }
    }

    /// Whether whoever is hidden by it cannot be seen from the pod.
    pub fn is_before_the_pod(&self) -> bool {
        matches!(self, Self::Snat { .. } | Self::LoadBalancer { .. } | Self::Gateway { .. })
    }

    /// Whether the pod's own proxy is what hides the client.
    pub fn is_inside_the_pod(&self) -> bool {
        matches!(
            self,
            Self::SidecarRedirect { .. }
                | Self::SidecarLoopback
                | Self::ProxyNotTransparent
                | Self::ProxyOwnAddress
        )
    }

    /// Whether the client's address is lost by it.
    pub fn loses(&self) -> bool {
        !matches!(self, Self::Preserved { .. } | Self::NodeItself { .. })
    }
}

/// What is known around a connection.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The pod, as srcip sees it.
    pub workload: &'a Workload,
    /// The pod, as Kubernetes does, if it is in the manifests.
    pub pod: Option<&'a Pod>,
    /// The rules in its network namespace.
    pub interception: &'a Interception,
    /// The cluster.
    pub cluster: &'a Cluster,
}

/// Tells why an application sees what it sees of one connection. Nothing for a connection that is none of
/// an application's, or of which too little is known.
pub fn causes(record: &Record, around: Surroundings<'_>) -> Vec<Cause> {
    let Some(seen) = record.seen_by_application() else { return Vec::new() };
    let mut causes = Vec::new();
    // First where the connection comes from, as the first hop in the pod sees it.
    let outside =
        record.origin.map(|origin| origin.ip()).or((!is_inside(seen, around.workload)).then_some(seen));
    causes.extend(outside.and_then(|client| before_the_pod(client, around)));
    // Then what happens inside.
    if record.leg != Leg::Direct && record.preserved == Some(false) {
        causes.push(inside_the_pod(seen, around));
    }
    if causes.is_empty() && record.preserved == Some(true) {
        causes.push(Cause::Preserved { by: keeper(record, around) });
    }
    causes
}

fn is_inside(ip: IpAddr, workload: &Workload) -> bool {
    ip.is_loopback() || is_sidecar_source(ip) || workload.addresses.contains(&ip)
}

/// Whether what arrives at the pod is not the client any more.
fn before_the_pod(client: IpAddr, around: Surroundings<'_>) -> Option<Cause> {
    let Surroundings { pod, cluster, .. } = around;
    if let Some(node) = cluster.node(client) {
        let services: Vec<_> =
            cluster.external_services(pod).filter(|service| policy(service) == "Cluster").collect();
        let asking = services.iter().filter(|service| asks_for_north_south(service));
        let north_south = asking.map(|service| ServiceName::from(*service)).collect();
        // Under Local, or without any such Service, nobody puts a node's address there but the node. Whether
        // there is none can be known only of a pod that is known.
        let knows_services = !cluster.services.is_empty();
        return Some(if services.is_empty() && knows_services {
            Cause::NodeItself { node }
        } else {
            let services = services.into_iter().map(ServiceName::from).collect();
            Cause::Snat { node, services, north_south }
        });
    }
    if cluster.is_load_balancer(client) {
        let service = cluster.external_services(pod).find(|service| has_proxy_protocol(service));
        return Some(Cause::LoadBalancer { proxy_protocol: service.map(ServiceName::from) });
    }
    let peer = cluster.pod(|ip| ip == client)?;
    cluster.is_gateway(peer).then(|| Cause::Gateway { pod: full_name(&peer.metadata) })
}

/// By its annotation; what the agents' configuration means is not known here.
fn asks_for_north_south(service: &Service) -> bool {
    Selection::default().choose(&service.metadata) == Choice::Asked
}

/// Cloud providers name it differently, but all name it: `service.beta.kubernetes.io/
/// aws-load-balancer-proxy-protocol`, `load-balancer.hetzner.cloud/uses-proxyprotocol`,
/// `service.beta.kubernetes.io/do-loadbalancer-enable-proxy-protocol`, ….
fn has_proxy_protocol(service: &Service) -> bool {
    service.metadata.annotations.iter().flatten().any(|(key, value)| {
        let key = key.to_ascii_lowercase().replace('-', "");
        key.contains("proxyprotocol") && !matches!(value.as_str(), "" | "false" | "none" | "disabled")
    })
}

fn inside_the_pod(seen: IpAddr, around: Surroundings<'_>) -> Cause {
    let Surroundings { workload, interception, .. } = around;
    if workload.attached || interception.mode == Some(Mode::Tproxy) {
        return Cause::ProxyNotTransparent;
    }
    let loopback = seen.is_loopback() || is_sidecar_source(seen);
    match (interception.mode, interception.proxy_port) {
        (Some(Mode::Redirect), Some(proxy_port)) if loopback => Cause::SidecarRedirect { proxy_port },
        _ if loopback => Cause::SidecarLoopback,
        _ => Cause::ProxyOwnAddress,
    }
}

fn keeper(record: &Record, around: Surroundings<'_>) -> Keeper {
    let Surroundings { workload, pod, interception, cluster } = around;
    if record.leg == Leg::Direct {
        let knows = pod.is_some() || cluster.pods.is_empty();
        let outside = record.origin.is_some_and(|origin| cluster.pod(|ip| ip == origin.ip()).is_none());
        let some = |is: fn(&Service) -> bool| knows && outside && cluster.external_services(pod).any(is);
        return if some(|service| policy(service) == "Local") {
            Keeper::LocalPolicy
        } else if some(asks_for_north_south) {
            Keeper::NorthSouth
        } else {
            Keeper::DirectRouting
        };
    }
    match (workload.attached, interception.mode) {
        (true, _) => Keeper::Srcip,
        (false, Some(Mode::Tproxy)) => Keeper::Tproxy,
        (false, _) => Keeper::OriginalSource,
    }
}
