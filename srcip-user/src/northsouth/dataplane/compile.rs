//! From Services to what the maps say.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
};

use srcip_common::{
    address::Address,
    northsouth::{
        ENTERED_HERE, Endpoint, FrontendKey, LOCAL_POLICY, RESTRICTED, SENT_HERE, TERMINATING, TUNNEL_RETURN,
        packet::{TCP, UDP},
        takes_new,
    },
};

use crate::northsouth::desired::{
    EndpointState, Place, Protocol, ReturnPath, ServiceName, ServicePort, TrafficPolicy,
};

/// A service as the maps are to have it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Compiled {
    pub(super) affinity_ns: u64,
    pub(super) flags: u32,
    /// With the flags of each.
    pub(super) frontends: HashMap<FrontendKey, u32>,
    /// By address and port.
    pub(super) endpoints: BTreeMap<(IpAddr, u16), Endpoint>,
    /// First addresses, with the bits that count of 128.
    pub(super) ranges: BTreeSet<(IpAddr, u32)>,
}

/// Compiles the Services of one `apply`.
pub(super) struct Compiler<'a, 'b> {
    /// Which Service has a frontend.
    pub(super) taken: &'a mut HashMap<FrontendKey, &'b ServiceName>,
    /// The devices of the endpoints on this node.
    pub(super) places: &'a HashMap<IpAddr, u32>,
    pub(super) problems: Vec<String>,
}

impl<'b> Compiler<'_, 'b> {
    /// The frontends that the Service gets, with their flags: those that no other one has.
    pub(super) fn claim(&mut self, port: &'b ServicePort) -> HashMap<FrontendKey, u32> {
        let mut claimed = HashMap::new();
        for frontend in &port.frontends {
            let protocol = match frontend.protocol {
                Protocol::Tcp => TCP,
                Protocol::Udp => UDP,
            };
            let key = FrontendKey::new(frontend.address.0.into(), frontend.port, protocol);
            let owner = *self.taken.entry(key).or_insert(&port.name);
            if owner == &port.name {
                claimed.insert(key, if frontend.restricted { RESTRICTED } else { 0 });
            } else {
                let (address, number) = (frontend.address.0, frontend.port);
                self.problems.push(format!("{address} port {number} of {} belongs to {owner}", port.name));
            }
        }
        claimed
    }

    /// One family of a Service, `None` if it has no frontend there.
    pub(super) fn compile(
        &mut self,
        port: &ServicePort,
        v4: bool,
        claimed: &HashMap<FrontendKey, u32>,
    ) -> Option<Compiled> {
        let is_of_family = |key: &FrontendKey| key.address.v4_be().is_some() == v4;
        let mut frontends: HashMap<_, _> =
            claimed.iter().filter(|(key, _)| is_of_family(key)).map(|(key, flags)| (*key, *flags)).collect();
        if frontends.is_empty() {
            return None;
        }
        // Without ranges everybody may come, even to a frontend that is restricted.
        if port.source_ranges.is_empty() {
            frontends.values_mut().for_each(|flags| *flags = 0);
        }
        let ranges = port.source_ranges.iter().filter(|net| net.addr().is_ipv4() == v4);
        let bits =
            |net: &ipnet::IpNet| if v4 { 96 + u32::from(net.prefix_len()) } else { net.prefix_len().into() };
        Some(Compiled {
            affinity_ns: port.affinity.map_or(0, |timeout| timeout.as_nanos().try_into().unwrap_or(u64::MAX)),
            flags: flags(port),
            frontends,
            endpoints: self.endpoints(port, v4),
            ranges: ranges.map(|net| (net.network(), bits(net))).collect(),
        })
    }

    fn endpoints(&mut self, port: &ServicePort, v4: bool) -> BTreeMap<(IpAddr, u16), Endpoint> {
        // Where there is no way to an endpoint, others must not be passed over for it.
        let mut reachable = port.clone();
        reachable.endpoints.retain(|endpoint| {
            let ip = endpoint.address.0;
            let problem = match endpoint.place {
                _ if ip.is_ipv4() != v4 => return false,
                Place::Local if !self.places.contains_key(&ip) => {
                    "no device of a pod that has a program leads to it"
                }
                Place::Remote(node) if node.0.is_ipv4() != v4 => "its node's address is of the other family",
                _ => return true,
            };
            self.problems.push(format!("the endpoint {ip} of {} is left out: {problem}", port.name));
            false
        });
        let (new, sent) = (reachable.takes_new(), reachable.takes_new_here());
        let compiled = reachable.endpoints.iter().map(|endpoint| {
            let mut flags = 0;
            if new(endpoint) {
                flags |= takes_new(ENTERED_HERE);
            }
            if sent(endpoint) {
                flags |= takes_new(SENT_HERE);
            }
            if endpoint.state == EndpointState::ServingTerminating {
                flags |= TERMINATING;
            }
            let node = match endpoint.place {
                Place::Local => nobody(v4),
                Place::Remote(node) => node.0.into(),
            };
            let value = Endpoint { address: endpoint.address.0.into(), node, port: endpoint.port, flags };
            ((endpoint.address.0, endpoint.port), value)
        });
        compiled.collect()
    }
}

fn flags(port: &ServicePort) -> u32 {
    let return_path = if port.return_path == ReturnPath::Tunnel { TUNNEL_RETURN } else { 0 };
    let policy = if port.policy == TrafficPolicy::Local { LOCAL_POLICY } else { 0 };
    return_path | policy
}

fn nobody(v4: bool) -> Address {
    if v4 { Address::from_v4_be(0) } else { Address::from_v6_be([0; 4]) }
}
