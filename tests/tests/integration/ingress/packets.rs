//! Packets that are not the plainest: with options and extension headers, in fragments.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread::scope,
    time::Duration,
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};
use srcip_tests::{
    Family, PATIENCE,
    cluster::{Cluster, agent::Agents, balancer, kube_proxy, node::PodNetwork, service::Service},
    host::Host,
    options,
    peer::APPLICATION_PORT,
};

/// A pod on node 1, and Services for it of both protocols, with kube-proxy's rules and srcip on every node.
struct Both {
    tcp: Service,
    udp: Service,
    agents: Agents,
    pod: Host,
    /// Last, so that it goes last.
    cluster: Cluster,
}

impl Both {
    fn new(options: &str) -> Self {
        let mut cluster = Cluster::new(PodNetwork::PointToPoint).unwrap();
        let pod = cluster.pod(1, "app").unwrap();
        let tcp = Service::new("tcp").endpoint(1, &pod, APPLICATION_PORT);
        let udp = Service::new("udp").ports(80, 30081, 31081).udp().endpoint(1, &pod, APPLICATION_PORT);
        kube_proxy::install(&cluster, &[&tcp, &udp]).unwrap();
        let agents = Agents::start(&cluster, &[&tcp, &udp], options).unwrap();
        Self { tcp, udp, agents, pod, cluster }
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

/// As many kinds as there are.
fn carry_all_options(socket: &UdpSocket, family: Family) {
    options::carry_options(socket, family).unwrap();
    if family == Family::V6 {
        options::carry_destination_options(socket).unwrap();
    }
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
    let test = Both::new("");
    let data: Vec<u8> = (0..1_000_000_u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let application = test.pod.socket(family, APPLICATION_PORT);
        let listener = test.pod.netns().run(|| TcpListener::bind(application).unwrap()).unwrap();
        // What is accepted inherits them for IPv6, and has those of the client's SYN for IPv4.
        options::carry_options(&listener, family).unwrap();
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        options::ask_for_options(&pod, family).unwrap();
        carry_all_options(&pod, family);
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
            carry_all_options(&caller, family);
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

/// More than fits into one packet of 1500 octets.
const LARGE: usize = 3000;

/// A client of the UDP Service.
struct Asker<'a> {
    test: &'a Both,
    pod: &'a UdpSocket,
    caller: UdpSocket,
}

impl<'a> Asker<'a> {
    fn new(test: &'a Both, pod: &'a UdpSocket, family: Family) -> Self {
        let caller = udp(&test.cluster.client, family, 0);
        // It takes nothing from another address.
        caller.connect(test.udp.dialled(family)).unwrap();
        for socket in [pod, &caller] {
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        }
        Self { test, pod, caller }
    }

    /// Asks with a datagram and is answered with another one, until it arrives: as with any network, one may be lost,
    /// be it because its size was too much. Returns whom the application saw.
    #[track_caller]
    fn ask(&self, question: usize, answer: usize) -> IpAddr {
        let mut buffer = [0; 2 * LARGE];
        for _ in 0..60 {
            // It may be told first that the last one was too large.
            let _ = self.caller.send(&vec![7; question]);
            let Ok((got, peer)) = self.pod.recv_from(&mut buffer) else { continue };
            if got != question {
                // What was asked before, and was late.
                continue;
            }
            self.pod.send_to(&vec![8; answer], peer).unwrap();
            if self.caller.recv(&mut buffer).is_ok_and(|got| (got, buffer[0]) == (answer, 8)) {
                return peer.ip();
            }
        }
        let logs = [1, 2].map(|node| self.test.agents.log(node));
        panic!("{question} octets, and {answer} back: no answer\n{}", logs.join("\n"));
    }
}

#[test]
fn fragments_keep_the_clients_address_too() {
    let test = Both::new("");
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        balancer::route(&test.cluster, &[1]).unwrap();
        let asker = Asker::new(&test, &pod, family);
        for (question, answer) in [(1000, 1000), (1000, LARGE), (LARGE, 1000), (LARGE, LARGE)] {
            assert_eq!(asker.ask(question, answer), client, "{family:?}: {question}, {answer}");
        }
    }
    assert_eq!(test.counter(1, "passed_fragments"), 0);
}

/// Of one that does not fit into the tunnel, the sender is told, where the protocol has it that routers cut nothing;
/// else it goes kube-proxy's way.
#[test]
fn fragments_go_through_the_tunnel_where_they_fit() {
    let test = Both::new("");
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        balancer::route(&test.cluster, &[2]).unwrap();
        let seen = Asker::new(&test, &pod, family).ask(LARGE, LARGE);
        match family {
            Family::V4 => assert_ne!(seen, client, "masqueraded, as kube-proxy does"),
            Family::V6 => assert_eq!(seen, client),
        }
        test.cluster.client.ip("link set eth0 mtu 1400").unwrap();
        // It takes no larger ones either.
        assert_eq!(Asker::new(&test, &pod, family).ask(LARGE, 1000), client);
        test.cluster.client.ip("link set eth0 mtu 1500").unwrap();
    }
    assert!(test.counter(2, "passed_too_big") > 0);
    assert!(test.counter(2, "too_big_told") > 0);
}

/// So are the answers that go back the way the client came: the pod makes smaller fragments.
#[test]
fn fragments_come_back_through_the_tunnel() {
    let test = Both::new("--return-path tunnel");
    for family in Family::BOTH {
        let client = test.cluster.client.address(family);
        let pod = udp(&test.pod, family, APPLICATION_PORT);
        balancer::route(&test.cluster, &[2]).unwrap();
        assert_eq!(Asker::new(&test, &pod, family).ask(1000, LARGE), client, "{family:?}");
    }
    assert_eq!(test.counter(1, "too_big_told"), 2);
    assert!(test.counter(1, "replies_to_node") > 0);
}
