//! What srcip tells of connections agrees with what the proxy itself logs, and nothing is lost silently.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde_json::Value;
use srcip_tests::{
    Family,
    client::{self, connect_here},
    process::Process,
    proxy::{Kind, Proxy},
};

use crate::{
    engines,
    scenario::{Engine, PORT, Scenario},
};

engines!(agrees_with_envoy_one_to_one, agrees_with_envoy_pooling);

/// A client has this many addresses: as many clients.
const CLIENTS: u8 = 50;

/// Starts `srcip observe -f -o json` and waits until it watches.
fn observe(scenario: &Scenario, options: &str) -> Process {
    let arguments = format!("observe -f -o json --cgroup {} {options}", scenario.world.cgroup().display());
    let command = scenario.srcip.command(&arguments);
    let mut process = scenario.pod.start("observe", command).unwrap();
    // It says nothing until something happens.
    process
        .wait_until("tells of a connection", |p| {
            scenario.ask(Family::V4);
            std::thread::sleep(Duration::from_millis(30));
            !p.log().is_empty()
        })
        .unwrap();
    process
}

fn records(observe: &Process) -> Vec<Value> {
    let log = observe.log();
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

fn field(record: &Value, name: &str) -> Option<SocketAddr> {
    let text = record[name].as_str()?;
    let address: SocketAddr = text.parse().unwrap_or_else(|e| panic!("{name} {text:?}: {e}"));
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

const FIELDS: [&str; 4] =
    ["downstream_remote_address", "downstream_local_address", "upstream_local_address", "upstream_host"];

/// The clients' addresses; the first is left to the connections that tell whether the observer is there.
fn clients(scenario: &Scenario) -> Vec<IpAddr> {
    scenario.client.addresses(Family::V4)[1..].to_vec()
}

/// 50 clients, 10,000 requests: half of them on connections that are kept, half on fresh ones.
fn send_requests(scenario: &Scenario) {
    let clients = clients(scenario);
    let to = scenario.pod.socket(Family::V4, PORT);
    let netns = scenario.client.netns();
    std::thread::scope(|scope| {
        for chunk in clients.chunks(5) {
            scope.spawn(move || {
                netns
                    .run(|| {
                        for from in chunk {
                            let from = SocketAddr::new(*from, 0);
                            let mut kept = connect_here(Some(from), to).unwrap();
                            for _ in 0..100 {
                                client::ask(&mut kept).unwrap();
                                client::ask(&mut connect_here(Some(from), to).unwrap()).unwrap();
                            }
                        }
                    })
                    .unwrap();
            });
        }
    });
}

struct Comparison {
    exact: usize,
    inferred: usize,
    lines: usize,
}

/// Compares every line of Envoy's access log with our record of that connection.
fn compare(
    scenario: &Scenario,
    proxy: &Proxy,
    observe: &mut Process,
    expected: usize,
    pooling: bool,
) -> Comparison {
    observe
        .wait_until("tells of all connections' ends", |p| {
            std::thread::sleep(Duration::from_millis(200));
            let log = p.log();
            log.lines().filter(|line| line.contains(r#""event":"close""#)).count() >= expected
        })
        .unwrap();
    let clients = clients(scenario);
    let mut ours: HashMap<SocketAddr, Value> = HashMap::new();
    for record in records(observe) {
        if record["event"] == "close" && record["leg"] == "downstream" {
            let remote = field(&record, FIELDS[0]).unwrap();
            // A client's port may be used again; Envoy's lines of the two could not be told apart.
            assert!(ours.insert(remote, record).is_none(), "{remote} came twice");
        }
    }
    let mut comparison = Comparison { exact: 0, inferred: 0, lines: 0 };
    for line in proxy.access_log().lines() {
        let theirs: Value = serde_json::from_str(line).unwrap();
        let remote = field(&theirs, FIELDS[0]).unwrap();
        if !clients.contains(&remote.ip()) {
            continue;
        }
        comparison.lines += 1;
        let record = ours.get(&remote).unwrap_or_else(|| panic!("no record of {remote}: {line}"));
        assert_eq!(record["preserved"], true, "{record}");
        assert_eq!(field(record, "origin"), Some(remote), "{record}");
        let exact = record["join"] == "exact";
        assert!(exact || record["join"] == "inferred", "{record}");
        comparison.exact += usize::from(exact);
        comparison.inferred += usize::from(!exact);
        if exact || !pooling {
            for name in FIELDS {
                assert_eq!(field(record, name), field(&theirs, name), "{name}\n{record}\n{line}");
            }
        } else {
            for name in FIELDS {
                let ip = |value: &Value| field(value, name).map(|address| address.ip());
                assert_eq!(ip(record), ip(&theirs), "{name}\n{record}\n{line}");
            }
        }
    }
    comparison
}

fn scenario(engine: Engine, change: impl FnOnce(String) -> String) -> Scenario {
    let mut scenario = Scenario::empty(engine);
    scenario.world.add_addresses(&mut scenario.client, CLIENTS + 1).unwrap();
    scenario.application = Some(srcip_tests::peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.proxy = Some(Proxy::start_with(&scenario.pod, Kind::Envoy, change).unwrap());
    scenario.attach("");
    scenario
}

/// An upstream connection for each request: the tuple decides which one a client's connection got.
fn agrees_with_envoy_one_to_one(engine: Engine) {
    let scenario = scenario(engine, |config| {
        // Envoy then closes an upstream connection after its first request.
        config.replace(
            "connect_timeout: 10s\n",
            "connect_timeout: 10s\n    typed_extension_protocol_options:\n      \
             envoy.extensions.upstreams.http.v3.HttpProtocolOptions:\n        \
             \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions\n        \
             common_http_protocol_options: { max_requests_per_connection: 1 }\n        \
             explicit_http_config: { http_protocol_options: {} }\n",
        )
    });
    let mut observe = observe(&scenario, "--leg downstream");
    fresh_requests(&scenario);
    let compared = compare(&scenario, scenario.proxy.as_ref().unwrap(), &mut observe, 5000, false);
    assert_eq!(compared.lines, 5000);
    // A client that opens the next connection before Envoy has closed the last one has two for a moment.
    assert!(compared.exact > compared.inferred, "{} {}", compared.exact, compared.inferred);
}

fn fresh_requests(scenario: &Scenario) {
    let clients = clients(scenario);
    let to = scenario.pod.socket(Family::V4, PORT);
    let netns = scenario.client.netns();
    std::thread::scope(|scope| {
        for chunk in clients.chunks(10) {
            scope.spawn(move || {
                netns
                    .run(|| {
                        for from in chunk {
                            for _ in 0..100 {
                                let mut one = connect_here(Some(SocketAddr::new(*from, 0)), to).unwrap();
                                client::ask(&mut one).unwrap();
                            }
                        }
                    })
                    .unwrap();
            });
        }
    });
}

/// Envoy keeps upstream connections and uses them for other connections of the same client.
fn agrees_with_envoy_pooling(engine: Engine) {
    let scenario = scenario(engine, |config| config);
    let mut observe = observe(&scenario, "--leg downstream");
    send_requests(&scenario);
    let compared = compare(&scenario, scenario.proxy.as_ref().unwrap(), &mut observe, 50 + 5000, true);
    assert_eq!(compared.lines, 10_000);
    assert!(compared.inferred > 0 && compared.exact > 0, "{} {}", compared.exact, compared.inferred);
}
