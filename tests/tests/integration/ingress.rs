//! Traffic from outside the cluster, under both policies: the client's address gets to the pod, whichever node
//! it comes in by, beside kube-proxy's own rules for the same Service.

mod api;
mod audit;
mod changes;
mod explain;
mod gateway;
mod load_balancer;
mod operation;
mod packets;
mod size;
mod upgrade;

use std::net::IpAddr;

use crate::kube_proxy::Inside;

use srcip_tests::{
    Family,
    client::{self, Seen},
    cluster::{Cluster, agent::Agents, balancer, kube_proxy, node::PodNetwork, service::Service},
    host::Host,
    peer::{self, APPLICATION_PORT},
    process::Process,
};

/// A cluster with a Service of some pods, kube-proxy's rules for it, and srcip on every node.
pub struct NorthSouth {
    pub agents: Agents,
    applications: Vec<Process>,
    pub pods: Vec<Host>,
    pub service: Service,
    /// Last, so that it goes last.
    pub cluster: Cluster,
}

impl NorthSouth {
    /// With an HTTP application on each of these nodes, as `change` says.
    pub fn new(network: PodNetwork, nodes: &[u8], change: impl FnOnce(Service) -> Service) -> Self {
        Self::with(network, nodes, change, "")
    }

    /// The same with further options for the agents.
    pub fn with_agents(network: PodNetwork, nodes: &[u8], options: &str) -> Self {
        Self::with(network, nodes, |service| service, options)
    }

    fn with(
        network: PodNetwork,
        nodes: &[u8],
        change: impl FnOnce(Service) -> Service,
        options: &str,
    ) -> Self {
        let mut cluster = Cluster::new(network).unwrap();
        let pods: Vec<_> = (0..)
            .zip(nodes)
            .map(|(number, node)| cluster.pod(*node, &format!("web{number}")).unwrap())
            .collect();
        let applications = pods.iter().map(|pod| peer::application(pod, &["[::]:8000"]).unwrap()).collect();
        let service = nodes
            .iter()
            .zip(&pods)
            .fold(Service::new("web"), |service, (node, pod)| service.endpoint(*node, pod, APPLICATION_PORT));
        let service = change(service);
        kube_proxy::install(&cluster, &[&service]).unwrap();
        let agents = Agents::start(&cluster, &[&service], options).unwrap();
        Self { agents, applications, pods, service, cluster }
    }

    /// Changes the Service, for kube-proxy and for srcip.
    pub fn update(&mut self, change: impl FnOnce(&mut Service)) {
        change(&mut self.service);
        kube_proxy::install(&self.cluster, &[&self.service]).unwrap();
        self.agents.update(&self.cluster, &[&self.service]).unwrap();
    }

    /// Ends the application in a pod.
    pub fn kill(&mut self, pod: usize) {
        self.applications[pod].kill();
    }

    /// Asks at the load balancer's address, by way of one node.
    pub fn ask_by(&self, node: u8, family: Family) -> anyhow::Result<Seen> {
        balancer::route(&self.cluster, &[node]).unwrap();
        client::ask_once(&self.cluster.client, self.service.dialled(family))
    }

    /// No connection comes about by way of this node.
    pub fn assert_refused_by(&self, node: u8) {
        balancer::route(&self.cluster, &[node]).unwrap();
        let to = self.service.dialled(Family::V4);
        client::connect_in_vain(&self.cluster.client, None, to).unwrap();
    }

    /// Asks, and the application saw the client. Returns which pod it was.
    pub fn assert_kept_by(&self, node: u8, family: Family) -> IpAddr {
        let seen = self.ask_by(node, family).unwrap_or_else(|error| {
            panic!("{family:?} by node {node}: {error:#}\n{}", self.agents.log(node))
        });
        assert_eq!(seen.peer.ip(), self.cluster.client.address(family), "{family:?} by node {node}");
        seen.local.ip()
    }
}

#[test]
fn under_cluster_every_node_leads_to_every_pod_with_the_clients_address() {
    for network in PodNetwork::ALL {
        let test = NorthSouth::new(network, &[1, 2], |service| service);
        for family in Family::BOTH {
            for node in 1..=3 {
                let mut seen: Vec<_> = (0..30).map(|_| test.assert_kept_by(node, family)).collect();
                seen.sort();
                seen.dedup();
                let mut pods: Vec<_> = test.pods.iter().map(|pod| pod.address(family)).collect();
                pods.sort();
                assert_eq!(seen, pods, "{network:?} {family:?} by node {node}");
            }
        }
    }
}

#[test]
fn under_local_only_pods_of_the_node_serve() {
    for network in PodNetwork::ALL {
        let test = NorthSouth::new(network, &[1, 2], Service::local);
        for family in Family::BOTH {
            for (node, pod) in [(1, 0), (2, 1)] {
                for _ in 0..5 {
                    assert_eq!(test.assert_kept_by(node, family), test.pods[pod].address(family));
                }
            }
        }
        // A node without a pod leads nowhere.
        test.assert_refused_by(3);
    }
}

#[test]
fn node_ports_keep_the_address_too() {
    let test = NorthSouth::new(PodNetwork::PointToPoint, &[2], |service| service);
    for family in Family::BOTH {
        for node in 1..=3 {
            let to = test.cluster.node(node).host.socket(family, test.service.node_port);
            let seen = client::ask_once(&test.cluster.client, to).unwrap();
            assert_eq!(seen.peer.ip(), test.cluster.client.address(family), "{family:?} by node {node}");
        }
    }
}

/// What begins on a node or in its pods does not come in by an uplink: it is kube-proxy's, hairpins included, and
/// its source is what kube-proxy makes of it. What another node or its pods send to a NodePort does, and keeps its
/// own address.
#[test]
fn what_begins_inside_the_cluster_gets_through_as_without() {
    for network in PodNetwork::ALL {
        let mut test = NorthSouth::new(network, &[1], |service| service);
        balancer::route(&test.cluster, &[1]).unwrap();
        let inside = Inside::new(&mut test.cluster);
        let with = inside.ask(&test.cluster, &test.service, &test.pods[0]);
        let failed: Vec<_> = with.iter().filter(|(_, seen)| seen.is_err()).collect();
        assert!(failed.is_empty(), "{network:?}: {failed:#?}");
        test.update(|service| service.annotated = false);
        let without = inside.ask(&test.cluster, &test.service, &test.pods[0]);
        for ((what, with), (_, without)) in with.iter().zip(&without) {
            if what.contains("node 2") && what.contains("30080") {
                assert_ne!(with, without, "{network:?}: {what}: it was masqueraded");
            } else if !what.contains("a pod of") {
                assert_eq!(with, without, "{network:?}: {what}");
            }
        }
    }
}

/// A Service that does not ask is kube-proxy's, and so is one whose endpoints are on the host's network: they have no
/// device of their own to answer from.
#[test]
fn what_is_not_srcips_goes_on_as_before() {
    let mut test = NorthSouth::new(PodNetwork::Bridge, &[1], |service| service);
    test.update(|service| service.annotated = false);
    for family in Family::BOTH {
        let seen = test.ask_by(2, family).unwrap();
        assert_ne!(seen.peer.ip(), test.cluster.client.address(family), "masqueraded, as kube-proxy does");
    }
    let host = &test.cluster.node(1).host;
    let _application = peer::application(host, &["[::]:9000"]).unwrap();
    let on_host = Service::new("web").endpoint(1, host, 9000);
    kube_proxy::install(&test.cluster, &[&on_host]).unwrap();
    test.agents.update_in_vain(&test.cluster, &[&on_host], "is a node's own address").unwrap();
    for family in Family::BOTH {
        for node in 1..=3 {
            test.ask_by(node, family).unwrap();
        }
    }
}

#[test]
fn source_ranges_hold_for_the_load_balancers_address_on_the_clients_own() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1], |service| Service {
        more: serde_json::json!({"loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8:100::/48"]}),
        ..service
    });
    for family in Family::BOTH {
        for node in 1..=2 {
            test.assert_kept_by(node, family);
        }
    }
    test.update(|service| {
        service.more = serde_json::json!({"loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8:999::/48"]});
    });
    for node in 1..=2 {
        test.assert_refused_by(node);
        // As with kube-proxy, the NodePort is everybody's.
        let to = test.cluster.node(node).host.socket(Family::V4, test.service.node_port);
        client::ask_once(&test.cluster.client, to).unwrap();
    }
}

#[test]
fn a_client_stays_with_its_pod_under_session_affinity() {
    let test = NorthSouth::new(PodNetwork::PointToPoint, &[1, 1, 2, 3], |service| Service {
        more: serde_json::json!({"sessionAffinity": "ClientIP"}),
        ..service
    });
    for family in Family::BOTH {
        let first = test.assert_kept_by(1, family);
        for _ in 0..20 {
            assert_eq!(test.assert_kept_by(1, family), first);
        }
    }
}
