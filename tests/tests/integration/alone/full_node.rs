//! A full node.

use std::{
    fs,
    time::{Duration, Instant},
};

use srcip_tests::{
    Family,
    agent::{Agent, pod, uid},
    client, peer,
};

use crate::{
    agent::{Rig, TPROXY},
    scenario::PORT,
};

/// What a kubelet takes, and some more.
const PODS: usize = 250;
/// A cold start attaches all of them within this time, one of them within that.
const ALL: Duration = Duration::from_secs(10);
const ONE: &str = "0.05";
/// Resident memory, in KiB.
const MEMORY: u64 = 64 * 1024;
/// Of one processor, while nothing happens.
const IDLE: f64 = 0.005;
/// How often its first thread wakes in the meantime: it asks nobody whether something has happened.
const WAKES: u64 = 60;
/// The machine may have other things to do: the best of so many counts.
const ATTEMPTS: usize = 6;

#[test]
fn a_full_node() {
    let mut rig = Rig::with_manifests();
    let mut pods = Vec::new();
    for number in 0..PODS {
        let uid = uid();
        let host = rig.world.pod(&format!("p{number}"), &uid).unwrap();
        let proxy = peer::echo(&host, &["[::]:15006"]).unwrap();
        rig.put(&pod("shop", &format!("p{number}"), &uid, TPROXY));
        pods.push((host, proxy));
    }
    rig.setup.configure(|config| config["resyncSeconds"] = 30.into()).unwrap();

    let mut best = None;
    for _ in 0..ATTEMPTS {
        let attempt = cold_start(&mut rig);
        eprintln!("{attempt:?}");
        let is_better = best.as_ref().is_none_or(|best: &Start| attempt.took < best.took);
        if is_better {
            best = Some(attempt);
        }
        let best = best.as_ref().unwrap();
        if best.took <= ALL && best.slow <= PODS / 100 {
            break;
        }
    }
    let best = best.unwrap();
    assert!(best.took <= ALL, "{best:?}");
    assert!(best.slow <= PODS / 100, "the 99th percentile of an attach is above {ONE} s: {best:?}");

    let pid = rig.agent().process.pid();
    let (before, mut looks) = (waits(pid), 0);
    let used = (0..ATTEMPTS)
        .map(|_| {
            looks += 1;
            idle(pid)
        })
        .find(|used| *used <= IDLE);
    let waited = (waits(pid) - before) / looks;
    eprintln!("idle: {used:?} of a processor, its first thread has waited {waited} times");
    assert!(waited <= WAKES, "it woke {waited} times while nothing happened");
    assert!(used.is_some(), "it uses more than {IDLE} of a processor while nothing happens");
    let memory = resident(pid);
    eprintln!("resident: {memory} KiB");
    assert!(memory <= MEMORY, "{memory} KiB are resident");

    // They are steered for real.
    for (host, _) in pods.iter().step_by(50) {
        let stream = client::connect(&rig.client, host.socket(Family::V4, PORT)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), host.socket(Family::V4, PORT));
    }
    assert!(steered_connections(rig.agent()) >= 5);
}

/// How a start went.
#[derive(Debug)]
struct Start {
    took: Duration,
    /// Pods whose attach took longer than [`ONE`].
    slow: usize,
}

/// Starts an agent on a node with nothing attached.
fn cold_start(rig: &mut Rig) -> Start {
    if let Some(agent) = rig.agent.take() {
        agent.stop().unwrap();
        rig.setup.srcip().run("cleanup").unwrap();
    }
    let began = Instant::now();
    rig.start();
    let steered = |agent: &Agent| agent.metric("srcip_agent_pods{state=\"steered\"}").unwrap() as usize;
    rig.agent().wait("all are steered", |agent| steered(agent) == PODS).unwrap();
    let took = began.elapsed();
    let series = "srcip_agent_action_duration_seconds";
    let all = rig.agent().metric(&format!("{series}_count{{action=\"attach\"}}")).unwrap();
    let quick = rig.agent().metric(&format!("{series}_bucket{{le=\"{ONE}\",action=\"attach\"}}")).unwrap();
    assert!(all as usize >= PODS);
    Start { took, slow: (all - quick) as usize }
}

/// The share of a processor that a process uses over half a minute, which has one look at all pods in it.
fn idle(pid: u32) -> f64 {
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        // proc_pid_stat(5): utime and stime are the 14th and the 15th, in clock ticks of 10 ms.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    let (before, began) = (used(), Instant::now());
    std::thread::sleep(Duration::from_secs(31));
    (used() - before) as f64 / 100.0 / began.elapsed().as_secs_f64()
}

/// How often a process' first thread, which serves and waits for signals, has gone to sleep.
fn waits(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// Resident memory of a process, in KiB.
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn steered_connections(agent: &Agent) -> u64 {
    let status = agent.status().unwrap();
    let all = status["attachments"].as_array().unwrap();
    all.iter().map(|attachment| attachment["counters"]["steered"].as_u64().unwrap()).sum()
}
