//! kube-proxy's SNAT under `externalTrafficPolicy: Cluster`, and its cures.

use super::*;

/// A client, two nodes, and a pod on the second one, with kube-proxy's rules on both.
struct Cluster {
    world: World,
    srcip: Srcip,
    client: Host,
    nodes: [Host; 2],
    pod: Host,
    service: Value,
    _application: srcip_tests::process::Process,
}

impl Cluster {
    fn new() -> Self {
        let mut world = World::new().unwrap();
        let client = world.host("client").unwrap();
        let nodes = [world.host("nodea").unwrap(), world.host("nodeb").unwrap()];
        let pod = world.host("pod").unwrap();
        // The pod's cable goes to the second node instead of the bridge. That one answers for it on the
        // network, and for the network to it.
        let node = &nodes[1];
        let bridge = world.node().name();
        sh(&format!("ip -n {bridge} link set veth4 nomaster")).unwrap();
        sh(&format!("ip -n {bridge} link set veth4 netns {}", node.name())).unwrap();
        node.ip("link set veth4 up").unwrap();
        node.ip(&format!("route add {}/32 dev veth4", pod.address(Family::V4))).unwrap();
        node.sysctl("net.ipv4.conf.all.proxy_arp", "1").unwrap();
        for node in &nodes {
            node.sysctl("net.ipv4.ip_forward", "1").unwrap();
        }
        let application = peer::application(&pod, &["[::]:8000"]).unwrap();
        let srcip = world.srcip();
        let cluster =
            Self { world, srcip, client, nodes, pod, service: service_manifest(), _application: application };
        cluster.kube_proxy();
        cluster
    }

    /// Does what kube-proxy does with the Service as it is.
    fn kube_proxy(&self) {
        for (i, node) in self.nodes.iter().enumerate() {
            let rules = NodePort {
                node_port: 30080,
                endpoint: (self.pod.address(Family::V4), PORT),
                local: self.service["spec"]["externalTrafficPolicy"] == "Local",
                endpoint_is_here: i == 1,
            };
            node.feed("iptables-restore", &rules.rules()).unwrap();
        }
    }

    fn manifests(&self) -> String {
        let nodes = self.nodes.iter().zip(["a", "b"]).map(|(host, name)| node_manifest(name, host));
        let objects: Vec<_> =
            nodes.chain([pod_manifest("httpbin", &self.pod), self.service.clone()]).collect();
        manifests(&self.world, &objects)
    }

    /// What the application sees of the client by way of a node's port.
    fn ask(&self, node: usize) -> IpAddr {
        let to = SocketAddr::new(self.nodes[node].address(Family::V4), 30080);
        client::ask_once(&self.client, to).unwrap().peer.ip()
    }
}

/// kube-proxy's rules put a node's address in place of the client's, and both cures are printed; the patch, applied to
/// the Service and followed by kube-proxy, makes the audit clean.
#[test]
fn snat_by_kube_proxy() {
    let mut cluster = Cluster::new();
    let node_address = cluster.nodes[0].address(Family::V4);
    let report = audit(&cluster.srcip, &cluster.manifests(), || {
        for _ in 0..3 {
            assert_eq!(cluster.ask(0), node_address);
        }
    });
    let finding = only_finding(&report, &cluster.pod);
    assert_eq!(finding["cause"], "snat", "{finding:#}");
    assert_eq!(finding["node"], "a");
    assert_eq!(finding["services"], json!([{ "namespace": "web", "name": "httpbin" }]));
    assert_eq!(finding["connections"], 3);
    assert_eq!(finding["application_saw"], json!([node_address]));
    assert_eq!(finding["clients"], json!([]), "the client cannot be known here");

    assert_eq!(finding["north_south"], json!([]));

    let commands = commands(&finding);
    let [command, annotate] = &commands[..] else { panic!("{commands:?}") };
    assert_eq!(annotate, "kubectl -n web annotate service httpbin --overwrite srcip.io/north-south=true");
    assert!(finding["steps"][1]["what"].as_str().unwrap().contains("--uplink"), "{finding:#}");
    let (kubectl, patch) = command.split_once(" --type merge -p ").unwrap();
    assert_eq!(kubectl, "kubectl -n web patch service httpbin");
    let patch: Value = serde_json::from_str(patch.trim_matches('\'')).unwrap();
    merge(&mut cluster.service, &patch);
    cluster.kube_proxy();
    // The load balancer follows the health check to the node with the pod.
    let report = audit(&cluster.srcip, &cluster.manifests(), || {
        for _ in 0..3 {
            assert_eq!(cluster.ask(1), cluster.client.address(Family::V4));
        }
    });
    assert_clean(&report, &cluster.pod, "local-policy");
}

/// A Service that asks for north-south on a node that does not heed it is told what to look for, not to ask.
#[test]
fn snat_although_north_south_is_asked_for() {
    let mut cluster = Cluster::new();
    cluster.service["metadata"]["annotations"] = json!({ "srcip.io/north-south": "true" });
    let node_address = cluster.nodes[0].address(Family::V4);
    let traffic = || assert_eq!(cluster.ask(0), node_address);
    let finding = only_finding(&audit(&cluster.srcip, &cluster.manifests(), traffic), &cluster.pod);
    assert_eq!(finding["cause"], "snat", "{finding:#}");
    assert_eq!(finding["north_south"], json!([{ "namespace": "web", "name": "httpbin" }]));
    let commands = commands(&finding);
    let [command] = &commands[..] else { panic!("{commands:?}") };
    assert!(command.contains("externalTrafficPolicy"), "{command}");
    let told = finding["steps"][0]["what"].as_str().unwrap();
    assert!(
        told.contains("web/httpbin asks") && told.contains("node a") && told.contains("--uplink"),
        "{told}"
    );
    // As it arrives where north-south has handled it.
    let traffic = || {
        let seen = client::ask_once(&cluster.client, cluster.pod.socket(Family::V4, PORT)).unwrap();
        assert_eq!(seen.peer.ip(), cluster.client.address(Family::V4));
    };
    assert_clean(&audit(&cluster.srcip, &cluster.manifests(), traffic), &cluster.pod, "north-south");
}

/// Flags instead of manifests.
#[test]
fn snat_by_kube_proxy_with_flags() {
    let cluster = Cluster::new();
    let node_address = cluster.nodes[0].address(Family::V4);
    let traffic = || assert_eq!(cluster.ask(0), node_address);
    let options = format!("--node-address {node_address} --service web/httpbin");
    let finding = only_finding(&audit(&cluster.srcip, &options, traffic), &cluster.pod);
    assert_eq!(
        (finding["cause"].as_str(), finding["node"].as_str()),
        (Some("snat"), Some(&*node_address.to_string()))
    );
    assert!(commands(&finding)[0].starts_with("kubectl -n web patch service httpbin "));
    let options = format!("--node-address {node_address} --service web/httpbin:Local");
    let finding = only_finding(&audit(&cluster.srcip, &options, traffic), &cluster.pod);
    assert_eq!(finding["cause"], "node-itself");
}

/// Without the pod's manifest, any of the Services may be the one.
#[test]
fn snat_to_a_pod_that_is_not_in_the_manifests() {
    let cluster = Cluster::new();
    let node_address = cluster.nodes[0].address(Family::V4);
    let nodes = cluster.nodes.iter().zip(["a", "b"]).map(|(host, name)| node_manifest(name, host));
    let objects: Vec<_> = nodes.chain([cluster.service.clone()]).collect();
    let options = manifests(&cluster.world, &objects);
    let report = audit(&cluster.srcip, &options, || assert_eq!(cluster.ask(0), node_address));
    let finding = only_finding(&report, &cluster.pod);
    assert_eq!(finding["cause"], "snat", "{finding:#}");
    assert!(commands(&finding)[0].starts_with("kubectl -n web patch service httpbin "));
    assert!(finding["steps"].to_string().contains("may be any of these"), "{finding:#}");
}

/// RFC 7386, as much as a patch of ours needs.
fn merge(target: &mut Value, patch: &Value) {
    let Some(fields) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    for (name, value) in fields {
        merge(&mut target[name], value);
    }
}

/// The node in between, and what was asked for by the Service's node port.
#[test]
fn explain_draws_the_node_in_between() {
    let cluster = Cluster::new();
    let client = cluster.client.address(Family::V4);
    let node = cluster.nodes[0].address(Family::V4);
    let cgroup = cluster.world.cgroup().display();
    let manifests = cluster.manifests();
    let to = SocketAddr::new(node, 30080);
    let mut connection = client::connect(&cluster.client, to).unwrap();
    client::ask(&mut connection).unwrap();
    let options = format!("--cgroup {cgroup} --wait 2s {manifests}");
    let text = cluster.srcip.run(&format!("explain --from {client} --to {to} {options}")).unwrap();
    assert!(text.contains("node a"), "{text}");
    assert!(text.contains(&client.to_string()), "{text}");
    assert!(text.contains(&format!("sees {node}:")), "{text}");
    assert_eq!(text.matches("is lost here").count(), 1, "{text}");
    assert!(text.contains("kubectl -n web patch service httpbin"), "{text}");
    // Nobody connects to that port.
    let output = cluster.srcip.output(&format!("explain --to {node}:30081 {options}")).unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no connection of a pod fits"));
}
