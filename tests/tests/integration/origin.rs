//! The application sees the client's address: in HTTP, at its socket, in the proxy's log.

use std::net::SocketAddr;

use serde_json::Value;
use srcip_tests::{Family, PATIENCE, client, proxy::Kind, wait_for};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(envoy, haproxy, nginx);

fn envoy(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Envoy);
    every_view(&scenario);

    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        let mut stream = client::connect(&scenario.client, to).unwrap();
        let own = stream.local_addr().unwrap();
        client::http_get(&mut stream, "/logged").unwrap();
        let proxy = scenario.proxy.as_ref().unwrap();
        let lines = wait_for("the proxy's line", || {
            let log = proxy.access_log();
            let lines: Vec<Value> = log
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .filter(|line: &Value| line["path"] == "/logged")
                .filter(|line| line["downstream_remote_address"] == own.to_string())
                .collect();
            (!lines.is_empty()).then_some(lines)
        });
        let [line] = &lines[..] else { panic!("{lines:?}") };
        assert_eq!(line["downstream_local_address"], to.to_string());
        assert_eq!(line["upstream_host"], to.to_string());
        let upstream = line["upstream_local_address"].as_str().unwrap();
        let upstream: SocketAddr = upstream.parse().unwrap();
        assert_eq!(upstream.ip(), own.ip());
    }
}

fn haproxy(engine: Engine) {
    every_view(&Scenario::http(engine, Kind::Haproxy));
}

fn nginx(engine: Engine) {
    every_view(&Scenario::http(engine, Kind::Nginx));
}

fn every_view(scenario: &Scenario) {
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        assert_eq!(client::origin(&scenario.client, to).unwrap(), scenario.client.address(family));
        scenario.assert_kept(family);

        // While a request is being answered, its sockets in the pod: the proxy's accepted one has the
        // original destination for a name, the application's has the client for a peer.
        let mut stream = client::connect(&scenario.client, to).unwrap();
        let own = stream.local_addr().unwrap();
        let application = scenario.application.as_ref().unwrap();
        let held = application.log().matches("holding ").count();
        std::thread::scope(|scope| {
            let request = scope.spawn(|| client::http_get(&mut stream, "/hold").unwrap());
            // By then there are both legs.
            let peer: SocketAddr = wait_for("the application has the request", || {
                let log = application.log();
                let mut lines =
                    log[..log.rfind('\n')? + 1].lines().filter(|line| line.starts_with("holding "));
                lines.nth(held)?.strip_prefix("holding ")?.parse().ok()
            });
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            assert_eq!(peer.ip(), own.ip());
            let sockets = scenario.pod.tcp_sockets().unwrap();
            let downstream = sockets.iter().find(|s| s.is_connection() && s.remote == own).unwrap();
            assert_eq!(downstream.local, to);
            assert!(sockets.iter().any(|s| s.local == to && s.remote == peer), "{peer}: {sockets:?}");
            // The same as `ss` in the pod shows it.
            let ss = scenario.pod.sh("ss -Htn").unwrap();
            let mapped = format!("[::ffff:{}]:{}", peer.ip(), peer.port());
            assert!(ss.contains(&peer.to_string()) || ss.contains(&mapped), "{peer} is not in\n{ss}");
            // Asked by the pod itself, past the proxy.
            let own_port = (std::net::Ipv4Addr::LOCALHOST, PORT).into();
            client::http_get(&mut client::connect(&scenario.pod, own_port).unwrap(), "/release").unwrap();
            request.join().unwrap();
        });
    }
    let steered = scenario.counter("steered");
    assert_eq!(steered, 6, "one per connection");
    assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
    assert_eq!(scenario.counter("upstream_port_kept"), 0);
}

/// A mapped or dual-stack listener alone serves both families.
#[test]
fn dual_stack_listener() {
    for engine in [Engine::SkLookup, Engine::Tc] {
        let scenario = Scenario::http(engine, Kind::Haproxy);
        let listeners = scenario.srcip.status(&scenario.pod).unwrap()["listeners"].clone();
        assert_eq!(listeners, serde_json::json!(["[::]:15006"]), "bind :::15006 v4v6");
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
}

/// An IPv6-only listener gets IPv6; IPv4 then has no proxy and is refused, not misdelivered.
#[test]
fn v6_only_listener() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(srcip_tests::peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = srcip_tests::proxy::Proxy::start_with(&scenario.pod, Kind::Haproxy, |config| {
        config.replace(":::15006 v4v6", ":::15006 v6only")
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("");
    scenario.assert_kept(Family::V6);
    let error = client::connect(&scenario.client, scenario.pod.socket(Family::V4, PORT)).unwrap_err();
    assert!(format!("{error:#}").contains("refused"), "{error:#}");
}

/// The proxy may listen on loopback alone: nothing but steered connections can then reach it.
#[test]
fn loopback_only_listener() {
    for engine in [Engine::SkLookup, Engine::Tc] {
        let mut scenario = Scenario::empty(engine);
        scenario.application = Some(srcip_tests::peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
        let proxy = srcip_tests::proxy::Proxy::start_with(&scenario.pod, Kind::Haproxy, |config| {
            config.replace("bind :::15006 v4v6", "bind 127.0.0.1:15006\n    bind [::1]:15006")
        });
        scenario.proxy = Some(proxy.unwrap());
        scenario.attach("");
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
}

/// An address that the pod gets after the attach is served like the others.
#[test]
fn address_added_later() {
    for engine in [Engine::SkLookup, Engine::Tc] {
        let mut scenario = Scenario::http(engine, Kind::Haproxy);
        for address in ["10.133.200.9", "fd13:37::200:9"] {
            let address: std::net::IpAddr = address.parse().unwrap();
            scenario.pod.add_address(address).unwrap();
            let to = SocketAddr::new(address, PORT);
            let seen = client::ask_once(&scenario.client, to).unwrap();
            assert_eq!(seen.local, to);
            assert!(seen.proxied);
            let upstream = scenario.srcip.counter(&scenario.pod, "upstream").unwrap();
            assert!(upstream > 0);
        }
        assert_eq!(scenario.counter("upstream"), 2);
    }
}

/// UDP passes untouched.
#[test]
fn udp_is_left_alone() {
    use std::net::UdpSocket;
    for engine in [Engine::SkLookup, Engine::Tc] {
        let scenario = Scenario::http(engine, Kind::Haproxy);
        for (family, any) in [(Family::V4, "0.0.0.0:0"), (Family::V6, "[::]:0")] {
            let to = scenario.pod.socket(family, PORT);
            let server = scenario.pod.netns().run(|| UdpSocket::bind(to)).unwrap().unwrap();
            let client = scenario.client.netns().run(|| UdpSocket::bind(any)).unwrap().unwrap();
            for socket in [&server, &client] {
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
            }
            client.send_to(b"ping", to).unwrap();
            let mut buffer = [0; 8];
            let (length, from) = server.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..length], from.ip()), (&b"ping"[..], scenario.client.address(family)));
            server.send_to(b"pong", from).unwrap();
            assert_eq!(client.recv_from(&mut buffer).unwrap(), (4, to));
        }
        assert_eq!(scenario.counter("steered"), 0);
    }
}
