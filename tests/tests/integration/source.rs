//! Where the agent learns of pods. What the Kubernetes API and a directory of manifests both promise is tested
//! with both, by `sources!`.

mod events;
mod kube;
mod kubectl;
mod manifests;
mod services;

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use prometheus_client::metrics::counter::Counter;
use serde_json::{Value, json};
use srcip_tests::{
    PATIENCE,
    apiserver::{ApiServer, faults::Faults},
    scratch::Scratch,
    wait_until as eventually,
};
use srcip_user::agent::{
    pod::{PodInfo, PodName, PodUid},
    source::{
        Snapshot, Source,
        kube::{self as kube_source, KubeSource, connect},
        manifests::{self as manifest_source, ManifestSource},
    },
};
use tokio::{
    runtime::{Builder, Handle},
    sync::{oneshot, watch},
};

/// The node whose pods are wanted.
const NODE: &str = "node-1";

/// What comes, comes within this time.
const SOON: Duration = PATIENCE;

/// Makes a test of each function for each source; the function takes the kind.
macro_rules! sources {
    ($($name:ident),+ $(,)?) => {
        mod from_kube { $(#[test] fn $name() { super::$name(super::Kind::Kube) })+ }
        mod from_manifests { $(#[test] fn $name() { super::$name(super::Kind::Manifests) })+ }
    };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Kube,
    Manifests,
}

/// Delays that suit a test. No answer comes so late, by itself, that it is asked for once more.
fn kube_timing() -> kube_source::Timing {
    kube_source::Timing {
        request: SOON,
        fetch: SOON,
        watch: Duration::from_secs(30),
        first_delay: Duration::from_millis(20),
        longest_delay: Duration::from_millis(200),
    }
}

fn manifest_timing() -> manifest_source::Timing {
    manifest_source::Timing { rescan: Duration::from_millis(500), settle: Duration::from_millis(50) }
}

/// A runtime on a thread of its own, as the agent has it; ends when dropped.
struct Background {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Background {
    fn start() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || drop(runtime.block_on(stopped)));
        Self { handle, stop: Some(stop), thread: Some(thread) }
    }

    /// Waits for something that runs there.
    fn wait<T>(&self, what: impl Future<Output = T>) -> T {
        self.handle.block_on(what)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

/// A source, and where its pods are.
struct Rig {
    source: Box<dyn Source>,
    seen: watch::Receiver<Snapshot>,
    background: Background,
    server: ApiServer,
    kind: Kind,
    scratch: Scratch,
}

impl Rig {
    /// A source that has begun, of a place that is `prepared` first.
    fn new(kind: Kind, prepare: impl FnOnce(&Place<'_>)) -> Self {
        Self::with(kind, kube_timing(), prepare)
    }

    /// The same with delays of its own for the API.
    fn with(kind: Kind, timing: kube_source::Timing, prepare: impl FnOnce(&Place<'_>)) -> Self {
        let scratch = Scratch::new().unwrap();
        let server = ApiServer::start().unwrap();
        let directory = manifests_of(&scratch);
        fs::create_dir(&directory).unwrap();
        prepare(&Place { kind, server: &server, directory });
        let background = Background::start();
        let source = background.wait(async {
            match kind {
                Kind::Kube => Box::new(kube_with(&server, &scratch, timing, Counter::default()).await)
                    as Box<dyn Source>,
                Kind::Manifests => {
                    Box::new(ManifestSource::start(&manifests_of(&scratch), Some(NODE), manifest_timing()))
                }
            }
        });
        let seen = source.watch();
        Self { source, seen, background, server, kind, scratch }
    }

    fn place(&self) -> Place<'_> {
        Place { kind: self.kind, server: &self.server, directory: manifests_of(&self.scratch) }
    }

    fn now(&self) -> Snapshot {
        self.seen.borrow().clone()
    }

    /// Waits until what is known is as it should be.
    fn until(&mut self, what: &str, mut right: impl FnMut(&Snapshot) -> bool) -> Snapshot {
        let seen = &mut self.seen;
        let result = self.background.handle.block_on(async {
            let found = tokio::time::timeout(SOON, seen.wait_for(|snapshot| right(snapshot))).await;
            found.map(|snapshot| snapshot.map(|snapshot| snapshot.clone()))
        });
        match result {
            Ok(snapshot) => snapshot.unwrap(),
            Err(_) => panic!("not within {SOON:?}: {what}\n{:#?}\n{:#?}", self.now(), self.server.requests()),
        }
    }

    /// Waits until exactly these pods are known, and all.
    fn until_pods(&mut self, expected: &[&str]) -> Snapshot {
        self.until(&format!("exactly the pods {expected:?}"), |snapshot| {
            snapshot.synced && names(snapshot) == expected
        })
    }

    fn fetch(&self, name: &str) -> anyhow::Result<Option<PodInfo>> {
        let name = PodName::new("default", name).unwrap();
        self.background.wait(self.source.fetch(&name))
    }
}

fn manifests_of(scratch: &Scratch) -> PathBuf {
    scratch.path().join("manifests")
}

async fn kube_of(server: &ApiServer, scratch: &Scratch, lost: Counter) -> KubeSource {
    kube_with(server, scratch, kube_timing(), lost).await
}

async fn kube_with(
    server: &ApiServer,
    scratch: &Scratch,
    timing: kube_source::Timing,
    lost: Counter,
) -> KubeSource {
    let config = server.kubeconfig(scratch.path()).unwrap();
    let client = connect(Some(&config)).await.unwrap();
    KubeSource::start(client, NODE, timing, lost).unwrap()
}

/// Where pods are made and removed.
struct Place<'a> {
    kind: Kind,
    server: &'a ApiServer,
    directory: PathBuf,
}

impl Place<'_> {
    /// Makes or changes a pod, whatever is in it; a file of its own.
    fn put(&self, pod: Value) {
        match self.kind {
            Kind::Kube => drop(self.server.put_pod(pod)),
            Kind::Manifests => {
                let name = pod["metadata"]["name"].as_str().unwrap();
                let path = self.directory.join(format!("{name}.yaml"));
                let half = path.with_extension("new");
                fs::write(&half, pod.to_string()).unwrap();
                fs::rename(half, path).unwrap();
            }
        }
    }

    fn delete(&self, name: &str) {
        match self.kind {
            Kind::Kube => self.server.delete_pod("default", name),
            Kind::Manifests => fs::remove_file(self.directory.join(format!("{name}.yaml"))).unwrap(),
        }
    }

    /// From now on nothing can be learned.
    fn down(&self) {
        match self.kind {
            Kind::Kube => self.server.set(Faults { refuse: true, ..Faults::default() }),
            Kind::Manifests => fs::rename(&self.directory, self.elsewhere()).unwrap(),
        }
    }

    /// It can again.
    fn up(&self) {
        match self.kind {
            Kind::Kube => self.server.set(Faults::default()),
            Kind::Manifests => fs::rename(self.elsewhere(), &self.directory).unwrap(),
        }
    }

    fn elsewhere(&self) -> PathBuf {
        self.directory.with_extension("elsewhere")
    }
}

/// A pod on the node, with a UID made of its name.
fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "default", "name": name, "uid": format!("uid-{name}"), "annotations": {} },
        "spec": { "nodeName": NODE, "containers": [{ "name": "c", "image": "i" }] },
        "status": { "phase": "Running", "podIP": "10.0.0.9" },
    })
}

/// The same, changed at a path such as `/spec/nodeName`.
fn pod_with(name: &str, path: &str, value: impl Into<Value>) -> Value {
    let mut pod = pod(name);
    let (parent, field) = path.rsplit_once('/').unwrap();
    pod.pointer_mut(parent).unwrap()[field.replace("~1", "/")] = value.into();
    pod
}

fn names(snapshot: &Snapshot) -> Vec<&str> {
    let mut names: Vec<&str> = snapshot.pods.values().map(|pod| &*pod.name.name).collect();
    names.sort_unstable();
    names
}

sources!(
    pods_come_change_and_go,
    another_pod_with_the_same_name_is_another,
    nothing_at_all_is_all_there_is,
    what_is_down_at_first_comes_up,
    what_goes_down_keeps_what_was_known,
    a_pod_that_makes_no_sense_hides_no_other,
    a_known_pod_that_makes_no_sense_any_more_stays_as_it_was,
    another_nodes_pods_are_left_out,
    a_pod_is_fetched_that_was_not_seen,
    who_watches_is_not_woken_for_nothing,
);

fn pods_come_change_and_go(kind: Kind) {
    let mut rig = Rig::new(kind, |place| place.put(pod("a")));
    rig.until_pods(&["a"]);
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b"]);
    rig.place().put(pod_with("b", "/metadata/annotations/srcip.io~1steer", "true"));
    let snapshot = rig.until("the annotation", |snapshot| {
        snapshot.pods.values().any(|pod| pod.annotations.contains_key("srcip.io/steer"))
    });
    assert_eq!(names(&snapshot), ["a", "b"]);
    rig.place().put(pod_with("b", "/status/phase", "Succeeded"));
    rig.until("the end", |snapshot| snapshot.pods.values().any(|pod| pod.completed));
    rig.place().delete("a");
    rig.until_pods(&["b"]);
    rig.place().delete("b");
    let snapshot = rig.until_pods(&[]);
    assert_eq!(snapshot.trouble, None);
}

fn another_pod_with_the_same_name_is_another(kind: Kind) {
    let mut rig = Rig::new(kind, |place| place.put(pod("a")));
    rig.until_pods(&["a"]);
    rig.place().delete("a");
    rig.place().put(pod_with("a", "/metadata/uid", "another"));
    let snapshot = rig.until("the other one alone", |snapshot| {
        snapshot.pods.keys().map(|uid| uid.as_str()).eq(["another"])
    });
    assert_eq!(names(&snapshot), ["a"]);
}

fn nothing_at_all_is_all_there_is(kind: Kind) {
    Rig::new(kind, |_| {}).until_pods(&[]);
}

fn what_is_down_at_first_comes_up(kind: Kind) {
    let mut rig = Rig::new(kind, |place| {
        place.put(pod("a"));
        place.down();
    });
    let snapshot = rig.until("trouble", |snapshot| snapshot.trouble.is_some());
    assert!(!snapshot.synced && snapshot.pods.is_empty(), "{snapshot:?}");
    let why = snapshot.trouble.unwrap();
    let cause = match kind {
        Kind::Kube => "Connection refused",
        Kind::Manifests => "No such file",
    };
    assert!(why.contains(cause), "{why}");
    rig.place().up();
    rig.until_pods(&["a"]);
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
}

fn what_goes_down_keeps_what_was_known(kind: Kind) {
    let mut rig = Rig::new(kind, |place| place.put(pod("a")));
    rig.until_pods(&["a"]);
    rig.place().down();
    let snapshot = rig.until("trouble", |snapshot| snapshot.trouble.is_some());
    assert!(snapshot.synced);
    assert_eq!(names(&snapshot), ["a"]);
    rig.place().up();
    rig.until("no trouble", |snapshot| snapshot.trouble.is_none());
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b"]);
}

fn bad_pods() -> [Value; 4] {
    [
        pod_with("bad-1", "/spec/hostNetwork", "perhaps"),
        pod_with("bad-2", "/metadata/uid", "../../etc"),
        pod_with("bad-3", "/metadata/labels", json!({ "a": ["b"] })),
        pod_with("bad-4", "/spec", json!(["no", "spec"])),
    ]
}

fn a_pod_that_makes_no_sense_hides_no_other(kind: Kind) {
    let mut rig = Rig::new(kind, |place| {
        place.put(pod("a"));
        bad_pods().into_iter().for_each(|pod| place.put(pod));
        place.put(pod("z"));
    });
    let snapshot = rig.until_pods(&["a", "z"]);
    assert_eq!(snapshot.trouble, None);
    for mut bad in bad_pods() {
        bad["metadata"]["generation"] = 2.into();
        rig.place().put(bad);
    }
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b", "z"]);
    // It is mended.
    rig.place().put(pod("bad-1"));
    rig.until_pods(&["a", "b", "bad-1", "z"]);
}

fn a_known_pod_that_makes_no_sense_any_more_stays_as_it_was(kind: Kind) {
    let mut rig = Rig::new(kind, |place| place.put(pod("a")));
    rig.until_pods(&["a"]);
    rig.place().put(pod_with("a", "/spec/hostNetwork", "perhaps"));
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b"]);
    if kind == Kind::Kube {
        // Nor is it gone after a new list.
        rig.server.expire();
        rig.place().put(pod("c"));
        rig.until_pods(&["a", "b", "c"]);
    }
}

fn another_nodes_pods_are_left_out(kind: Kind) {
    let mut rig = Rig::new(kind, |place| {
        place.put(pod("a"));
        place.put(pod_with("elsewhere", "/spec/nodeName", "node-2"));
    });
    rig.until_pods(&["a"]);
    rig.place().put(pod_with("later", "/spec/nodeName", "node-2"));
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b"]);
    assert_eq!(rig.fetch("later").unwrap(), None);
}

fn a_pod_is_fetched_that_was_not_seen(kind: Kind) {
    let mut rig = Rig::new(kind, |_| {});
    rig.until_pods(&[]);
    if kind == Kind::Kube {
        rig.server.set(Faults { silent: true, ..Faults::default() });
    }
    rig.place().put(pod("a"));
    let fetched = rig.fetch("a").unwrap().expect("it is there");
    assert_eq!(fetched.uid.as_str(), "uid-a");
    assert_eq!(rig.fetch("b").unwrap(), None);
    if kind == Kind::Kube {
        assert!(rig.now().pods.is_empty(), "the watch brings nothing");
    }
}

fn who_watches_is_not_woken_for_nothing(kind: Kind) {
    let mut rig = Rig::new(kind, |place| place.put(pod("a")));
    rig.until_pods(&["a"]);
    rig.seen.mark_unchanged();
    // Nothing that is kept of a pod changes.
    rig.place().put(pod_with("a", "/metadata/annotations/other", "x"));
    rig.place().put(pod("b"));
    rig.until_pods(&["a", "b"]);
    let before = rig.now();
    rig.seen.mark_unchanged();
    thread::sleep(Duration::from_millis(700));
    assert!(!rig.seen.has_changed().unwrap(), "{before:?}\n{:?}", rig.now());
}
