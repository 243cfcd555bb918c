//! Pods on one node do not disturb each other.

use srcip_tests::{
    Family, client, peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(same_ports_same_client, a_steered_client);

/// Two pods with the same ports and proxies, the same client in both.
fn same_ports_same_client(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    let other = scenario.world.host("other").unwrap();
    let _application = peer::application(&other, &["[::]:8000"]).unwrap();
    let proxy = Proxy::start(&other, Kind::Haproxy).unwrap();
    scenario.srcip.attach(&other, engine.option()).unwrap();
    for family in Family::BOTH {
        for _ in 0..5 {
            scenario.assert_kept(family);
            let seen = client::ask_once(&scenario.client, other.socket(family, PORT)).unwrap();
            assert_eq!(seen.peer.ip(), scenario.client.address(family));
            assert_eq!(seen.local, other.socket(family, PORT));
            assert!(seen.proxied);
        }
    }
    assert_eq!(scenario.counter("steered"), 10);
    assert_eq!(scenario.srcip.counter(&other, "steered").unwrap(), 10);

    // One proxy gone: the other one's pod does not notice.
    proxy.kill();
    other.wait_closed(15006).unwrap();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    scenario.srcip.detach(&other, "--now").unwrap();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}

/// A pod that is steered itself calls another one on its node, and the other way round.
fn a_steered_client(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Envoy);
    let other = scenario.world.host("other").unwrap();
    let _application = peer::application(&other, &["[::]:8000"]).unwrap();
    let _proxy = Proxy::start(&other, Kind::Envoy).unwrap();
    scenario.srcip.attach(&other, engine.option()).unwrap();
    for family in Family::BOTH {
        for (from, to) in [(&scenario.pod, &other), (&other, &scenario.pod)] {
            let seen = peer::ask(from, None, to.socket(family, PORT)).unwrap();
            assert_eq!(seen.peer.ip(), from.address(family));
            assert!(seen.proxied, "{seen:?}");
        }
    }
}
