//! Mirror tuples: inside the pod, the application's end of an upstream leg carries the tuple that a
//! connection from the client's own port would carry. srcip keeps the two apart.

use srcip_tests::{
    Family, client,
    host::Host,
    mesh::install_istio_tproxy,
    peer::{self, Clients, Opened},
    process::Process,
    proxy::{Kind, Proxy, with_istios_mark},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(a_client_uses_every_port, twenty_thousand_of_one_client, a_port_of_srcips_own_range);

/// The system's ephemeral ports.
pub const EPHEMERAL: std::ops::RangeInclusive<u16> = 32768..=60999;
/// Ports that are neither ephemeral nor srcip's.
pub const ASIDE: u16 = 2000;

pub fn assert_all(opened: &Opened, count: usize) {
    assert_eq!(opened.errors.iter().take(5).collect::<Vec<_>>(), [&""; 0]);
    assert_eq!(opened.good, count);
}

/// 500 upstream connections of one client are held open while it connects from every ephemeral port.
fn a_client_uses_every_port(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        let from = vec![scenario.client.address(family)];
        let held = Clients { from: from.clone(), from_port: Some(ASIDE), ..Clients::new(to, 500, 50) };
        let mut held = held.hold(&scenario.client).unwrap();
        assert_all(&held.opened().unwrap(), 500);

        let count = EPHEMERAL.len();
        let sweep = Clients { from, from_port: Some(*EPHEMERAL.start()), ..Clients::new(to, count, 32) };
        assert_all(&sweep.visit(&scenario.client).unwrap(), count);
        // Nobody else was disturbed.
        assert_all(&held.check().unwrap(), 500);
        held.close().unwrap();
    }
    // Each made one connection to the application: none of those was taken for a client's and led to the proxy once
    // more. `client_port_in_upstream_range` cannot tell: a last acknowledgement that is repeated finds nobody, is
    // looked up as a SYN would be, and counts.
    assert_eq!(scenario.counter("upstream"), 2 * (500 + EPHEMERAL.len() as u64));
    assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
}

/// Enough proxies and applications for `connections` at once: a process has 20,000 descriptors on some
/// machines, and a proxied connection takes two of the proxy's.
fn crowd(scenario: &mut Scenario, connections: usize) -> (Vec<Proxy>, Vec<Process>) {
    let applications = (0..connections.div_ceil(12_000))
        .map(|_| peer::echo(&scenario.pod, &["[::]:8000"]).unwrap())
        .collect();
    // The kernel spreads them over the members of the reuseport group, not quite evenly.
    let proxies = (0..connections.div_ceil(6_500))
        .map(|i| {
            let proxy = Proxy::spawn(&scenario.pod, Kind::HaproxyTcp, |config| config).unwrap();
            // All of them, or the first ones get more than they can take.
            scenario.wait_for_listeners(i + 1);
            proxy
        })
        .collect();
    scenario.attach("");
    (proxies, applications)
}

/// A gateway is one client.
fn twenty_thousand_of_one_client(engine: Engine) {
    let mut scenario = Scenario::empty(engine);
    let _crowd = crowd(&mut scenario, 20_000);
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        // Two processes, as one has too few descriptors; one address.
        let hold = |from_port| Clients { from_port: Some(from_port), ..Clients::new(to, 10_000, 100) };
        let mut held: Vec<_> = [32768, 45000].map(|port| hold(port).hold(&scenario.client).unwrap()).into();
        for held in &mut held {
            assert_all(&held.opened().unwrap(), 10_000);
        }
        let upstream = || scenario.srcip.status(&scenario.pod).unwrap()["upstream_connections"].clone();
        assert_eq!(upstream(), 20_000);
        for held in &mut held {
            assert_all(&held.check().unwrap(), 10_000);
        }
        assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
        held.into_iter().for_each(|held| held.close().unwrap());
        let deadline = std::time::Instant::now() + srcip_tests::PATIENCE;
        while upstream() != 0 {
            assert!(std::time::Instant::now() < deadline, "connections that do not end");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}

/// 40,000 of several clients. Source ports are per client, so it is the number of one that matters.
#[test]
fn forty_thousand_of_several_clients() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    let mut client = scenario.world.host("several").unwrap();
    scenario.world.add_addresses(&mut client, 4).unwrap();
    let _crowd = crowd(&mut scenario, 40_000);
    let to = scenario.pod.socket(Family::V4, PORT);
    let mut held: Vec<_> = client
        .addresses(Family::V4)
        .into_iter()
        .map(|address| {
            let clients = Clients { from: vec![address], ..Clients::new(to, 10_000, 100) };
            clients.hold(&client).unwrap()
        })
        .collect();
    for held in &mut held {
        assert_all(&held.opened().unwrap(), 10_000);
    }
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert_eq!(status["upstream_connections"], 40_000);
    for held in &mut held {
        assert_all(&held.check().unwrap(), 10_000);
    }
    assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
    held.into_iter().for_each(|held| held.close().unwrap());
}

/// What srcip cannot exclude, a client that comes from srcip's own range, is counted; its port is then
/// left alone by what comes after.
fn a_port_of_srcips_own_range(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
    scenario.attach("--upstream-ports 30000-30099");
    let to = scenario.pod.socket(Family::V4, PORT);
    let mut first =
        Clients { from_port: Some(30050), ..Clients::new(to, 1, 1) }.hold(&scenario.client).unwrap();
    assert_all(&first.opened().unwrap(), 1);
    assert_eq!(scenario.counter("client_port_in_upstream_range"), 1);
    // Most of the 98 ports that are left, without meeting the one that the client has.
    let mut rest =
        Clients { from_port: Some(ASIDE), ..Clients::new(to, 70, 1) }.hold(&scenario.client).unwrap();
    assert_all(&rest.opened().unwrap(), 70);
    assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
    // More than there are: the kernel chooses, the connection works, and it shows.
    let more = Clients { from_port: Some(ASIDE + 100), ..Clients::new(to, 60, 1) };
    let mut more = more.hold(&scenario.client).unwrap();
    assert_all(&more.opened().unwrap(), 60);
    assert!(scenario.counter("upstream_ports_exhausted") >= 32);
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert!(status["problems"].to_string().contains("widen --upstream-ports"), "{status}");
    for (held, count) in [(&mut first, 1), (&mut rest, 70), (&mut more, 60)] {
        assert_all(&held.check().unwrap(), count);
    }
}

/// With Istio's rule set and the same Envoy, a client hangs on every port that is mirrored.
#[test]
fn istios_tproxy_hangs_on_mirrored_ports() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    let pod = &scenario.pod;
    scenario.application = Some(peer::echo(pod, &["[::]:8000"]).unwrap());
    scenario.proxy = Some(Proxy::start_with(pod, Kind::EnvoyTcp, with_istios_mark).unwrap());
    install_istio_tproxy(pod).unwrap();

    let to = pod.socket(Family::V4, PORT);
    let from = scenario.client.address(Family::V4);
    let held = Clients { from: vec![from], from_port: Some(ASIDE), ..Clients::new(to, 500, 50) };
    let mut held = held.hold(&scenario.client).unwrap();
    assert_all(&held.opened().unwrap(), 500);
    let mirrored: Vec<u16> = mirrored_ports(pod, from).into_iter().take(16).collect();
    assert_eq!(mirrored.len(), 16);
    let from_port = |port| Some(std::net::SocketAddr::new(from, port));
    // Another port works, so it is the mirrored ones that matter.
    let free = EPHEMERAL.rev().find(|port| !mirrored_ports(pod, from).contains(port)).unwrap();
    client::connect_from(&scenario.client, from_port(free), to).unwrap();
    std::thread::scope(|scope| {
        let client = &scenario.client;
        let attempt = |port| scope.spawn(move || client::connect_in_vain(client, from_port(port), to));
        let attempts: Vec<_> = mirrored.iter().map(|&port| (port, attempt(port))).collect();
        for (port, attempt) in attempts {
            let error = attempt.join().unwrap().unwrap();
            assert!(format!("{error:#}").contains("timed out"), "{port}: {error:#}");
        }
    });
}

/// The ports that the application's ends have for peers and that the client did not come from.
pub fn mirrored_ports(pod: &Host, client: std::net::IpAddr) -> Vec<u16> {
    let sockets = pod.tcp_sockets().unwrap();
    sockets
        .iter()
        .filter(|s| s.is_connection() && s.local.port() == PORT && s.remote.ip() == client)
        .map(|s| s.remote.port())
        .filter(|port| EPHEMERAL.contains(port))
        .collect()
}
