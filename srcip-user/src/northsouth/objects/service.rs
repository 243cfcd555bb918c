//! A Service: which addresses and ports lead to it from outside, and on what terms.

use std::{collections::BTreeSet, net::IpAddr, num::NonZeroU16, sync::Arc, time::Duration};

use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Service, ServicePort as PortObject, ServiceSpec};

use super::{ObjectName, Problem, shown, unicast};
use crate::{
    agent::pod::PodUid,
    northsouth::{
        desired::{Protocol, TrafficPolicy},
        select::{Choice, Selection},
    },
};

/// Ports of a Service.
pub const MAX_PORTS: usize = 256;
/// Addresses of a Service: those of its load balancer, or external ones.
pub const MAX_ADDRESSES: usize = 64;
/// Networks that its clients may be in.
pub const MAX_RANGES: usize = 256;

/// How long a client stays with its endpoint unless the Service says otherwise, and the longest it may:
/// `DefaultClientIPServiceAffinitySeconds` and `MaxClientIPServiceAffinitySeconds` in Kubernetes'
/// pkg/apis/core/types.go.
const DEFAULT_AFFINITY: i32 = 10_800;
const MAX_AFFINITY: i32 = 86_400;

/// A Service that can be reached from outside, as far as north-south needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceInfo {
    /// Its name.
    pub name: ObjectName,
    /// Tells it from a later one of its name.
    pub uid: Option<PodUid>,
    /// Since when there is one of that name.
    pub created: Option<Timestamp>,
    /// Whether its traffic is srcip's to handle. What others' Services occupy matters as well.
    pub is_selected: bool,
    /// Its ports.
    pub ports: Vec<PortInfo>,
    /// Addresses that others route to the nodes (`externalIPs`).
    pub external: BTreeSet<IpAddr>,
    /// Addresses of its load balancer, if that leaves them in the packets it passes on (`ipMode: VIP`).
    pub load_balancer: BTreeSet<IpAddr>,
    /// Which endpoints may serve.
    pub policy: TrafficPolicy,
    /// How long a client stays with its endpoint (`sessionAffinity: ClientIP`).
    pub affinity: Option<Duration>,
    /// Who may use the addresses of the load balancer; nobody is named: everybody. As with kube-proxy, the
    /// other addresses are for everybody.
    pub source_ranges: Vec<IpNet>,
    /// Where a load balancer asks whether this node has endpoints of its own (`healthCheckNodePort`).
    pub health_check: Option<NonZeroU16>,
    /// What of it is left to others.
    pub warnings: Vec<Problem>,
}

/// A port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PortInfo {
    /// Its name, by which the slices know it; empty if it has none.
    pub name: Arc<str>,
    /// The protocol.
    pub protocol: Protocol,
    /// The port of external addresses and load balancers.
    pub port: u16,
    /// The port of every node, if it has one.
    pub node_port: Option<NonZeroU16>,
}

impl ServiceInfo {
    /// Takes what matters out of a Service; `Ok(None)` if nothing leads to it from outside, which is a problem
    /// only if it was meant to be handled.
    pub fn from_object(service: &Service, selection: &Selection) -> Result<Option<Self>, Problem> {
        let metadata = &service.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or("default");
        let name = metadata.name.as_deref().unwrap_or_default();
        let name = ObjectName::new(namespace, name)
            .ok_or_else(|| invalid("metadata.name", name, "the name of a Service"))?;
        let choice = selection.choose(metadata);
        let is_selected = match &choice {
            Choice::Asked | Choice::Matched => true,
            Choice::Not => false,
            Choice::Invalid(problem) => return Err(problem.clone()),
        };
        let spec = service.spec.as_ref().filter(|spec| !is_internal(spec));
        let info = spec.map(|spec| Self::read(service, spec, name, is_selected)).transpose();
        match info {
            // What is wrong with others' Services is told by whoever handles them.
            Err(_) if !is_selected => Ok(None),
            Err(problem) => Err(problem),
            Ok(Some(info)) if info.leads_here() => Ok(Some(info)),
            Ok(_) if choice == Choice::Asked => Err(unreachable_from_outside()),
            Ok(_) => Ok(None),
        }
    }

    fn read(
        service: &Service,
        spec: &ServiceSpec,
        name: ObjectName,
        is_selected: bool,
    ) -> Result<Self, Problem> {
        let ports = spec.ports.as_deref().unwrap_or_default();
        at_most("spec.ports", ports.len(), MAX_PORTS)?;
        let mut warnings = Vec::new();
        let mut read = Vec::with_capacity(ports.len());
        for port in ports {
            match protocol(port.protocol.as_deref()) {
                Some(protocol) => read.push(PortInfo::read(port, protocol)?),
                None => warnings.push(Problem::new(
                    "UnsupportedProtocol",
                    format!(
                        "port {} speaks {}; srcip handles TCP and UDP, and leaves this port to others",
                        port.port,
                        shown(port.protocol.as_deref().unwrap_or_default())
                    ),
                )),
            }
        }
        let ingress = service.status.iter().flat_map(|status| status.load_balancer.iter());
        let ingress = ingress.flat_map(|load_balancer| load_balancer.ingress.iter().flatten());
        let vips = ingress.filter(|ingress| matches!(ingress.ip_mode.as_deref(), None | Some("VIP")));
        let vips = vips.filter_map(|ingress| ingress.ip.as_deref()).filter(|ip| !ip.is_empty());
        let external = spec.external_ips.iter().flatten().map(String::as_str);
        let policy = policy(spec)?;
        Ok(Self {
            name,
            uid: service.metadata.uid.as_deref().and_then(PodUid::new),
            created: service.metadata.creation_timestamp.as_ref().map(|time| time.0),
            is_selected,
            ports: read,
            external: addresses("spec.externalIPs", external)?,
            load_balancer: addresses("status.loadBalancer.ingress", vips)?,
            policy,
            affinity: affinity(spec)?,
            source_ranges: source_ranges(spec)?,
            health_check: health_check(spec, policy)?,
            warnings,
        })
    }

    /// Whether anything leads to it from outside.
    fn leads_here(&self) -> bool {
        !self.external.is_empty()
            || !self.load_balancer.is_empty()
            || self.health_check.is_some()
            || self.ports.iter().any(|port| port.node_port.is_some())
    }
}

impl PortInfo {
    fn read(object: &PortObject, protocol: Protocol) -> Result<Self, Problem> {
        let number = |field: &str, number: i32| {
            let valid = u16::try_from(number).ok().and_then(NonZeroU16::new);
            valid.ok_or_else(|| invalid(field, &number.to_string(), "a number from 1 to 65535"))
        };
        let node_port = object.node_port.filter(|port| *port != 0);
        Ok(Self {
            name: object.name.as_deref().unwrap_or_default().into(),
            protocol,
            port: number("port", object.port)?.get(),
            node_port: node_port.map(|port| number("nodePort", port)).transpose()?,
        })
    }
}

/// The protocol of a port; `None` if it is none of srcip's. TCP if it does not say.
pub(super) fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some(_) => None,
    }
}

/// Another name for something, or endpoints that clients find by themselves: nothing to choose.
fn is_internal(spec: &ServiceSpec) -> bool {
    spec.type_.as_deref() == Some("ExternalName") || spec.cluster_ip.as_deref() == Some("None")
}

fn policy(spec: &ServiceSpec) -> Result<TrafficPolicy, Problem> {
    match spec.external_traffic_policy.as_deref() {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(invalid("externalTrafficPolicy", other, "Cluster or Local")),
    }
}

fn affinity(spec: &ServiceSpec) -> Result<Option<Duration>, Problem> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => return Err(invalid("sessionAffinity", other, "None or ClientIP")),
    }
    let config = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| config.timeout_seconds).unwrap_or(DEFAULT_AFFINITY);
    match u64::try_from(seconds) {
        Ok(1..) if seconds <= MAX_AFFINITY => Ok(Some(Duration::from_secs(seconds.unsigned_abs().into()))),
        _ => Err(invalid("timeoutSeconds", &seconds.to_string(), "a number of seconds from 1 to 86400")),
    }
}

fn source_ranges(spec: &ServiceSpec) -> Result<Vec<IpNet>, Problem> {
    let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    at_most("spec.loadBalancerSourceRanges", ranges.len(), MAX_RANGES)?;
    let parse = |text: &String| {
        // The API server lets blanks pass.
        let network = text.trim().parse::<IpNet>();
        let expected = "a network such as 10.0.0.0/8";
        network.map(|net| net.trunc()).map_err(|_| invalid("loadBalancerSourceRanges", text, expected))
    };
    let mut ranges = ranges.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    ranges.sort_unstable();
    ranges.dedup();
    Ok(ranges)
}

/// As `NeedsHealthCheck` in Kubernetes' pkg/api/v1/service/util.go.
fn health_check(spec: &ServiceSpec, policy: TrafficPolicy) -> Result<Option<NonZeroU16>, Problem> {
    if spec.type_.as_deref() != Some("LoadBalancer") || policy != TrafficPolicy::Local {
        return Ok(None);
    }
    let port = spec.health_check_node_port.unwrap_or_default();
    u16::try_from(port)
        .map(NonZeroU16::new)
        .map_err(|_| invalid("healthCheckNodePort", &port.to_string(), "a number from 1 to 65535"))
}

fn addresses<'a>(field: &str, texts: impl Iterator<Item = &'a str>) -> Result<BTreeSet<IpAddr>, Problem> {
    let mut addresses = BTreeSet::new();
    for text in texts {
        let expected = "an address that a packet from another host can have";
        addresses.insert(unicast(text).ok_or_else(|| invalid(field, text, expected))?);
        at_most(field, addresses.len(), MAX_ADDRESSES)?;
    }
    Ok(addresses)
}

fn at_most(field: &str, count: usize, most: usize) -> Result<(), Problem> {
    if count > most {
        let note = format!("{field} has {count} entries; {most} are the most that srcip handles");
        return Err(Problem::new("TooMany", note));
    }
    Ok(())
}

fn invalid(field: &str, value: &str, expected: &str) -> Problem {
    Problem::new("InvalidService", format!("{field} has \"{}\"; expected {expected}", shown(value)))
}

fn unreachable_from_outside() -> Problem {
    Problem::new(
        "NothingFromOutside",
        "it asks for srcip.io/north-south, but has no nodePort, no external address and no load balancer's; make \
         its type NodePort or LoadBalancer",
    )
}

#[cfg(test)]
mod tests;
