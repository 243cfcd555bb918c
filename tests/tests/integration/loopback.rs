//! What a pod says to itself is never steered.

use std::net::{IpAddr, SocketAddr};

use srcip_tests::{
    Family, peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(a_pod_calls_itself, an_application_on_loopback);

fn a_pod_calls_itself(engine: Engine) {
    for kind in Kind::HTTP {
        let mut scenario = Scenario::http(engine, kind);
        // A second address, from which and to which the pod may call as well.
        let second: IpAddr = "10.133.201.1".parse().unwrap();
        scenario.pod.add_address(second).unwrap();
        scenario.attach("");
        let upstream = scenario.counter("upstream");
        let own = ["127.0.0.1", "127.0.0.6", "::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
        let targets = own.into_iter().chain(Family::BOTH.map(|f| scenario.pod.address(f))).chain([second]);
        for target in targets {
            let seen = peer::ask(&scenario.pod, None, SocketAddr::new(target, PORT)).unwrap();
            assert!(!seen.proxied, "{kind:?} {target}: {seen:?}");
        }
        // From one of its addresses to another one.
        let from = SocketAddr::new(scenario.pod.address(Family::V4), 0);
        let seen = peer::ask(&scenario.pod, Some(from), SocketAddr::new(second, PORT)).unwrap();
        assert!(!seen.proxied, "{seen:?}");
        assert_eq!((scenario.counter("steered"), scenario.counter("upstream")), (0, upstream));
    }
}

/// An application that listens on loopback alone is reached if the proxy is told to dial loopback; it
/// still sees the client's address.
fn an_application_on_loopback(engine: Engine) {
    let mut scenario = Scenario::empty(engine);
    scenario.application = Some(peer::application(&scenario.pod, &["127.0.0.1:8000", "[::1]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::Haproxy, |config| {
        // A listener for each family: from a dual-stack one an IPv4 client is an IPv6 one to HAProxy.
        config
            .replace("bind :::15006 v4v6", "bind 0.0.0.0:15006\n    bind [::]:15006 v6only")
            .replace("default_backend", "use_backend v6 if !{ src 0.0.0.0/0 }\n    default_backend")
            .replace("server original 0.0.0.0:0", "server local 127.0.0.1:8000")
            + "\nbackend v6\n    source 0.0.0.0 usesrc clientip\n    server local [::1]:8000\n"
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("");
    for family in Family::BOTH {
        let seen = scenario.ask(family);
        assert!(seen.proxied);
        assert_eq!(seen.peer.ip(), scenario.client.address(family));
        assert!(seen.local.ip().is_loopback());
    }
}
