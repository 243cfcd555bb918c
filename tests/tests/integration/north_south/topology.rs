//! A client and nodes on one wire; pods behind the nodes, as a CNI plugin connects them.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use srcip_tests::{Family, host::Host, process::sh, world::World};
use srcip_user::{
    dataplane::record::TcHook,
    northsouth::{
        Changes, Programmer as _,
        dataplane::NorthSouth,
        desired::{
            Desired, Endpoint, EndpointAddress, EndpointState, Frontend, FrontendAddress, NodeAddress, Place,
            Protocol, ReturnPath, ServiceName, ServicePort, TrafficPolicy,
        },
    },
    routing,
};

/// Where clients dial.
pub const PORT: u16 = 80;

/// The address of a load balancer, which nobody has.
pub fn vip(family: Family) -> IpAddr {
    match family {
        Family::V4 => "203.0.113.10".parse().unwrap(),
        Family::V6 => "2001:db8::10".parse().unwrap(),
    }
}

pub struct Node {
    pub host: Host,
    pub pins: PathBuf,
    pub programmer: NorthSouth,
}

pub struct Pod {
    pub host: Host,
    addresses: [IpAddr; 2],
}

pub struct Site {
    pub client: Host,
    pub nodes: Vec<Node>,
    hook: TcHook,
    pods: u8,
    // Last: it removes what the others are made of.
    world: World,
}

impl Site {
    /// The client's way to the VIP is by the first node.
    pub fn new(nodes: usize) -> Self {
        Self::by(TcHook::newest(), nodes)
    }

    /// The same with programs attached by this hook.
    pub fn by(hook: TcHook, nodes: usize) -> Self {
        let mut world = World::new().unwrap();
        let client = world.host("client").unwrap();
        let nodes: Vec<_> = (0..nodes)
            .map(|n| {
                let host = world.host(&format!("node{n}")).unwrap();
                host.sysctl("net.ipv4.ip_forward", "1").unwrap();
                host.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
                // Neighbours are asked from it.
                host.ip(&format!("addr add fe80::{}/64 dev eth0 nodad", n + 1)).unwrap();
                let pins = world.directory().join("bpf").join(format!("node{n}"));
                let programmer = NorthSouth::open(&pins).unwrap().by(hook);
                Node { host, pins, programmer }
            })
            .collect();
        for family in Family::BOTH {
            let (vip, via) = (vip(family), nodes[0].host.address(family));
            client.ip(&format!("route add {vip} via {via}")).unwrap();
        }
        Self { client, nodes, hook, pods: 0, world }
    }

    /// A pod on a node, with an address of each family and a route for each.
    pub fn pod(&mut self, node: usize) -> Pod {
        self.pods += 1;
        let n = self.pods;
        let host = self.world.host(&format!("pod{n}")).unwrap();
        host.ip("link del eth0").unwrap();
        let node = &self.nodes[node].host;
        let (v4, v6) = (format!("10.244.1.{n}"), format!("fd44::{n}"));
        sh(&format!("ip -n {} link add pod{n} type veth peer name eth0 netns {}", node.name(), host.name()))
            .unwrap();
        for (at, line) in [
            (node, format!("link set pod{n} addrgenmode none up")),
            (node, format!("addr add 169.254.1.1/32 dev pod{n}")),
            (node, format!("addr add fe80::1/64 dev pod{n} nodad")),
            (node, format!("route add {v4} dev pod{n}")),
            (node, format!("route add {v6} dev pod{n}")),
            (&host, "link set eth0 addrgenmode none up".to_owned()),
            (&host, format!("addr add {v4}/32 dev eth0")),
            (&host, format!("addr add {v6}/128 dev eth0 nodad")),
            (&host, "addr add fe80::2/64 dev eth0 nodad".to_owned()),
            (&host, "route add 169.254.1.1 dev eth0".to_owned()),
            (&host, "route add default via 169.254.1.1".to_owned()),
            (&host, "route add default via fe80::1 dev eth0".to_owned()),
        ] {
            at.ip(&line).unwrap();
        }
        Pod { host, addresses: [v4.parse().unwrap(), v6.parse().unwrap()] }
    }

    pub fn node_address(&self, node: usize, family: Family) -> NodeAddress {
        NodeAddress(self.nodes[node].host.address(family))
    }

    /// A Service at the VIP, without endpoints yet.
    pub fn service(&self, protocol: Protocol, family: Family) -> ServicePort {
        ServicePort {
            name: ServiceName::new(format!("test/gateway:{protocol:?}-{family:?}")).unwrap(),
            frontends: vec![Frontend {
                address: FrontendAddress(vip(family)),
                port: PORT,
                protocol,
                restricted: true,
            }],
            policy: TrafficPolicy::Cluster,
            affinity: None,
            source_ranges: Vec::new(),
            endpoints: Vec::new(),
            return_path: ReturnPath::Direct,
        }
    }

    /// What is desired on a node that has these Services.
    pub fn desired(&self, node: usize, services: impl IntoIterator<Item = ServicePort>) -> Desired {
        let host = &self.nodes[node].host;
        let devices = host.netns().run(routing::devices).unwrap().unwrap();
        let all = |n: usize| Family::BOTH.map(|family| self.node_address(n, family));
        Desired {
            services: services.into_iter().map(|s| (s.name.clone(), s)).collect::<BTreeMap<_, _>>(),
            nodes: (0..self.nodes.len()).flat_map(all).collect(),
            own: all(node).to_vec(),
            uplinks: devices.into_iter().filter(|device| device.name == "eth0").collect(),
        }
    }

    /// Programs a node with these Services and no others.
    pub fn apply(&mut self, node: usize, services: impl IntoIterator<Item = ServicePort>) -> Changes {
        let desired = self.desired(node, services);
        let Node { host, programmer, .. } = &mut self.nodes[node];
        let changes = host.netns().run(|| programmer.apply(&desired)).unwrap().unwrap();
        assert_eq!(changes.problems, Vec::<String>::new());
        changes
    }

    /// As if the node's agent had been started again.
    pub fn reopen(&mut self, node: usize) {
        self.reopen_by(self.hook, node);
    }

    /// The same with another hook.
    pub fn reopen_by(&mut self, hook: TcHook, node: usize) {
        self.hook = hook;
        let node = &mut self.nodes[node];
        let programmer = node.host.netns().run(|| NorthSouth::open(&node.pins)).unwrap();
        node.programmer = programmer.unwrap().by(hook);
    }

    /// Removes a node's data plane.
    pub fn remove(&self, node: usize) {
        NorthSouth::remove(&self.nodes[node].pins).unwrap();
    }
}

impl Pod {
    pub fn address(&self, family: Family) -> IpAddr {
        self.addresses[usize::from(family == Family::V6)]
    }

    pub fn endpoint(&self, family: Family, place: Place, state: EndpointState) -> Endpoint {
        Endpoint { address: EndpointAddress(self.address(family)), port: 8000, state, place }
    }
}
