//! kube-proxy's rules, as its iptables mode writes them on a node. What srcip is compared with, and what it
//! has to get along with.

use std::{fmt::Write as _, net::SocketAddr};

use anyhow::Result;

use super::{
    Cluster,
    node::{CLUSTER_NETWORK_V4, CLUSTER_NETWORK_V6, Node},
    service::{Endpoint, Service, State},
    vip,
};
use crate::Family;

/// Writes the rules for these Services on all nodes, instead of what was there.
pub fn install(cluster: &Cluster, services: &[&Service]) -> Result<()> {
    cluster.nodes.iter().try_for_each(|node| install_on(node, services))
}

/// The same on one node.
pub fn install_on(node: &Node, services: &[&Service]) -> Result<()> {
    for (family, restore) in [(Family::V4, "iptables-restore"), (Family::V6, "ip6tables-restore")] {
        node.host.feed(restore, &rules(node.number, family, services))?;
    }
    Ok(())
}

/// One family's rules on one node.
fn rules(node: u8, family: Family, services: &[&Service]) -> String {
    let mut filter =
        "*filter\n:KUBE-NODEPORTS - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n\
                      :KUBE-FORWARD - [0:0]\n\
                      -A INPUT -j KUBE-NODEPORTS\n\
                      -A INPUT -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
                      -A FORWARD -j KUBE-FORWARD\n\
                      -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
                      -A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
                      -A OUTPUT -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
                      -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
                      -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
                      -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"
            .to_owned();
    let mut nat = "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n\
                   :KUBE-POSTROUTING - [0:0]\n\
                   -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n\
                   -A POSTROUTING -j KUBE-POSTROUTING\n\
                   -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n\
                   -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
                   -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
                   -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n"
        .to_owned();
    for (number, service) in services.iter().enumerate() {
        add(&mut nat, &mut filter, node, family, service, number);
    }
    // kube-proxy has it last.
    nat.push_str("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\nCOMMIT\n");
    filter.push_str("COMMIT\n");
    filter + &nat
}

/// Writing to a string cannot fail.
macro_rules! rule {
    ($table:expr, $($argument:tt)*) => {
        writeln!($table, $($argument)*).expect("a string takes it")
    };
}

fn add(nat: &mut String, filter: &mut String, node: u8, family: Family, service: &Service, number: usize) {
    let Service { port, node_port, local, .. } = service;
    let (vip, protocol) = (vip(family), service.protocol().to_lowercase());
    let ready = endpoints(service, family, |endpoint| endpoint.state == State::Ready);
    let draining = endpoints(service, family, |endpoint| endpoint.state == State::Draining);
    let all = if ready.is_empty() { &draining } else { &ready };
    let is_here = |(endpoint, _): &&(&Endpoint, SocketAddr)| endpoint.node == node;
    let here = |endpoints: &[(_, _)]| endpoints.iter().filter(is_here).copied().collect::<Vec<_>>();
    let local_ready = here(&ready);
    let here = if local_ready.is_empty() { here(&draining) } else { local_ready };

    if *local {
        rule!(filter, "-A KUBE-NODEPORTS -p tcp --dport {} -j ACCEPT", service.health_port);
    }
    let nobody = if all.is_empty() { Some("REJECT") } else { (*local && here.is_empty()).then_some("DROP") };
    if let Some(verdict) = nobody {
        rule!(filter, "-A KUBE-EXTERNAL-SERVICES -d {vip} -p {protocol} --dport {port} -j {verdict}");
        rule!(
            filter,
            "-A KUBE-EXTERNAL-SERVICES -p {protocol} -m addrtype --dst-type LOCAL --dport {node_port} -j {verdict}"
        );
    }
    if all.is_empty() {
        return;
    }
    let (external, cluster, own) =
        (format!("KUBE-EXT-{number}"), format!("KUBE-SVC-{number}"), format!("KUBE-SVL-{number}"));
    for chain in [&external, &cluster, &own] {
        rule!(nat, ":{chain} - [0:0]");
    }
    rule!(nat, "-A KUBE-SERVICES -d {vip} -p {protocol} --dport {port} -j {external}");
    rule!(nat, "-A KUBE-NODEPORTS -p {protocol} --dport {node_port} -j {external}");
    if *local {
        let pods = if family == Family::V4 { CLUSTER_NETWORK_V4 } else { CLUSTER_NETWORK_V6 };
        rule!(nat, "-A {external} -s {pods} -j {cluster}");
        rule!(nat, "-A {external} -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ");
        rule!(nat, "-A {external} -m addrtype --src-type LOCAL -j {cluster}");
        if !here.is_empty() {
            rule!(nat, "-A {external} -j {own}");
        }
    } else {
        rule!(nat, "-A {external} -j KUBE-MARK-MASQ");
        rule!(nat, "-A {external} -j {cluster}");
    }
    let mut known: Vec<SocketAddr> = Vec::new();
    for (chain, endpoints) in [(&cluster, all), (&own, &here)] {
        for (i, (_, address)) in endpoints.iter().enumerate() {
            let index = known.iter().position(|other| other == address).unwrap_or_else(|| {
                known.push(*address);
                known.len() - 1
            });
            let left = endpoints.len() - i;
            let share = if left > 1 {
                format!("-m statistic --mode random --probability {:.10} ", 1.0 / left as f64)
            } else {
                String::new()
            };
            rule!(nat, "-A {chain} {share}-j KUBE-SEP-{number}-{index}");
        }
    }
    let mut declared = String::new();
    for (index, address) in known.iter().enumerate() {
        let chain = format!("KUBE-SEP-{number}-{index}");
        rule!(declared, ":{chain} - [0:0]");
        rule!(nat, "-A {chain} -s {} -j KUBE-MARK-MASQ", address.ip());
        rule!(nat, "-A {chain} -p {protocol} -j DNAT --to-destination {address}");
    }
    // Chains have to be known before a rule leads to them.
    nat.insert_str("*nat\n".len(), &declared);
}

fn endpoints(
    service: &Service,
    family: Family,
    is: impl Fn(&Endpoint) -> bool,
) -> Vec<(&Endpoint, SocketAddr)> {
    let of_family = |endpoint: &Endpoint| {
        endpoint.addresses.iter().copied().find(|address| address.is_ipv4() == (family == Family::V4))
    };
    let endpoints = service.endpoints.iter().filter(|endpoint| is(endpoint));
    endpoints.filter_map(|endpoint| Some((endpoint, of_family(endpoint)?))).collect()
}
