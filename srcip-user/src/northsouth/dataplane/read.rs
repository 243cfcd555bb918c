//! What is programmed, back in terms of Services: for who wants to show it, without a process that programs.

use std::{collections::BTreeMap, net::IpAddr, path::Path, time::Duration};

use ipnet::IpNet;
use srcip_common::northsouth::{
    self as map, FrontendKey, LOCAL_POLICY, RESTRICTED, TERMINATING, TUNNEL_RETURN, counter::Counts,
    packet::UDP,
};

use super::{maps::Maps, pins, write::Programmed};
use crate::{
    dataplane::error::Result,
    northsouth::desired::{
        Endpoint, EndpointAddress, EndpointState, Frontend, FrontendAddress, NodeAddress, Place, Protocol,
        ReturnPath, ServiceName, ServicePort, TrafficPolicy,
    },
};

/// The ports of Services that the instance at `pin_path` handles, in the order of their names; `None` if there is
/// no north-south there.
pub fn programmed(pin_path: &Path) -> Result<Option<Vec<ServicePort>>> {
    let Some(maps) = open(pin_path)? else { return Ok(None) };
    let mut ports = BTreeMap::<ServiceName, ServicePort>::new();
    for (key, programmed) in maps.read_back()? {
        // One that is being made, or taken away.
        let Some(service) = maps.service(programmed.id)? else { continue };
        let port = ports.entry(key.name.clone()).or_insert_with(|| without_ends(key.name, &service));
        add(port, &programmed);
    }
    Ok(Some(ports.into_values().collect()))
}

/// What the instance at `pin_path` has counted, by reason; `None` if there is no north-south there.
pub fn counters(pin_path: &Path) -> Result<Option<BTreeMap<&'static str, u64>>> {
    open(pin_path)?.map(|maps| maps.counters()).transpose()
}

/// What the instance at `pin_path` has counted of each Service that it handles; `None` if there is no north-south
/// there. Services that an earlier version handles, which does not count them, are missing.
pub fn counts(pin_path: &Path) -> Result<Option<BTreeMap<ServiceName, Counts>>> {
    open(pin_path)?.map(|maps| maps.counts()).transpose()
}

fn open(pin_path: &Path) -> Result<Option<Maps>> {
    let pins = pins(pin_path);
    if !pins.maps().join("NS_LAYOUT").exists() {
        return Ok(None);
    }
    super::maps::check_layout(&pins)?;
    Maps::open(&pins).map(Some)
}

/// What both families have in common.
fn without_ends(name: ServiceName, service: &map::Service) -> ServicePort {
    let is = |flag| service.flags & flag != 0;
    ServicePort {
        name,
        frontends: Vec::new(),
        policy: if is(LOCAL_POLICY) { TrafficPolicy::Local } else { TrafficPolicy::Cluster },
        affinity: (service.affinity_ns != 0).then(|| Duration::from_nanos(service.affinity_ns)),
        source_ranges: Vec::new(),
        endpoints: Vec::new(),
        return_path: if is(TUNNEL_RETURN) { ReturnPath::Tunnel } else { ReturnPath::Direct },
    }
}

fn add(port: &mut ServicePort, programmed: &Programmed) {
    port.frontends.extend(programmed.frontends.iter().map(|(key, flags)| frontend(key, *flags)));
    port.source_ranges.extend(programmed.ranges.iter().filter_map(|&(ip, bits)| range(ip, bits)));
    port.endpoints.extend(programmed.endpoints.values().map(endpoint));
    port.frontends.sort_unstable();
    port.source_ranges.sort_unstable();
    port.endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.port));
}

fn frontend(key: &FrontendKey, flags: u32) -> Frontend {
    Frontend {
        address: FrontendAddress(key.address.into()),
        port: key.port,
        protocol: if key.protocol == UDP { Protocol::Udp } else { Protocol::Tcp },
        restricted: flags & RESTRICTED != 0,
    }
}

/// Of 128 bits, those of an IPv4 network count from 96 on.
pub(super) fn range(ip: IpAddr, bits: u32) -> Option<IpNet> {
    let length = if ip.is_ipv4() { bits.checked_sub(96)? } else { bits };
    IpNet::new(ip, length.try_into().ok()?).ok()
}

fn endpoint(endpoint: &map::Endpoint) -> Endpoint {
    let is_terminating = endpoint.flags & TERMINATING != 0;
    Endpoint {
        address: EndpointAddress(endpoint.address.into()),
        port: endpoint.port,
        state: if is_terminating { EndpointState::ServingTerminating } else { EndpointState::Ready },
        place: if endpoint.node.is_unspecified() {
            Place::Local
        } else {
            Place::Remote(NodeAddress(endpoint.node.into()))
        },
    }
}
