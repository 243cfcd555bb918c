//! The agent holds no connection: it may die, and come back.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use nix::sys::signal::Signal;

use srcip_user::dataplane::build::Build;

use super::*;
use crate::upgrade::{differently, one_set};

/// Asks one more time over a connection that stays.
fn ask_again(stream: &mut TcpStream) {
    stream.write_all(b"GET /ip HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    while !text.contains("\r\n\r\n") {
        let mut buffer = [0; 2048];
        let length = stream.read(&mut buffer).unwrap();
        assert_ne!(length, 0, "closed after {text:?}");
        text.push_str(std::str::from_utf8(&buffer[..length]).unwrap());
    }
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

/// How many connections of the pod have been steered, whether or not an agent runs.
fn steered(setup: &Setup) -> u64 {
    let status: Value = serde_json::from_str(&setup.srcip().run("status -o json").unwrap()).unwrap();
    status["attachments"][0]["counters"]["steered"].as_u64().unwrap()
}

/// 20 times killed and started again, with connections that are new, and one that is established.
#[test]
fn killed_and_restarted_under_load() {
    let mut rig = Rig::with_manifests();
    let web = rig.running("web", TPROXY);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    let mut established = client::connect(&rig.client, web.host.socket(Family::V6, PORT)).unwrap();
    ask_again(&mut established);
    let load = Load::start(&rig.client, web.host.socket(Family::V4, PORT), 2).unwrap();
    for round in 0..20 {
        load.wait_for(10);
        rig.agent().process.signal(Signal::SIGKILL).unwrap();
        rig.agent().process.wait(PATIENCE).unwrap();
        load.wait_for(10);
        let before = steered(&rig.setup);
        // Some are killed in the middle of their start.
        if round % 4 == 0 {
            let log = rig.setup.directory().join("killed.log");
            let mut early = Process::start("srcip agent", rig.setup.command(), &log).unwrap();
            std::thread::sleep(Duration::from_millis(20 * round));
            early.kill();
        }
        rig.start();
        rig.agent().wait("ready", |agent| agent.get("/readyz").is_ok_and(|(code, _)| code == 200)).unwrap();
        assert!(steered(&rig.setup) >= before);
        ask_again(&mut established);
    }
    load.wait_for(10);
    let report = load.stop().unwrap();
    assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0));
    assert_eq!(rig.agent().status().unwrap()["attachments"].as_array().unwrap().len(), 1);
}

/// 20 times replaced by an agent whose programs are of another build, and by one of the first build again.
#[test]
fn upgraded_and_rolled_back_under_load() {
    let mut rig = Rig::with_manifests();
    let (web, other) = (rig.running("web", TPROXY), rig.running("by-tc", TPROXY));
    let mut object = other.object.clone();
    object["metadata"]["annotations"]["srcip.io/engine"] = "tc".into();
    rig.put(&web.object);
    rig.put(&object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    rig.agent().wait_steered("shop/by-tc").unwrap();
    let build = rig.setup.directory().join("other-build");
    fs::write(&build, differently(&Build::current().unwrap().steer)).unwrap();
    let first = rig.setup.clone();
    let second = first.clone().with_variable("SRCIP_EBPF_OBJECT", &build.display().to_string());
    let pin_path = first.srcip().pin_path().to_owned();
    // The recorder is the same in both.
    let set = || {
        let mut set = one_set(&pin_path);
        set.retain(|(name, _)| name != "srcip_watch");
        set
    };
    let ours = set();
    let mut established = [&web, &other].map(|pod| {
        let mut stream = client::connect(&rig.client, pod.host.socket(Family::V6, PORT)).unwrap();
        ask_again(&mut stream);
        stream
    });
    let loads =
        [&web, &other].map(|pod| Load::start(&rig.client, pod.host.socket(Family::V4, PORT), 1).unwrap());
    for round in 0..20 {
        for setup in [&second, &first] {
            loads.iter().for_each(|load| load.wait_for(5));
            let before = steered(setup);
            rig.agent().process.signal(Signal::SIGKILL).unwrap();
            rig.agent().process.wait(PATIENCE).unwrap();
            rig.setup = setup.clone();
            rig.start();
            rig.agent()
                .wait("ready", |agent| agent.get("/readyz").is_ok_and(|(code, _)| code == 200))
                .unwrap();
            let theirs = set();
            let same = theirs.iter().filter(|program| ours.contains(program)).count();
            let expected = if std::ptr::eq(setup, &first) { ours.len() } else { 0 };
            assert_eq!((theirs.len(), same), (ours.len(), expected), "round {round}: {theirs:?}, {ours:?}");
            assert!(steered(setup) >= before);
            established.iter_mut().for_each(ask_again);
        }
    }
    for load in loads {
        let report = load.stop().unwrap();
        assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0));
    }
}

/// SIGTERM leaves all attached; `srcip cleanup` leaves nothing.
#[test]
fn ended_it_leaves_all_attached_and_cleanup_removes_it() {
    let mut rig = Rig::with_manifests();
    let web = rig.running("web", TPROXY);
    let before = traces(&web.host);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    let log = rig.agent.take().unwrap().stop().unwrap();
    assert!(log.contains("what is attached stays attached"), "{log}");
    assert!(!rig.setup.socket().exists());
    rig.assert_kept(&web.host);
    rig.setup.srcip().run("cleanup").unwrap();
    assert!(!rig.setup.srcip().pin_path().exists());
    assert_eq!(traces(&web.host), before);
    rig.assert_direct(&web.host);
}

/// One node takes one agent.
#[test]
fn a_second_agent_is_refused() {
    let mut rig = Rig::with_manifests();
    rig.start();
    let output = rig.setup.command().output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("another agent runs on this node"), "{error}");
    rig.agent().get("/livez").unwrap();
}

/// An API that cannot be reached, at the start or later, detaches nobody and is told of.
#[test]
fn an_outage_of_the_api_detaches_nobody() {
    let mut rig = Rig::new(true);
    let Cluster::Api(server) = &rig.cluster else { unreachable!("made with the API") };
    let web_uid = uid();
    let web = rig.world.pod("web", &web_uid).unwrap();
    let _application = peer::application(&web, &["[::]:8000"]).unwrap();
    let _proxy = Proxy::start(&web, Kind::Haproxy).unwrap();
    server.put_pod(pod("shop", "web", &web_uid, TPROXY));
    let mut agent = rig.setup.start().unwrap();
    agent.wait_steered("shop/web").unwrap();
    server.set(Faults { refuse: true, ..Default::default() });
    server.cut();
    agent.stop().unwrap();
    let mut agent = rig.setup.start().unwrap();
    agent.wait("told", |agent| agent.get("/readyz").is_ok_and(|(code, _)| code == 503)).unwrap();
    assert_eq!(agent.get("/livez").unwrap(), (200, "ok".to_owned()));
    std::thread::sleep(Duration::from_secs(1));
    assert!(agent.steers("shop/web"));
    rig.assert_kept(&web);
    server.set(Faults::default());
    agent.wait("ready", |agent| agent.get("/readyz").is_ok_and(|(code, _)| code == 200)).unwrap();
    assert!(agent.steers("shop/web"));
}

/// Maps that another version laid out are not touched: the agent says so, and pods are steered on.
#[test]
fn another_layout_is_refused_and_steered_on() {
    let mut rig = Rig::with_manifests();
    let web = rig.running("web", TPROXY);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    rig.agent.take().unwrap().stop().unwrap();
    let pin = rig.setup.srcip().pin_path().join("maps/LAYOUT");
    let layout = Map::Array(MapData::from_pin(&pin).unwrap());
    let mut layout = Array::<_, u32>::try_from(layout).unwrap();
    let number = layout.get(&0, 0).unwrap();
    layout.set(0, number + 1, 0).unwrap();
    rig.start();
    let refuses = |agent: &Agent| {
        let (code, text) = agent.get("/readyz").unwrap();
        code == 503 && text.contains("another version of srcip") && text.contains("srcip cleanup")
    };
    rig.agent().wait("refused", refuses).unwrap();
    assert_eq!(rig.agent().get("/livez").unwrap().0, 200);
    rig.assert_kept(&web.host);
    // It goes on by itself when there is nothing in its way any more.
    layout.set(0, number, 0).unwrap();
    rig.agent().wait("ready", |agent| agent.get("/readyz").unwrap().0 == 200).unwrap();
    rig.assert_kept(&web.host);
}

/// Mistakes of whoever starts it are named.
#[test]
fn mistakes_are_named() {
    let rig = Rig::with_manifests();
    let config = rig.setup.directory().join("bad.yaml");
    fs::write(&config, "steer:\n  selectors:\n  - proxyPort: 15006\n    matchLabel: {a: b}\n").unwrap();
    let socket = rig.setup.directory().join("run/bad.sock");
    let arguments =
        format!("agent --node-name n --config {} --socket {}", config.display(), socket.display());
    let error = rig.setup.srcip().fail(&arguments).unwrap();
    assert!(error.contains("bad.yaml") && error.contains("matchLabel"), "{error}");
    let error = rig.setup.srcip().fail("agent").unwrap();
    assert!(error.contains("--node-name") && error.contains("--manifests"), "{error}");
    let error = rig.setup.srcip().fail("loglevel --socket /run/srcip-none/agent.sock").unwrap();
    assert!(error.contains("no agent answers at /run/srcip-none/agent.sock"), "{error}");
}

/// The level of the log changes while it runs.
#[test]
fn the_log_level_changes_while_it_runs() {
    let mut rig = Rig::with_manifests();
    rig.setup = rig.setup.clone().with("--log-format json");
    rig.start();
    let socket = rig.setup.socket();
    let level = |filter: &str| {
        rig.setup.srcip().output(&format!("loglevel {filter} --socket {}", socket.display())).unwrap()
    };
    assert_eq!(String::from_utf8_lossy(&level("").stdout), "info\n");
    assert_eq!(String::from_utf8_lossy(&level("debug").stdout), "debug\n");
    assert_eq!(level("loud").status.code(), Some(1));
    let log = rig.agent.as_ref().unwrap().process.log();
    // Nothing of a line that is half written.
    for line in log[..log.rfind('\n').unwrap()].lines() {
        assert!(serde_json::from_str::<Value>(line).is_ok_and(|line| line["level"].is_string()), "{line}");
    }
}

/// What the programs log is part of the agent's log, from the moment that somebody wants it.
#[test]
fn the_programs_log_comes_with_the_agents() {
    let mut rig = Rig::with_manifests();
    rig.setup = rig.setup.clone().with("--log-format json");
    let (first, second) = (rig.running("first", TPROXY), rig.running("second", TPROXY));
    rig.put(&first.object);
    rig.start();
    rig.agent().wait_steered("shop/first").unwrap();
    let said = |agent: &Agent| {
        let log = agent.process.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line.to_string().contains("listener registered: family")).count()
    };
    assert_eq!(said(rig.agent()), 0);
    let socket = rig.setup.socket();
    rig.setup.srcip().run(&format!("loglevel debug --socket {}", socket.display())).unwrap();
    rig.put(&second.object);
    rig.agent().wait("said", |agent| said(agent) > 0).unwrap();
}
