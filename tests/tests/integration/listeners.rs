//! The proxy comes and goes; connections find it.

use srcip_tests::{
    Family,
    load::Load,
    peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(started_after_attach, restarted, haproxy_reload, nginx_reload, envoy_hot_restart,);

fn started_after_attach(engine: Engine) {
    for kind in Kind::HTTP {
        let mut scenario = Scenario::empty(engine);
        scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
        scenario.attach("");
        scenario.proxy = Some(Proxy::start(&scenario.pod, kind).unwrap());
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
}

/// Killed and started again: no connection ever passes the missing proxy by.
fn restarted(engine: Engine) {
    for kind in Kind::HTTP {
        let mut scenario = Scenario::http(engine, kind);
        let to = scenario.pod.socket(Family::V4, PORT);
        let load = Load::start(&scenario.client, to, 2).unwrap();
        for _ in 0..2 {
            load.wait_for(20);
            scenario.proxy.take().unwrap().kill();
            scenario.pod.wait_closed(15006).unwrap();
            scenario.proxy = Some(Proxy::start(&scenario.pod, kind).unwrap());
        }
        load.wait_for(50);
        let report = load.stop().unwrap();
        assert_eq!((report.bypassed, report.lost), (0, 0), "{kind:?}: {report:?}");
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
}

fn haproxy_reload(engine: Engine) {
    handover(engine, Kind::Haproxy, |proxy, scenario| proxy.reload(&scenario.pod).unwrap());
}

fn nginx_reload(engine: Engine) {
    handover(engine, Kind::Nginx, |proxy, scenario| proxy.reload(&scenario.pod).unwrap());
}

fn envoy_hot_restart(engine: Engine) {
    handover(engine, Kind::Envoy, |proxy, scenario| proxy.hot_restart(&scenario.pod).unwrap());
}

/// One proxy hands over to the next under load: none fails, none passes it by.
fn handover(engine: Engine, kind: Kind, mut hand_over: impl FnMut(&mut Proxy, &Scenario)) {
    let mut scenario = Scenario::http(engine, kind);
    let mut proxy = scenario.proxy.take().unwrap();
    for family in Family::BOTH {
        let load = Load::start(&scenario.client, scenario.pod.socket(family, PORT), 2).unwrap();
        for _ in 0..3 {
            load.wait_for(40);
            hand_over(&mut proxy, &scenario);
        }
        load.wait_for(100);
        let report = load.stop().unwrap();
        assert!(report.total >= 220, "{report:?}");
        assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0), "{kind:?}");
    }
}

/// Members of a reuseport group come and go in any order; as long as one lives, it is found.
#[test]
fn any_member_of_a_reuseport_group_will_do() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.attach("");
    let mut members: Vec<Proxy> = Vec::new();
    for round in 0..6 {
        members.push(Proxy::spawn(&scenario.pod, Kind::Haproxy, |config| config).unwrap());
        scenario.wait_for_listeners(members.len());
        if members.len() == 3 {
            // The oldest, the newest, the one in the middle: whoever was registered first is gone.
            members.remove([0, 2, 1][round % 3]).kill();
            scenario.wait_for_listeners(members.len());
        }
        for _ in 0..10 {
            scenario.assert_kept(Family::V4);
            scenario.assert_kept(Family::V6);
        }
        let status = scenario.srcip.status(&scenario.pod).unwrap();
        assert_eq!(status["registered_listeners"], members.len(), "{status}");
    }
}

/// A proxy that stops listening and starts again with the same socket: HAProxy pauses a frontend.
#[test]
fn a_listener_that_pauses() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    let proxy = scenario.proxy.as_ref().unwrap();
    for _ in 0..3 {
        proxy.admin(&scenario.pod, "disable frontend inbound").unwrap();
        scenario.pod.wait_closed(15006).unwrap();
        let to = scenario.pod.socket(Family::V4, PORT);
        let error = srcip_tests::client::connect(&scenario.client, to).unwrap_err();
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
        proxy.admin(&scenario.pod, "enable frontend inbound").unwrap();
        scenario.wait_for_listeners(1);
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
}

/// A proxy that takes its source port at `bind` shows in the status, and the option cures it. socat is
/// one: it binds without `IP_BIND_ADDRESS_NO_PORT`.
#[test]
fn a_proxy_that_takes_its_port_at_bind() {
    for engine in [Engine::SkLookup, Engine::Tc] {
        let mut scenario = Scenario::empty(engine);
        scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
        let client = scenario.client.address(Family::V4);
        let to = scenario.pod.socket(Family::V4, PORT);
        let mut socat = scenario.pod.command("socat").unwrap();
        socat.arg("TCP4-LISTEN:15006,fork,reuseaddr,backlog=64");
        socat.arg(format!("TCP4:{to},bind={client},ip-transparent"));
        let _socat = scenario.pod.start("socat", socat).unwrap();
        scenario.pod.wait_open(15006).unwrap();
        scenario.attach("");
        let seen = scenario.ask(Family::V4);
        assert_eq!(seen.peer.ip(), client);
        assert!((32768..61000).contains(&seen.peer.port()), "a port that clients use: {seen:?}");
        assert_eq!(scenario.counter("upstream_port_kept"), 1);
        let problems = scenario.srcip.status(&scenario.pod).unwrap()["problems"].to_string();
        assert!(problems.contains("attach with --upstream-port-at bind"), "{problems}");

        scenario.attach("--upstream-port-at bind");
        for _ in 0..50 {
            let seen = scenario.ask(Family::V4);
            assert_eq!(seen.peer.ip(), client);
            assert!(!(32768..61000).contains(&seen.peer.port()), "{seen:?}");
        }
        assert_eq!((scenario.counter("upstream"), scenario.counter("upstream_port_kept")), (51, 1));
    }
}
