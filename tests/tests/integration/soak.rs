//! A million connections leave no trace: neither in the observer's memory nor in the kernel's maps.

use std::{
    fs,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use srcip_tests::{
    Family,
    host::Host,
    peer::{self, Clients, Holders},
    process::Process,
    wait_until,
};

use crate::scenario::{Engine, PORT, Scenario};

/// Connections in all.
const TOTAL: usize = 1_000_000;
/// At the same time, at most.
const CONCURRENT: usize = 100_000;
/// Of those, held open all the time; the others come and go.
const HELD: usize = 99_000;
/// A process has 20,000 descriptors here at most; the kernel spreads connections not quite evenly.
const PROCESSES: usize = 7;
const VISITORS: usize = 2;

/// Kilobytes of a process that are its own.
fn memory(process: &Process) -> usize {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Bytes of the kernel's that the BPF maps of a process take.
fn map_memory(process: &Process) -> usize {
    let entries = fs::read_dir(format!("/proc/{}/fdinfo", process.pid())).unwrap();
    entries
        .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
        .filter(|text| text.contains("map_type:"))
        .filter_map(|text| {
            text.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse::<usize>().ok()
        })
        .sum()
}

/// Clients in several processes, with the host's addresses in turn.
fn clients(scenario: &Scenario, host: &Host, count: usize, at_once: usize) -> Clients {
    let from = host.addresses(Family::V4);
    Clients { from, ..Clients::new(scenario.pod.socket(Family::V4, PORT), count, at_once) }
}

#[test]
fn a_million_connections() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    // More addresses for more ports: 28,000 each.
    scenario.world.add_addresses(&mut scenario.client, 12).unwrap();
    let mut visitor = scenario.world.host("visitor").unwrap();
    scenario.world.add_addresses(&mut visitor, 12).unwrap();
    let _applications: Vec<_> =
        (0..PROCESSES).map(|_| peer::echo(&scenario.pod, &["0.0.0.0:8000"]).unwrap()).collect();

    let cgroup = scenario.world.cgroup().display();
    let netns = scenario.pod.path();
    // Whatever it prints is the same amount for each connection; here it is nothing, unless one is lost.
    let arguments = format!("observe -v -f --lost --cgroup {cgroup} --netns {}", netns.display());
    let mut observe = scenario.pod.start("observe", scenario.srcip.command(&arguments)).unwrap();
    observe.wait_until("watches", |process| process.log().contains("watching")).unwrap();
    let started = Instant::now();
    let mut held: Vec<Holders> = (0..PROCESSES)
        .map(|_| clients(&scenario, &scenario.client, HELD / PROCESSES, 50).hold(&scenario.client).unwrap())
        .collect();
    let mut opened = 0;
    for holders in &mut held {
        let result = holders.opened().unwrap();
        assert_eq!(result.errors, Vec::<String>::new());
        opened += result.good;
    }
    let maps = map_memory(&observe);
    assert!(maps > 8 << 20, "the ring buffer alone has more: {maps}");

    let per_visitor = 50_000;
    let mut samples = Vec::new();
    while opened < TOTAL {
        assert!(started.elapsed() < Duration::from_secs(900), "{opened} connections in 15 minutes");
        let results: Vec<_> = std::thread::scope(|scope| {
            let visits: Vec<_> = (0..VISITORS)
                .map(|_| {
                    let clients = clients(&scenario, &visitor, per_visitor, 40);
                    let visitor = &visitor;
                    scope.spawn(move || clients.visit(visitor).unwrap())
                })
                .collect();
            visits.into_iter().map(|visit| visit.join().unwrap()).collect()
        });
        for result in results {
            assert_eq!(result.errors, Vec::<String>::new());
            opened += result.good;
        }
        samples.push(memory(&observe));
    }
    const { assert!(HELD + VISITORS * 40 <= CONCURRENT) };
    println!("{opened} connections; own memory in kB after each 100,000: {samples:?}");
    assert!(samples.len() >= 9, "{samples:?}");
    // A hash table that the held connections have filled by more than half doubles once, sooner or later, when what
    // came and went has left it no free place. There are a few of them; what is left behind by connections shows in
    // each step.
    let mut steps: Vec<_> = samples.windows(2).map(|two| two[1].saturating_sub(two[0])).collect();
    steps.sort_unstable();
    let usual = &steps[..steps.len() - 3];
    assert!(usual.iter().sum::<usize>() < samples[0] / 20, "{samples:?}");
    assert_eq!(map_memory(&observe), maps);
    for holders in &mut held {
        assert_eq!(holders.check().unwrap().errors, Vec::<String>::new());
    }
    // One after the other: all at once are more events than the ring buffer holds.
    let mut left = PROCESSES * (HELD / PROCESSES);
    for holders in held {
        holders.close().unwrap();
        left -= HELD / PROCESSES;
        wait_until("the application has closed its ends", || {
            let sockets = scenario.pod.tcp_sockets().unwrap();
            sockets.iter().filter(|s| s.is_connection() && s.local.port() == PORT).count() <= left
        });
    }
    assert_eq!(map_memory(&observe), maps);
    observe.signal(Signal::SIGTERM).unwrap();
    assert!(observe.wait(Duration::from_secs(20)).unwrap().success());
    let told =
        format!("{opened} opened = {opened} told of + 0 lost, {opened} closed = {opened} told of + 0 lost");
    let log = observe.log();
    assert!(log.trim_end().ends_with(&told), "{told}\n{log}");
    assert!(!log.contains(" open ") && !log.contains("warning"), "connections were lost, or events: {log}");
}
