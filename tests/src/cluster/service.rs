//! A Service and what stands behind it, as Kubernetes has them.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Cluster, vip};
use crate::{Family, host::Host};

/// A Service of type LoadBalancer with one port, in namespace `shop`.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Its port at the load balancer's addresses.
    pub port: u16,
    /// Its port on every node.
    pub node_port: u16,
    /// Its port's protocol is UDP, not TCP.
    pub udp: bool,
    /// `externalTrafficPolicy: Local`.
    pub local: bool,
    /// Where a load balancer asks, under `Local`.
    pub health_port: u16,
    /// Whether it asks for srcip.
    pub annotated: bool,
    /// What stands behind it.
    pub endpoints: Vec<Endpoint>,
    /// Further fields of its `spec`.
    pub more: Value,
}

/// A pod behind a Service.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// The number of its node.
    pub node: u8,
    /// Its addresses, with the port.
    pub addresses: Vec<SocketAddr>,
    /// How it is.
    pub state: State,
}

/// How an endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    /// It serves.
    Ready,
    /// It serves, and is about to end.
    Draining,
    /// It does not serve.
    Down,
}

impl Service {
    /// A Service for port 80, NodePort 30080, under `Cluster`, that asks for srcip and has no endpoints yet.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            port: 80,
            node_port: 30080,
            udp: false,
            local: false,
            health_port: 31080,
            annotated: true,
            endpoints: Vec::new(),
            more: json!({}),
        }
    }

    /// The same under `Local`.
    #[must_use]
    pub fn local(mut self) -> Self {
        self.local = true;
        self
    }

    /// The same for UDP.
    #[must_use]
    pub fn udp(mut self) -> Self {
        self.udp = true;
        self
    }

    /// With other ports.
    #[must_use]
    pub fn ports(mut self, port: u16, node_port: u16, health_port: u16) -> Self {
        (self.port, self.node_port, self.health_port) = (port, node_port, health_port);
        self
    }

    /// With a pod on a node behind it, ready on a port.
    #[must_use]
    pub fn endpoint(mut self, node: u8, pod: &Host, port: u16) -> Self {
        let addresses = Family::BOTH.map(|family| pod.socket(family, port)).to_vec();
        self.endpoints.push(Endpoint { node, addresses, state: State::Ready });
        self
    }

    /// Where clients dial it.
    pub fn dialled(&self, family: Family) -> SocketAddr {
        SocketAddr::new(vip(family), self.port)
    }

    /// Its port's protocol.
    pub fn protocol(&self) -> &'static str {
        if self.udp { "UDP" } else { "TCP" }
    }

    /// The ready endpoints on a node.
    pub fn ready_on(&self, node: u8) -> usize {
        self.endpoints
            .iter()
            .filter(|endpoint| endpoint.node == node && endpoint.state == State::Ready)
            .count()
    }

    /// The Service and its slices.
    pub fn objects(&self) -> Vec<Value> {
        let mut annotations = json!({});
        if self.annotated {
            annotations["srcip.io/north-south"] = "true".into();
        }
        let mut spec = json!({
            "type": "LoadBalancer",
            "ipFamilyPolicy": "RequireDualStack",
            "selector": {"app": self.name},
            "externalTrafficPolicy": if self.local { "Local" } else { "Cluster" },
            "ports": [{
                "name": "main", "protocol": self.protocol(), "port": self.port, "nodePort": self.node_port,
                "targetPort": "main",
            }],
        });
        if self.local {
            spec["healthCheckNodePort"] = self.health_port.into();
        }
        for (field, value) in self.more.as_object().into_iter().flatten() {
            spec[field] = value.clone();
        }
        let ingress = Family::BOTH.map(|family| json!({"ip": vip(family).to_string(), "ipMode": "VIP"}));
        let service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "shop", "name": self.name, "annotations": annotations},
            "spec": spec,
            "status": {"loadBalancer": {"ingress": ingress}},
        });
        let slices = Family::BOTH.map(|family| self.slice(family));
        std::iter::once(service).chain(slices).collect()
    }

    fn slice(&self, family: Family) -> Value {
        let (kind, suffix) = match family {
            Family::V4 => ("IPv4", "v4"),
            Family::V6 => ("IPv6", "v6"),
        };
        let is_family = |address: &&SocketAddr| address.is_ipv4() == (family == Family::V4);
        let addresses =
            self.endpoints.iter().map(|endpoint| (endpoint, endpoint.addresses.iter().find(is_family)));
        let addresses: Vec<_> =
            addresses.filter_map(|(endpoint, address)| Some((endpoint, address?))).collect();
        let port = addresses.first().map_or(self.port, |(_, address)| address.port());
        let endpoints: Vec<_> = addresses
            .iter()
            .map(|(endpoint, address)| {
                let conditions = json!({
                    "ready": endpoint.state == State::Ready,
                    "serving": endpoint.state != State::Down,
                    "terminating": endpoint.state == State::Draining,
                });
                json!({
                    "addresses": [address.ip().to_string()], "conditions": conditions,
                    "nodeName": format!("n{}", endpoint.node),
                })
            })
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "namespace": "shop", "name": format!("{}-{suffix}", self.name),
                "labels": {"kubernetes.io/service-name": self.name},
            },
            "addressType": kind,
            "ports": [{"name": "main", "port": port, "protocol": self.protocol()}],
            "endpoints": endpoints,
        })
    }
}

/// The nodes, the Services and what stands behind these.
pub fn objects(cluster: &Cluster, services: &[&Service]) -> Vec<Value> {
    let nodes = cluster.nodes.iter().map(|node| {
        let addresses = Family::BOTH.map(|family| node.host.address(family));
        let addresses = addresses.map(|ip: IpAddr| json!({"type": "InternalIP", "address": ip.to_string()}));
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name()},
            "status": {"addresses": addresses},
        })
    });
    nodes.chain(services.iter().flat_map(|service| service.objects())).collect()
}

/// Writes them as a manifest that appears all at once.
pub fn write_manifests(cluster: &Cluster, services: &[&Service], directory: &Path) -> Result<()> {
    let items = objects(cluster, services);
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let (hidden, path) = (directory.join(".new.json"), directory.join("cluster.json"));
    fs::write(&hidden, list.to_string())?;
    fs::rename(&hidden, &path).with_context(|| path.display().to_string())
}
