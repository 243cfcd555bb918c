//! The loop against a data plane that fails when it is told to.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Mutex, PoisonError,
        mpsc::{Sender, channel, sync_channel},
    },
    thread::{self, JoinHandle},
};

use futures_util::future::BoxFuture;

use super::*;
use crate::{
    agent::{board::PodState, pod::PodInfo, reconcile::Attachment},
    dataplane::error::Result as DataplaneResult,
};

/// What is in the kernel, as far as the loop can tell.
#[derive(Default)]
struct Kernel {
    attachments: BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>,
    running: BTreeMap<PodUid, NetnsCookie>,
    failing: BTreeSet<PodUid>,
    attached: Vec<PodUid>,
    open: BTreeSet<NetnsCookie>,
    /// Called at the next attach.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
    upstream: usize,
}

#[derive(Clone, Default)]
struct FakeBackend(Arc<Mutex<Kernel>>);

impl FakeBackend {
    fn with<T>(&self, use_it: impl FnOnce(&mut Kernel) -> T) -> T {
        use_it(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Backend for FakeBackend {
    fn upgrade(&mut self) -> DataplaneResult<bool> {
        Ok(true)
    }

    fn attachments(&mut self) -> DataplaneResult<BTreeMap<NetnsCookie, Attachment<Option<Wanted>>>> {
        Ok(self.with(|kernel| kernel.attachments.clone()))
    }

    fn find(&mut self, uids: BTreeSet<PodUid>) -> io::Result<BTreeMap<PodUid, DataplaneResult<NetnsCookie>>> {
        self.with(|kernel| {
            let running = kernel.running.iter().filter(|(uid, _)| uids.contains(uid));
            let found: BTreeMap<_, _> = running.map(|(uid, netns)| (uid.clone(), Ok(*netns))).collect();
            kernel.open.extend(found.values().flatten());
            Ok(found)
        })
    }

    fn offer(&mut self, netns: Netns) -> DataplaneResult<NetnsCookie> {
        let cookie = netns.cookie()?;
        self.with(|kernel| kernel.open.insert(cookie));
        Ok(cookie)
    }

    fn close(&mut self) {
        self.with(|kernel| kernel.open.clear());
    }

    fn attach(&mut self, target: &Target, _: &Config) -> DataplaneResult<Vec<String>> {
        if let Some(meanwhile) = self.with(|kernel| kernel.meanwhile.take()) {
            meanwhile();
        }
        self.with(|kernel| {
            let Target { uid, name, netns, wanted } = target.clone();
            if !kernel.open.remove(&netns) && !kernel.attachments.contains_key(&netns) {
                return Err(Error::NotAttached("what is not open".to_owned()));
            }
            if kernel.failing.contains(&uid) {
                return Err(Error::NotAttached("told to fail".to_owned()));
            }
            kernel.attached.push(uid.clone());
            let condition = Condition::Steering;
            kernel.attachments.insert(netns, Attachment { uid, name, wanted: Some(wanted), condition });
            Ok(Vec::new())
        })
    }

    fn stop(&mut self, netns: NetnsCookie) -> DataplaneResult<()> {
        self.with(|kernel| kernel.attachments.get_mut(&netns).unwrap().condition = Condition::Draining);
        Ok(())
    }

    fn finish(&mut self, netns: NetnsCookie, deadline: Instant) -> DataplaneResult<bool> {
        self.with(|kernel| {
            let over = kernel.upstream == 0 || Instant::now() >= deadline;
            if over {
                kernel.attachments.remove(&netns);
            }
            Ok(over)
        })
    }

    fn forget(&mut self, netns: NetnsCookie) -> DataplaneResult<()> {
        self.with(|kernel| kernel.attachments.remove(&netns));
        Ok(())
    }
}

/// Pods as the test has them.
#[derive(Default)]
struct FakeSource {
    snapshot: watch::Sender<Snapshot>,
    warnings: Mutex<Vec<String>>,
}

impl Source for FakeSource {
    fn watch(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.subscribe()
    }

    fn fetch<'a>(&'a self, _: &'a PodName) -> BoxFuture<'a, anyhow::Result<Option<PodInfo>>> {
        Box::pin(async { Ok(None) })
    }

    fn warn(&self, pod: &PodInfo, reason: &'static str, _: &str) {
        self.warnings.lock().unwrap().push(format!("{} {reason}", pod.name));
    }
}

struct Silent;

impl Observer for Silent {
    fn beat(&self, _: &'static str) {}
    fn acted(&self, _: &'static str, _: Duration, _: bool) {}
    fn round(&self, _: &Board, _: &Snapshot) {}
}

/// A loop that runs.
struct Running {
    backend: FakeBackend,
    source: Arc<FakeSource>,
    board: Arc<Board>,
    jobs: Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start(config: Config) -> Self {
        let backend = FakeBackend::default();
        let source = Arc::new(FakeSource::default());
        let board = Arc::new(Board::default());
        let (jobs, asked) = channel();
        let worker = Worker::new(
            backend.clone(),
            Arc::new(config),
            Arc::clone(&source) as Arc<dyn Source>,
            Arc::clone(&board),
            Box::new(Silent),
        );
        let thread = Some(thread::spawn(move || worker.run(&asked)));
        Self { backend, source, board, jobs, thread }
    }

    fn tell(&self, pods: &[PodInfo]) {
        let pods = pods.iter().map(|pod| (pod.uid.clone(), Arc::new(pod.clone()))).collect();
        self.source.snapshot.send_replace(Snapshot { synced: true, pods: Arc::new(pods), trouble: None });
        self.jobs.send(Job::Changed).unwrap();
    }

    fn run(&self, pod: &PodInfo, netns: u64) {
        self.backend.with(|kernel| kernel.running.insert(pod.uid.clone(), NetnsCookie(netns)));
    }

    fn attached(&self) -> Vec<String> {
        self.backend.with(|kernel| kernel.attachments.values().map(|a| a.name.to_string()).collect())
    }

    fn state(&self, pod: &PodInfo) -> Option<PodState> {
        self.board.read().pods.get(&pod.uid).map(|(_, state)| state.clone())
    }

    fn wait(&self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(self) {
            assert!(Instant::now() < deadline, "never: {what}; attached: {:?}", self.attached());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.jobs.send(Job::End);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()));
    }
}

fn pod(name: &str, annotations: &[(&str, &str)]) -> PodInfo {
    let annotations: BTreeMap<_, _> = annotations.iter().copied().collect();
    let metadata = serde_json::json!({ "name": name, "uid": name, "annotations": annotations });
    PodInfo::from_object(&serde_json::from_value(serde_json::json!({ "metadata": metadata })).unwrap())
        .unwrap()
}

const STEER: &[(&str, &str)] = &[("srcip.io/steer", "true"), ("srcip.io/proxy-port", "15006")];

#[test]
fn a_bad_pod_does_not_stop_the_good_ones() {
    let agent = Running::start(Config::default());
    let bad = pod("bad", &[("srcip.io/steer", "yes")]);
    let failing = pod("failing", STEER);
    let (good, plain) = (pod("good", STEER), pod("plain", &[]));
    agent.backend.with(|kernel| kernel.failing.insert(failing.uid.clone()));
    for (netns, pod) in [&bad, &failing, &good, &plain].into_iter().enumerate() {
        agent.run(pod, netns as u64 + 1);
    }
    agent.tell(&[bad.clone(), failing.clone(), good.clone(), plain.clone()]);
    agent.wait("steered", |agent| agent.state(&good) == Some(PodState::Steered));
    assert_eq!(agent.attached(), ["default/good"]);
    assert!(matches!(agent.state(&bad), Some(PodState::Refused(_))));
    assert!(agent.source.warnings.lock().unwrap().contains(&"default/bad InvalidAnnotation".to_owned()));
    assert!(matches!(agent.state(&failing), Some(PodState::Failed(_))), "{:?}", agent.state(&failing));
    assert_eq!(agent.state(&plain), None);
    // It is tried again by itself.
    agent.backend.with(|kernel| kernel.failing.clear());
    agent.wait("tried again", |agent| agent.state(&failing) == Some(PodState::Steered));
}

#[test]
fn a_pod_that_starts_later_is_found_and_one_that_changes_is_changed_in_place() {
    let agent = Running::start(Config::default());
    let mut web = pod("web", STEER);
    agent.tell(std::slice::from_ref(&web));
    agent.wait("pending", |agent| agent.state(&web) == Some(PodState::Pending));
    agent.run(&web, 7);
    agent.wait("steered", |agent| agent.state(&web) == Some(PodState::Steered));
    web.annotations.insert("srcip.io/proxy-port".to_owned(), "15106".to_owned());
    agent.tell(std::slice::from_ref(&web));
    let port = |kernel: &mut Kernel| {
        let wanted = kernel.attachments.get(&NetnsCookie(7))?.wanted.as_ref()?;
        Some(wanted.settings.proxy_port)
    };
    agent.wait("changed", |agent| agent.backend.with(port) == Some(15106));
    assert_eq!(agent.backend.with(|kernel| kernel.attached.len()), 2);
}

#[test]
fn draining_waits_for_connections_but_not_for_ever() {
    let agent = Running::start(Config { drain_seconds: 2, ..Config::default() });
    let mut web = pod("web", STEER);
    agent.run(&web, 7);
    agent.backend.with(|kernel| kernel.upstream = 1);
    agent.tell(std::slice::from_ref(&web));
    agent.wait("steered", |agent| agent.state(&web) == Some(PodState::Steered));
    let draining = |agent: &Running| {
        agent.backend.with(|kernel| {
            kernel.attachments.values().next().is_some_and(|a| a.condition == Condition::Draining)
        })
    };
    web.annotations.insert("srcip.io/steer".to_owned(), "false".to_owned());
    let stopped = Instant::now();
    agent.tell(std::slice::from_ref(&web));
    agent.wait("draining", draining);
    agent.wait("given up", |agent| agent.attached().is_empty());
    assert!(stopped.elapsed() >= Duration::from_secs(2), "{:?}", stopped.elapsed());
}

fn announce(agent: &Running, pod: &PodInfo) -> Result<(), String> {
    let (reply, answer) = sync_channel(1);
    agent.jobs.send(add_request(pod, reply)).unwrap();
    answer.recv_timeout(Duration::from_secs(60)).unwrap()
}

/// Our own network namespace stands for a pod's.
fn add_request(pod: &PodInfo, reply: SyncSender<Result<(), String>>) -> Job {
    let crate::agent::decide::Decision::Steer(wanted) = crate::agent::decide::decide(pod, &Config::default())
    else {
        panic!("it asks to be steered")
    };
    let add = Add {
        container: ContainerId::new("0f3c").unwrap(),
        netns: Netns::of_process(std::process::id()).unwrap(),
        uid: pod.node_uid.clone(),
        name: pod.name.clone(),
        wanted,
        deadline: Instant::now() + Duration::from_secs(60),
        reply,
    };
    Job::Add(Box::new(add))
}

#[test]
fn a_pod_that_the_plugin_announces_stays_while_the_source_lags_behind() {
    let agent = Running::start(Config::default());
    agent.tell(&[]);
    let web = pod("web", STEER);
    announce(&agent, &web).unwrap();
    for _ in 0..3 {
        agent.jobs.send(Job::Changed).unwrap();
        thread::sleep(Duration::from_millis(150));
    }
    assert_eq!(agent.attached(), ["default/web"]);
    agent.tell(std::slice::from_ref(&web));
    agent.wait("steered", |agent| agent.state(&web) == Some(PodState::Steered));
    // Told of once, it is gone when it is not told of any more.
    agent.tell(&[]);
    agent.wait("gone", |agent| agent.attached().is_empty());
}

#[test]
fn a_request_between_two_steps_is_in_nobodys_way() {
    let agent = Running::start(Config::default());
    let pods: Vec<_> = (0..20).map(|number| pod(&format!("p{number}"), STEER)).collect();
    for (netns, pod) in pods.iter().enumerate() {
        agent.run(pod, netns as u64 + 1000);
    }
    let (jobs, web) = (agent.jobs.clone(), pod("web", STEER));
    let (asked, answer) = sync_channel(1);
    let add = add_request(&web, asked);
    agent.backend.with(|kernel| kernel.meanwhile = Some(Box::new(move || jobs.send(add).unwrap())));
    agent.tell(&pods);
    answer.recv_timeout(Duration::from_secs(60)).unwrap().unwrap();
    agent.wait("all are steered", |agent| agent.attached().len() == 21);
    assert!(pods.iter().all(|pod| !matches!(agent.state(pod), Some(PodState::Failed(_)))));
    assert_eq!(agent.backend.with(|kernel| kernel.attached.len()), 21, "each once");
}

#[test]
fn nobody_takes_a_static_pods_place() {
    const HASH: &str = "0cc175b9c0f1b6a831c399e269772661";
    let agent = Running::start(Config::default());
    let mirror = |name: &str, annotations: &[(&str, &str)]| {
        let mut pod = pod(name, annotations);
        pod.node_uid = PodUid::new(HASH).unwrap();
        pod
    };
    let (plain, steered) = (mirror("plain", &[]), mirror("steered", STEER));
    let thief = mirror("thief", &[("srcip.io/steer", "true"), ("srcip.io/proxy-port", "6666")]);
    agent.backend.with(|kernel| kernel.running.insert(plain.node_uid.clone(), NetnsCookie(7)));
    // Of two that were never seen, none is believed.
    agent.tell(&[plain, thief.clone()]);
    agent.wait("refused", |agent| matches!(agent.state(&thief), Some(PodState::Refused(_))));
    assert!(agent.attached().is_empty());
    // Whoever was there before is.
    agent.tell(std::slice::from_ref(&steered));
    agent.wait("steered", |agent| agent.attached() == ["default/steered"]);
    agent.wait("a round later", |agent| agent.board.read().count(|state| *state == PodState::Steered) == 1);
    agent.tell(&[steered, thief.clone()]);
    agent.wait("refused again", |agent| matches!(agent.state(&thief), Some(PodState::Refused(_))));
    assert_eq!(agent.attached(), ["default/steered"]);
}

#[test]
fn the_plugin_is_told_why_a_pod_cannot_be_steered_and_its_sandbox_goes_at_once() {
    let agent = Running::start(Config::default());
    let web = pod("web", STEER);
    agent.backend.with(|kernel| kernel.failing.insert(web.uid.clone()));
    assert!(announce(&agent, &web).unwrap_err().contains("told to fail"));
    agent.backend.with(|kernel| kernel.failing.clear());
    announce(&agent, &web).unwrap();
    agent.jobs.send(Job::Del(ContainerId::new("other").unwrap())).unwrap();
    thread::sleep(Duration::from_millis(150));
    assert_eq!(agent.attached(), ["default/web"]);
    agent.jobs.send(Job::Del(ContainerId::new("0f3c").unwrap())).unwrap();
    agent.wait("gone", |agent| agent.attached().is_empty());
}
