//! A real Prometheus scrapes the exporter; its tools check what we ship for it.

use std::{fs, path::Path};

use nix::sys::signal::Signal;
use serde_json::Value;
use srcip_tests::{
    Family, PATIENCE, client,
    host::Host,
    process::{Process, sh},
    proxy::Kind,
    wait_until,
};

use super::{Export, scrape, visit, wait_for};
use crate::scenario::{Engine, Scenario};

/// Where Prometheus serves, in a node's namespace of its own.
const PROMETHEUS: &str = "127.0.0.1:9090";

fn shipped(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus").join(file);
    path.canonicalize().unwrap().display().to_string()
}

/// With the configuration we ship, but in more of a hurry.
fn start(node: &Host) -> Process {
    let directory = node.directory().join("prometheus");
    fs::create_dir(&directory).unwrap();
    let config = fs::read_to_string(shipped("scrape.yaml")).unwrap();
    let config = config
        .replace("scrape_interval: 15s", "scrape_interval: 1s\n  evaluation_interval: 1s")
        .replace("- rules.yaml", &format!("- {}", shipped("rules.yaml")));
    let path = directory.join("prometheus.yaml");
    fs::write(&path, config).unwrap();
    let mut command = node.command("prometheus").unwrap();
    command
        .arg(format!("--config.file={}", path.display()))
        .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
        .arg(format!("--web.listen-address={PROMETHEUS}"));
    let process = node.start("prometheus", command).unwrap();
    node.wait_open(9090).unwrap();
    process
}

/// What Prometheus answers.
fn api(node: &Host, path: &str) -> Value {
    let mut stream = client::connect(node, PROMETHEUS.parse().unwrap()).unwrap();
    let answer = client::http_get(&mut stream, &format!("/api/v1/{path}")).unwrap();
    let answer: Value = serde_json::from_str(&answer.body).unwrap();
    assert_eq!(answer["status"], "success", "{answer}");
    answer["data"].clone()
}

/// The value of a query with one result, once it has one.
fn query(node: &Host, expression: &str) -> Option<f64> {
    let data = api(node, &format!("query?query={expression}"));
    let result = data["result"].as_array().unwrap();
    assert!(result.len() <= 1, "{expression}: {data}");
    result.first()?["value"][1].as_str()?.parse().ok()
}

#[test]
fn prometheus_gets_what_was_sent() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let path = scenario.world.directory().join("access.json");
    let export = Export::start(&scenario, &format!("--access-log {}", path.display()));
    let node = scenario.world.node();
    let mut prometheus = start(node);
    // Prometheus may not listen yet on the first look; from here on it does.
    wait_for("Prometheus is ready", || {
        let mut stream = client::connect(node, PROMETHEUS.parse().unwrap()).ok()?;
        client::http_get(&mut stream, "/-/ready").ok()
    });
    visit(&scenario, 9);
    for leg in ["downstream", "upstream"] {
        let labels = format!(r#"{{leg="{leg}",preserved="true",workload="{}"}}"#, scenario.pod.name());
        let expression = format!("srcip_connections_total{labels}");
        wait_for(&expression, || (query(node, &expression) == Some(9.)).then_some(()));
    }
    // A scrape may fail that the machine has no time for; the next one does not.
    for expression in [r#"up{job="srcip"}"#, "count(srcip_build_info)"] {
        wait_for(expression, || (query(node, expression) == Some(1.)).then_some(()));
    }
    assert_eq!(query(node, r#"sum(srcip_connections_total{preserved!="true"})"#), None);
    // Both ends agree on the payload: what clients were sent is in the access log, too.
    super::wait_for_value(&scenario, "srcip_access_log_lines_total", 18.);
    let log = fs::read_to_string(&path).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let sent: u64 = lines
        .filter(|line| line["leg"] == "downstream")
        .map(|line| line["bytes_sent"].as_u64().unwrap())
        .sum();
    assert!(sent > 0);
    assert_eq!(query(node, r#"sum(srcip_connection_sent_bytes_total{leg="downstream"})"#), Some(sent as f64));
    // It has taken all of the page, and our rules work on it.
    wait_until("it takes the page", || api(node, "targets")["activeTargets"][0]["lastError"] == "");
    let rules = || api(node, "rules")["groups"][0]["rules"].as_array().cloned().unwrap_or_default();
    wait_until("the rules work, and nothing is wrong", || {
        let rules = rules();
        assert!(rules.len() > 8);
        rules.iter().all(|rule| rule["health"] == "ok" && rule["state"] == "inactive")
    });
    prometheus.signal(Signal::SIGTERM).unwrap();
    prometheus.wait(PATIENCE).unwrap();
    export.stop();
}

#[test]
fn rules_are_valid_and_their_tests_pass() {
    sh(&format!("promtool check rules {}", shipped("rules.yaml"))).unwrap();
    sh(&format!("promtool check config {}", shipped("scrape.yaml"))).unwrap();
    sh(&format!("promtool test rules {}", shipped("rules_test.yaml"))).unwrap();
    // Every alert has a test.
    let (rules, tests) =
        ["rules.yaml", "rules_test.yaml"].map(|f| fs::read_to_string(shipped(f)).unwrap()).into();
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 8);
    for alert in alerts {
        assert!(tests.contains(&format!("alertname: {alert}\n")), "{alert} has no test");
    }
}

/// The names and the form are as Prometheus wants them.
#[test]
fn metrics_pass_promtool() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    let export = Export::start(&scenario, "");
    scenario.assert_kept(Family::V4);
    let node = scenario.world.node();
    let leg = r#"srcip_connection_bytes_count{leg="downstream"}"#;
    let page = super::wait_for_value(&scenario, leg, 1.);
    node.feed("promtool check metrics", &page).unwrap();
    // And it would have found something.
    let wrong = page.replace("srcip_connections_total", "srcip_connections");
    node.feed("promtool check metrics", &wrong).unwrap_err();
    assert!(scrape(&scenario).lines().count() > 100);
    export.stop();
}
