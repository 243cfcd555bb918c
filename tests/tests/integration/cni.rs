//! The CNI plugin behind Debian's: a pod is steered when ADD returns.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use srcip_tests::{
    PATIENCE, client,
    cni::{Network, Sandbox, parse},
    host::Host,
    peer,
    proxy::{Kind, Proxy},
    srcip::Srcip,
    world::World,
};
use srcip_user::{
    agent::{
        admin::{Handler, Server},
        decide::{Ask, asks_for_steering},
        protocol::{AddAnswer, AddRequest, AgentStatus, CheckAnswer, CheckRequest, DelRequest, Note},
    },
    cni::attachment::ContainerId,
    netns::Netns,
};

use crate::scenario::PORT;

const ISTIO: &str = "sidecar.istio.io/interceptionMode";

/// Steers by annotations alone, at once.
struct Agent {
    srcip: Srcip,
    cgroup: PathBuf,
    asked: AtomicUsize,
    gone: Mutex<Vec<ContainerId>>,
    collected: AtomicUsize,
    delay: Duration,
}

impl Handler for Agent {
    fn add(&self, request: AddRequest, netns: Netns) -> AddAnswer {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let annotations: BTreeMap<_, _> = request.annotations.unwrap_or_default();
        match asks_for_steering(&annotations) {
            Ask::Yes => {}
            Ask::Invalid(problem) => {
                return AddAnswer::Refused(Note { reason: "Bad".to_owned(), note: problem.note });
            }
            Ask::No(_) | Ask::Unknown => return AddAnswer::NotSteered,
        }
        if &*request.pod.name.name == "unlucky" {
            return AddAnswer::Failed("the verifier's words".to_owned());
        }
        thread::sleep(self.delay);
        // The plugin's path is for people; what counts is the descriptor.
        assert_eq!(netns.id(), Netns::open(&request.netns).unwrap().id());
        let attach = format!(
            "attach --netns {} --proxy-port 15006 --cgroup {}",
            request.netns.display(),
            self.cgroup.display()
        );
        match self.srcip.run(&attach) {
            Ok(_) => AddAnswer::Steered,
            Err(error) => AddAnswer::Failed(error.to_string()),
        }
    }

    fn check(&self, request: CheckRequest, _: Netns) -> CheckAnswer {
        let status = self.srcip.run("status -o json").unwrap();
        if status.contains(request.netns.to_str().unwrap()) {
            CheckAnswer::Good
        } else {
            CheckAnswer::NotSteered("it is not attached".to_owned())
        }
    }

    fn del(&self, request: DelRequest) {
        self.gone.lock().unwrap().push(request.container_id);
    }

    fn gc(&self) {
        self.collected.fetch_add(1, Ordering::Relaxed);
    }

    fn status(&self) -> AgentStatus {
        AgentStatus::default()
    }

    fn log_level(&self, _: Option<String>) -> Result<String, String> {
        Err("not this one".to_owned())
    }
}

/// A node whose network calls the plugin, and a pod's namespace that has nothing yet.
struct Node {
    srcip: Srcip,
    pod: Host,
    world: World,
}

impl Node {
    fn new() -> Self {
        let mut world = World::new().unwrap();
        let pod = world.sandbox("pod").unwrap();
        Self { srcip: world.srcip(), pod, world }
    }

    fn socket(&self) -> PathBuf {
        self.world.directory().join("agent/agent.sock")
    }

    fn network(&self, version: &str, mut settings: Value) -> Network<'_> {
        settings["socket"] = json!(self.socket());
        settings["pinPath"] = json!(self.srcip.pin_path());
        Network::bridged(self.world.node(), version, &settings)
    }

    fn sandbox(&self, annotations: Value) -> Sandbox {
        Sandbox::of_pod(&self.pod, "shop", "web", annotations)
    }

    fn agent(&self, delay: Duration) -> (Arc<Agent>, Server) {
        let agent = Arc::new(Agent {
            srcip: self.srcip.clone(),
            cgroup: self.world.cgroup().to_owned(),
            asked: AtomicUsize::default(),
            gone: Mutex::default(),
            collected: AtomicUsize::default(),
            delay,
        });
        let server = Server::start(&self.socket(), Arc::clone(&agent) as _).unwrap();
        (agent, server)
    }

    fn attachments(&self) -> usize {
        let status: Value = serde_json::from_str(&self.srcip.run("status -o json").unwrap()).unwrap();
        status["attachments"].as_array().unwrap().len()
    }
}

fn code(error: &anyhow::Error) -> Option<u64> {
    let text = error.to_string();
    let object: Value = serde_json::from_str(&text[text.find('{')?..=text.rfind('}')?]).ok()?;
    object["code"].as_u64()
}

/// The life of a steered pod, in each version of the specification.
#[test]
fn steered_when_add_returns() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let mut node = Node::new();
        let (agent, _server) = node.agent(Duration::from_millis(100));
        let sandbox = node.sandbox(json!({ ISTIO: "TPROXY", "other": "x" }));
        let network = node.network(version, json!({}));
        let started = Instant::now();
        let result = network.add(&sandbox).unwrap();
        assert!(started.elapsed() > Duration::from_millis(100));
        assert_eq!(node.attachments(), 1, "{version}");

        // What the plugins before it found is what the runtime gets.
        assert_eq!(result["cniVersion"], version);
        let address = result["ips"][0]["address"].as_str().unwrap();
        assert!(address.starts_with("10.88."), "{result}");
        assert_eq!(result["ips"].as_array().unwrap().len(), 2);

        // The same interface again, another one, and an end that comes twice.
        let again = network.add_ours(&sandbox, &result).unwrap();
        assert_eq!(parse(&json!({}), again).unwrap(), result);
        let other = Sandbox { ifname: "net1".to_owned(), ..sandbox.clone() };
        assert_eq!(parse(&json!({}), network.add_ours(&other, &result).unwrap()).unwrap(), result);
        assert_eq!(node.attachments(), 1);

        let address: std::net::IpAddr = address.split('/').next().unwrap().parse().unwrap();
        let _application = peer::application(&node.pod, &["0.0.0.0:8000"]).unwrap();
        let _proxy = Proxy::start(&node.pod, Kind::Haproxy).unwrap();
        let seen = client::ask_once(node.world.node(), (address, PORT).into()).unwrap();
        assert!(seen.proxied && seen.peer.ip().to_string() == "10.88.0.1", "{seen:?}");

        if version != "0.3.1" {
            network.check(&sandbox, &result).unwrap();
            node.srcip.detach(&node.pod, "--now").unwrap();
            let error = network.check(&sandbox, &result).unwrap_err();
            assert_eq!(code(&error), Some(101), "{error}");
        }
        if version == "1.1.0" {
            network.ask_ours("STATUS", &[]).unwrap();
            network.ask_ours("GC", &[&sandbox, &other]).unwrap();
            assert_eq!(agent.collected.load(Ordering::Relaxed), 1);
        } else {
            for command in ["STATUS", "GC"] {
                assert_eq!(code(&network.ask_ours(command, &[]).unwrap_err()), Some(1));
            }
        }
        for _ in 0..2 {
            network.del(&sandbox, &result).unwrap();
        }
        let gone: Vec<_> = agent.gone.lock().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(gone, [sandbox.container_id.as_str(); 2]);
        // Also if the namespace has gone before.
        let name = node.pod.name().to_owned();
        let other = node.world.host("other").unwrap();
        drop(std::mem::replace(&mut node.pod, other));
        srcip_tests::process::sh(&format!("ip netns del {name}")).unwrap();
        let network = node.network(version, json!({}));
        network.del(&sandbox, &result).unwrap();
        network.del(&Sandbox { netns: PathBuf::new(), ..sandbox }, &result).unwrap();
    }
}

/// Pods that ask for nothing, or for what cannot be, start as ever.
#[test]
fn others_are_left_alone() {
    let node = Node::new();
    let (_agent, _server) = node.agent(Duration::ZERO);
    for annotations in
        [json!({}), json!({ ISTIO: "REDIRECT" }), json!({"srcip.io/steer": "perhaps"}), Value::Null]
    {
        let network = node.network("1.0.0", json!({}));
        let sandbox = node.sandbox(annotations);
        let result = network.add(&sandbox).unwrap();
        assert_eq!(node.attachments(), 0);
        network.del(&sandbox, &result).unwrap();
    }
    // A sandbox that is not Kubernetes'.
    let network = node.network("1.0.0", json!({"onAgentAbsent": "fail"}));
    let sandbox = Sandbox { arguments: String::new(), ..node.sandbox(json!({ ISTIO: "TPROXY" })) };
    let result = network.add(&sandbox).unwrap();
    assert_eq!(node.attachments(), 0);
    network.del(&sandbox, &result).unwrap();
}

/// Without an agent, who needs one does not start, and all can end.
#[test]
fn without_an_agent() {
    let node = Node::new();
    for (annotations, settings, starts) in [
        (json!({ ISTIO: "TPROXY" }), json!({}), false),
        (json!({}), json!({}), true),
        (Value::Null, json!({}), false),
        (Value::Null, json!({"onUnknown": "pass"}), true),
        (json!({ ISTIO: "TPROXY" }), json!({"onAgentAbsent": "pass"}), true),
        (json!({}), json!({"onAgentAbsent": "fail"}), false),
    ] {
        let what = format!("{annotations} {settings}");
        let mut settings = settings;
        settings["timeoutSeconds"] = json!(1);
        let network = node.network("1.1.0", settings);
        let sandbox = node.sandbox(annotations);
        match network.add(&sandbox) {
            Ok(_) => assert!(starts, "{what}"),
            Err(error) => {
                assert!(!starts, "{what}: {error}");
                assert_eq!(code(&error), Some(11), "{error}");
                assert!(error.to_string().contains("no agent answers at"), "{error}");
            }
        }
        network.ask_ours("GC", &[]).unwrap();
        network.del(&sandbox, &Value::Null).unwrap();
    }
}

/// The agent is replaced by another one: a pod that starts meanwhile waits for it.
#[test]
fn an_agent_that_is_just_starting() {
    let node = Node::new();
    let (_, server) = node.agent(Duration::ZERO);
    drop(server);
    let network = node.network("1.0.0", json!({"timeoutSeconds": 60}));
    let sandbox = node.sandbox(json!({"srcip.io/steer": "true"}));
    let result = thread::scope(|scope| {
        let added = scope.spawn(|| network.add(&sandbox));
        thread::sleep(Duration::from_millis(800));
        let (_agent, _server) = node.agent(Duration::ZERO);
        added.join().unwrap().unwrap()
    });
    assert_eq!(node.attachments(), 1);
    // It has gone again; what is attached can be seen without it.
    network.check(&sandbox, &result).unwrap();
    node.srcip.detach(&node.pod, "--now").unwrap();
    assert_eq!(code(&network.check(&sandbox, &result).unwrap_err()), Some(101));
}

/// What is said of an agent that cannot do it.
#[test]
fn an_agent_that_fails() {
    let node = Node::new();
    let (_agent, _server) = node.agent(Duration::ZERO);
    let network = node.network("1.0.0", json!({}));
    let sandbox = Sandbox::of_pod(&node.pod, "shop", "unlucky", json!({ ISTIO: "TPROXY" }));
    let error = network.add(&sandbox).unwrap_err();
    assert_eq!(code(&error), Some(100), "{error}");
    assert!(error.to_string().contains("failed to steer pod shop/unlucky"), "{error}");
    assert!(error.to_string().contains("the verifier's words"), "{error}");
}

/// A pod that is not steered is asked about once, and does not wait for an agent that is away.
#[test]
fn who_is_not_steered_does_not_wait() {
    let node = Node::new();
    let (agent, server) = node.agent(Duration::ZERO);
    // Who waits, waits that long.
    let network = node.network("1.0.0", json!({"timeoutSeconds": 120}));
    let sandbox = node.sandbox(json!({"a": "b"}));
    let result = network.add(&sandbox).unwrap();
    assert_eq!(agent.asked.load(Ordering::Relaxed), 1);
    drop(server);
    network.del(&sandbox, &result).unwrap();
    let started = Instant::now();
    let result = network.add(&sandbox).unwrap();
    assert!(started.elapsed() < PATIENCE, "{:?}", started.elapsed());
    network.del(&sandbox, &result).unwrap();
}
