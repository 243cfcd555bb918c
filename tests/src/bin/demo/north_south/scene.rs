//! A client outside, a router, three nodes; on one the ingress gateway, on another the application with its
//! sidecar.

use std::net::IpAddr;

use anyhow::Result;
use srcip_tests::{
    Family,
    cluster::{
        Cluster,
        gateway::{Gateway, HTTP_PORT, HTTPS_PORT},
        node::PodNetwork,
        service::Service,
        vip,
    },
    host::Host,
    peer::{self, APPLICATION_PORT},
    process::Process,
    proxy::{Kind, Proxy},
    world::World,
};

use crate::screen::Screen;

/// Where the gateway is.
const GATEWAY_NODE: u8 = 1;
/// Where the application is.
const APPLICATION_NODE: u8 = 3;

/// How the gateway is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scheme {
    Http,
    Https,
}

/// Both.
pub const SCHEMES: [Scheme; 2] = [Scheme::Http, Scheme::Https];

impl Scheme {
    /// As URLs have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    /// Where the application says who has asked. Without a port: the Service's is the scheme's own.
    pub fn url(self, family: Family) -> String {
        match vip(family) {
            IpAddr::V4(ip) => format!("{}://{ip}/ip", self.name()),
            IpAddr::V6(ip) => format!("{}://[{ip}]/ip", self.name()),
        }
    }

    /// What curl has to be told: the certificate is the gateway's own.
    pub fn option(self) -> &'static str {
        match self {
            Self::Http => "",
            Self::Https => "--insecure ",
        }
    }
}

/// All of it. Dropped in this order: the cluster, which removes the hosts, comes last.
#[derive(Debug)]
pub struct Scene {
    /// The ingress gateway.
    pub gateway: Gateway,
    _sidecar: Proxy,
    _application: Process,
    gateway_pod: Host,
    application_pod: Host,
    services: [Service; 2],
    /// The client and the nodes.
    pub cluster: Cluster,
}

impl Scene {
    /// Builds it in an empty world: without any rules yet.
    pub fn create(world: World) -> Result<Self> {
        let mut cluster = Cluster::create_in(world, PodNetwork::PointToPoint)?;
        let gateway_pod = cluster.pod(GATEWAY_NODE, "gateway")?;
        let application_pod = cluster.pod(APPLICATION_NODE, "httpbin")?;
        let application = peer::forwarded(&application_pod, &[&format!("[::]:{APPLICATION_PORT}")])?;
        let sidecar = Proxy::start(&application_pod, Kind::Envoy)?;
        cluster.world.srcip().attach(&application_pod, "")?;
        let gateway = Gateway::start(&gateway_pod, application_pod.socket(Family::V4, APPLICATION_PORT))?;
        let http = Service::new("http").endpoint(GATEWAY_NODE, &gateway_pod, HTTP_PORT);
        let https = Service::new("https").ports(443, 30443, 31443);
        let https = https.endpoint(GATEWAY_NODE, &gateway_pod, HTTPS_PORT);
        Ok(Self {
            gateway,
            _sidecar: sidecar,
            _application: application,
            gateway_pod,
            application_pod,
            services: [http, https],
            cluster,
        })
    }

    /// The gateway's Services.
    pub fn services(&self) -> [&Service; 2] {
        self.services.each_ref()
    }

    /// A picture of it.
    pub fn draw(&self, screen: Screen) -> Result<()> {
        let client = &self.cluster.client;
        // Padded before it is coloured.
        let [client_v4, client_v6] = Family::BOTH.map(|family| format!("{:<16}", client.address(family)));
        let (client_v4, client_v6) = (screen.good(&client_v4), screen.good(&client_v6));
        let [vip_v4, vip_v6] = Family::BOTH.map(|family| format!("{:<16}", vip(family)));
        let node = |number| format!("{number}: {}", self.cluster.node(number).host.address(Family::V4));
        let [first, second, third] = [1, 2, 3].map(node);
        let [gateway, application] =
            [&self.gateway_pod, &self.application_pod].map(|pod| pod.address(Family::V4));
        let hosts = [client, self.cluster.router()].into_iter();
        let hosts = hosts.chain(self.cluster.nodes.iter().map(|node| &node.host));
        let names = hosts.chain([&self.gateway_pod, &self.application_pod]).map(Host::name);
        let lines = [
            String::new(),
            format!("  {:<22}{:<23}{:<20}pods", "client", "load balancer", "nodes"),
            format!("  {client_v4} ──── {vip_v4} ──┬── {first} ── gateway {gateway}: Envoy, HTTP and HTTPS"),
            format!("  {client_v6}      {vip_v6}   ├── {second}"),
            format!("  {:<22}{:<19}└── {third} ── httpbin {application}: with a sidecar", "", ""),
            format!("  network namespaces: {}", names.collect::<Vec<_>>().join(" ")),
            String::new(),
        ];
        lines.iter().try_for_each(|line| Ok(screen.show(format_args!("{line}"))?))
    }
}
