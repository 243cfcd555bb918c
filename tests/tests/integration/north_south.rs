//! North-south: clients reach pods by a frontend, with their own address, through one node or two.

mod attachment;
mod bench;
mod choice;
mod counters;
mod fragments;
mod icmp;
mod packets;
mod properties;
mod scale;
mod topology;

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, UdpSocket},
    time::Duration,
};

use srcip_tests::{Family, PATIENCE, client::connect, host::Host, options::never_fragment, wait_until};
use srcip_user::{
    dataplane::record::TcHook,
    northsouth::{
        Programmer as _,
        desired::{EndpointState, Place, Protocol, ReturnPath, TrafficPolicy},
    },
};
use topology::{Node, PORT, Site, vip};

/// Those that this kernel has: below 6.6 there is one.
fn hooks() -> BTreeSet<TcHook> {
    BTreeSet::from([TcHook::newest(), TcHook::Clsact])
}

/// A pod that answers everything with who asked.
struct Application {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Application {
    fn start(pod: &Host, family: Family) -> Self {
        let any: IpAddr = match family {
            Family::V4 => "0.0.0.0".parse().unwrap(),
            Family::V6 => "::".parse().unwrap(),
        };
        let sockets = pod
            .netns()
            .run(|| (TcpListener::bind((any, 8000)).unwrap(), UdpSocket::bind((any, 8000)).unwrap()));
        let (tcp, udp) = sockets.unwrap();
        udp.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { tcp, udp }
    }
}

/// One TCP connection: the application sees the client; a few megabytes go either way, unharmed.
fn tcp_works(site: &Site, application: &Application, family: Family) {
    // No two stretches of it are alike.
    let data: Vec<u8> = (0..4_000_000_u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    let mut stream = connect(&site.client, (vip(family), PORT).into()).unwrap();
    let (mut accepted, peer) = application.tcp.accept().unwrap();
    assert_eq!(peer.ip(), site.client.address(family));
    assert_eq!(peer.port(), stream.local_addr().unwrap().port());
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut got = vec![0; data.len()];
            accepted.read_exact(&mut got).unwrap();
            assert!(got == data, "the application got something else");
            accepted.write_all(&got).unwrap();
        });
        stream.write_all(&data).unwrap();
        let mut got = vec![0; data.len()];
        stream.read_exact(&mut got).unwrap();
        assert!(got == data, "the client got something else");
    });
}

/// A datagram and its answer, from the address that was asked.
fn udp_works(site: &Site, application: &Application, family: Family) {
    let client = udp_client(site, family);
    for size in [1, 1000, 1400] {
        client.send(&vec![7; size]).unwrap();
        let mut buffer = [0; 2000];
        let (length, peer) = application.udp.recv_from(&mut buffer).unwrap();
        assert_eq!((length, peer.ip()), (size, site.client.address(family)));
        application.udp.send_to(&buffer[..length], peer).unwrap();
        // Connected: it takes nothing from another address.
        assert_eq!(client.recv(&mut buffer).unwrap(), size);
    }
}

fn udp_client(site: &Site, family: Family) -> UdpSocket {
    let address = site.client.address(family);
    let client = site.client.netns().run(|| UdpSocket::bind((address, 0)).unwrap()).unwrap();
    client.connect((vip(family), PORT)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client
}

fn each_works(mut site: Site, place: impl Fn(&Site, Family) -> Place, return_path: ReturnPath) -> Vec<Node> {
    let nodes = site.nodes.len();
    for family in Family::BOTH {
        let pod = site.pod(nodes - 1);
        let application = Application::start(&pod.host, family);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for node in 0..nodes {
                let place = if node == nodes - 1 { Place::Local } else { place(&site, family) };
                let mut service = site.service(protocol, family);
                service.return_path = return_path;
                service.endpoints.push(pod.endpoint(family, place, EndpointState::Ready));
                site.apply(node, [service]);
            }
            match protocol {
                Protocol::Tcp => tcp_works(&site, &application, family),
                Protocol::Udp => udp_works(&site, &application, family),
            }
        }
    }
    std::mem::take(&mut site.nodes)
}

/// On the second node.
fn remote(site: &Site, family: Family) -> Place {
    Place::Remote(site.node_address(1, family))
}

#[test]
fn an_endpoint_on_this_node() {
    for hook in hooks() {
        let nodes = each_works(Site::by(hook, 1), |_, _| Place::Local, ReturnPath::Direct);
        let counters = nodes[0].programmer.counters().unwrap();
        assert_eq!(counters["new_flows"], 4, "{hook:?}");
        assert!(counters["to_endpoint"] > 0 && counters["replies"] > 0, "{hook:?}: {counters:?}");
        let odd: Vec<_> =
            counters.iter().filter(|(name, n)| name.starts_with("dropped") && **n > 0).collect();
        assert!(odd.is_empty(), "{hook:?}: {odd:?}");
    }
}

#[test]
fn an_endpoint_on_another_node_answers_directly() {
    for hook in hooks() {
        let nodes = each_works(Site::by(hook, 2), remote, ReturnPath::Direct);
        let [entry, other] = [0, 1].map(|n| nodes[n].programmer.counters().unwrap());
        assert!(entry["to_node"] > 0 && other["from_node"] > 0, "{hook:?}: {entry:?} {other:?}");
        // The answers do not come by the entry node, and their segments leave room for what encapsulates requests.
        assert_eq!((entry["replies"], entry["from_node"]), (0, 0), "{hook:?}");
        assert!(other["replies"] > 0 && other["mss_clamped"] >= 2, "{hook:?}: {other:?}");
    }
}

#[test]
fn an_endpoint_on_another_node_answers_through_the_entry_node() {
    for hook in hooks() {
        let nodes = each_works(Site::by(hook, 2), remote, ReturnPath::Tunnel);
        let [entry, other] = [0, 1].map(|n| nodes[n].programmer.counters().unwrap());
        assert!(other["replies_to_node"] > 0 && other["replies"] == 0, "{hook:?}: {other:?}");
        assert!(entry["replies"] > 0 && entry["mss_clamped"] >= 2, "{hook:?}: {entry:?} {other:?}");
    }
}

#[test]
fn who_sends_more_than_fits_into_the_tunnel_is_told() {
    let mut site = Site::new(2);
    for family in Family::BOTH {
        let pod = site.pod(1);
        let application = Application::start(&pod.host, family);
        let remote = Place::Remote(site.node_address(1, family));
        for (node, place) in [(0, remote), (1, Place::Local)] {
            let mut service = site.service(Protocol::Udp, family);
            service.endpoints.push(pod.endpoint(family, place, EndpointState::Ready));
            site.apply(node, [service]);
        }
        let client = udp_client(&site, family);
        // Fragments have no ports.
        never_fragment(&client, family).unwrap();
        let header = if family == Family::V4 { 28 } else { 48 };
        let overhead = if family == Family::V4 { 20 } else { 40 };
        client.send(&vec![7; 1500 - header]).unwrap();
        // The error comes back at once; the kernel remembers it for this destination.
        wait_until(&format!("{family:?}: the client is told"), || {
            client.send(&vec![7; 1500 - header]).is_err_and(|e| e.raw_os_error() == Some(libc::EMSGSIZE))
        });
        // Errors about what was sent meanwhile may still be waiting.
        wait_until(&format!("{family:?}: less fits"), || {
            client.send(&vec![8; 1500 - header - overhead]).is_ok()
        });
        let mut buffer = [0; 2000];
        let (length, peer) = application.udp.recv_from(&mut buffer).unwrap();
        assert_eq!(
            (length, buffer[0], peer.ip()),
            (1500 - header - overhead, 8, site.client.address(family))
        );
    }
}

#[test]
fn an_endpoint_that_refuses_is_heard() {
    let mut site = Site::new(1);
    for family in Family::BOTH {
        let pod = site.pod(0);
        let mut service = site.service(Protocol::Udp, family);
        service.endpoints.push(pod.endpoint(family, Place::Local, EndpointState::Ready));
        site.apply(0, [service]);
        // Nobody listens: the pod answers with an ICMP error that quotes what it got.
        let client = udp_client(&site, family);
        client.send(b"anybody?").unwrap();
        let error = client.recv(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{family:?}: {error}");
    }
}

#[test]
fn without_endpoints_nothing_passes_and_removal_leaves_nothing() {
    let mut site = Site::new(1);
    let mut service = site.service(Protocol::Tcp, Family::V4);
    service.policy = TrafficPolicy::Local;
    site.apply(0, [service]);
    let attempt = |site: &Site| {
        let to = (vip(Family::V4), PORT).into();
        let limit = Duration::from_millis(500);
        let attempt = site.client.netns().run(|| std::net::TcpStream::connect_timeout(&to, limit));
        attempt.unwrap().unwrap_err().kind()
    };
    // The first attempt may end before the client knows its neighbour.
    wait_until("a SYN is dropped", || {
        assert_eq!(attempt(&site), std::io::ErrorKind::TimedOut);
        site.nodes[0].programmer.counters().unwrap()["dropped_no_endpoint"] > 0
    });

    // Without us the node has nothing at this address, and says so: not at once to everybody, as the kernel does.
    site.remove(0);
    wait_until("an answer", || attempt(&site) != std::io::ErrorKind::TimedOut);
    assert!(!site.nodes[0].pins.join("northsouth").exists());
}
