use std::{
    os::{fd::AsFd as _, unix::net::UnixDatagram},
    sync::atomic::AtomicUsize,
};

use nix::sys::socket::{MsgFlags, connect, send};

use super::*;
use crate::agent::{
    client::{CallError, Client},
    pod::{PodName, PodUid},
    protocol::{Note, PodRef},
};
use crate::cni::attachment::{Attachment, ContainerId, IfName};

/// Steers whom a pod's name asks for, and counts.
#[derive(Default)]
struct Fake {
    at_work: AtomicUsize,
    most_at_work: AtomicUsize,
}

impl Handler for Fake {
    fn add(&self, request: AddRequest, netns: Netns) -> AddAnswer {
        assert_eq!(netns.path(), request.netns);
        match &*request.pod.name.name {
            "web" => AddAnswer::Steered,
            "bad" => AddAnswer::Refused(Note { reason: "Bad".to_owned(), note: "so".to_owned() }),
            "slow" => {
                let now = self.at_work.fetch_add(1, Ordering::SeqCst) + 1;
                self.most_at_work.fetch_max(now, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(300));
                self.at_work.fetch_sub(1, Ordering::SeqCst);
                AddAnswer::NotSteered
            }
            "panics" => panic!("a bug"),
            _ => AddAnswer::NotSteered,
        }
    }
    fn check(&self, _: CheckRequest, _: Netns) -> CheckAnswer {
        CheckAnswer::Good
    }
    fn del(&self, _: DelRequest) {}
    fn gc(&self) {}
    fn status(&self) -> AgentStatus {
        AgentStatus { pods: 3, ..AgentStatus::default() }
    }
    fn log_level(&self, filter: Option<String>) -> Result<String, String> {
        match filter.as_deref() {
            Some("bad") => Err("no filter".to_owned()),
            filter => Ok(filter.unwrap_or("info").to_owned()),
        }
    }
}

/// A server in a directory of its own; `None`, with a word, for who is not root.
fn served() -> Option<(tempfile::TempDir, PathBuf, Arc<Fake>, Server)> {
    if !geteuid().is_root() {
        eprintln!("skipped: the agent's socket is root's");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run/agent.sock");
    let fake = Arc::new(Fake::default());
    let server = Server::start(&path, Arc::clone(&fake) as _).unwrap();
    Some((directory, path, fake, server))
}

fn add(client: &Client, name: &str) -> Result<AddAnswer, CallError> {
    let netns = Netns::of_process(std::process::id()).unwrap();
    let request = AddRequest {
        attachment: Attachment {
            container_id: ContainerId::new("0f3c").unwrap(),
            ifname: IfName::new("eth0").unwrap(),
        },
        netns: "/run/netns/somewhere".into(),
        pod: PodRef { name: PodName::new("shop", name).unwrap(), uid: PodUid::new("1") },
        annotations: None,
        timeout_ms: 1000,
    };
    client.add(request, netns.as_fd())
}

#[test]
fn each_question_has_its_answer() {
    let Some((_directory, path, _fake, server)) = served() else { return };
    let client = Client::new(&path, Duration::from_secs(5));
    assert_eq!(add(&client, "web").unwrap(), AddAnswer::Steered);
    assert_eq!(add(&client, "other").unwrap(), AddAnswer::NotSteered);
    assert!(matches!(add(&client, "bad").unwrap(), AddAnswer::Refused(note) if note.note == "so"));
    let container_id = ContainerId::new("0f3c").unwrap();
    client.tell(Request::Del(DelRequest { container_id, pod: None })).unwrap();
    client.tell(Request::Gc {}).unwrap();
    assert_eq!(client.status().unwrap().pods, 3);
    assert_eq!(client.log_level(None).unwrap(), "info");
    assert!(
        matches!(client.log_level(Some("bad".to_owned())), Err(CallError::Rejected(why)) if why == "no filter")
    );
    // A bug in a request is that request's.
    assert!(matches!(add(&client, "panics"), Err(CallError::Absent(_))));
    assert_eq!(add(&client, "web").unwrap(), AddAnswer::Steered);
    drop(server);
    assert!(!path.exists());
    assert!(matches!(client.status(), Err(CallError::Absent(_))));
}

#[test]
fn only_root_may_ask_and_the_name_never_has_a_wider_mode() {
    let Some((_directory, path, _fake, _server)) = served() else { return };
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn one_agent_and_the_next_one_after_its_death() {
    let Some((_directory, path, fake, server)) = served() else { return };
    let second = Server::start(&path, Arc::clone(&fake) as _).unwrap_err();
    assert!(second.to_string().starts_with("another agent runs on this node"), "{second}");
    let client = Client::new(&path, Duration::from_secs(5));
    client.status().unwrap();
    drop(server);
    // Killed: the socket is there, and nobody behind it.
    drop(bound(&path).unwrap());
    assert!(matches!(client.status(), Err(CallError::Absent(_))));
    let _server = Server::start(&path, fake).unwrap();
    client.status().unwrap();
}

#[test]
fn what_is_in_the_way_stays() {
    let Some((directory, _path, _fake, _server)) = served() else { return };
    let file = directory.path().join("file");
    fs::write(&file, "mine").unwrap();
    let error = Server::start(&file, Arc::new(Fake::default())).unwrap_err();
    assert!(matches!(error, ServeError::NotASocket(_)), "{error}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    let open = directory.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let error = Server::start(&open.join("agent.sock"), Arc::new(Fake::default())).unwrap_err();
    assert!(error.to_string().contains("can be changed by other users"), "{error}");
    let long = directory.path().join("x".repeat(120));
    assert!(Server::start(&long, Arc::new(Fake::default())).is_err());
}

/// Peers that say nothing, nonsense, too much, or send descriptors that nobody asked for.
#[test]
fn hostile_peers_cost_nothing() {
    let Some((_directory, path, _fake, _server)) = served() else { return };
    let client = Client::new(&path, Duration::from_secs(5));
    let peer = || {
        let socket = new_socket().unwrap();
        connect(socket.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        socket
    };
    let silent: Vec<_> = (0..MAX_REQUESTS / 2).map(|_| peer()).collect();
    client.status().unwrap();
    for bytes in [&b"{"[..], b"\xff", b"null", br#"{"version":1,"body":{"add":{}}}"#, br#"{"version":7}"#] {
        let socket = peer();
        send(socket.as_raw_fd(), bytes, MsgFlags::empty()).unwrap();
        let packet = Connection::accepted(socket).receive(Instant::now() + PEER_TIMEOUT).unwrap().unwrap();
        assert!(matches!(decode(&packet.bytes, "x"), Ok(Answer::Rejected(_))));
    }
    let long = peer();
    send(long.as_raw_fd(), &vec![b' '; crate::agent::protocol::MAX_MESSAGE + 1], MsgFlags::empty()).unwrap();
    let answered = Connection::accepted(long).receive(Instant::now() + PEER_TIMEOUT);
    assert!(matches!(answered, Ok(None) | Err(_)), "{answered:?}");

    // Not a network namespace.
    let (file, _other) = UnixDatagram::pair().unwrap();
    let connection = Connection::accepted(peer());
    let request = br#"{"version":1,"body":{"add":{"containerID":"a","ifname":"eth0","netns":"/x",
        "pod":{"namespace":"a","name":"b"},"timeout_ms":1}}}"#;
    let deadline = Instant::now() + PEER_TIMEOUT;
    connection.send(request, Some(file.as_fd()), deadline).unwrap();
    let packet = connection.receive(deadline).unwrap().unwrap();
    let Ok(Answer::Rejected(why)) = decode(&packet.bytes, "x") else { panic!("rejected") };
    assert!(why.contains("/x is not a network namespace"), "{why}");
    // Nor is it missing.
    let connection = Connection::accepted(peer());
    connection.send(request, None, deadline).unwrap();
    let packet = connection.receive(deadline).unwrap().unwrap();
    assert!(matches!(decode(&packet.bytes, "x"), Ok(Answer::Rejected(why)) if why.contains("missing")));
    drop(silent);
    client.status().unwrap();
}

/// More requests than slots: each gets its answer, and no more than that are worked on at a time.
#[test]
fn a_crowd_waits_in_the_queue() {
    let Some((_directory, path, fake, _server)) = served() else { return };
    let client = Client::new(&path, Duration::from_secs(30));
    thread::scope(|scope| {
        let asking: Vec<_> = (0..MAX_REQUESTS + 20).map(|_| scope.spawn(|| add(&client, "slow"))).collect();
        for asked in asking {
            assert_eq!(asked.join().unwrap().unwrap(), AddAnswer::NotSteered);
        }
    });
    assert_eq!(fake.most_at_work.load(Ordering::SeqCst), MAX_REQUESTS);
}

/// A client whose agent hangs gives up in time.
#[test]
fn an_agent_that_hangs() {
    let Some((_directory, path, _fake, _server)) = served() else { return };
    let path = path.with_file_name("hung.sock");
    let _hung = bound(&path).unwrap();
    let client = Client::new(&path, Duration::from_millis(200));
    let started = Instant::now();
    assert!(matches!(client.status(), Err(CallError::TimedOut(..))));
    assert!(started.elapsed() >= Duration::from_millis(200), "{:?}", started.elapsed());
}
