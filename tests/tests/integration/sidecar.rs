//! What the sidecar needs: nothing to be handed connections, `CAP_NET_RAW` to connect from a client's address.
//! Envoy, as a user who is not root.

use serde_json::json;
use srcip_tests::{
    Family, client, peer,
    process::Process,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

/// Options of `setpriv`: a user with no capability, and with no way to get one.
const NOBODY: &str =
    "--reuid 1337 --regid 1337 --clear-groups --no-new-privs --bounding-set -all --inh-caps -all";
/// The same with one.
const NET_RAW: &str = "--reuid 1337 --regid 1337 --clear-groups --no-new-privs --bounding-set -all,+net_raw \
                       --inh-caps -all,+net_raw --ambient-caps -all,+net_raw";

fn scenario(identity: &str, change: impl FnOnce(String) -> String) -> Scenario {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.attach("");
    scenario.proxy = Some(Proxy::spawn_as(&scenario.pod, Kind::Envoy, identity, change).unwrap());
    scenario
}

fn effective_capabilities(process: &Process) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    u64::from_str_radix(line, 16).unwrap()
}

/// A listener that only takes what srcip hands to it, and a cluster that has an address of its own, because
/// Envoy looks where a client wanted to go on transparent sockets alone.
fn plain_listener(config: String) -> String {
    let cluster = json!({"cluster_name": "application", "endpoints": [{"lb_endpoints": [{"endpoint": {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": PORT}},
    }}]}]});
    config
        .replace("    transparent: true\n", "")
        .replace("type: ORIGINAL_DST", "type: STATIC")
        .replace("lb_policy: CLUSTER_PROVIDED", &format!("load_assignment: {cluster}"))
}

fn without_original_source(config: String) -> String {
    let start = config.find("    - name: envoy.filters.listener.original_src").unwrap();
    let end = config[start..].find("    filter_chains:").unwrap() + start;
    plain_listener(format!("{}{}", &config[..start], &config[end..]))
}

/// Any process can be handed connections: the listener needs nothing.
#[test]
fn a_listener_needs_no_capability() {
    let mut scenario = scenario(NOBODY, without_original_source);
    scenario.proxy.as_mut().unwrap().wait_listening(&scenario.pod).unwrap();
    assert_eq!(effective_capabilities(scenario.proxy.as_ref().unwrap().process()), 0);
    for family in Family::BOTH {
        let seen = scenario.ask(family);
        assert!(seen.proxied && seen.peer.ip().is_loopback(), "{seen:?}");
    }
    assert_eq!(scenario.counter("steered"), 2);
}

/// With the one capability, the configuration of the documentation keeps the client's address.
#[test]
fn cap_net_raw_alone_keeps_the_address() {
    let mut scenario = scenario(NET_RAW, |config| config);
    scenario.proxy.as_mut().unwrap().wait_listening(&scenario.pod).unwrap();
    assert_eq!(effective_capabilities(scenario.proxy.as_ref().unwrap().process()), 1 << 13);
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}

/// Without it, Envoy says what it is not allowed to do: at the listener of the documentation, and, with another
/// one, when it connects.
#[test]
fn without_cap_net_raw() {
    const REFUSED: &str =
        "Setting IPPROTO_IP/IP_TRANSPARENT option on socket failed: Operation not permitted";
    let mut documented = scenario(NOBODY, |config| config);
    let proxy = documented.proxy.as_mut().unwrap();
    let error = proxy.wait_listening(&documented.pod).unwrap_err().to_string();
    assert!(error.contains(REFUSED) && error.contains("listener 'inbound' failed to bind"), "{error}");

    let mut other = scenario(NOBODY, plain_listener);
    other.proxy.as_mut().unwrap().wait_listening(&other.pod).unwrap();
    let error = client::ask_once(&other.client, other.pod.socket(Family::V4, PORT)).unwrap_err();
    assert!(format!("{error:#}").contains("HTTP/1.1 503"), "{error:#}");
    let log = other.proxy.as_ref().unwrap().process().log();
    assert!(log.contains(REFUSED), "{log}");
}
