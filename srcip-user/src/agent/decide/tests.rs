//! Tests of what is decided.

use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::record::{ISTIO_PORTS, OnProxyDown},
    text::is_unprintable,
};

/// An Event's note may have so many bytes.
const MAX_NOTE: usize = 1024;

fn pod(annotations: &[(&str, &str)]) -> PodInfo {
    let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
    let object = serde_json::json!({
        "metadata": {
            "namespace": "shop", "name": "web-0", "uid": "1", "labels": {"app": "web"},
            "annotations": annotations,
        },
    });
    PodInfo::from_object(&serde_json::from_value(object).unwrap()).unwrap()
}

/// A configuration with one selector.
fn selecting(fields: serde_json::Value) -> Config {
    serde_json::from_value(serde_json::json!({"steer": {"selectors": [fields]}})).unwrap()
}

fn steered(annotations: &[(&str, &str)], config: &Config) -> Wanted {
    match decide(&pod(annotations), config) {
        Decision::Steer(wanted) => wanted,
        other => panic!("{annotations:?}: {other:?}"),
    }
}

fn refused(annotations: &[(&str, &str)]) -> Problem {
    match decide(&pod(annotations), &Config::default()) {
        Decision::Refuse(problem) => problem,
        other => panic!("{annotations:?}: {other:?}"),
    }
}

fn warned(pod: &PodInfo, config: &Config) -> Vec<Problem> {
    warnings(pod, &decide(pod, config))
}

fn is_left(annotations: &[(&str, &str)], config: &Config) -> bool {
    matches!(decide(&pod(annotations), config), Decision::Leave(_))
}

/// The settings' ports as the programs see them.
fn has_port(wanted: &Wanted, port: u16) -> bool {
    wanted.settings.pod().steered_ports.contains(port)
}

#[test]
fn istio_pods_are_steered_as_istio_would() {
    let config = Config::default();
    let wanted = steered(&[(INTERCEPTION_MODE, "TPROXY")], &config);
    assert_eq!((wanted.settings.proxy_port, wanted.engine), (15006, None));
    assert_eq!(wanted.settings.on_proxy_down, OnProxyDown::Drop);
    assert!(has_port(&wanted, 80) && !ISTIO_PORTS.iter().any(|port| has_port(&wanted, *port)));
    for mode in ["REDIRECT", "NONE"] {
        assert!(is_left(&[(INTERCEPTION_MODE, mode)], &config), "{mode}");
    }
    for mode in ["", "tproxy", "TPROXY "] {
        let problem = refused(&[(INTERCEPTION_MODE, mode)]);
        assert_eq!(problem.reason, "InvalidAnnotation");
        assert!(problem.note.contains(INTERCEPTION_MODE) && problem.note.contains("REDIRECT"), "{problem:?}");
    }
}

#[test]
fn port_lists_mean_what_they_mean_to_istio() {
    let config = Config::default();
    let tproxy = (INTERCEPTION_MODE, "TPROXY");
    let wanted = steered(&[tproxy, (INCLUDE_INBOUND_PORTS, " 80, 443 ,15020")], &config);
    assert!(has_port(&wanted, 80) && has_port(&wanted, 443));
    assert!(!has_port(&wanted, 8080) && !has_port(&wanted, 15020));
    let wanted =
        steered(&[tproxy, (INCLUDE_INBOUND_PORTS, "*"), (EXCLUDE_INBOUND_PORTS, "22, 9000-9010")], &config);
    assert!(has_port(&wanted, 80) && !has_port(&wanted, 22) && !has_port(&wanted, 9005));
    let wanted = steered(&[tproxy, (EXCLUDE_INBOUND_PORTS, "")], &config);
    assert!(has_port(&wanted, 22));
    // Excluded is only what would go to the proxy because everything does.
    let both = [tproxy, (INCLUDE_INBOUND_PORTS, "80,443"), (EXCLUDE_INBOUND_PORTS, "443")];
    assert!(has_port(&steered(&both, &config), 443));
    assert_eq!(warned(&pod(&both), &config)[0].reason, "NoEffect");
    for nothing in ["", "  ", "15006", "15020,15021,15090,15006"] {
        assert!(is_left(&[tproxy, (INCLUDE_INBOUND_PORTS, nothing)], &config), "{nothing:?}");
    }
    for bad in ["80,", "http", "0", "65536", "80;81", "9010-9000", "-1", "*,80"] {
        for list in [INCLUDE_INBOUND_PORTS, EXCLUDE_INBOUND_PORTS] {
            let problem = refused(&[tproxy, (list, bad)]);
            assert!(problem.note.contains(list) && problem.note.contains(bad), "{problem:?}");
        }
    }
    assert!(refused(&[tproxy, (EXCLUDE_INBOUND_PORTS, "*")]).note.contains("srcip.io/steer"));
    let long = "80,".repeat(1000);
    assert!(refused(&[tproxy, (INCLUDE_INBOUND_PORTS, &long)]).note.contains("9000-9010"));
}

#[test]
fn srcips_own_annotations() {
    let config = Config::default();
    let yes = (STEER, "true");
    let wanted = steered(&[yes, (PROXY_PORT, "15001"), (ON_PROXY_DOWN, "pass"), (ENGINE, "tc")], &config);
    assert_eq!((wanted.settings.proxy_port, wanted.engine), (15001, Some(EngineKind::Tc)));
    assert_eq!(wanted.settings.on_proxy_down, OnProxyDown::Pass);
    assert_eq!(steered(&[yes, (PROXY_PORT, "1"), (ENGINE, "auto")], &config).engine, None);
    // With a sidecar that Istio does not hand connections to, and with Istio's at another port.
    assert_eq!(
        steered(&[yes, (PROXY_PORT, "1"), (INTERCEPTION_MODE, "NONE")], &config).settings.proxy_port,
        1
    );
    let istio = steered(&[(INTERCEPTION_MODE, "TPROXY"), (PROXY_PORT, "1")], &config);
    assert_eq!(istio.settings.proxy_port, 1);
    for (annotations, reason) in [
        (&[yes][..], "MissingAnnotation"),
        (&[(STEER, "yes")], "InvalidAnnotation"),
        (&[(STEER, "")], "InvalidAnnotation"),
        (&[yes, (PROXY_PORT, "0")], "InvalidAnnotation"),
        (&[yes, (PROXY_PORT, "http")], "InvalidAnnotation"),
        (&[yes, (PROXY_PORT, "1"), (ON_PROXY_DOWN, "reject")], "InvalidAnnotation"),
        (&[yes, (PROXY_PORT, "1"), (ENGINE, "xdp")], "InvalidAnnotation"),
        (&[yes, (PROXY_PORT, "1"), (INTERCEPTION_MODE, "REDIRECT")], "ConflictingAnnotations"),
        (&[yes, (PROXY_PORT, "1"), (INTERCEPTION_MODE, "x")], "InvalidAnnotation"),
    ] {
        assert_eq!(refused(annotations).reason, reason, "{annotations:?}");
    }
}

#[test]
fn steer_false_wins_over_everything() {
    let config = selecting(serde_json::json!({"namespace": "shop", "proxyPort": 1}));
    for other in [(INTERCEPTION_MODE, "TPROXY"), (INTERCEPTION_MODE, "bad"), (PROXY_PORT, "bad")] {
        assert!(is_left(&[(STEER, "false"), other], &config), "{other:?}");
    }
}

#[test]
fn selectors_give_what_annotations_do_not() {
    let config = selecting(serde_json::json!({
        "matchLabels": {"app": "web"}, "proxyPort": 1500, "excludeInboundPorts": "22",
        "onProxyDown": "pass", "engine": "tc",
    }));
    let wanted = steered(&[], &config);
    assert_eq!((wanted.settings.proxy_port, wanted.engine), (1500, Some(EngineKind::Tc)));
    assert_eq!(wanted.settings.on_proxy_down, OnProxyDown::Pass);
    assert!(has_port(&wanted, 80) && !has_port(&wanted, 22));
    let wanted = steered(&[(STEER, "true"), (ENGINE, "sk-lookup"), (EXCLUDE_INBOUND_PORTS, "")], &config);
    assert_eq!((wanted.settings.proxy_port, wanted.engine), (1500, Some(EngineKind::SkLookup)));
    assert!(has_port(&wanted, 22));
    assert_eq!(steered(&[(INTERCEPTION_MODE, "TPROXY")], &config).settings.proxy_port, 15006);
    assert!(is_left(&[(INTERCEPTION_MODE, "REDIRECT")], &config));
    assert!(is_left(&[], &selecting(serde_json::json!({"namespace": "other", "proxyPort": 1500}))));
}

#[test]
fn pods_that_cannot_or_need_not_be_steered() {
    let selecting = selecting(serde_json::json!({"namespace": "shop", "proxyPort": 1}));
    let mut host = pod(&[(INTERCEPTION_MODE, "TPROXY")]);
    host.host_network = true;
    for config in [&Config::default(), &selecting] {
        let Decision::Refuse(problem) = decide(&host, config) else { panic!("not refused") };
        assert_eq!(problem.reason, "HostNetwork");
    }
    host.annotations.clear();
    assert!(matches!(decide(&host, &selecting), Decision::Refuse(_)));
    assert!(matches!(decide(&host, &Config::default()), Decision::Leave(_)));
    let mut completed = pod(&[(INTERCEPTION_MODE, "TPROXY")]);
    completed.completed = true;
    assert!(matches!(decide(&completed, &selecting), Decision::Leave(_)));
}

#[test]
fn mistakes_that_change_nothing_are_told() {
    let config = Config::default();
    let typo = pod(&[(STEER, "true"), (PROXY_PORT, "1"), ("srcip.io/on-proxydown", "pass")]);
    assert!(matches!(decide(&typo, &config), Decision::Steer(_)));
    let [warning] = &warned(&typo, &config)[..] else { panic!("not one warning") };
    assert_eq!(warning.reason, "UnknownAnnotation");
    assert!(warning.note.contains("srcip.io/on-proxydown;") && warning.note.contains(ON_PROXY_DOWN));
    let silent = pod(&[(PROXY_PORT, "1")]);
    assert_eq!(warned(&silent, &config)[0].reason, "NoEffect");
    assert!(warned(&silent, &selecting(serde_json::json!({"namespace": "shop", "proxyPort": 2}))).is_empty());
    assert!(warned(&pod(&[(INTERCEPTION_MODE, "TPROXY")]), &config).is_empty());
    assert!(warned(&pod(&[(STEER, "false"), (PROXY_PORT, "1")]), &config).is_empty());
}

#[test]
fn what_pods_say_cannot_reach_a_terminal() {
    let problem = refused(&[(STEER, "\u{1b}[2J\u{202e}x")]);
    assert!(!problem.note.chars().any(is_unprintable), "{problem:?}");
}

/// Annotations as they come, and as somebody out for trouble writes them.
fn annotations() -> impl Strategy<Value = BTreeMap<String, String>> {
    let names = prop_oneof![
        proptest::sample::select(vec![
            INTERCEPTION_MODE,
            INCLUDE_INBOUND_PORTS,
            EXCLUDE_INBOUND_PORTS,
            STEER,
            PROXY_PORT,
            ON_PROXY_DOWN,
            ENGINE,
        ])
        .prop_map(str::to_owned),
        "srcip.io/.{0,80}",
    ];
    let values = prop_oneof![
        proptest::sample::select(vec!["true", "false", "TPROXY", "REDIRECT", "*", "", "80", "tc", "pass"])
            .prop_map(str::to_owned),
        "[0-9, -]{0,40}",
        ".{0,2000}",
    ];
    proptest::collection::btree_map(names, values, 0..8)
}

proptest! {
    #[test]
    fn whatever_a_pod_says_is_decided_within_bounds(
        annotations in annotations(),
        host_network: bool,
        completed: bool,
        selected: bool,
    ) {
        let mut pod = pod(&[]);
        (pod.annotations, pod.host_network, pod.completed) = (annotations, host_network, completed);
        let namespace = if selected { "shop" } else { "other" };
        let config = selecting(serde_json::json!({"namespace": namespace, "proxyPort": 7}));
        let decision = decide(&pod, &config);
        let mut problems = warnings(&pod, &decision);
        match &decision {
            Decision::Steer(wanted) => {
                prop_assert!(!host_network && !completed);
                let ask = asks_for_steering(&pod.annotations);
                prop_assert!(ask == Ask::Yes || selected && ask == Ask::Unknown);
                prop_assert!(!has_port(wanted, wanted.settings.proxy_port));
                prop_assert!(wanted.settings.include.to_string().len() <= MAX_LIST);
                prop_assert!(wanted.settings.exclude.to_string().len() <= MAX_LIST);
            }
            Decision::Leave(_) => {}
            Decision::Refuse(problem) => problems.push(problem.clone()),
        }
        for problem in problems {
            prop_assert!(problem.note.len() <= MAX_NOTE, "{} bytes", problem.note.len());
            prop_assert!(!problem.note.chars().any(is_unprintable));
            prop_assert!(problem.reason.chars().all(|c| c.is_ascii_alphanumeric()));
        }
        // Nothing else decides.
        prop_assert_eq!(decide(&pod, &config), decision);
    }
}
