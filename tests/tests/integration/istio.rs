//! Pods of Istio's, with the rules of istio-init really in force.

use std::io::{Read as _, Write as _};

use srcip_tests::{
    Family, client,
    mesh::{ISTIO_ID, install_istio_tproxy, istio_redirect},
    peer::{self, Clients},
    process::run,
    proxy::{Kind, Proxy, with_istios_mark},
    wait_until,
};

use crate::{
    detach::traces,
    mirror::{ASIDE, EPHEMERAL, assert_all, mirrored_ports},
    scenario::{Engine, PORT, Scenario},
};

crate::engines!(
    beside_tproxy_rules,
    before_tproxy_rules,
    no_client_hangs,
    resets_reach_the_client,
    beside_redirect_rules
);

/// The sidecar as istiod sets it up for TPROXY: root, with a group that the rules know.
fn sidecar(scenario: &mut Scenario, kind: Kind) {
    let identity = format!("--regid {ISTIO_ID} --clear-groups");
    let mut proxy = Proxy::spawn_as(&scenario.pod, kind, &identity, with_istios_mark).unwrap();
    proxy.wait_listening(&scenario.pod).unwrap();
    scenario.proxy = Some(proxy);
}

fn http(engine: Engine) -> Scenario {
    let mut scenario = Scenario::empty(engine);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    sidecar(&mut scenario, Kind::Envoy);
    scenario
}

/// What `srcip attach` says on stderr.
fn warnings(scenario: &Scenario) -> String {
    let arguments = scenario.srcip.attach_arguments(&scenario.pod, scenario.engine.option());
    let output = run(&mut scenario.srcip.command(&arguments)).unwrap();
    String::from_utf8(output.stderr).unwrap()
}

/// What `srcip doctor` says of the pod, whatever it makes of it.
fn doctor(scenario: &Scenario) -> String {
    let arguments = format!("doctor --netns {}", scenario.pod.path().display());
    String::from_utf8(scenario.srcip.output(&arguments).unwrap().stdout).unwrap()
}

/// Attached after istio-init: both keep the address, and the rules work on once srcip has gone.
fn beside_tproxy_rules(engine: Engine) {
    let mut scenario = http(engine);
    install_istio_tproxy(&scenario.pod).unwrap();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    let before = traces(&scenario.pod);
    // The same route for the same mark, by somebody else, is nothing to warn of.
    let warnings = warnings(&scenario);
    assert!(!warnings.contains("another component") && !warnings.contains("REDIRECT"), "{warnings}");
    for family in Family::BOTH {
        (0..5).for_each(|_| scenario.assert_kept(family));
    }
    // The proxy may have used the upstream connections of before srcip; of a new application, it has none.
    scenario.restart_application();
    let upstream = scenario.counter("upstream");
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    assert_eq!(scenario.counter("upstream"), upstream + 2);
    // Istio's rules come before `sk_lookup`, and after `tc`.
    assert_eq!(scenario.counter("steered") > 0, engine == Engine::Tc);
    assert!(doctor(&scenario).contains("by TPROXY, beside which srcip works"));
    scenario.srcip.detach(&scenario.pod, "").unwrap();
    assert_eq!(traces(&scenario.pod), before);
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}

/// Attached before istio-init, as by the CNI plugin: Istio's own route is there when srcip's goes.
fn before_tproxy_rules(engine: Engine) {
    let scenario = http(engine);
    scenario.attach("");
    install_istio_tproxy(&scenario.pod).unwrap();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    scenario.srcip.detach(&scenario.pod, "").unwrap();
    for family in Family::BOTH {
        (0..5).for_each(|_| scenario.assert_kept(family));
    }
}

/// With Istio's rules alone, clients hang on mirrored ports (`mirror.rs`); with srcip beside them, none does.
fn no_client_hangs(engine: Engine) {
    let mut scenario = Scenario::empty(engine);
    scenario.application = Some(peer::echo(&scenario.pod, &["[::]:8000"]).unwrap());
    sidecar(&mut scenario, Kind::EnvoyTcp);
    install_istio_tproxy(&scenario.pod).unwrap();
    scenario.attach("");
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        let from = scenario.client.address(family);
        let held = Clients { from: vec![from], from_port: Some(ASIDE), ..Clients::new(to, 500, 50) };
        let mut held = held.hold(&scenario.client).unwrap();
        assert_all(&held.opened().unwrap(), 500);
        assert_eq!(mirrored_ports(&scenario.pod, from), [0; 0]);
        let sweep = Clients {
            from: vec![from],
            from_port: Some(*EPHEMERAL.start()),
            ..Clients::new(to, EPHEMERAL.len(), 32)
        };
        assert_all(&sweep.visit(&scenario.client).unwrap(), EPHEMERAL.len());
        assert_all(&held.check().unwrap(), 500);
        held.close().unwrap();
    }
}

/// REDIRECT takes connections before srcip sees them: the address is lost as before, nothing breaks, and
/// whoever looks is told.
fn beside_redirect_rules(engine: Engine) {
    let mut scenario = Scenario::empty(engine);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let identity = format!("--reuid {ISTIO_ID} --regid {ISTIO_ID} --clear-groups");
    let mut proxy = Proxy::spawn_as(&scenario.pod, Kind::EnvoyRedirect, &identity, |config| config).unwrap();
    proxy.wait_listening(&scenario.pod).unwrap();
    scenario.proxy = Some(proxy);
    scenario.pod.feed("iptables-restore", &istio_redirect(Family::V4, ISTIO_ID)).unwrap();
    let warnings = warnings(&scenario);
    assert!(warnings.contains("rules in the pod take connections to port 15006 by REDIRECT"), "{warnings}");
    assert!(warnings.contains("sidecar.istio.io/interceptionMode: TPROXY"), "{warnings}");
    let to = scenario.pod.socket(Family::V4, PORT);
    let seen = client::ask_once(&scenario.client, to).unwrap();
    assert_eq!(seen.peer.ip().to_string(), "127.0.0.6");
    assert_eq!(scenario.counter("upstream"), 0);
    let doctor = doctor(&scenario);
    assert!(doctor.contains("REDIRECT --to-ports 15006"), "{doctor}");
}

/// Who sends on a connection that its other end has given up gets a reset, at once.
fn resets_reach_the_client(engine: Engine) {
    let mut scenario = http(engine);
    scenario.attach("");
    let problems =
        |scenario: &Scenario| scenario.srcip.status(&scenario.pod).unwrap()["problems"].to_string();
    assert_eq!(problems(&scenario), "[]");
    install_istio_tproxy(&scenario.pod).unwrap();
    assert!(problems(&scenario).contains("net.ipv4.fwmark_reflect"), "{}", problems(&scenario));
    scenario.attach("");
    assert_eq!(problems(&scenario), "[]");
    for family in Family::BOTH {
        let mut stream = client::connect(&scenario.client, scenario.pod.socket(family, PORT)).unwrap();
        client::ask(&mut stream).unwrap();
        scenario.proxy.take().unwrap().kill();
        // After the FIN, the first byte is answered by a reset.
        let mut end = [0; 1];
        assert_eq!(stream.read(&mut end).unwrap(), 0);
        stream.write_all(b"x").unwrap();
        wait_until("the reset", || stream.take_error().unwrap().is_some());
        sidecar(&mut scenario, Kind::Envoy);
    }
}
