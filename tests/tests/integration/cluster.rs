//! Two nodes: one with a container runtime, whose pods the other one reaches.
//!
//! ```text
//!  node a ─ cni0 ─┬ pod 10.134.0.2
//!    │            └ pod 10.134.0.3
//!    │ br0
//!  node b (route to 10.134.0.0/24 by way of node a)
//! ```

use std::path::Path;

use srcip_tests::{
    Family,
    client::{self, Seen},
    containerd::Containerd,
    host::Host,
    image::{ENVOY, PEER},
    pod::{ContainerSpec, Pod, PodSpec},
    srcip::Srcip,
    world::World,
};

/// The addresses of node a's pods.
const PODS: [(&str, &str); 2] = [("ip", "10.134.0.0/24"), ("ip -6", "fd13:38::/64")];

pub struct Cluster {
    pub containerd: Containerd,
    pub node: Host,
    pub other_node: Host,
    pub srcip: Srcip,
    /// Last, so that it goes last.
    pub world: World,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.world.diagnose();
        }
    }
}

impl Cluster {
    /// With the usual CNI plugins.
    pub fn new() -> Self {
        Self::with_conflist(&conflist("", ""))
    }

    pub fn with_conflist(conflist: &str) -> Self {
        let mut world = World::new().unwrap();
        let node = world.host("a").unwrap();
        let other_node = world.host("b").unwrap();
        node.sysctl("net.ipv4.ip_forward", "1").unwrap();
        node.sysctl("net.ipv6.conf.all.forwarding", "1").unwrap();
        for ((ip, subnet), family) in PODS.into_iter().zip(Family::BOTH) {
            let family_option = ip.strip_prefix("ip").unwrap();
            let gateway = node.address(family);
            other_node.ip(&format!("{family_option} route add {subnet} via {gateway}")).unwrap();
        }
        let containerd = Containerd::start(&world, &node, conflist).unwrap();
        let srcip = world.srcip();
        Self { containerd, node, other_node, srcip, world }
    }

    /// Starts a pod with an application and Envoy in front of it, and waits until both listen.
    pub fn run_sidecar_pod(&self, spec: PodSpec) -> Pod {
        let pod = self.containerd.run_pod(spec).unwrap();
        for container in sidecar_containers(self.world.directory()) {
            self.containerd.start_container(&pod, &container).unwrap();
        }
        pod.wait_open(8000).unwrap();
        pod.wait_open(15006).unwrap();
        pod
    }

    /// Asks the pod's application from the other node.
    pub fn ask(&self, pod: &Pod, family: Family) -> Seen {
        client::ask_once(&self.other_node, pod.socket(family, 8000).unwrap()).unwrap()
    }
}

/// An HTTP application and Envoy, as two containers; Envoy's configuration is written into `directory`.
pub fn sidecar_containers(directory: &Path) -> [ContainerSpec; 2] {
    let config = directory.join("envoy.yaml");
    std::fs::write(&config, include_str!("../../../deploy/examples/envoy.yaml")).unwrap();
    [
        ContainerSpec::new("application", PEER, "httpbin [::]:8000"),
        ContainerSpec::new("envoy", ENVOY, "--config-path /etc/envoy.yaml --concurrency 1 --log-level info")
            .mounted(config, "/etc/envoy.yaml"),
    ]
}

/// A bridge with addresses from these pools, and ports of the node; `range` narrows the IPv4 pool, `more`
/// are plugins that follow.
pub fn conflist(range: &str, more: &str) -> String {
    let [(_, v4), (_, v6)] = PODS;
    format!(
        r#"{{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {{
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipam": {{
        "type": "host-local",
        "ranges": [[{{ "subnet": "{v4}"{range} }}], [{{ "subnet": "{v6}" }}]],
        "routes": [{{ "dst": "0.0.0.0/0" }}, {{ "dst": "::/0" }}]
      }}
    }},
    {{ "type": "portmap", "capabilities": {{ "portMappings": true }} }}{more}
  ]
}}
"#
    )
}
