//! As many pods as a node has, and what is left of as many as a node sees in a week.

use std::{
    fs,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use srcip_tests::{
    agent::{Agent, pod, uid},
    bare::Bare,
    kernel::Counts,
    srcip::binary,
    world::World,
};

use super::full_node::resident;
use crate::agent::{Rig, TPROXY};

/// What `srcip-pods` reports.
fn pods(world: &World, arguments: &[&str]) -> Value {
    let mut command = Command::new(binary("srcip-pods"));
    command.arg("--pin-path").arg(world.directory().join("bpf/pods"));
    command.arg("--cgroup").arg(world.cgroup()).args(arguments);
    let output = srcip_tests::process::run(&mut command).unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap();
    println!("{}: {report}", arguments.join(" "));
    report
}

/// 250 pods within 10 s, each within 50 ms but for one in a hundred, in 64 MiB. The best of a few rounds is what
/// the code can do. Where other tests keep the processors busy in all of them, its own processor time counts.
fn attach_250(options: &[&str]) {
    let world = World::new().unwrap();
    let mut reports = Vec::new();
    for _ in 0..4 {
        let report = pods(&world, &[&["250"], options].concat());
        assert_eq!(report["complete"], 250, "{report}");
        assert!(report["resident_kb"].as_u64().unwrap() < 64 << 10, "{report}");
        let within = |p99: &str, total: &str| {
            report[p99].as_f64().unwrap() <= 50.0 && report[total].as_f64().unwrap() <= 10_000.0
        };
        let is_busy = report["others_cpu_ms"].as_f64() > report["total_cpu_ms"].as_f64();
        if within("p99_ms", "total_ms") || is_busy && within("p99_cpu_ms", "total_cpu_ms") {
            return;
        }
        reports.push(report);
    }
    panic!("slow every time: {reports:?}");
}

#[test]
fn two_hundred_and_fifty_with_sk_lookup() {
    attach_250(&[]);
}

#[test]
fn two_hundred_and_fifty_with_tc() {
    attach_250(&["--tc"]);
}

/// Pods that come and go in one wave.
const WAVE: usize = 100;
const WAVES: usize = 20;

/// 2,000 pods come and go before the agent's eyes: what it and the kernel have is as much as before.
#[test]
fn two_thousand_leave_nothing() {
    let mut rig = Rig::with_manifests();
    let stays = rig.running("stays", TPROXY);
    rig.put(&stays.object);
    rig.start();
    rig.agent().wait_steered("shop/stays").unwrap();
    // The first to come and go leave what the agent keeps.
    wave(&mut rig, 2, false);
    wave(&mut rig, 2, true);
    let pid = rig.agent().process.pid();
    let pins = rig.setup.srcip().pin_path().to_owned();
    let counts = || Counts::of(&pins, pid).unwrap();
    let mut before = counts();
    rig.agent()
        .wait("it is quiet", |_| {
            let last = std::mem::replace(&mut before, counts());
            std::thread::sleep(Duration::from_millis(500));
            last == before
        })
        .unwrap();
    // Five hooks, the recorder, the iterator, and what steers the pod that stays.
    assert_eq!((before.programs, before.pinned_pods), (8, 1), "{before:?}");
    let attached = |agent: &Agent| {
        let succeeded = "srcip_agent_actions_total{action=\"attach\",result=\"success\"}";
        agent.metric(succeeded).unwrap() as usize
    };
    let (resident_before, attached_before) = (resident(pid), attached(rig.agent()));

    let began = Instant::now();
    (0..WAVES).for_each(|number| wave(&mut rig, WAVE, number % 2 == 0));
    let took = began.elapsed();
    rig.agent().wait("as before", |_| counts() == before).unwrap_or_else(|error| {
        panic!("{before:?} before, {:?} after: {error}", counts());
    });
    let grown = resident(pid).saturating_sub(resident_before);
    eprintln!("{} pods in {took:?}: {before:?} before and after, {grown} KiB more", WAVE * WAVES);
    assert_eq!(attached(rig.agent()) - attached_before, WAVE * WAVES);
    assert!(grown < 16 * 1024, "{grown} KiB more are resident");
    rig.assert_kept(&stays.host);
}

/// Pods come and are steered. Then their sandboxes go, or their objects do, and the other follows.
fn wave(rig: &mut Rig, count: usize, sandboxes_first: bool) {
    let pods: Vec<_> = (0..count)
        .map(|number| {
            let uid = uid();
            (Bare::start(rig.world.cgroup(), &uid).unwrap(), pod("shop", &format!("p{number}"), &uid, TPROXY))
        })
        .collect();
    let (sandboxes, objects): (Vec<_>, Vec<_>) = pods.into_iter().unzip();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    rig.setup.put("wave", &list).unwrap();
    let steered = |agent: &Agent| agent.metric("srcip_agent_pods{state=\"steered\"}").unwrap() as usize;
    rig.agent().wait("the wave is steered", |agent| steered(agent) == count + 1).unwrap();
    if sandboxes_first {
        drop(sandboxes);
        rig.setup.put("wave", &Value::Null).unwrap();
        gone(rig);
    } else {
        rig.setup.put("wave", &Value::Null).unwrap();
        gone(rig);
        drop(sandboxes);
    }
}

fn gone(rig: &mut Rig) {
    let pods = rig.setup.srcip().pin_path().join("pods");
    rig.agent().wait("the wave is gone", |_| fs::read_dir(&pods).unwrap().count() == 1).unwrap();
}
