//! Which address and port is whose.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::IpAddr,
};

use crate::northsouth::{
    desired::{Frontend, FrontendAddress, Protocol},
    objects::{
        ObjectName, Problem,
        service::{PortInfo, ServiceInfo},
    },
};

/// An address and port, whoever may come there.
type Key = (FrontendAddress, u16, Protocol);

/// What is taken, in the order of the Services' age.
pub(super) struct Owners<'a> {
    owners: BTreeMap<Key, &'a ObjectName>,
    /// The addresses that NodePorts are on.
    nodes: BTreeSet<IpAddr>,
}

impl<'a> Owners<'a> {
    /// Nothing is taken yet.
    pub(super) fn new(nodes: BTreeSet<IpAddr>) -> Self {
        Self { owners: BTreeMap::new(), nodes }
    }

    /// Takes all addresses of a port that nobody has taken before. Returns them, and what is wrong with the
    /// rest.
    pub(super) fn claim(
        &mut self,
        service: &'a ServiceInfo,
        port: &PortInfo,
    ) -> (Vec<Frontend>, Vec<Problem>) {
        let mut claimed = BTreeMap::<Key, Frontend>::new();
        let mut problems = Vec::new();
        for frontend in wanted(service, port) {
            let key = (frontend.address, frontend.port, frontend.protocol);
            if let Some(same) = claimed.get_mut(&key) {
                // By one of the two names everybody may come there.
                same.restricted &= frontend.restricted;
                continue;
            }
            match self.take(key, &service.name) {
                Ok(()) => drop(claimed.insert(key, frontend)),
                Err(owner) => problems.push(conflict(frontend, owner)),
            }
        }
        (claimed.into_values().collect(), problems)
    }

    fn take(&mut self, key: Key, service: &'a ObjectName) -> Result<(), &'a ObjectName> {
        let (FrontendAddress(address), port, protocol) = key;
        // An external address that is a node's would be found before the NodePort there.
        if self.nodes.contains(&address)
            && let Some(owner) = self.owners.get(&(any_node(address.is_ipv4()), port, protocol))
            && *owner != service
        {
            return Err(owner);
        }
        match self.owners.entry(key) {
            Entry::Vacant(entry) => drop(entry.insert(service)),
            Entry::Occupied(entry) => return Err(entry.get()),
        }
        Ok(())
    }
}

/// All that leads to a port.
fn wanted(service: &ServiceInfo, port: &PortInfo) -> impl Iterator<Item = Frontend> {
    let protocol = port.protocol;
    let at = move |address: FrontendAddress, port: u16, restricted: bool| Frontend {
        address,
        port,
        protocol,
        restricted,
    };
    let is_restricted = !service.source_ranges.is_empty();
    let node_ports = port.node_port.into_iter().flat_map(move |node_port| {
        [true, false].map(|is_ipv4| at(any_node(is_ipv4), node_port.get(), false))
    });
    let number = port.port;
    let external = service.external.iter().map(move |ip| at(FrontendAddress(*ip), number, false));
    let vips = service.load_balancer.iter().map(move |ip| at(FrontendAddress(*ip), number, is_restricted));
    node_ports.chain(external).chain(vips)
}

fn any_node(is_ipv4: bool) -> FrontendAddress {
    if is_ipv4 { FrontendAddress::ANY_NODE_V4 } else { FrontendAddress::ANY_NODE_V6 }
}

fn conflict(frontend: Frontend, owner: &ObjectName) -> Problem {
    let Frontend { address, port, .. } = frontend;
    let place = match address {
        FrontendAddress::ANY_NODE_V4 | FrontendAddress::ANY_NODE_V6 => format!("port {port} of the nodes"),
        FrontendAddress(address) => format!("port {port} of {address}"),
    };
    Problem::new("Conflict", format!("{place} leads to {owner}, which is older; give one of them another"))
}
