//! Packets that are not the plainest: with options and extension headers, in fragments.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::scope,
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};
use srcip_tests::{
    Family,
    client::PATIENCE,
    cluster::{Cluster, agent::Agents, balancer, kube_proxy, node::PodNetwork, service::Service},
    host::Host,
    options,
    peer::APPLICATION_PORT,
};

/// A pod on node 1, and Services for it of both protocols, with kube-proxy's rules and srcip on every node.
struct Both {
    tcp: Service,
    udp: Service,
    _agents: Agents,
    pod: Host,
    /// Last, so that it goes last.
    cluster: Cluster,
}

impl Both {
    fn new() -> Self {
        let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
        let pod = cluster.pod(1, "app").unwrap();
        let tcp = Service::new("tcp").endpoint(1, &pod, APPLICATION_PORT);
        let udp = Service::new("udp").ports(80, 30081, 31081).udp().endpoint(1, &pod, APPLICATION_PORT);
        kube_proxy::install(&cluster, &[&tcp, &udp]).unwrap();
        let agents = Agents::start(&cluster, &[&tcp, &udp], "").unwrap();
        Self { tcp, udp, _agents: agents, pod, cluster }
    }

    fn counter(&self, node: u8, name: &str) -> u64 {
        let status = Agents::srcip(&self.cluster, node).run("status -o json").unwrap();
        let status: Value = serde_json::from_str(&status).unwrap();
        status["north_south"]["counters"][name].as_u64().unwrap()
    }
}

/// A UDP socket of a host, at a port of its address.
pub(super) fn udp(host: &Host, family: Family, port: u16) -> UdpSocket {
    let socket = host.netns().run(|| UdpSocket::bind(host.socket(family, port)).unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A TCP connection all of whose packets carry options from the client's side.
fn connect_with_options(host: &Host, family: Family, to: SocketAddr) -> TcpStream {
    let socket = host.netns().run(|| Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap());
    let socket = socket.unwrap();
    options::carry_options(&socket, family).unwrap();
    socket.connect_timeout(&to.into(), PATIENCE).unwrap();
    socket.into()
}

#[test]
fn options_and_extension_headers_get_through() {
    let test = Both::new();
    let data: Vec<u8> = (0..1_000_000_u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let application = test.pod.socket(family, APPLICATION_PORT);
        let listener = test.pod.netns().run(|| TcpListener::bind(application).unwrap()).unwrap();
        // What is accepted inherits them for IPv6, and has those of the client's SYN for IPv4.
        options::carry_options(&listener, family).unwrap();
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        options::ask_for_options(&pod, family).unwrap();
        options::carry_options(&pod, family).unwrap();
        for node in [1, 2] {
            balancer::route(&test.cluster, &[node]).unwrap();
            let mut stream = connect_with_options(&test.cluster.client, family, test.tcp.dialled(family));
            let (mut accepted, peer) = listener.accept().unwrap();
            assert_eq!(peer, SocketAddr::new(client, stream.local_addr().unwrap().port()));
            for socket in [&accepted, &stream] {
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.set_write_timeout(Some(PATIENCE)).unwrap();
            }
            if family == Family::V4 {
                assert!(!options::of_connection(&accepted).unwrap().is_empty(), "they did not arrive");
            }
            scope(|scope| {
                scope.spawn(|| {
                    let mut got = vec![0; data.len()];
                    accepted.read_exact(&mut got).unwrap();
                    assert!(got == data, "{family:?} by node {node}: the application got something else");
                    accepted.write_all(&got).unwrap();
                });
                stream.write_all(&data).unwrap();
                let mut got = vec![0; data.len()];
                stream.read_exact(&mut got).unwrap();
                assert!(got == data, "{family:?} by node {node}: the client got something else");
            });

            let caller = udp(&test.cluster.client, family, 0);
            options::ask_for_options(&caller, family).unwrap();
            options::carry_options(&caller, family).unwrap();
            let kinds = if family == Family::V4 { 1 } else { 2 };
            let mut buffer = [0; 2000];
            caller.send_to(&[7; 1000], test.udp.dialled(family)).unwrap();
            let (length, peer, arrived) = options::receive(&pod, &mut buffer).unwrap();
            assert_eq!((length, peer, arrived), (1000, caller.local_addr().unwrap(), kinds));
            pod.send_to(&buffer[..length], peer).unwrap();
            let (length, peer, arrived) = options::receive(&caller, &mut buffer).unwrap();
            assert_eq!((length, peer, arrived), (1000, test.udp.dialled(family), kinds));
        }
    }
    for node in [1, 2] {
        for passed in ["passed_malformed", "passed_fragments", "passed_too_big"] {
            assert_eq!(test.counter(node, passed), 0, "{passed} on node {node}");
        }
    }
}

/// They reach the pod, and so do the fragments of the answer the client; with the address that kube-proxy gives them.
#[test]
fn fragments_go_kube_proxys_way_and_are_counted() {
    const LARGE: usize = 3000;
    // Of 1500 octets, with headers.
    const FRAGMENTS: u64 = 3;
    let test = Both::new();
    let mut counted = 0;
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        balancer::route(&test.cluster, &[1]).unwrap();
        let ask = |length: usize| -> IpAddr {
            let caller = udp(&test.cluster.client, family, 0);
            caller.connect(test.udp.dialled(family)).unwrap();
            caller.send(&vec![7; length]).unwrap();
            let mut buffer = [0; 2 * LARGE];
            let (got, peer) = pod.recv_from(&mut buffer).unwrap();
            assert_eq!(got, length);
            pod.send_to(&buffer[..got], peer).unwrap();
            // Connected: it takes nothing from another address.
            assert_eq!(caller.recv(&mut buffer).unwrap(), length);
            peer.ip()
        };
        assert_eq!(ask(1000), client);
        assert_eq!(test.counter(1, "passed_fragments"), counted);
        assert_ne!(ask(LARGE), client, "masqueraded, as kube-proxy does");
        // By the uplink, and from the pod.
        counted += 2 * FRAGMENTS;
        assert_eq!(test.counter(1, "passed_fragments"), counted);
        // Others are not disturbed by that.
        assert_eq!(ask(1000), client);
    }
    let table = Agents::srcip(&test.cluster, 1).run("status").unwrap();
    assert!(table.contains(&format!("passed_fragments   {counted}")), "{table}");
}
