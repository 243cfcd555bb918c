use std::{collections::HashMap, net::Ipv4Addr};

use proptest::prelude::*;
use srcip_common::telemetry::{ABORTED, CLOSE, NOBODY, PASSIVE};

use super::{
    super::record::{Origin, UpstreamHost, UpstreamLocal},
    *,
};

const NETNS: NetnsCookie = NetnsCookie(7);
const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const CLOCK: Clock = Clock { offset_ns: 0 };

fn socket(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

fn client(n: u8, port: u16) -> SocketAddr {
    socket(Ipv4Addr::new(10, 0, 1, n), port)
}

/// A joiner with a pod, which counts sockets and nanoseconds.
struct Bench {
    joiner: Joiner,
    workloads: Workloads,
    now: u64,
    socket: Socket,
}

impl Bench {
    fn new(proxy: Option<ProxyPorts>) -> Self {
        let mut workloads = Workloads::default();
        workloads.insert_for_tests(NETNS, "pod", [POD.into()], proxy);
        Self { joiner: Joiner::default(), workloads, now: 0, socket: 0 }
    }

    fn steered() -> Self {
        let mut ports = srcip_common::ports::PortSet::EMPTY;
        ports.insert(8000..=8001);
        Self::new(Some(ProxyPorts::Steered(Box::new(ports))))
    }

    fn event(&mut self, kind: u8, role: u8, socket: Socket, local: SocketAddr, remote: SocketAddr) -> Event {
        self.now += 1;
        Event {
            netns: NETNS.0,
            socket,
            time_ns: self.now,
            bytes_sent: 0,
            bytes_received: 0,
            local: local.ip().into(),
            remote: remote.ip().into(),
            local_port: local.port(),
            remote_port: remote.port(),
            srtt_us: 0,
            retransmits: 0,
            mark: 0,
            kind,
            role,
            closed_by: if kind == CLOSE { ABORTED } else { NOBODY },
            padding: 0,
            padding2: 0,
        }
    }

    fn open(&mut self, role: u8, local: SocketAddr, remote: SocketAddr) -> (Socket, Option<Record>) {
        self.socket += 1;
        let event = self.event(OPEN, role, self.socket, local, remote);
        (self.socket, self.joiner.event(&event, CLOCK, &self.workloads))
    }

    /// A client's connection to the pod's port 8000, or where the proxy gets it.
    fn downstream(&mut self, from: SocketAddr, port: u16) -> Socket {
        self.open(PASSIVE, socket(POD, port), from).0
    }

    /// A connection of the proxy's to the application, and that one's end of it.
    fn upstream(&mut self, from: SocketAddr, to: SocketAddr) -> (Socket, Record) {
        let (active, record) = self.open(ACTIVE, from, to);
        let (_, twin) = self.open(PASSIVE, to, from);
        assert_eq!(twin, None, "the application's end has nothing to say");
        (active, record.unwrap())
    }

    fn close(&mut self, socket: Socket) -> Option<Record> {
        // The kernel names the ends; only a connection that is not known by its number is found by them.
        let nowhere = SocketAddr::new([0, 0, 0, 0].into(), 0);
        let event = self.event(CLOSE, 0, socket, nowhere, nowhere);
        self.joiner.event(&event, CLOCK, &self.workloads)
    }
}

#[test]
fn the_only_connection_of_a_client() {
    let mut bench = Bench::steered();
    let other = bench.downstream(client(2, 50000), 8000);
    let downstream = bench.downstream(client(1, 40000), 8000);
    let (upstream, record) = bench.upstream(client(1, 61000), socket(POD, 8000));
    assert_eq!((record.leg, record.join), (Leg::Upstream, Some(Join::Exact)));
    assert_eq!(record.origin, Some(Origin(client(1, 40000))));
    assert_eq!(record.preserved, Some(true));
    let record = bench.close(downstream).unwrap();
    assert_eq!((record.leg, record.join), (Leg::Downstream, Some(Join::Exact)));
    assert_eq!(record.upstream_local_address, Some(UpstreamLocal(client(1, 61000))));
    assert_eq!(record.upstream_host, Some(UpstreamHost(socket(POD, 8000))));
    // Another connection of the same client that gets none of its own must have shared it.
    let second = bench.downstream(client(1, 40001), 8000);
    let record = bench.close(second).unwrap();
    assert_eq!((record.join, record.rule), (Some(Join::Inferred), Some(Rule::Pooled)));
    assert_eq!(record.preserved, Some(true));
    assert!(bench.close(upstream).is_some() && bench.close(other).is_some());
    assert!(bench.joiner.is_empty() && bench.joiner.is_tidy());
}

#[test]
fn several_of_a_client_are_inferred() {
    let mut bench = Bench::steered();
    bench.downstream(client(1, 40000), 8000);
    bench.downstream(client(1, 40001), 8000);
    let (_, record) = bench.upstream(client(1, 61000), socket(POD, 8000));
    assert_eq!((record.join, record.rule), (Some(Join::Inferred), Some(Rule::FirstWaiting)));
    assert_eq!(record.preserved, Some(true), "whichever it is, the address is the client's");
    // To another port, there is one that fits; a proxy may still go elsewhere.
    bench.downstream(client(1, 40002), 8001);
    let (_, record) = bench.upstream(client(1, 61001), socket(POD, 8001));
    assert_eq!((record.join, record.origin), (Some(Join::Inferred), Some(Origin(client(1, 40002)))));
}

#[test]
fn what_the_pod_says_to_itself_is_no_upstream_leg() {
    for mut bench in [Bench::new(Some(ProxyPorts::Redirected(15006))), Bench::steered(), Bench::new(None)] {
        bench.downstream(client(1, 40000), 15006);
        bench.downstream(client(1, 40001), 8000);
        for to in [6379, 8000] {
            let loopback = socket([127, 0, 0, 1], to);
            let (_, record) = bench.upstream(socket([127, 0, 0, 1], 50000 + to), loopback);
            assert_eq!((record.leg, record.origin), (Leg::Local, None), "{record:?}");
        }
    }
}

#[test]
fn a_proxy_that_hides_the_client() {
    let mut bench = Bench::new(Some(ProxyPorts::Redirected(15006)));
    let first = bench.downstream(client(1, 40000), 15006);
    let (_, record) = bench.upstream(socket([127, 0, 0, 6], 50000), socket(POD, 8000));
    assert_eq!((record.leg, record.preserved), (Leg::Upstream, Some(false)));
    assert_eq!((record.join, record.origin), (Some(Join::Exact), Some(Origin(client(1, 40000)))));
    // The second client shares that one.
    let second = bench.downstream(client(2, 40000), 15006);
    let record = bench.close(second).unwrap();
    assert_eq!((record.leg, record.preserved), (Leg::Downstream, Some(false)));
    assert_eq!((record.join, record.rule), (Some(Join::Inferred), Some(Rule::Pooled)));
    // Where the proxy dials from Istio's address, it does not dial from another.
    let (_, record) = bench.upstream(socket(POD, 50001), socket(POD, 8000));
    assert_eq!(record.leg, Leg::Local);
    bench.close(first);
    // A proxy that dials from the pod's own address.
    let mut bench = Bench::new(Some(ProxyPorts::Redirected(15006)));
    bench.downstream(client(1, 40000), 15006);
    let (_, record) = bench.upstream(socket(POD, 50001), socket(POD, 8000));
    assert_eq!((record.leg, record.join), (Leg::Upstream, Some(Join::Inferred)));
    assert_eq!(record.preserved, Some(false));
}

#[test]
fn connections_from_before_are_never_exact_and_go() {
    let mut bench = Bench::steered();
    let mut event = bench.event(OPEN, PASSIVE, Socket::MAX, socket(POD, 8000), client(1, 40000));
    event.time_ns = 0;
    bench.joiner.was_open(&event, CLOCK, &bench.workloads);
    assert!(bench.joiner.has_unwatched());
    let (upstream, record) = bench.upstream(client(1, 61000), socket(POD, 8000));
    assert_eq!(record.join, Some(Join::Inferred));
    bench.close(upstream);
    // Its end may be told of all the same, by its ends.
    let event = bench.event(CLOSE, 0, 4711, socket(POD, 8000), client(1, 40000));
    assert_eq!(bench.joiner.event(&event, CLOCK, &bench.workloads), None);
    assert!(!bench.joiner.has_unwatched() && bench.joiner.is_empty() && bench.joiner.is_tidy());
}

#[test]
fn a_client_that_has_gone_may_have_caused_it() {
    let mut bench = Bench::steered();
    let gone = bench.downstream(client(1, 40000), 8000);
    bench.close(gone);
    bench.downstream(client(1, 40001), 8000);
    let (_, record) = bench.upstream(client(1, 61000), socket(POD, 8000));
    assert_eq!(record.join, Some(Join::Inferred));
    bench.now += UNSERVED_NS;
    bench.downstream(client(2, 40000), 8000);
    let (_, record) = bench.upstream(client(2, 61000), socket(POD, 8000));
    assert_eq!(record.join, Some(Join::Exact));
}

#[test]
fn after_a_loss_nothing_is_exact_and_what_is_gone_is_forgotten() {
    let mut bench = Bench::steered();
    let (kept, lost) = (client(1, 40000), client(2, 40000));
    bench.downstream(kept, 8000);
    bench.downstream(lost, 8000);
    bench.joiner.note_loss();
    let (_, record) = bench.upstream(client(1, 61000), socket(POD, 8000));
    assert_eq!(record.join, Some(Join::Inferred));
    let listed = bench.now + 1;
    bench.now = listed;
    // Opened after the list was made: it cannot be on it.
    bench.downstream(client(3, 40000), 8000);
    bench.joiner.retain(listed, |_, _, remote| remote != lost);
    assert_eq!(bench.joiner.len(), 3);
    bench.joiner.retain(u64::MAX - UNSERVED_NS, |_, _, _| false);
    assert!(bench.joiner.is_empty());
}

/// A client's connection to the simulated proxy.
#[derive(Clone, Copy)]
struct Simulated {
    socket: Socket,
    from: SocketAddr,
    open: bool,
    served: bool,
}

/// What a simulated proxy does next.
#[derive(Clone, Debug)]
enum Step {
    /// A client connects.
    Connect { client: u8, port: u8 },
    /// The proxy opens an upstream connection for one that is open, or its first for one that has gone.
    Dial { which: prop::sample::Index },
    /// A connection ends: a client's, or the proxy's.
    End { which: prop::sample::Index },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..3_u8, 0..2_u8).prop_map(|(client, port)| Step::Connect { client, port }),
        3 => any::<prop::sample::Index>().prop_map(|which| Step::Dial { which }),
        2 => any::<prop::sample::Index>().prop_map(|which| Step::End { which }),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    /// A proxy that knows whom it serves: what is called exact is so, and with original source the address
    /// is right in any case.
    #[test]
    fn exact_is_never_wrong(steps in steps(), hides: bool) {
        let proxy = ProxyPorts::Redirected(15006);
        let mut bench = if hides { Bench::new(Some(proxy)) } else { Bench::steered() };
        let mut clients: Vec<Simulated> = Vec::new();
        let mut dialled: Vec<Socket> = Vec::new();
        let mut next_port = 10000;
        let mut truth: HashMap<SocketAddr, SocketAddr> = HashMap::new();
        for step in steps {
            next_port += 1;
            match step {
                Step::Connect { client: n, port } => {
                    let from = client(n, next_port);
                    let port = if hides { 15006 } else { 8000 + u16::from(port) };
                    let socket = bench.downstream(from, port);
                    clients.push(Simulated { socket, from, open: true, served: false });
                }
                Step::Dial { which } if !clients.is_empty() => {
                    let chosen = which.index(clients.len());
                    let Simulated { from: served, open, served: before, .. } = clients[chosen];
                    if !open && before {
                        continue;
                    }
                    clients[chosen].served = true;
                    let from = if hides { socket([127, 0, 0, 6], next_port) } else { socket(served.ip(), next_port) };
                    truth.insert(from, served);
                    let (socket, record) = bench.upstream(from, socket(POD, 8000));
                    dialled.push(socket);
                    prop_assert_eq!(record.leg, Leg::Upstream);
                    if record.join == Some(Join::Exact) {
                        prop_assert_eq!(record.origin, Some(Origin(served)), "{:?}", record);
                    }
                    if let Some(origin) = record.origin.filter(|_| !hides) {
                        prop_assert_eq!(origin.ip(), served.ip());
                    }
                }
                Step::End { which } if which.index(2) == 0 && !dialled.is_empty() => {
                    let socket = dialled.swap_remove(which.index(dialled.len()));
                    prop_assert!(bench.close(socket).is_some());
                }
                Step::End { which } if !clients.is_empty() => {
                    let at = which.index(clients.len());
                    if std::mem::replace(&mut clients[at].open, false) {
                        let record = bench.close(clients[at].socket).unwrap();
                        if let (Some(Join::Exact), Some(upstream)) = (record.join, record.upstream_local_address) {
                            prop_assert_eq!(Some(&clients[at].from), truth.get(&upstream.0), "{:?}", record);
                        }
                    }
                }
                Step::Dial { .. } | Step::End { .. } => {}
            }
        }
        for client in clients.into_iter().filter(|client| client.open) {
            bench.close(client.socket);
        }
        for socket in dialled {
            bench.close(socket);
        }
        prop_assert!(bench.joiner.is_empty() && bench.joiner.is_tidy());
    }
}
