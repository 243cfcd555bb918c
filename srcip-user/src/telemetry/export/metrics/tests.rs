//! Tests of what is counted, and of the files that use it.

use std::{collections::BTreeSet, path::Path};

use srcip_common::northsouth::counter::Counter;

use super::{super::labels::OTHER, *};
use crate::{
    agent::metrics::AgentMetrics,
    netns::NetnsCookie,
    telemetry::record::{ClosedBy, Timestamp, Totals},
};

/// A connection that has ended.
pub(crate) fn closed(workload: &str, leg: Leg, preserved: Option<bool>) -> Record {
    Record {
        time: Timestamp(1_700_000_000_123_456_000),
        event: EventKind::Close,
        workload: workload.into(),
        netns_cookie: NetnsCookie(7),
        leg,
        downstream_remote_address: None,
        downstream_local_address: None,
        upstream_local_address: None,
        upstream_host: None,
        origin: None,
        preserved,
        join: None,
        rule: None,
        mark: 0,
        totals: Some(Totals {
            bytes_sent: 1000,
            bytes_received: 200,
            duration_ms: 1500.,
            rtt_us: 300,
            retransmits: 0,
            closed_by: ClosedBy::Local,
        }),
    }
}

fn series(page: &str) -> Vec<&str> {
    page.lines().filter(|line| !line.starts_with('#')).collect()
}

/// One of everything there can be.
fn all() -> Metrics {
    let metrics = Metrics::new(250);
    for leg in Leg::ALL {
        metrics.record(&closed("pod", leg, Some(true)));
    }
    metrics.node.fill_for_test();
    metrics
}

#[test]
fn connections_count_when_they_end() {
    let metrics = Metrics::new(2);
    let mut open = closed("pod", Leg::Downstream, None);
    (open.event, open.totals) = (EventKind::Open, None);
    metrics.record(&open);
    assert!(!metrics.encode(false).unwrap().contains("srcip_connections_total{"));
    metrics.record(&closed("pod", Leg::Downstream, Some(true)));
    metrics.record(&closed("pod", Leg::Downstream, Some(false)));
    metrics.record(&closed("pod", Leg::Outbound, None));
    let page = metrics.encode(false).unwrap();
    for expected in [
        r#"srcip_connections_total{workload="pod",leg="downstream",preserved="true"} 1"#,
        r#"srcip_connections_total{workload="pod",leg="downstream",preserved="false"} 1"#,
        r#"srcip_connections_total{workload="pod",leg="outbound",preserved="unknown"} 1"#,
        r#"srcip_connection_sent_bytes_total{workload="pod",leg="downstream"} 2000"#,
        r#"srcip_connection_received_bytes_total{workload="pod",leg="outbound"} 200"#,
        r#"srcip_connection_bytes_sum{leg="downstream"} 2400"#,
        r#"srcip_connection_bytes_bucket{le="4096.0",leg="outbound"} 1"#,
        r#"srcip_connection_duration_seconds_sum{leg="outbound"} 1.5"#,
        r#"srcip_connection_rtt_seconds_bucket{le="0.0005",leg="outbound"} 1"#,
        r#"srcip_connection_rtt_seconds_bucket{le="0.00025",leg="outbound"} 0"#,
    ] {
        assert!(page.contains(expected), "no {expected} in\n{page}");
    }
}

#[test]
fn names_of_pods_cannot_break_out_of_their_label() {
    let metrics = Metrics::new(2);
    metrics.record(&closed("a\"} 1\nsrcip_forged 1\\", Leg::Direct, Some(true)));
    let page = metrics.encode(false).unwrap();
    assert!(!page.lines().any(|line| line.starts_with("srcip_forged")), "{page}");
    assert!(page.contains(r#"workload="a\"} 1\nsrcip_forged 1\\""#), "{page}");
}

/// Ten times the pods, all kinds of connections: the rest shares a label, and the bound holds.
#[test]
fn series_are_bounded() {
    for max in [0, 1, 20] {
        let metrics = Metrics::new(max);
        metrics.node.fill_for_test();
        for number in 0..10 * (max + 1) {
            for leg in Leg::ALL {
                for preserved in [Some(true), Some(false), None] {
                    metrics.record(&closed(&format!("pod-{number}"), leg, preserved));
                }
            }
        }
        let page = metrics.encode(true).unwrap();
        let labels: BTreeSet<_> = series(&page)
            .iter()
            .filter_map(|line| Some(line.split_once("workload=\"")?.1.split_once('"')?.0))
            .collect();
        assert_eq!(labels.len(), max + 1, "{labels:?}");
        assert!(labels.contains(OTHER));
        assert!(series(&page).len() <= max_series(max), "{} > {}", series(&page).len(), max_series(max));
        // Not far off, either: a bound that is never reached says nothing.
        assert!(max_series(max) < series(&page).len() * 3 / 2 + 50, "{}", series(&page).len());
    }
    assert_eq!(max_series(250), 9800, "the documentation says so");
}

#[test]
fn who_has_gone_takes_his_series_along() {
    let metrics = Metrics::new(2);
    metrics.record(&closed("gone", Leg::Direct, Some(true)));
    metrics.record(&closed("here", Leg::Direct, Some(true)));
    metrics.forget(&"gone".into());
    let page = metrics.encode(false).unwrap();
    assert!(!page.contains("gone") && page.contains("here"), "{page}");
}

#[test]
fn both_formats_name_families_as_they_want_it() {
    let open_metrics = all().encode(true).unwrap();
    assert!(open_metrics.contains("# TYPE srcip_connections counter\n"));
    assert!(open_metrics.contains("# TYPE srcip_build info\n"));
    assert!(open_metrics.ends_with("# EOF\n"));
    let classic = all().encode(false).unwrap();
    assert!(classic.contains("# TYPE srcip_connections_total counter\n"));
    assert!(classic.contains("# TYPE srcip_build_info gauge\n"));
    assert!(classic.contains("# TYPE srcip_connection_rtt_seconds histogram\n"));
    assert!(!classic.contains("EOF") && !classic.contains("# UNIT"));
    assert_eq!(series(&classic).len(), series(&open_metrics).len());
    let described = |kind: &str| classic.lines().filter(|line| line.starts_with(kind)).count();
    assert_eq!(described("# HELP"), described("# TYPE"));
}

/// Every metric by the names of its series.
fn names(metrics: &Metrics) -> BTreeSet<String> {
    names_on(&metrics.encode(false).unwrap())
}

/// The same for a page.
fn names_on(page: &str) -> BTreeSet<String> {
    series(page).iter().map(|line| line[..line.find(['{', ' ']).unwrap()].to_owned()).collect()
}

/// The words in a text that look like our metrics.
fn used(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.starts_with("srcip_")).map(str::to_owned).collect()
}

#[test]
fn dashboard_rules_and_documentation_use_metrics_that_exist() {
    let mut there = names(&all());
    // Documented for those who build with OpenTelemetry.
    there.insert("srcip_otlp_records_total".to_owned());
    let by_agent = names_on(&AgentMetrics::full_page_for_test());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap();
    for file in ["deploy/grafana/srcip.json", "deploy/prometheus/rules.yaml", "docs/TELEMETRY.md"] {
        let text = read(file);
        let used = used(&text);
        assert!(used.len() > 5, "{file}: {used:?}");
        // The documentation names histograms, not their series.
        let exists = |name: &str| {
            let histogram = format!("{name}_count");
            [&there, &by_agent].iter().any(|names| names.contains(name) || names.contains(&histogram))
        };
        let unknown: Vec<_> = used.iter().filter(|name| !exists(name)).collect();
        assert!(unknown.is_empty(), "{file} has metrics that nobody has: {unknown:?}");
        // What north-south drops, by reason.
        let is_counted = |reason: &str| Counter::ALL.iter().any(|counter| counter.name() == reason);
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let reasons = words.filter(|word| word.starts_with("dropped_") && *word != "dropped_");
        let unknown: Vec<_> = reasons.filter(|reason| !is_counted(reason)).collect();
        assert!(unknown.is_empty(), "{file} has reasons that nothing has: {unknown:?}");
    }
    // And the documentation has all of them.
    let documented = used(&read("docs/TELEMETRY.md"));
    let base = |name: &str| {
        let name = name.strip_suffix("_bucket").or_else(|| name.strip_suffix("_count")).unwrap_or(name);
        name.strip_suffix("_sum").unwrap_or(name).to_owned()
    };
    let missing: Vec<_> = there.iter().filter(|name| !documented.contains(&base(name))).collect();
    assert!(missing.is_empty(), "docs/TELEMETRY.md lacks {missing:?}");
}

#[test]
fn the_dashboard_is_complete() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/grafana/srcip.json");
    let dashboard: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for key in ["title", "uid", "schemaVersion", "version", "time", "templating", "timezone", "refresh"] {
        assert!(!dashboard[key].is_null(), "no {key}");
    }
    assert!(dashboard["id"].is_null(), "Grafana gives it one");
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: the id is another panel's");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title} is too wide");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(cells.insert((x, y)), "{title} covers another panel");
            }
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["datasource"]["uid"].is_string(), "{title}");
        let targets = panel["targets"].as_array().unwrap();
        let mut refs = BTreeSet::new();
        for target in targets {
            assert!(refs.insert(target["refId"].as_str().unwrap()), "{title}");
            assert!(!used(target["expr"].as_str().unwrap()).is_empty(), "{title}");
        }
        assert!(!targets.is_empty(), "{title}");
    }
    assert!(panels.len() > 8);
}
