//! Several nodes: a client outside, a router, nodes with uplinks and pod networks of their own.
//!
//! ```text
//!  client ── router ──┬── eth0 node 1 ──┬─ pod
//!  198.51.100.10      │                 └─ pod
//!                     ├── eth0 node 2 ──── pod
//!                     └── eth0 node 3
//! ```
//!
//! - [`node`]: a node, and pods on it as CNI plugins connect them.
//! - [`service`]: a Service, as Kubernetes has it. [`kube_proxy`]: its rules for that.
//! - [`agent`]: srcip on every node.
//! - [`balancer`]: a load balancer's stand-in on the router. [`gateway`]: an ingress gateway.

pub mod agent;
pub mod balancer;
pub mod gateway;
pub mod kube_proxy;
pub mod node;
pub mod service;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::{Family, host::Host, process::sh, world::World};
use node::{Node, PodNetwork};

/// How many nodes there are.
pub const NODES: u8 = 3;

/// A cluster, its client and the router between them.
#[derive(Debug)]
pub struct Cluster {
    /// Outside, beyond the router.
    pub client: Host,
    /// The nodes; the first is number 1.
    pub nodes: Vec<Node>,
    /// The router is the world's own node. Last, so that it goes last.
    pub world: World,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // While the processes still run: the world's own drop comes after theirs.
        if std::thread::panicking() {
            self.world.diagnose();
        }
    }
}

impl Cluster {
    /// Nodes without pods, all with this kind of pod network.
    pub fn new(network: PodNetwork) -> Result<Self> {
        Self::create_in(World::new()?, network)
    }

    /// The same in an empty world.
    pub fn create_in(mut world: World, network: PodNetwork) -> Result<Self> {
        let router = world.node();
        for forwarding in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
            router.sysctl(forwarding, "1")?;
        }
        // Each connection by itself goes to one of several nodes.
        router.sysctl("net.ipv4.fib_multipath_hash_policy", "1")?;
        router.sysctl("net.ipv6.fib_multipath_hash_policy", "1")?;
        // A router tells one host a few errors a second only; a test waits for the first.
        router.sysctl("net.ipv4.icmp_ratelimit", "0")?;
        add_addresses(router, "br0", lan(254), 24, 64)?;
        let client = Self::connect_client(&mut world)?;
        let nodes =
            (1..=NODES).map(|number| Node::create(&mut world, number, network)).collect::<Result<_>>()?;
        let cluster = Self { client, nodes, world };
        cluster.route_pods()?;
        Ok(cluster)
    }

    fn connect_client(world: &mut World) -> Result<Host> {
        let mut client = world.sandbox("client")?;
        let (router, name) = (world.node(), client.name().to_owned());
        sh(&format!("ip -n {} link add ext0 type veth peer name eth0 netns {name}", router.name()))?;
        up(router, "ext0")?;
        up(&client, "eth0")?;
        add_addresses(router, "ext0", outside(1), 24, 64)?;
        add_addresses(&client, "eth0", outside(10), 24, 64)?;
        client.know_addresses(outside(10));
        default_routes(&client, outside(1))?;
        Ok(client)
    }

    /// Every node knows where the others' pods are.
    fn route_pods(&self) -> Result<()> {
        for node in &self.nodes {
            for other in self.nodes.iter().filter(|other| other.number != node.number) {
                let (v4, v6) = lan(other.number);
                node.host.ip(&format!("route add {} via {v4}", node::pod_network_v4(other.number)))?;
                node.host.ip(&format!("-6 route add {} via {v6}", node::pod_network_v6(other.number)))?;
            }
        }
        Ok(())
    }

    /// The router.
    pub fn router(&self) -> &Host {
        self.world.node()
    }

    /// A node by its number, from 1 on.
    pub fn node(&self, number: u8) -> &Node {
        &self.nodes[usize::from(number) - 1]
    }

    /// Starts a pod on a node.
    pub fn pod(&mut self, node: u8, role: &str) -> Result<Host> {
        self.nodes[usize::from(node) - 1].pod(&mut self.world, role)
    }
}

/// The address that a load balancer has for a Service.
pub fn vip(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, 1).into(),
        Family::V6 => "2001:db8:113::1".parse().expect("an address"),
    }
}

/// Addresses of the network that the nodes are on.
fn lan(host: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(172, 18, 0, host), Ipv6Addr::new(0xfd18, 0, 0, 0, 0, 0, 0, host.into()))
}

/// Addresses of the network that the client is on.
fn outside(host: u8) -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(198, 51, 100, host), Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, host.into()))
}

/// Sets a device up, without a link-local address of the kernel's, which would turn up a second later.
fn up(host: &Host, device: &str) -> Result<()> {
    host.ip(&format!("link set {device} addrgenmode none up"))?;
    Ok(())
}

fn add_addresses(host: &Host, device: &str, at: (Ipv4Addr, Ipv6Addr), v4: u8, v6: u8) -> Result<()> {
    host.ip(&format!("addr add {}/{v4} dev {device}", at.0))?;
    host.ip(&format!("-6 addr add {}/{v6} dev {device} nodad", at.1))?;
    // A host that forwards asks for its neighbours with this one.
    host.ip(&format!("-6 addr add fe80::{:x}/64 dev {device} nodad", at.1.segments()[7]))?;
    Ok(())
}

fn default_routes(host: &Host, via: (Ipv4Addr, Ipv6Addr)) -> Result<()> {
    host.ip(&format!("route add default via {}", via.0))?;
    host.ip(&format!("-6 route add default via {}", via.1))?;
    Ok(())
}
