//! The plugin as the runtime calls it, and the agent that answers.
//!
//! The agent's own look at everything comes too late for these tests: what happens, happens for the plugin.

use srcip_tests::cni::{Network, Sandbox};

use super::*;

super::sources!(nobody_tells_annotations, labels_are_asked_for);

/// Longer than anything waits here.
const RESYNC: u32 = 300;

/// A sandbox that the runtime has made, and its pod as the API has it.
struct Pod {
    host: Host,
    sandbox: Sandbox,
    object: Value,
}

/// `told` is what the runtime tells of the pod's annotations.
fn made(world: &mut World, name: &str, annotations: &[(&str, &str)], told: Value) -> Pod {
    let host = world.sandbox(name).unwrap();
    let sandbox = Sandbox::of_pod(&host, "shop", name, told);
    let object = pod("shop", name, host.name(), annotations);
    Pod { host, sandbox, object }
}

fn tproxy() -> Value {
    TPROXY.iter().copied().collect::<std::collections::BTreeMap<_, _>>().into_iter().collect()
}

fn network<'a>(setup: &Setup, node: &'a Host, mut settings: Value) -> Network<'a> {
    settings["socket"] = json!(setup.socket());
    settings["pinPath"] = json!(setup.srcip().pin_path());
    if settings["timeoutSeconds"].is_null() {
        settings["timeoutSeconds"] = json!(60);
    }
    Network::bridged(node, "1.1.0", &settings)
}

fn start(rig: &mut Rig, pods: &[&Pod]) {
    rig.setup.configure(|config| config["resyncSeconds"] = RESYNC.into()).unwrap();
    pods.iter().for_each(|pod| rig.put(&pod.object));
    rig.start();
    let known = |agent: &Agent| {
        let told = &agent.status().unwrap()["agent"];
        // Of no pods, nobody knows whether they are all, until it is ready.
        told["ready"] == true && told["pods"] == pods.len()
    };
    rig.agent().wait("the pods are known", known).unwrap();
}

/// The error of a command that fails, with its code.
fn refusal(result: anyhow::Result<impl std::fmt::Debug>) -> (u64, String) {
    let text = result.unwrap_err().to_string();
    let object = &text[text.find('{').expect(&text)..=text.rfind('}').expect(&text)];
    let object: Value = serde_json::from_str(object).expect(&text);
    (object["code"].as_u64().unwrap(), text)
}

/// CHECK tells a pod that is steered from one that is to be and is not; of others it has nothing to say.
#[test]
fn check() {
    let mut rig = Rig::with_manifests();
    let web = made(&mut rig.world, "web", TPROXY, tproxy());
    let plain = made(&mut rig.world, "plain", &[], json!({}));
    start(&mut rig, &[&web, &plain]);
    let network = network(&rig.setup, rig.world.node(), json!({}));
    let agent = rig.agent.as_mut().unwrap();
    let of_web = network.add(&web.sandbox).unwrap();
    let of_plain = network.add(&plain.sandbox).unwrap();
    assert!(agent.steers("shop/web") && !agent.steers("shop/plain"));
    network.check(&web.sandbox, &of_web).unwrap();
    network.check(&plain.sandbox, &of_plain).unwrap();

    // Somebody takes a program away. The agent is told by the question, and puts it back.
    let cookie = web.host.netns().cookie().unwrap();
    let pin = rig.setup.srcip().pin_path().join(format!("pods/{cookie}/srcip_sk_lookup"));
    std::fs::remove_file(&pin).unwrap();
    let (code, text) = refusal(network.check(&web.sandbox, &of_web));
    assert_eq!(code, 101, "{text}");
    assert!(text.contains("pod shop/web is to be steered, and is not"), "{text}");
    assert!(text.contains("its programs are not all in place"), "{text}");
    agent.wait("repaired", |_| pin.exists()).unwrap();
    agent.wait("good again", |_| network.check(&web.sandbox, &of_web).is_ok()).unwrap();
    assert!(
        agent.metric("srcip_agent_cni_requests_total{request=\"check\",result=\"good\"}").unwrap() >= 3.0
    );

    // Somebody detaches it.
    rig.setup.srcip().detach(&web.host, "--now").unwrap();
    let (code, text) = refusal(network.check(&web.sandbox, &of_web));
    assert_eq!(code, 101, "{text}");
    assert!(text.contains("it is not attached"), "{text}");
    network.check(&plain.sandbox, &of_plain).unwrap();
}

/// What a sandbox leaves goes with DEL; without one, with GC. What is there stays, whoever forgets to list it.
#[test]
fn del_and_gc() {
    let mut rig = Rig::with_manifests();
    let [first, second, third, stays] =
        ["first", "second", "third", "stays"].map(|name| made(&mut rig.world, name, TPROXY, tproxy()));
    start(&mut rig, &[&first, &second, &third, &stays]);
    let network = network(&rig.setup, rig.world.node(), json!({}));
    let agent = rig.agent.as_mut().unwrap();
    let results: Vec<_> =
        [&first, &second, &third, &stays].map(|pod| network.add(&pod.sandbox).unwrap()).into();
    assert_eq!(agent.status().unwrap()["attachments"].as_array().unwrap().len(), 4);

    // The object still has it; the sandbox is about to go.
    rig.setup.put("first", &Value::Null).unwrap();
    network.del(&first.sandbox, &results[0]).unwrap();
    agent.wait_gone("shop/first").unwrap();
    // What follows is not told by the object that has gone.
    agent.wait("it has looked", |agent| agent.status().unwrap()["agent"]["pods"] == 3).unwrap();

    let gone = |pod: Pod| {
        let name = pod.host.name().to_owned();
        drop(pod.host);
        srcip_tests::process::sh(&format!("ip netns del {name}")).unwrap();
        pod.sandbox
    };
    gone(second);
    assert!(agent.attachment("shop/second").unwrap().is_some(), "nobody has told the agent");
    // The kernel takes its time with a namespace.
    agent
        .wait("the second one has gone", |agent| {
            network.ask_ours("GC", &[]).unwrap();
            agent.attachment("shop/second").unwrap().is_none()
        })
        .unwrap();
    assert!(agent.steers("shop/third") && agent.steers("shop/stays"));
    // Once more does no harm. Only now: it has the agent look for what is gone, a moment later.
    network.del(&first.sandbox, &results[0]).unwrap();
    assert!(agent.steers("shop/third") && agent.steers("shop/stays"));

    // Another agent does not know which sandbox was which pod's.
    rig.agent.take().unwrap().stop().unwrap();
    network.ask_ours("GC", &[]).unwrap();
    let mut agent = rig.setup.start().unwrap();
    agent.wait("it has looked", |agent| agent.metric("srcip_agent_rounds_total").unwrap() > 0.0).unwrap();
    let sandbox = gone(third);
    network.del(&sandbox, &results[2]).unwrap();
    agent.wait_gone("shop/third").unwrap();

    let _application = peer::application(&stays.host, &["0.0.0.0:8000"]).unwrap();
    let _proxy = Proxy::start(&stays.host, Kind::Haproxy).unwrap();
    let address = results[3]["ips"][0]["address"].as_str().unwrap().split('/').next().unwrap();
    let to = std::net::SocketAddr::new(address.parse().unwrap(), PORT);
    let seen = client::ask_once(rig.world.node(), to).unwrap();
    assert!(seen.proxied && seen.peer.ip().to_string() == "10.88.0.1", "{seen:?}");
    rig.agent = Some(agent);
}

/// A node is not taken out of service because one of its pods cannot be steered, or the agent is away; only
/// if no pod at all could start.
#[test]
fn status() {
    let mut rig = Rig::with_manifests();
    start(&mut rig, &[]);
    let node = rig.world.node();
    let (usual, strict) =
        (network(&rig.setup, node, json!({})), network(&rig.setup, node, json!({"onAgentAbsent": "fail"})));
    let agent = rig.agent.as_mut().unwrap();
    let both = [&usual, &strict];
    agent.wait("ready", |agent| agent.get("/readyz").unwrap().0 == 200).unwrap();
    both.iter().for_each(|network| network.ask_ours("STATUS", &[]).unwrap());

    std::fs::write(rig.setup.directory().join("manifests/torn.yaml"), "{").unwrap();
    agent.wait("not ready", |agent| agent.get("/readyz").unwrap().0 == 503).unwrap();
    both.iter().for_each(|network| network.ask_ours("STATUS", &[]).unwrap());

    rig.agent.take().unwrap().stop().unwrap();
    usual.ask_ours("STATUS", &[]).unwrap();
    let (code, text) = refusal(strict.ask_ours("STATUS", &[]));
    assert_eq!(code, 50, "{text}");
    assert!(text.contains("no pod could start: there is no agent"), "{text}");
}

/// A runtime that tells no annotations: the agent asks for the pod, which no watch has brought.
fn nobody_tells_annotations(mut rig: Rig) {
    let web = made(&mut rig.world, "web", TPROXY, Value::Null);
    let plain = made(&mut rig.world, "plain", &[], Value::Null);
    let unknown = made(&mut rig.world, "unknown", TPROXY, Value::Null);
    start(&mut rig, &[]);
    if let Cluster::Api(server) = &rig.cluster {
        server.set(Faults { silent: true, ..Faults::default() });
    }
    rig.put(&web.object);
    rig.put(&plain.object);
    let network = network(&rig.setup, rig.world.node(), json!({}));
    network.add(&web.sandbox).unwrap();
    let agent = rig.agent.as_mut().unwrap();
    assert!(agent.steers("shop/web"));
    network.add(&plain.sandbox).unwrap();
    assert!(!agent.steers("shop/plain"));
    // What nobody knows is waited for.
    let impatient = self::network(&rig.setup, rig.world.node(), json!({"timeoutSeconds": 2}));
    let (code, text) = refusal(impatient.add(&unknown.sandbox));
    assert_eq!(code, 11, "{text}");
    assert!(text.contains("nobody tells whether pod shop/unknown is to be steered"), "{text}");
    // The last attempt may have been too late to hear more.
    let reasons = ["the source of pods does not know the pod shop/unknown", "has not answered in time"];
    assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
    assert!(agent.process.log().contains(reasons[0]), "{}", agent.process.log());
    if let Cluster::Api(server) = &rig.cluster {
        assert_eq!(agent.status().unwrap()["agent"]["pods"], 0, "the watch has brought nothing");
        let asked = server.asked("get", "pods").into_iter().filter_map(|asked| asked.name);
        let asked: std::collections::BTreeSet<_> = asked.collect();
        assert_eq!(asked.into_iter().collect::<Vec<_>>(), ["plain", "unknown", "web"]);
    }
}

/// A runtime tells annotations, not labels: with selectors the agent asks for who does not say yes or no.
fn labels_are_asked_for(mut rig: Rig) {
    let mut chosen = made(&mut rig.world, "chosen", &[], json!({}));
    chosen.object["metadata"]["labels"] = json!({"app": "web"});
    let other = made(&mut rig.world, "other", &[], json!({}));
    // A static pod, whose mirror the API does not have yet.
    let early = made(&mut rig.world, "early", TPROXY, tproxy());
    let selector = json!({"matchLabels": {"app": "web"}, "proxyPort": 15006});
    rig.setup.configure(|config| config["steer"] = json!({ "selectors": [selector] })).unwrap();
    start(&mut rig, &[]);
    if let Cluster::Api(server) = &rig.cluster {
        server.set(Faults { silent: true, ..Faults::default() });
    }
    rig.put(&chosen.object);
    rig.put(&other.object);
    let network = network(&rig.setup, rig.world.node(), json!({"selectors": true}));
    for (pod, name, is_steered) in
        [(&chosen, "shop/chosen", true), (&other, "shop/other", false), (&early, "shop/early", true)]
    {
        network.add(&pod.sandbox).unwrap();
        assert_eq!(rig.agent.as_ref().unwrap().steers(name), is_steered, "{name}");
    }
}
