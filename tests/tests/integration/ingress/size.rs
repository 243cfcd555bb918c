//! Packets that are too large for a link beyond the node: path MTU discovery works through the translation, also where
//! the endpoint is on another node than the one that the router tells.

use std::io::{Read as _, Write as _};

use serde_json::Value;
use srcip_tests::{
    Family,
    cluster::{Cluster, agent::Agents, balancer, node::PodNetwork, service::Service},
    options::never_fragment,
    peer::{self, APPLICATION_PORT},
    wait_until,
};

use super::{changes::Conversation, packets::udp};

/// More than any buffers hold.
const SIZE: usize = 1 << 20;

/// The client still says that it takes 1500 octets, and the router can only hand on 1300. The route says so, not the
/// device: of a device that takes less than its peer sends, a veth driver drops what comes in a single segment
/// (`__is_skb_forwardable`), and the client would never be told.
fn narrow(cluster: &Cluster) {
    for (family, option) in [(Family::V4, ""), (Family::V6, "-6 ")] {
        let client = cluster.client.address(family);
        cluster.router().ip(&format!("{option}route add {client} dev ext0 mtu 1300")).unwrap();
    }
}

#[test]
fn a_narrow_link_beyond_the_router_is_found_out() {
    // With how many segments the client hands to its device at once: as many as it likes, or one by one.
    for (options, segments) in [("", 65535), ("--return-path tunnel", 65535), ("--tc-hook clsact", 1)] {
        let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
        let pod = cluster.pod(1, "echo").unwrap();
        let _application = peer::echo(&pod, &["[::]:8000"]).unwrap();
        let service = Service::new("web").endpoint(1, &pod, APPLICATION_PORT);
        let _agents = Agents::start(&cluster, &[&service], options).unwrap();
        narrow(&cluster);
        cluster.client.ip(&format!("link set eth0 gso_max_segs {segments}")).unwrap();
        for family in Family::BOTH {
            for node in [1, 2] {
                balancer::route(&cluster, &[node]).unwrap();
                let mut conversation = Conversation::open(&cluster, &service, family);
                let data = vec![7; SIZE];
                let mut other = conversation.stream.try_clone().unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(|| other.write_all(&data).unwrap());
                    let mut got = vec![0; SIZE];
                    conversation.stream.read_exact(&mut got).unwrap_or_else(|error| {
                        panic!("{options:?} {family:?} by node {node}: {error}");
                    });
                    assert!(got == data);
                });
                // What was learned holds for the client, however it comes.
                pod.ip("route flush cache").unwrap();
                pod.ip("-6 route flush cache").unwrap();
            }
        }
        let status = Agents::srcip(&cluster, 1).run("status -o json").unwrap();
        let status: Value = serde_json::from_str(&status).unwrap();
        let counters = &status["north_south"]["counters"];
        assert!(counters["icmp_translated"].as_u64().unwrap() >= 4, "{options:?}: {counters}");
    }
}

/// Of a datagram the application is told itself.
#[test]
fn who_answers_with_more_than_a_narrow_link_takes_is_told() {
    for options in ["", "--return-path tunnel"] {
        let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
        let pod = cluster.pod(1, "app").unwrap();
        let service = Service::new("udp").udp().endpoint(1, &pod, APPLICATION_PORT);
        let _agents = Agents::start(&cluster, &[&service], options).unwrap();
        narrow(&cluster);
        for family in Family::BOTH {
            let application = udp(&pod, family, APPLICATION_PORT);
            never_fragment(&application, family).unwrap();
            for node in [1, 2] {
                balancer::route(&cluster, &[node]).unwrap();
                let client = udp(&cluster.client, family, 0);
                client.connect(service.dialled(family)).unwrap();
                client.send(b"how much?").unwrap();
                let mut buffer = [0; 2000];
                let (_, caller) = application.recv_from(&mut buffer).unwrap();
                assert_eq!(caller, client.local_addr().unwrap());
                // The error comes back a moment later; the kernel remembers it for this destination.
                let where_to = format!("{options:?} {family:?} by node {node}");
                wait_until(&format!("{where_to}: the application is told"), || {
                    let sent = application.send_to(&[7; 1400], caller);
                    sent.is_err_and(|error| error.raw_os_error() == Some(libc::EMSGSIZE))
                });
                // Errors about what was sent meanwhile may still be waiting.
                wait_until(&format!("{where_to}: less fits"), || {
                    application.send_to(&[8; 1200], caller).is_ok()
                });
                assert_eq!((client.recv(&mut buffer).unwrap(), buffer[0]), (1200, 8));
                pod.ip("route flush cache").unwrap();
                pod.ip("-6 route flush cache").unwrap();
            }
        }
    }
}
