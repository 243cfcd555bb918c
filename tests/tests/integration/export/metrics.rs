//! What the metrics say is what was sent.

use std::time::Duration;

use nix::{
    fcntl::{Flock, FlockArg},
    sys::signal::Signal,
};
use srcip_tests::{
    Family, PATIENCE, peer,
    process::sh,
    proxy::{Kind, Proxy},
};

use super::{Export, assert_clean, connections, scrape, value, visit, wait_for_value};
use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(connections_and_attachments);

fn connections_and_attachments(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::HaproxyTcp);
    let export = Export::start(&scenario, "");
    visit(&scenario, 7);
    let pod = scenario.pod.name();
    for leg in ["downstream", "upstream"] {
        wait_for_value(&scenario, &connections(pod, leg, "true"), 7.);
    }
    // A machine that is busy may not have read what is attached in time for the first scrapes.
    wait_for_status(&scenario, &format!(r#"srcip_listeners{{workload="{pod}"}}"#), 1.);
    let page = scrape(&scenario);
    assert!(!page.contains(r#"preserved="false""#), "{page}");
    for (name, expected) in [
        ("srcip_open_connections".to_owned(), 0.),
        (format!(r#"srcip_listeners{{workload="{pod}"}}"#), 1.),
        (format!(r#"srcip_attachment_problems{{workload="{pod}"}}"#), 0.),
        (r#"srcip_connection_bytes_count{leg="downstream"}"#.to_owned(), 7.),
        (r#"srcip_connection_duration_seconds_count{leg="upstream"}"#.to_owned(), 7.),
        (r#"srcip_events_lost_total{event="open"}"#.to_owned(), 0.),
        (r#"srcip_map_entries{map="PODS"}"#.to_owned(), 1.),
        (r#"srcip_map_max_entries{map="PODS"}"#.to_owned(), 1024.),
        ("srcip_status_errors_total".to_owned(), 0.),
    ] {
        assert_eq!(value(&page, &name), Some(expected), "{name}\n{page}");
    }
    // Of the upstream leg, the proxy's end alone is told of; but once anybody on this machine looks on at all pods
    // (`srcip audit` of another test), the kernel tells everybody of the application's ends, too.
    let closes = r#"srcip_events_total{event="close"}"#;
    super::wait_for(closes, || {
        value(&scrape(&scenario), closes).filter(|closes| (14. ..=21.).contains(closes))
    });
    let option = engine.option().rsplit(' ').next().unwrap();
    let info = format!(r#"srcip_attachment_info{{workload="{pod}",engine="{option}",state="attached"}}"#);
    assert_eq!(value(&page, &info), Some(1.), "{page}");
    for address in ["10.133.", "fd13:37", scenario.client.name()] {
        assert!(!page.contains(address), "{address} is in\n{page}");
    }
    // What is attached is read again, but not at every scrape.
    let steered = format!(r#"srcip_steered_total{{workload="{pod}"}}"#);
    wait_for_status(&scenario, &steered, scenario.counter("steered") as f64);
    export.stop();
}

/// As [`wait_for_value`], for what is read every ten seconds.
fn wait_for_status(scenario: &Scenario, series: &str, wanted: f64) {
    super::wait_for(series, || (value(&scrape(scenario), series) == Some(wanted)).then_some(()));
}

/// A proxy that connects with the pod's own address loses the client, and the metrics say so.
#[test]
fn lost_clients_are_counted() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::echo(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::HaproxyTcp, |config| {
        config.replace("source 0.0.0.0 usesrc clientip", "")
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("");
    let export = Export::start(&scenario, "");
    let to = scenario.pod.socket(Family::V4, PORT);
    let opened = peer::Clients::new(to, 3, 1).visit(&scenario.client).unwrap();
    assert_eq!(opened.errors.len(), 3, "the application sees another address: {opened:?}");
    let pod = scenario.pod.name();
    let page = wait_for_value(&scenario, &connections(pod, "downstream", "false"), 3.);
    assert_eq!(value(&page, &connections(pod, "downstream", "true")), None, "{page}");
    export.stop();
}

/// However many pods there are, those beyond the bound share a label.
#[test]
fn the_number_of_series_is_bounded() {
    let mut scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let others = [scenario.world.host("more1").unwrap(), scenario.world.host("more2").unwrap()];
    let applications = others.each_ref().map(|pod| peer::echo(pod, &["[::]:8000"]).unwrap());
    let [one, two] = &others;
    let export = Export::start_for(&scenario, &[&scenario.pod, one, two], "--max-workloads 1");
    visit(&scenario, 2);
    wait_for_value(&scenario, &connections(scenario.pod.name(), "downstream", "true"), 2.);
    for pod in &others {
        let to = pod.socket(Family::V4, PORT);
        let opened = peer::Clients::new(to, 2, 1).visit(&scenario.client).unwrap();
        assert_eq!(opened.good, 2);
    }
    let page = wait_for_value(&scenario, &connections("other", "direct", "true"), 4.);
    for pod in &others {
        assert!(!page.contains(pod.name()), "{page}");
    }
    drop(applications);
    export.stop();
}

/// Either signal ends it with 0, and nothing of it stays.
#[test]
fn a_signal_ends_it() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let cgroup = scenario.world.cgroup().display().to_string();
    let attached = || sh(&format!("bpftool cgroup show {cgroup}")).unwrap();
    let before = attached();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut export = Export::start(&scenario, "");
        assert_ne!(attached(), before, "it watches");
        export.process.signal(signal).unwrap();
        let status = export.process.wait(PATIENCE).unwrap();
        assert_clean(status, &export.process.log());
        assert_eq!(attached(), before, "{signal}");
    }
    // What is attached goes on.
    visit(&scenario, 1);
}

/// A command that holds the instance's lock, and hangs: connections are counted, metrics served, and a
/// signal ends the exporter.
#[test]
fn a_command_that_hangs_holds_nothing_up() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let export = Export::start(&scenario, "");
    let pins = std::fs::File::open(scenario.srcip.pin_path()).unwrap();
    let lock = Flock::lock(pins, FlockArg::LockExclusive).unwrap();
    let status = |page: &str| value(page, "srcip_status_age_seconds");
    // Whoever waited for the lock would wait for ever.
    assert!(status(&scrape(&scenario)).unwrap().is_nan(), "it cannot be read");
    // Until pods have been looked for again, which reads what is attached.
    std::thread::sleep(Duration::from_secs(6));
    visit(&scenario, 3);
    wait_for_value(&scenario, &connections(scenario.pod.name(), "downstream", "true"), 3.);
    let another = Export::start(&scenario, "--metrics-address 127.0.0.1:9465");
    another.stop();
    drop(lock);
    super::wait_for("status is read", || status(&scrape(&scenario)).filter(|age| !age.is_nan()));
    export.stop();
}

#[test]
fn mistakes_are_explained() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let fail = |options: &str| {
        let output = super::command(&scenario, &[&scenario.pod], options).output().unwrap();
        assert!(!output.status.success(), "{options}");
        String::from_utf8(output.stderr).unwrap()
    };
    let directory = scenario.world.directory().display().to_string();
    for (options, parts) in [
        ("--metrics-address none", &["nothing to export", "--access-log"][..]),
        ("--metrics-address 9464", &["not an address with a port", "127.0.0.1:9464"]),
        ("--metrics-address 192.0.2.1:9464", &["cannot serve metrics on 192.0.2.1:9464", "Cannot assign"]),
        ("--access-log-max-size 100MB", &["did you mean MiB"]),
        ("--access-log-max-files 0", &["0"]),
        ("--access-log-events never", &["open, close"]),
        (&format!("--access-log {directory}"), &["cannot open the access log", "directory"]),
        (&format!("--access-log {directory}/no/log"), &["cannot open the access log", "No such file"]),
        ("--access-log /dev/null", &["not a regular file"]),
        ("--otlp-endpoint https://collector", &["https is not spoken"]),
    ] {
        let said = fail(options);
        for part in parts {
            assert!(said.contains(part), "{options}: no {part:?} in {said}");
        }
    }
    let export = Export::start(&scenario, "");
    let said = fail("");
    assert!(said.contains("in use") && said.contains("--metrics-address"), "{said}");
    export.stop();
}
