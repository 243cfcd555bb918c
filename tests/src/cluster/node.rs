//! A node: its uplink, and pods as CNI plugins connect them.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use super::{add_addresses, default_routes, lan, up};
use crate::{host::Host, process::sh, world::World};

/// How pods are connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PodNetwork {
    /// A bridge, as the plugin `bridge` makes it.
    Bridge,
    /// A device of the node for each, with a route to it, as `ptp` and Calico do.
    PointToPoint,
}

impl PodNetwork {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Bridge, Self::PointToPoint];
}

/// A node.
#[derive(Debug)]
pub struct Node {
    /// Its namespace; `eth0` is its uplink.
    pub host: Host,
    /// From 1 on.
    pub number: u8,
    network: PodNetwork,
    pods: u8,
}

impl Node {
    /// Puts a node on the router's bridge.
    pub(super) fn create(world: &mut World, number: u8, network: PodNetwork) -> Result<Self> {
        let mut host = world.sandbox(&format!("node{number}"))?;
        let router = world.node();
        let name = host.name();
        sh(&format!("ip -n {} link add lan{number} type veth peer name eth0 netns {name}", router.name()))?;
        router.ip(&format!("link set lan{number} master br0 addrgenmode none up"))?;
        up(&host, "eth0")?;
        add_addresses(&host, "eth0", lan(number), 24, 64)?;
        host.know_addresses(lan(number));
        default_routes(&host, lan(254))?;
        for forwarding in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            host.sysctl(forwarding, "1")?;
        }
        if network == PodNetwork::Bridge {
            host.ip("link add cni0 type bridge")?;
            up(&host, "cni0")?;
            add_addresses(&host, "cni0", pod_addresses(number, 1), 24, 64)?;
        }
        Ok(Self { host, number, network, pods: 0 })
    }

    /// Its name as Kubernetes has it.
    pub fn name(&self) -> String {
        format!("n{}", self.number)
    }

    /// Starts a pod: a namespace with addresses of the node's own networks.
    pub(super) fn pod(&mut self, world: &mut World, role: &str) -> Result<Host> {
        self.pods += 1;
        let (number, device) = (self.number, format!("veth{}", self.pods));
        let mut pod = world.sandbox(&format!("n{number}-{role}"))?;
        let addresses = pod_addresses(number, 10 + self.pods);
        let gateway = pod_addresses(number, 1);
        let (name, node) = (pod.name().to_owned(), &self.host);
        sh(&format!("ip -n {} link add {device} type veth peer name eth0 netns {name}", node.name()))?;
        up(&pod, "eth0")?;
        pod.know_addresses(addresses);
        match self.network {
            PodNetwork::Bridge => {
                node.ip(&format!("link set {device} master cni0 addrgenmode none up"))?;
                // Of a bridged pod that dials itself by its Service: with br_netfilter the bridge sends it back
                // where it came from. `hairpinMode` in the plugin's configuration.
                node.ip(&format!("link set {device} type bridge_slave hairpin on"))?;
                add_addresses(&pod, "eth0", addresses, 24, 64)?;
                default_routes(&pod, gateway)?;
            }
            PodNetwork::PointToPoint => {
                up(node, &device)?;
                add_addresses(node, &device, gateway, 32, 128)?;
                add_addresses(&pod, "eth0", addresses, 32, 128)?;
                node.ip(&format!("route add {} dev {device}", addresses.0))?;
                node.ip(&format!("-6 route add {} dev {device}", addresses.1))?;
                pod.ip(&format!("route add {} dev eth0", gateway.0))?;
                pod.ip(&format!("-6 route add {} dev eth0", gateway.1))?;
                default_routes(&pod, gateway)?;
            }
        }
        Ok(pod)
    }
}

/// The `i`th addresses of a node's pod networks.
fn pod_addresses(node: u8, i: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(10, 244, node, i), Ipv6Addr::new(0xfd44, 0, 0, node.into(), 0, 0, 0, i.into()))
}

/// A node's pod network.
pub(super) fn pod_network_v4(node: u8) -> String {
    format!("10.244.{node}.0/24")
}

/// The same of the other family.
pub(super) fn pod_network_v6(node: u8) -> String {
    format!("fd44:0:0:{node}::/64")
}

/// All pods' networks, which kube-proxy is told of as `--cluster-cidr`.
pub(super) const CLUSTER_NETWORK_V4: &str = "10.244.0.0/16";
/// The same of the other family.
pub(super) const CLUSTER_NETWORK_V6: &str = "fd44::/32";
