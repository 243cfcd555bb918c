//! What kube-proxy does to a client's address, on the very nodes that srcip is tested on: the baseline.

use std::net::IpAddr;

use srcip_tests::{
    Family, client,
    cluster::{
        Cluster, balancer,
        gateway::{Gateway, HTTP_PORT, HTTPS_PORT},
        kube_proxy,
        node::PodNetwork,
        service::{Service, State},
    },
    host::Host,
    peer::{self, APPLICATION_PORT},
};

/// The addresses of nodes and of their pods' gateways: what a masqueraded connection comes from.
fn is_a_nodes(cluster: &Cluster, address: IpAddr) -> bool {
    let output = cluster.nodes.iter().map(|node| node.host.ip("-o addr").unwrap()).collect::<String>();
    output.split_whitespace().any(|word| word.split('/').next() == Some(&address.to_string()))
}

/// Asks the Service by way of one node.
fn ask(cluster: &Cluster, node: u8, service: &Service, family: Family) -> IpAddr {
    balancer::route(cluster, &[node]).unwrap();
    client::ask_once(&cluster.client, service.dialled(family)).unwrap().peer.ip()
}

/// One pod on node 1.
fn one_pod(network: PodNetwork) -> (Cluster, Host) {
    let mut cluster = Cluster::new(network).unwrap();
    let pod = cluster.pod(1, "web").unwrap();
    (cluster, pod)
}

#[test]
fn under_cluster_the_application_sees_a_node() {
    for network in PodNetwork::ALL {
        let (cluster, pod) = one_pod(network);
        let _application = peer::application(&pod, &["[::]:8000"]).unwrap();
        let service = Service::new("web").endpoint(1, &pod, APPLICATION_PORT);
        kube_proxy::install(&cluster, &[&service]).unwrap();
        for family in Family::BOTH {
            for node in 1..=3 {
                let seen = ask(&cluster, node, &service, family);
                assert!(is_a_nodes(&cluster, seen), "{network:?} by node {node}: {seen}");
                // Nor does the NodePort let it through.
                let to = cluster.node(node).host.socket(family, service.node_port);
                let seen = client::ask_once(&cluster.client, to).unwrap().peer.ip();
                assert!(is_a_nodes(&cluster, seen), "{network:?} by node {node}'s NodePort: {seen}");
            }
        }
    }
}

#[test]
fn under_local_it_sees_the_client_and_nodes_without_a_pod_are_dead_ends() {
    for network in PodNetwork::ALL {
        let (cluster, pod) = one_pod(network);
        let _application = peer::application(&pod, &["[::]:8000"]).unwrap();
        let service = Service::new("web").local().endpoint(1, &pod, APPLICATION_PORT);
        kube_proxy::install(&cluster, &[&service]).unwrap();
        for family in Family::BOTH {
            let seen = ask(&cluster, 1, &service, family);
            assert_eq!(seen, cluster.client.address(family), "{network:?}");
        }
        // A client waits there for nothing.
        balancer::route(&cluster, &[2]).unwrap();
        client::connect_in_vain(&cluster.client, None, service.dialled(Family::V4)).unwrap();
    }
}

/// As [`State`] says of each endpoint, so do the rules.
#[test]
fn endpoints_that_drain_serve_only_while_there_are_no_others() {
    let mut cluster = Cluster::new(PodNetwork::Bridge).unwrap();
    let pods = ["a", "b"].map(|role| cluster.pod(1, role).unwrap());
    let _applications = pods.each_ref().map(|pod| peer::application(pod, &["[::]:8000"]).unwrap());
    let mut service = Service::new("web").local();
    for pod in &pods {
        service = service.endpoint(1, pod, APPLICATION_PORT);
    }
    let local = |cluster: &Cluster, service: &Service| {
        kube_proxy::install(cluster, &[service]).unwrap();
        balancer::route(cluster, &[1]).unwrap();
        // Of two, one is missed by chance in 2^39 runs.
        let mut seen = (0..40)
            .map(|_| client::ask_once(&cluster.client, service.dialled(Family::V4)).unwrap().local.ip())
            .collect::<Vec<_>>();
        seen.sort();
        seen.dedup();
        seen
    };
    let [a, b] = pods.each_ref().map(|pod| pod.address(Family::V4));
    assert_eq!(local(&cluster, &service), [a, b]);
    service.endpoints[0].state = State::Draining;
    assert_eq!(local(&cluster, &service), [b]);
    service.endpoints[1].state = State::Down;
    assert_eq!(local(&cluster, &service), [a]);
}

/// The whole way in: a gateway with HTTP and HTTPS, an application behind it. Under `Cluster` all that they
/// hear of the client is a node's address.
#[test]
fn a_gateway_under_cluster_forwards_a_nodes_address() {
    let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
    let gateway_pod = cluster.pod(1, "gateway").unwrap();
    let application_pod = cluster.pod(2, "app").unwrap();
    let _application = peer::forwarded(&application_pod, &["[::]:8000"]).unwrap();
    let application = application_pod.socket(Family::V4, APPLICATION_PORT);
    let gateway = Gateway::start(&gateway_pod, application).unwrap();
    let http = Service::new("http").endpoint(1, &gateway_pod, HTTP_PORT);
    let https = Service::new("https").ports(443, 30443, 31443).endpoint(1, &gateway_pod, HTTPS_PORT);
    let mut count = 0;
    for local in [false, true] {
        let [http, https] = [&http, &https].map(|service| Service { local, ..service.clone() });
        kube_proxy::install(&cluster, &[&http, &https]).unwrap();
        balancer::route(&cluster, &[1]).unwrap();
        for (scheme, service) in [("http", &http), ("https", &https)] {
            for family in Family::BOTH {
                let answer = curl(&cluster.client, scheme, service, family);
                count += 1;
                let line = gateway.logged(count).unwrap();
                let client = cluster.client.address(family);
                if local {
                    assert_eq!(answer, client);
                    assert_eq!(line["x_forwarded_for"], client.to_string());
                } else {
                    assert!(is_a_nodes(&cluster, answer), "{scheme} {family:?}: {answer}");
                    assert_eq!(line["x_forwarded_for"], answer.to_string());
                }
                assert_eq!(line["tls_version"].is_null(), scheme == "http", "{line}");
            }
        }
    }
}

/// Hosts inside the cluster that dial a Service: a pod on each of two nodes, and the nodes themselves.
pub struct Inside {
    pods: Vec<(String, Host)>,
}

impl Inside {
    /// With new pods.
    pub fn new(cluster: &mut Cluster) -> Self {
        let pods = [1, 2].map(|node| (format!("a pod of node {node}"), cluster.pod(node, "inside").unwrap()));
        Self { pods: pods.into() }
    }

    /// Each dials the NodePort of node 1 and the load balancer's address, and so does the endpoint. Where it comes
    /// from, as the application sees it.
    pub fn ask(
        &self,
        cluster: &Cluster,
        service: &Service,
        endpoint: &Host,
    ) -> Vec<(String, Result<IpAddr, String>)> {
        let nodes = cluster.nodes.iter().take(2).map(|node| (format!("node {}", node.number), &node.host));
        let pods = self.pods.iter().map(|(name, pod)| (name.clone(), pod));
        let mut found = Vec::new();
        for (name, host) in nodes.chain(pods).chain([("the endpoint".to_owned(), endpoint)]) {
            for family in Family::BOTH {
                for to in [cluster.node(1).host.socket(family, service.node_port), service.dialled(family)] {
                    let seen = client::ask_once(host, to).map(|seen| seen.peer.ip().to_canonical());
                    found.push((format!("{name} to {to}"), seen.map_err(|error| format!("{error:#}"))));
                }
            }
        }
        found
    }
}

#[test]
fn what_begins_inside_the_cluster_gets_through() {
    for network in PodNetwork::ALL {
        let (mut cluster, pod) = one_pod(network);
        let _application = peer::application(&pod, &["[::]:8000"]).unwrap();
        let service = Service::new("web").endpoint(1, &pod, APPLICATION_PORT);
        kube_proxy::install(&cluster, &[&service]).unwrap();
        balancer::route(&cluster, &[1]).unwrap();
        let inside = Inside::new(&mut cluster);
        let found = inside.ask(&cluster, &service, &pod);
        assert!(found.iter().all(|(_, seen)| seen.is_ok()), "{network:?}: {found:#?}");
    }
}

/// What `/ip` says at the Service's address.
pub fn curl(host: &Host, scheme: &str, service: &Service, family: Family) -> IpAddr {
    let url = format!("{scheme}://{}/ip", service.dialled(family));
    let json: serde_json::Value = serde_json::from_str(&client::curl(host, &url).unwrap()).unwrap();
    json["origin"].as_str().unwrap().parse().unwrap()
}
