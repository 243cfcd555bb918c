//! Warning Events.

use std::time::Duration;

use srcip_tests::{apiserver::faults::Faults, scratch::Scratch};

use super::*;

struct Reporter {
    source: KubeSource,
    lost: Counter,
    server: ApiServer,
    background: Background,
    scratch: Scratch,
}

impl Reporter {
    fn new() -> Self {
        let scratch = Scratch::new().unwrap();
        let server = ApiServer::start().unwrap();
        let background = Background::start();
        let lost = Counter::default();
        let source = background.wait(kube_of(&server, &scratch, lost.clone()));
        Self { source, lost, server, background, scratch }
    }

    fn until_events(&self, count: usize) -> Vec<Value> {
        eventually(&format!("{count} Events"), || self.server.events().len() >= count);
        // One too many would come now.
        thread::sleep(Duration::from_millis(300));
        let events = self.server.events();
        assert_eq!(events.len(), count, "{events:#?}");
        events
    }
}

fn info(name: &str) -> PodInfo {
    PodInfo::from_object(&serde_json::from_value(pod(name)).unwrap()).unwrap()
}

#[test]
fn an_event_says_what_is_wrong_with_which_pod_and_who_says_so() {
    let reporter = Reporter::new();
    reporter.source.warn(&info("web-0"), "InvalidAnnotation", "srcip.io/proxy-port is \"x\"");
    let events = reporter.until_events(1);
    let event = &events[0];
    assert_eq!(
        event["regarding"],
        json!({
            "apiVersion": "v1", "kind": "Pod", "namespace": "default", "name": "web-0", "uid": "uid-web-0",
        })
    );
    assert_eq!(event["metadata"]["namespace"], "default");
    assert_eq!(event["type"], "Warning");
    assert_eq!(event["reason"], "InvalidAnnotation");
    assert_eq!(event["note"], "srcip.io/proxy-port is \"x\"");
    assert_eq!(event["reportingController"], "srcip");
    assert_eq!(event["reportingInstance"], NODE);
    assert_eq!(event["action"], "Steer");
    let made = reporter.server.asked("create", "events.events.k8s.io");
    assert_eq!(made.len(), 1);
    assert_eq!(made[0].namespace.as_deref(), Some("default"));
}

/// Every node sees what is wrong with a Service; one of them tells it.
#[test]
fn an_event_on_a_service_is_told_once_by_all_nodes_together() {
    let reporter = Reporter::new();
    let other = reporter.background.wait(kube_of(&reporter.server, &reporter.scratch, Counter::default()));
    let name = PodName::new("shop", "web").unwrap();
    let uid = PodUid::new("uid-web").unwrap();
    for source in [&reporter.source, &other] {
        source.warn_service(&name, &uid, "Conflict", "port 80 of 203.0.113.1 leads to shop/old");
    }
    let asked = || reporter.server.asked("create", "events.events.k8s.io").len();
    eventually("both have told it", || asked() == 2);
    let events = reporter.until_events(1);
    let event = &events[0];
    assert_eq!(
        event["regarding"],
        json!({"apiVersion": "v1", "kind": "Service", "namespace": "shop", "name": "web", "uid": "uid-web"})
    );
    assert_eq!((&event["reason"], &event["action"]), (&json!("Conflict"), &json!("Handle")));
    assert_eq!(asked(), 2);
    // Another note is another Event, and one refused as known already is not lost.
    reporter.source.warn_service(&name, &uid, "Conflict", "port 81 of 203.0.113.1 leads to shop/old");
    reporter.until_events(2);
    assert_eq!(reporter.lost.get(), 0);
}

#[test]
fn the_same_is_told_once_and_what_differs_is_told() {
    let reporter = Reporter::new();
    for _ in 0..20 {
        reporter.source.warn(&info("a"), "InvalidAnnotation", "one");
        reporter.source.warn(&info("b"), "InvalidAnnotation", "one");
        reporter.source.warn(&info("a"), "HostNetwork", "one");
    }
    reporter.source.warn(&info("a"), "InvalidAnnotation", "two");
    let events = reporter.until_events(4);
    let told: Vec<_> = events.iter().map(|event| (&event["regarding"]["name"], &event["note"])).collect();
    assert_eq!(told.last(), Some(&(&json!("a"), &json!("two"))));
}

#[test]
fn hostile_names_and_notes_make_a_valid_event() {
    let reporter = Reporter::new();
    // Cut where a label would end in a hyphen.
    let name = format!("{}.{}-{}", "a".repeat(63), "b".repeat(171), "c".repeat(17));
    let mut long = info("long");
    long.name = PodName::new("default", &name).unwrap();
    reporter.source.warn(&long, "InvalidAnnotation", &"\u{202e}ä\n".repeat(1000));
    let events = reporter.until_events(1);
    let note = events[0]["note"].as_str().unwrap();
    assert!(note.len() <= 1024 && note.len() > 1000 && !note.contains('\n'), "{}", note.len());
    assert_eq!(reporter.lost.get(), 0);
}

#[test]
fn an_event_waits_for_a_server_that_is_down() {
    let reporter = Reporter::new();
    reporter.server.set(Faults { status: Some(503), ..Faults::default() });
    reporter.source.warn(&info("a"), "InvalidAnnotation", "one");
    eventually("an attempt", || !reporter.server.asked("create", "events.events.k8s.io").is_empty());
    reporter.server.set(Faults::default());
    reporter.until_events(1);
    assert_eq!(reporter.lost.get(), 0);
}

#[test]
fn what_is_lost_is_counted_and_is_news_again() {
    let reporter = Reporter::new();
    reporter.server.set(Faults { status: Some(403), ..Faults::default() });
    reporter.source.warn(&info("a"), "InvalidAnnotation", "one");
    eventually("a loss", || reporter.lost.get() == 1);
    assert_eq!(reporter.server.asked("create", "events.events.k8s.io").len(), 1, "no is no");
    reporter.server.set(Faults::default());
    reporter.source.warn(&info("a"), "InvalidAnnotation", "one");
    reporter.until_events(1);
}

#[test]
fn a_flood_never_waits_and_is_bounded() {
    let reporter = Reporter::new();
    reporter.server.set(Faults { refuse: true, ..Faults::default() });
    let before = Instant::now();
    // Who waited for each as long as the next attempt does would take minutes.
    for i in 0..5000 {
        reporter.source.warn(&info(&format!("pod-{i}")), "InvalidAnnotation", "one");
    }
    assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
    assert!(reporter.lost.get() >= 5000 - 258, "{}", reporter.lost.get());
}
