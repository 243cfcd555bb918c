//! What srcip tells of connections agrees with what the proxy itself logs, and nothing is lost silently.

use std::{
    collections::HashMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use serde_json::Value;
use srcip_tests::{
    Family,
    client::{self, connect_here},
    peer::Clients,
    process::Process,
    proxy::{Kind, Proxy},
    wait_for, wait_until,
};
use srcip_user::{
    dataplane::Dataplane,
    telemetry::{
        observer::{Accounting, Observer, Options, POLL_INTERVAL},
        record::{ClosedBy, EventKind, Leg, Record},
    },
};

use crate::{
    engines,
    mirror::ASIDE,
    scenario::{Engine, PORT, Scenario},
};

engines!(agrees_with_envoy_one_to_one, agrees_with_envoy_pooling, every_end_is_told_of);

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

/// Does something for each client, as it, several at a time.
fn for_each_client(scenario: &Scenario, each: impl Fn(IpAddr) + Sync) {
    let netns = scenario.client.netns();
    std::thread::scope(|scope| {
        for chunk in clients(scenario).chunks(5) {
            let (chunk, each) = (chunk.to_vec(), &each);
            scope.spawn(move || {
                netns.run(|| chunk.into_iter().for_each(&each)).unwrap();
            });
        }
    });
}

/// Asks on a fresh connection of a client's, from a port of its own: Envoy's lines of two connections from one port
/// could not be told apart.
fn ask_from(client: IpAddr, number: u16, to: SocketAddr) {
    let from = SocketAddr::new(client, ASIDE + number);
    client::ask(&mut connect_here(Some(from), to).unwrap()).unwrap();
}

/// 50 clients, 10,000 requests: half of them on connections that are kept, half on fresh ones.
fn send_requests(scenario: &Scenario) {
    let to = scenario.pod.socket(Family::V4, PORT);
    for_each_client(scenario, |client| {
        let mut kept = connect_here(Some(SocketAddr::new(client, ASIDE)), to).unwrap();
        for number in 1..=100 {
            client::ask(&mut kept).unwrap();
            ask_from(client, number, to);
        }
    });
}

struct Comparison {
    exact: usize,
    inferred: usize,
}

/// What Envoy has logged of these clients; it writes when it likes.
fn logged(proxy: &Proxy, clients: &[IpAddr]) -> Vec<Value> {
    let log = proxy.access_log();
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    let lines = whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| clients.contains(&field(line, FIELDS[0]).unwrap().ip())).collect()
}

/// Compares every line of Envoy's access log with our record of that connection: of so many requests on so many
/// connections.
fn compare(
    scenario: &Scenario,
    observe: &mut Process,
    (requests, expected): (usize, usize),
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
            assert!(ours.insert(remote, record).is_none(), "{remote} came twice");
        }
    }
    let lines = wait_for("Envoy's log has all requests", || {
        let lines = logged(scenario.proxy.as_ref().unwrap(), &clients);
        (lines.len() >= requests).then_some(lines)
    });
    assert_eq!(lines.len(), requests);
    let mut comparison = Comparison { exact: 0, inferred: 0 };
    for line in &lines {
        let remote = field(line, FIELDS[0]).unwrap();
        let record = ours.get(&remote).unwrap_or_else(|| panic!("no record of {remote}: {line}"));
        assert_eq!(record["preserved"], true, "{record}");
        assert_eq!(field(record, "origin"), Some(remote), "{record}");
        let exact = record["join"] == "exact";
        assert!(exact || record["join"] == "inferred", "{record}");
        comparison.exact += usize::from(exact);
        comparison.inferred += usize::from(!exact);
        if exact || !pooling {
            for name in FIELDS {
                assert_eq!(field(record, name), field(line, name), "{name}\n{record}\n{line}");
            }
        } else {
            for name in FIELDS {
                let ip = |value: &Value| field(value, name).map(|address| address.ip());
                assert_eq!(ip(record), ip(line), "{name}\n{record}\n{line}");
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
    let compared = compare(&scenario, &mut observe, (5000, 5000), false);
    // A client that opens the next connection before Envoy has closed the last one has two for a moment,
    // and what is said of these, and after them, is right, but not certain.
    assert!(compared.exact > 0, "{} {}", compared.exact, compared.inferred);
    println!("exact: {}, inferred: {}", compared.exact, compared.inferred);
}

/// 50 clients, 5,000 requests on fresh connections.
fn fresh_requests(scenario: &Scenario) {
    let to = scenario.pod.socket(Family::V4, PORT);
    for_each_client(scenario, |client| (1..=100).for_each(|number| ask_from(client, number, to)));
}

/// Envoy keeps upstream connections and uses them for other connections of the same client.
fn agrees_with_envoy_pooling(engine: Engine) {
    let scenario = scenario(engine, |config| config);
    let mut observe = observe(&scenario, "--leg downstream");
    send_requests(&scenario);
    let compared = compare(&scenario, &mut observe, (10_000, 50 + 5000), true);
    assert!(compared.inferred > 0 && compared.exact > 0, "{} {}", compared.exact, compared.inferred);
}

/// An observer in this process, of one pod.
fn observer(scenario: &Scenario) -> Observer {
    let options = Options {
        netns: vec![scenario.pod.path()],
        cgroup: scenario.world.cgroup().to_owned(),
        find_proxy: None,
    };
    Observer::start(&Dataplane::new(scenario.srcip.pin_path().to_owned()), &options).unwrap()
}

/// Reads until so many connections have ended, and then until nothing more comes.
fn drain(observer: &mut Observer, ended: usize, mut each: impl FnMut(Record)) {
    let mut quiet = 0;
    wait_until(&format!("{ended} connections have ended"), || {
        let count = observer.poll(&mut each).unwrap();
        let is_over = observer.accounting().unwrap().closed >= ended as u64;
        quiet = if is_over && count == 0 { quiet + 1 } else { 0 };
        std::thread::sleep(POLL_INTERVAL);
        quiet == 25
    });
}

fn assert_all_accounted_for(accounting: &Accounting) {
    assert_eq!(accounting.opened, accounting.opened_delivered + accounting.opened_lost, "{accounting:?}");
    assert_eq!(accounting.closed, accounting.closed_delivered + accounting.closed_lost, "{accounting:?}");
}

/// Of a steered connection, the downstream and the upstream leg open and close once.
fn every_end_is_told_of(engine: Engine) {
    const CONNECTIONS: usize = 2000;
    let scenario = Scenario::tcp(engine, Kind::HaproxyTcp);
    let mut observer = observer(&scenario);
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        let opened = Clients::new(to, CONNECTIONS, 50).visit(&scenario.client).unwrap();
        assert_eq!((opened.good, opened.errors.len()), (CONNECTIONS, 0), "{:?}", opened.errors.first());
    }
    let mut seen: HashMap<(Leg, bool), usize> = HashMap::new();
    let ends = 2 * 2 * CONNECTIONS;
    drain(&mut observer, ends, |record| {
        *seen.entry((record.leg, record.event == EventKind::Open)).or_default() += 1;
        assert_ne!(record.preserved, Some(false), "{record:?}");
        // The clients send nothing and are greeted: a SYN is no payload.
        if let (Leg::Upstream, Some(totals)) = (record.leg, record.totals) {
            assert_eq!(totals.bytes_sent, 0, "{record:?}");
            assert!(totals.bytes_received > 20, "{record:?}");
        }
    });
    let accounting = observer.accounting().unwrap();
    assert_all_accounted_for(&accounting);
    assert_eq!((accounting.opened_lost, accounting.closed_lost), (0, 0));
    assert_eq!((accounting.opened, accounting.closed), (ends as u64, ends as u64));
    for leg in [Leg::Downstream, Leg::Upstream] {
        for open in [true, false] {
            assert_eq!(seen.get(&(leg, open)), Some(&(2 * CONNECTIONS)), "{leg} {open} {seen:?}");
        }
    }
    assert_eq!(observer.open_connections(), 0);
}

/// A reader that stalls loses events, and knows how many; no connection fails or waits for it.
#[test]
fn a_stalled_reader_loses_events_but_no_count() {
    const CONNECTIONS: usize = 60_000;
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(srcip_tests::peer::echo(&scenario.pod, &["[::]:8000"]).unwrap());
    let mut observer = observer(&scenario);
    let to = scenario.pod.socket(Family::V4, PORT);
    let opened = Clients::new(to, CONNECTIONS, 100).visit(&scenario.client).unwrap();
    assert_eq!((opened.good, opened.errors.len()), (CONNECTIONS, 0), "{:?}", opened.errors.first());
    let stalled = observer.accounting().unwrap();
    assert!(stalled.opened_lost > 0 && stalled.closed_lost > 0, "the ring buffer holds more: {stalled:?}");
    drain(&mut observer, CONNECTIONS, |_| {});
    let accounting = observer.accounting().unwrap();
    assert_all_accounted_for(&accounting);
    assert_eq!((accounting.opened, accounting.closed), (CONNECTIONS as u64, CONNECTIONS as u64));
    // From here on it keeps up again.
    let opened = Clients::new(to, 100, 10).visit(&scenario.client).unwrap();
    assert_eq!(opened.good, 100);
    drain(&mut observer, CONNECTIONS + 100, |_| {});
    let after = observer.accounting().unwrap();
    assert_eq!(after.opened_delivered, accounting.opened_delivered + 100);
    assert_eq!(after.lost(), accounting.lost());
}

/// Payload is counted without SYN and FIN, whoever ends the connection, and who that was is told.
#[test]
fn bytes_and_ends() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(srcip_tests::peer::echo(&scenario.pod, &["[::]:8000"]).unwrap());
    let http = srcip_tests::peer::application(&scenario.pod, &["[::]:8001"]).unwrap();
    let mut observer = observer(&scenario);
    let mut closed = |port: u16| {
        let mut found = None;
        wait_for(&format!("the end of the connection from port {port} is told of"), || {
            observer
                .poll(|record| {
                    let from = record.downstream_remote_address.map(|address| address.0.port());
                    if record.event == EventKind::Close && from == Some(port) {
                        found = record.totals;
                    }
                })
                .unwrap();
            found
        })
    };
    for (family, size) in [(Family::V4, 0), (Family::V4, 1), (Family::V6, 100_000), (Family::V4, 3_000_000)] {
        let to = scenario.pod.socket(family, PORT);
        let data = vec![7; size];
        // The client ends its side; the application, when it has sent everything back, its own.
        let stream = client::connect(&scenario.client, to).unwrap();
        let port = stream.local_addr().unwrap().port();
        let received = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut all = Vec::new();
                (&stream).read_to_end(&mut all).unwrap();
                all.len()
            });
            (&stream).write_all(&data).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            reader.join().unwrap()
        });
        drop(stream);
        let totals = closed(port);
        assert_eq!((totals.bytes_sent, totals.bytes_received), (received as u64, size as u64), "{totals:?}");
        assert_eq!(totals.closed_by, ClosedBy::Remote);

        // The application ends it.
        let to = SocketAddr::new(to.ip(), 8001);
        let mut stream = client::connect(&scenario.client, to).unwrap();
        let port = stream.local_addr().unwrap().port();
        let request = b"GET /seen HTTP/1.1\r\nConnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        drop(stream);
        let totals = closed(port);
        assert_eq!(totals.bytes_sent, answer.len() as u64, "{totals:?}");
        assert_eq!(totals.bytes_received, request.len() as u64, "{totals:?}");
        assert_eq!(totals.closed_by, ClosedBy::Local);

        // The client resets it.
        let stream = client::connect(&scenario.client, to).unwrap();
        let port = stream.local_addr().unwrap().port();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        drop(stream);
        let totals = closed(port);
        assert_eq!((totals.bytes_sent, totals.bytes_received), (0, 0), "{totals:?}");
        assert_eq!(totals.closed_by, ClosedBy::Aborted);
    }
    drop(http);
}
