//! The Kubernetes API: its protocol, and its failures.

use std::time::Duration;

use srcip_tests::{
    apiserver::{Asked, faults::Faults},
    scratch::Scratch,
};

use super::*;

fn synced(prepare: impl FnOnce(&Place<'_>)) -> Rig {
    let mut rig = Rig::new(Kind::Kube, prepare);
    rig.until("all pods", |snapshot| snapshot.synced);
    rig
}

impl Rig {
    fn asked(&self, verb: &str) -> Vec<Asked> {
        self.server.asked(verb, "pods")
    }

    /// Waits until a watch has begun: what happens from now on is told by it.
    fn until_watched(&self, times: usize) {
        eventually("a watch", || self.asked("watch").len() >= times);
    }
}

#[test]
fn only_this_nodes_pods_are_asked_for_and_only_as_documented() {
    let mut rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    rig.server.expire();
    rig.until_watched(2);
    assert_eq!(rig.fetch("a").unwrap().unwrap().name.to_string(), "default/a");
    for asked in rig.server.requests() {
        assert!(matches!(asked.verb, "list" | "watch" | "get"), "{asked:?}");
        assert_eq!((asked.resource.as_str(), asked.token), ("pods", true));
        if asked.verb == "get" {
            assert_eq!((asked.namespace.as_deref(), asked.name.as_deref()), (Some("default"), Some("a")));
        } else {
            assert_eq!(asked.query.get("fieldSelector").map(String::as_str), Some("spec.nodeName=node-1"));
        }
        if asked.verb == "watch" {
            assert_eq!(asked.query.get("allowWatchBookmarks").map(String::as_str), Some("true"));
            assert_eq!(asked.query.get("timeoutSeconds").map(String::as_str), Some("30"));
        }
    }
    rig.until_pods(&["a"]);
}

#[test]
fn a_thousand_pods_come_in_pages_and_only_then_are_they_all() {
    let mut rig = Rig::new(Kind::Kube, |place| {
        (0..1000).for_each(|i| place.put(pod(&format!("pod-{i:04}"))));
    });
    let mut partial = false;
    let snapshot = rig.until("all pods", |snapshot| {
        partial |= !snapshot.synced && !snapshot.pods.is_empty();
        snapshot.synced
    });
    assert_eq!(snapshot.pods.len(), 1000);
    assert!(!partial, "a part of the list was published");
    let lists = rig.asked("list");
    assert_eq!(lists.len(), 40);
    assert!(lists.iter().all(|asked| asked.query["limit"] == "25"));
    assert_eq!(lists.iter().filter(|asked| !asked.query.contains_key("continue")).count(), 1);
}

#[test]
fn a_list_that_expires_half_way_is_begun_anew() {
    let mut rig = Rig::new(Kind::Kube, |place| {
        (0..100).for_each(|i| place.put(pod(&format!("pod-{i:03}"))));
        place.server.set(Faults { lists_expire: true, ..Faults::default() });
    });
    let begun =
        |rig: &Rig| rig.asked("list").iter().filter(|asked| !asked.query.contains_key("continue")).count();
    eventually("a list begun anew", || begun(&rig) >= 2);
    assert!(!rig.now().synced);
    rig.server.set(Faults::default());
    let snapshot = rig.until("all pods", |snapshot| snapshot.synced);
    assert_eq!(snapshot.pods.len(), 100);
}

#[test]
fn what_was_missed_while_cut_off_is_caught_up_without_a_list() {
    let mut rig = synced(|place| {
        place.put(pod("a"));
        place.put(pod("b"));
    });
    rig.until_watched(1);
    rig.place().down();
    rig.until("trouble", |snapshot| snapshot.trouble.is_some());
    rig.place().delete("a");
    rig.place().put(pod("c"));
    rig.place().up();
    rig.until_pods(&["b", "c"]);
    assert_eq!(rig.asked("list").len(), 1, "{:#?}", rig.server.requests());
    let watches = rig.asked("watch");
    let from = |watch: &Asked| watch.query["resourceVersion"].parse::<u64>().unwrap();
    assert!(watches.iter().all(|watch| from(watch) >= 2), "{watches:#?}");
}

#[test]
fn connections_that_are_cut_are_made_again() {
    let mut rig = synced(|_| {});
    for i in 1..=5 {
        rig.until_watched(i);
        rig.server.cut();
        rig.place().put(pod(&format!("pod-{i}")));
        rig.until(&format!("pod {i}"), |snapshot| snapshot.pods.len() == i);
    }
}

#[test]
fn an_object_that_breaks_off_is_asked_for_again() {
    let mut rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    rig.server.set(Faults { torn: true, ..Faults::default() });
    rig.place().put(pod("b"));
    rig.until_watched(3);
    assert_eq!(names(&rig.now()), ["a"]);
    rig.server.set(Faults::default());
    rig.until_pods(&["a", "b"]);
}

#[test]
fn a_version_that_is_gone_leads_to_a_new_list() {
    for gone_by_status in [false, true] {
        let faults = Faults { gone_by_status, ..Faults::default() };
        let mut rig = synced(|place| {
            place.put(pod("a"));
            place.put(pod("b"));
        });
        rig.until_watched(1);
        rig.server.set(Faults { refuse: true, ..faults.clone() });
        rig.until("trouble", |snapshot| snapshot.trouble.is_some());
        // What is not told any more: one has gone, another has come.
        rig.place().delete("a");
        rig.place().put(pod("c"));
        rig.server.expire();
        rig.server.set(faults);
        rig.until_pods(&["b", "c"]);
        rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
        assert_eq!(rig.asked("list").len(), 2, "{:#?}", rig.server.requests());
        rig.place().put(pod("d"));
        rig.until_pods(&["b", "c", "d"]);
    }
}

#[test]
fn what_is_no_json_leads_to_a_new_list() {
    let mut rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    rig.server.set(Faults { garbage: true, ..Faults::default() });
    rig.place().put(pod("b"));
    // The list has it.
    rig.until_pods(&["a", "b"]);
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
    // It passes with the next list. Whoever looks on from the source's own thread does not miss it.
    let mut seen = rig.seen.clone();
    let troubled = rig.background.handle.spawn(async move {
        drop(seen.wait_for(|snapshot| snapshot.trouble.is_some()).await.unwrap());
    });
    rig.place().put(pod("c"));
    let troubled = rig.background.wait(async { tokio::time::timeout(SOON, troubled).await });
    troubled.expect("there is trouble").unwrap();
    rig.server.set(Faults::default());
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
    rig.until_pods(&["a", "b", "c"]);
}

#[test]
fn what_is_told_twice_is_true_once() {
    let mut rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    rig.server.set(Faults { twice: true, ..Faults::default() });
    rig.place().put(pod("b"));
    rig.place().delete("a");
    rig.place().put(pod("c"));
    rig.until_pods(&["b", "c"]);
}

#[test]
fn what_is_never_told_is_found_by_the_next_list() {
    let mut rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    rig.server.set(Faults { lossy: true, ..Faults::default() });
    rig.place().delete("a");
    rig.place().put(pod("b"));
    thread::sleep(Duration::from_millis(300));
    assert_eq!(names(&rig.now()), ["a"]);
    rig.server.expire();
    rig.until_pods(&["b"]);
}

#[test]
fn slow_answers_are_waited_for_and_slower_ones_are_trouble() {
    let slow = Faults { delay: Duration::from_millis(300), ..Faults::default() };
    let timing = kube_source::Timing {
        request: Duration::from_secs(2),
        fetch: Duration::from_secs(1),
        ..kube_timing()
    };
    let mut rig = Rig::with(Kind::Kube, timing, |place| {
        place.put(pod("a"));
        place.server.set(slow.clone());
    });
    rig.until_pods(&["a"]);
    rig.until_watched(1);
    rig.server.set(Faults { delay: SOON, ..Faults::default() });
    rig.server.cut();
    rig.until("the trouble", |snapshot| {
        let why = snapshot.trouble.as_deref().unwrap_or_default();
        why.contains("has not answered to watch pods in 2s")
    });
    let before = Instant::now();
    let error = rig.fetch("a").unwrap_err().to_string();
    assert!(error.contains("has not told of pod default/a within 1s"), "{error}");
    assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
    rig.server.set(Faults::default());
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
}

#[test]
fn a_silent_connection_is_given_up_when_its_watch_should_have_ended() {
    let scratch = Scratch::new().unwrap();
    let server = ApiServer::start().unwrap();
    server.set(Faults { silent: true, ..Faults::default() });
    let background = Background::start();
    let source = background.wait(async {
        let client = connect(Some(&server.kubeconfig(scratch.path()).unwrap())).await.unwrap();
        let timing = kube_source::Timing { watch: Duration::from_secs(1), ..kube_timing() };
        KubeSource::start(client, NODE, timing, Counter::default()).unwrap()
    });
    let begun = Instant::now();
    eventually("another watch", || server.asked("watch", "pods").len() >= 2);
    // The server never ended the first one. It was given the time agreed and some more.
    let waited = begun.elapsed();
    assert!(waited > Duration::from_secs(3), "{waited:?}");
    // The next one goes on from where that was, and brings what has happened.
    assert_eq!(server.asked("list", "pods").len(), 1);
    server.put_pod(pod("a"));
    server.set(Faults::default());
    let seen = source.watch();
    eventually("the pod", || names(&seen.borrow()) == ["a"]);
    assert_eq!(server.asked("list", "pods").len(), 1);
}

#[test]
fn a_server_that_always_fails_is_not_asked_all_the_time() {
    for faults in [
        Faults { short: true, ..Faults::default() },
        Faults { status: Some(500), ..Faults::default() },
        Faults { torn: true, ..Faults::default() },
    ] {
        let rig = Rig::new(Kind::Kube, |place| {
            place.server.set(faults.clone());
            place.put(pod("a"));
        });
        if faults.torn {
            rig.until_watched(1);
            rig.place().put(pod("b"));
        }
        eventually("requests", || rig.server.requests().len() >= 4);
        let (began, before) = (Instant::now(), rig.server.requests().len());
        thread::sleep(Duration::from_secs(2));
        let asked = rig.server.requests().len() - before;
        // The longest delay is 200 ms, and as much again at random; the first ones are shorter.
        let most = began.elapsed().as_millis() / 200 + 2;
        assert!(asked as u128 <= most, "{asked} requests, not {most}, with {faults:?}");
    }
}

#[test]
fn who_may_not_is_told_which_rule_is_missing() {
    let mut rig = Rig::new(Kind::Kube, |place| {
        place.put(pod("a"));
        place.server.set(Faults { status: Some(403), ..Faults::default() });
    });
    let why = rig.until("trouble", |snapshot| snapshot.trouble.is_some()).trouble.unwrap();
    assert!(why.contains("403") && why.contains("the verb `list` on `pods`"), "{why}");
    let error = rig.fetch("a").unwrap_err().to_string();
    assert!(error.contains("the verb `get` on `pods`"), "{error}");
    assert!(!rig.now().synced);
    rig.server.set(Faults { status: Some(401), ..Faults::default() });
    rig.until("another trouble", |snapshot| {
        snapshot.trouble.as_ref().is_some_and(|why| why.contains("does not accept who asks (401)"))
    });
    rig.server.set(Faults::default());
    rig.until_pods(&["a"]);
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
}

#[test]
fn a_kubeconfig_that_cannot_be_used_is_named() {
    let background = Background::start();
    let scratch = Scratch::new().unwrap();
    let path = scratch.path().join("none");
    let error = background.wait(connect(Some(&path))).err().expect("there is no such file");
    assert!(format!("{error:#}").contains(&format!("the kubeconfig {} cannot be used", path.display())));
}

#[test]
fn a_source_that_is_dropped_asks_no_more() {
    let rig = synced(|place| place.put(pod("a")));
    rig.until_watched(1);
    let Rig { source, seen, background, server, .. } = rig;
    drop(source);
    server.cut();
    background.wait(async { tokio::time::sleep(Duration::from_millis(500)).await });
    assert_eq!(server.asked("watch", "pods").len(), 1);
    assert_eq!(names(&seen.borrow()), ["a"]);
}
