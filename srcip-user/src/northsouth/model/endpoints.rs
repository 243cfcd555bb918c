//! What stands behind a Service's port, and where.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
    sync::Arc,
};

use super::Here;
use crate::northsouth::{
    desired::{Endpoint, EndpointAddress, EndpointState, NodeAddress, Place, TrafficPolicy},
    objects::{
        Objects, Problem,
        node::NodeInfo,
        service::PortInfo,
        shown,
        slice::{SliceEndpoint, SliceInfo},
    },
};

/// Endpoints of one port of a Service. Of more, the first by address are taken, so that all nodes take the
/// same.
pub(super) const MAX_ENDPOINTS: usize = 1000;

/// Who is where.
pub(super) struct Map<'a> {
    here: &'a Here,
    nodes: &'a BTreeMap<Arc<str>, Arc<NodeInfo>>,
    /// Addresses of nodes: a pod with one of them is on the host's network.
    addresses: BTreeSet<IpAddr>,
}

impl<'a> Map<'a> {
    /// The nodes as the objects have them.
    pub(super) fn new(objects: &'a Objects, here: &'a Here) -> Self {
        let nodes = objects.nodes.values().flat_map(|node| node.addresses());
        let addresses = nodes.chain(here.addresses.iter().copied()).collect();
        Self { here, nodes: &objects.nodes, addresses }
    }

    /// The addresses of all nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().copied()
    }

    /// This node's own addresses, each once; by the first of each family the others know it.
    pub(super) fn own(&self) -> impl Iterator<Item = IpAddr> {
        let mut seen = BTreeSet::new();
        let node = self.nodes.get(&self.here.node);
        let named = node.into_iter().flat_map(|node| node.addresses());
        let all = named.chain(self.here.addresses.iter().copied());
        all.filter(move |address| seen.insert(*address))
    }

    /// Whether a slice says that an endpoint is on this node.
    fn is_here(&self, endpoint: &SliceEndpoint) -> bool {
        endpoint.node.as_deref() == Some(&*self.here.node)
    }

    /// How many pods of this node are ready, whichever ports they have; one with addresses of both families
    /// is one pod.
    pub(super) fn local_ready(&self, slices: &[&SliceInfo]) -> usize {
        let count = |is_ipv4: bool| {
            let endpoints = slices.iter().filter(|slice| !slice.ports.is_empty());
            let endpoints = endpoints.flat_map(|slice| &slice.endpoints);
            let ready = endpoints.filter(|endpoint| endpoint.ready && self.is_here(endpoint));
            let addresses = ready.map(|endpoint| endpoint.address);
            addresses.filter(|address| address.is_ipv4() == is_ipv4).collect::<BTreeSet<_>>().len()
        };
        count(true).max(count(false))
    }

    /// All endpoints of a port that may be of use, and what is wrong with others. Fails if there are some but
    /// none that can be reached: the port is then better left to others than answered by nobody.
    pub(super) fn endpoints(
        &self,
        slices: &[&SliceInfo],
        port: &PortInfo,
        policy: TrafficPolicy,
    ) -> Result<(Vec<Endpoint>, Vec<Problem>), Problem> {
        let mut found = BTreeMap::<(IpAddr, u16), &SliceEndpoint>::new();
        for slice in slices {
            let ports =
                slice.ports.iter().filter(|known| known.protocol == port.protocol && known.name == port.name);
            for (number, endpoint) in ports.flat_map(|port| slice.endpoints.iter().map(|e| (port.port, e))) {
                match found.entry((endpoint.address, number)) {
                    Entry::Vacant(entry) => drop(entry.insert(endpoint)),
                    // Named twice, as while it moves from one slice to another.
                    Entry::Occupied(mut entry) if self.is_here(endpoint) => drop(entry.insert(endpoint)),
                    Entry::Occupied(_) => {}
                }
            }
        }
        let mut endpoints = Vec::new();
        let mut unreachable = Vec::new();
        for ((address, number), endpoint) in found {
            let Some(state) = state(endpoint) else { continue };
            let place = match self.place(endpoint) {
                Ok(place) => place,
                // Nobody asks for it.
                Err(_) if policy == TrafficPolicy::Local && !self.is_here(endpoint) => continue,
                Err(why) => {
                    unreachable.push(format!("{address} {why}"));
                    continue;
                }
            };
            endpoints.push(Endpoint { address: EndpointAddress(address), port: number, state, place });
        }
        let mut problems = problems(&unreachable, endpoints.is_empty(), port)?;
        if endpoints.len() > MAX_ENDPOINTS {
            let note = format!(
                "port {} has {} endpoints; the first {MAX_ENDPOINTS} by address are used",
                port.port,
                endpoints.len()
            );
            problems.push(Problem::new("TooMany", note));
            endpoints.truncate(MAX_ENDPOINTS);
        }
        Ok((endpoints, problems))
    }

    /// Where an endpoint is, or why no packet gets there.
    fn place(&self, endpoint: &SliceEndpoint) -> Result<Place, String> {
        if self.addresses.contains(&endpoint.address) {
            return Err("is a node's own address: pods on the host's network are not handled".to_owned());
        }
        if self.is_here(endpoint) {
            return Ok(Place::Local);
        }
        let Some(name) = endpoint.node.as_deref() else {
            return Err("is on no node, so no node can answer for it".to_owned());
        };
        let family = if endpoint.address.is_ipv4() { "IPv4" } else { "IPv6" };
        let node =
            self.nodes.get(name).ok_or_else(|| format!("is on node {}, which is not known", shown(name)))?;
        let address = node.address(endpoint.address.is_ipv4());
        let address =
            address.ok_or_else(|| format!("is on node {}, which has no {family} address", shown(name)))?;
        Ok(Place::Remote(NodeAddress(address)))
    }
}

/// Whether an endpoint takes connections: ready, or at least serving while it terminates; `None` if neither.
fn state(endpoint: &SliceEndpoint) -> Option<EndpointState> {
    if endpoint.ready {
        Some(EndpointState::Ready)
    } else {
        (endpoint.serving && endpoint.terminating).then_some(EndpointState::ServingTerminating)
    }
}

/// What to say of endpoints that cannot be reached.
fn problems(unreachable: &[String], all: bool, port: &PortInfo) -> Result<Vec<Problem>, Problem> {
    let Some(first) = unreachable.first() else { return Ok(Vec::new()) };
    let more = match unreachable.len() {
        1 => String::new(),
        count => format!(" (and so on, {count} in all)"),
    };
    let number = port.port;
    if all {
        let note = format!("port {number} is left to others: its endpoint {first}{more}");
        return Err(Problem::new("UnreachableEndpoints", note));
    }
    let note = format!("endpoints of port {number} are left out: {first}{more}");
    Ok(vec![Problem::new("UnreachableEndpoints", note)])
}
