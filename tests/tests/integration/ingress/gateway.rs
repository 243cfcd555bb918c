//! From the edge to the application's log: a real Envoy as the ingress gateway with HTTP and HTTPS, an
//! application with a sidecar behind it.

use srcip_tests::{
    Family,
    cluster::{
        Cluster,
        agent::Agents,
        balancer,
        gateway::{Gateway, HTTP_PORT, HTTPS_PORT},
        kube_proxy,
        node::PodNetwork,
        service::Service,
    },
    peer::{self, APPLICATION_PORT},
    proxy::{Kind, Proxy},
    wait_until,
};

use crate::kube_proxy::curl;

#[test]
fn the_clients_address_goes_from_the_edge_to_the_applications_log() {
    for network in PodNetwork::ALL {
        let mut cluster = Cluster::new(network).unwrap();
        let gateway_pod = cluster.pod(1, "gateway").unwrap();
        let application_pod = cluster.pod(2, "app").unwrap();
        let _application = peer::forwarded(&application_pod, &["[::]:8000"]).unwrap();
        let sidecar = Proxy::start(&application_pod, Kind::Envoy).unwrap();
        let steering = cluster.world.srcip();
        steering.attach(&application_pod, "").unwrap();
        let gateway =
            Gateway::start(&gateway_pod, application_pod.socket(Family::V4, APPLICATION_PORT)).unwrap();

        let mut count = 0;
        let mut agents: Option<Agents> = None;
        for local in [false, true] {
            let http = Service { local, ..Service::new("http") }.endpoint(1, &gateway_pod, HTTP_PORT);
            let https = Service { local, ..Service::new("https") }.ports(443, 30443, 31443);
            let https = https.endpoint(1, &gateway_pod, HTTPS_PORT);
            kube_proxy::install(&cluster, &[&http, &https]).unwrap();
            match &mut agents {
                Some(agents) => agents.update(&cluster, &[&http, &https]).unwrap(),
                None => agents = Some(Agents::start(&cluster, &[&http, &https], "").unwrap()),
            }
            let nodes: &[u8] = if local { &[1] } else { &[1, 2, 3] };
            for node in nodes {
                balancer::route(&cluster, &[*node]).unwrap();
                for (scheme, service) in [("http", &http), ("https", &https)] {
                    for family in Family::BOTH {
                        let client = cluster.client.address(family);
                        let seen = curl(&cluster.client, scheme, service, family);
                        assert_eq!(seen, client, "{network:?} {scheme} {family:?} by node {node}");
                        count += 1;
                        let line = gateway.logged(count).unwrap();
                        assert_eq!(line["x_forwarded_for"], client.to_string());
                        let remote = line["downstream_remote_address"].as_str().unwrap();
                        let remote: std::net::SocketAddr = remote.parse().unwrap();
                        assert_eq!(remote.ip().to_canonical(), client);
                        assert_eq!(line["tls_version"].is_null(), scheme == "http", "{line}");
                    }
                }
            }
        }
        // It writes its log when it likes.
        wait_until("the application's sidecar had them all", || {
            sidecar.access_log().lines().count() >= count
        });
    }
}
