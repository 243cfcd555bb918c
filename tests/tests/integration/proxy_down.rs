//! The proxy does not listen.

use srcip_tests::{
    Family, client,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(pass);

fn pass(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    scenario.attach("--on-proxy-down pass");
    scenario.assert_kept(Family::V4);
    scenario.proxy.take().unwrap().kill();
    scenario.pod.wait_closed(15006).unwrap();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_direct(family));
    assert_eq!(scenario.counter("passed_proxy_down"), 2);
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Haproxy).unwrap());
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    assert_eq!(scenario.counter("passed_proxy_down"), 2);
}

/// The default: refused at once, with a reset, and counted.
#[test]
fn sk_lookup_refuses() {
    let mut scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.proxy.take().unwrap().kill();
    scenario.pod.wait_closed(15006).unwrap();
    for (i, family) in Family::BOTH.into_iter().enumerate() {
        let error = client::connect(&scenario.client, scenario.pod.socket(family, PORT)).unwrap_err();
        assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
        // At once: no SYN had to be sent again.
        let resent = scenario.client.sh("nstat -asz TcpRetransSegs").unwrap();
        assert!(resent.lines().any(|l| l.split_whitespace().take(2).eq(["TcpRetransSegs", "0"])), "{resent}");
        assert_eq!(scenario.counter("refused"), i as u64 + 1);
    }
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert!(status["problems"].to_string().contains("nothing listens on port 15006"), "{status}");
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Haproxy).unwrap());
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}

/// This engine can only drop, and says so.
#[test]
fn tc_drops() {
    let mut scenario = Scenario::http(Engine::Tc, Kind::Haproxy);
    scenario.proxy.take().unwrap().kill();
    scenario.pod.wait_closed(15006).unwrap();
    let to = scenario.pod.socket(Family::V4, PORT);
    // The SYN and its retransmissions after 1 and 3 s are dropped; the application never sees one.
    let error = client::connect_in_vain(&scenario.client, None, to).unwrap();
    assert!(format!("{error:#}").contains("timed out"), "{error:#}");
    assert!(scenario.counter("refused") >= 2);
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert!(status["missing_guarantees"].to_string().contains("dropped, not refused"), "{status}");
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Haproxy).unwrap());
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}
