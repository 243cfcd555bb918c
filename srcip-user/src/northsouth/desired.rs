//! What shall be programmed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use ipnet::IpNet;

use crate::routing::Device;

/// Longer than any `namespace/name:port`: three labels of at most 63 octets.
const MAX_SERVICE_NAME: usize = 191;

/// One port of a Service: `namespace/name:port`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceName(String);

impl ServiceName {
    /// Checks the length, 191 octets at most; the API server has checked the rest.
    pub fn new(text: impl Into<String>) -> Option<Self> {
        let text = text.into();
        ((1..=MAX_SERVICE_NAME).contains(&text.len()) && !text.contains('\0')).then_some(Self(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An address that clients dial.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrontendAddress(pub IpAddr);

impl FrontendAddress {
    /// Every IPv4 address of every node: where a NodePort is.
    pub const ANY_NODE_V4: Self = Self(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    /// Every IPv6 address of every node: where a NodePort is.
    pub const ANY_NODE_V6: Self = Self(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
}

/// An address of a pod.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EndpointAddress(pub IpAddr);

/// An address of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeAddress(pub IpAddr);

/// A protocol with ports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One address and port that clients outside dial.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    /// The address, or [`FrontendAddress::ANY_NODE_V4`] or [`ANY_NODE_V6`](FrontendAddress::ANY_NODE_V6) for a
    /// NodePort.
    pub address: FrontendAddress,
    /// The port, host byte order.
    pub port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// Whether the Service's source ranges hold here. kube-proxy checks them for the addresses of load
    /// balancers alone, not for NodePorts and external IPs.
    pub restricted: bool,
}

/// `externalTrafficPolicy`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrafficPolicy {
    /// All endpoints, on whatever node.
    Cluster,
    /// Only those on this node.
    Local,
}

/// How the answers of an endpoint on another node than the one the client came to reach the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReturnPath {
    /// Straight from the endpoint's node.
    Direct,
    /// Back through the node the client came to, for networks that let only that one use the address.
    Tunnel,
}

/// Whether an endpoint takes connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EndpointState {
    /// It does.
    Ready,
    /// It is on its way out and still does: for new ones only if nobody else can.
    ServingTerminating,
}

/// Where an endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// On this node. Its host-side device is found by the route to it.
    Local,
    /// On another node, which is reached by this address. Of the endpoint's family.
    Remote(NodeAddress),
}

/// A pod's port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The pod's address.
    pub address: EndpointAddress,
    /// The pod's port, host byte order.
    pub port: u16,
    /// Whether it takes connections.
    pub state: EndpointState,
    /// Where it is.
    pub place: Place,
}

/// What stands behind one port of a Service. Frontends and endpoints are of one protocol; a frontend is
/// answered by the endpoints of its own family.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Its name.
    pub name: ServiceName,
    /// Where it is dialled. A frontend belongs to one Service; whose name comes first has it.
    pub frontends: Vec<Frontend>,
    /// `externalTrafficPolicy`.
    pub policy: TrafficPolicy,
    /// `sessionAffinity: ClientIP` with its timeout.
    pub affinity: Option<Duration>,
    /// `loadBalancerSourceRanges`, for the frontends that are restricted; empty: everybody may come.
    pub source_ranges: Vec<IpNet>,
    /// All endpoints that are ready, or serving while they terminate, here and elsewhere.
    pub endpoints: Vec<Endpoint>,
    /// The way of the answers.
    pub return_path: ReturnPath,
}

impl ServicePort {
    /// The endpoints that new connections which enter the cluster on this node may go to: those the policy
    /// allows, ready ones, or else terminating ones that still serve.
    pub fn takes_new(&self) -> impl Fn(&Endpoint) -> bool + use<> {
        let local_only = self.policy == TrafficPolicy::Local;
        takes_new(&self.endpoints, local_only)
    }

    /// The same for connections that another node has sent here: only endpoints on this node.
    pub fn takes_new_here(&self) -> impl Fn(&Endpoint) -> bool + use<> {
        takes_new(&self.endpoints, true)
    }
}

fn takes_new(endpoints: &[Endpoint], local_only: bool) -> impl Fn(&Endpoint) -> bool + use<> {
    let allowed = move |endpoint: &Endpoint| !local_only || endpoint.place == Place::Local;
    let ready = |endpoint: &Endpoint| endpoint.state == EndpointState::Ready;
    let is_v4 = |endpoint: &Endpoint| endpoint.address.0.is_ipv4();
    // Each family by itself: a Service can have ready endpoints in one alone.
    let has_ready = [false, true].map(|v4| {
        endpoints.iter().any(|endpoint| is_v4(endpoint) == v4 && allowed(endpoint) && ready(endpoint))
    });
    move |endpoint| allowed(endpoint) && (ready(endpoint) || !has_ready[usize::from(is_v4(endpoint))])
}

/// All that this node's data plane shall do.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// The Services.
    pub services: BTreeMap<ServiceName, ServicePort>,
    /// The addresses of all nodes, this one's included: NodePorts are there, and the others may send us
    /// encapsulated packets.
    pub nodes: BTreeSet<NodeAddress>,
    /// This node's own addresses. The first of each family is the source of what it encapsulates.
    pub own: Vec<NodeAddress>,
    /// The Ethernet devices by which traffic enters.
    pub uplinks: Vec<Device>,
}
