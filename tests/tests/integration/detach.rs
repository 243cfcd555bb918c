//! Detach leaves nothing, and established connections end in peace.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    time::{Duration, Instant},
};

use aya::{
    maps::loaded_maps,
    programs::{loaded_links, loaded_programs},
};
use srcip_tests::{Family, PATIENCE, client, host::Host, load::Load, proxy::Kind, wait_for, wait_until};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(leaves_nothing, drains, does_not_wait_when_told, twenty_rounds_under_load);

/// Everything srcip may change in a pod, as text.
pub fn traces(pod: &Host) -> String {
    let mut text = String::new();
    for command in ["ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all"] {
        text += &pod.sh(command).unwrap();
    }
    text += &pod.sh("tc qdisc show").unwrap();
    text += &pod.sh("tc filter show dev eth0 ingress").unwrap_or_default();
    text += &pod.sh("bpftool net").unwrap();
    for name in [
        "net.ipv4.tcp_fwmark_accept",
        "net.ipv4.fwmark_reflect",
        "net.ipv6.fwmark_reflect",
        "net.ipv4.tcp_tw_reuse",
    ] {
        text += &format!("{name}={}\n", pod.read_sysctl(name).unwrap());
    }
    text
}

fn leaves_nothing(engine: Engine) {
    // Odd values, so that they are seen to come back and not just the defaults.
    let scenario = Scenario::empty(engine);
    scenario.pod.sysctl("net.ipv4.tcp_tw_reuse", "0").unwrap();
    scenario.pod.sysctl("net.ipv6.fwmark_reflect", "1").unwrap();
    let before = traces(&scenario.pod);
    for hook in ["", "--tc-hook clsact"] {
        scenario.attach(hook);
        assert_ne!(traces(&scenario.pod), before);
        // Twice is like once.
        scenario.attach(hook);
        scenario.srcip.detach(&scenario.pod, "--now").unwrap();
        assert_eq!(traces(&scenario.pod), before);
        assert!(!scenario.srcip.pin_path().exists());
    }
}

/// Established connections go on after the detach, and what they need goes once they have ended.
fn drains(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
    let before_rules = 1;
    let mut streams: Vec<_> = Family::BOTH
        .into_iter()
        .map(|family| {
            let mut stream = client::connect(&scenario.client, scenario.pod.socket(family, PORT)).unwrap();
            exchange(&mut stream, true);
            stream
        })
        .collect();
    let arguments = format!("detach --netns {} --drain 600", scenario.pod.path().display());
    let mut detach = scenario.srcip.command(&arguments).spawn().unwrap();
    // Steering stops at once ...
    wait_until("it drains", || scenario.srcip.status(&scenario.pod).unwrap()["state"] == "draining");
    let steered = scenario.counter("steered");
    let mut direct = client::connect(&scenario.client, scenario.pod.socket(Family::V4, PORT)).unwrap();
    let greeting = exchange(&mut direct, true);
    let port = direct.local_addr().unwrap().port();
    assert!(greeting.contains(&format!(":{port} ")), "past the proxy, with its own port: {greeting}");
    assert_eq!(scenario.counter("steered"), steered);
    // ... and the others live on.
    for _ in 0..20 {
        streams.iter_mut().for_each(|stream| drop(exchange(stream, false)));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(detach.try_wait().unwrap().is_none(), "there are connections to wait for");
    drop(streams);
    // It waits no longer than it has to.
    let ended = wait_for("the end", || detach.try_wait().unwrap());
    assert!(ended.success());
    assert!(!scenario.srcip.pin_path().exists());
    let rules = scenario.pod.sh("ip rule").unwrap();
    assert_eq!(rules.matches("lookup local").count(), before_rules);
    assert!(!rules.contains("fwmark"), "{rules}");
}

/// Sends a line and reads it back; the greeting first, if there is one.
fn exchange(stream: &mut std::net::TcpStream, greeting: bool) -> String {
    let read_line = |stream: &mut std::net::TcpStream| {
        let (mut line, mut byte) = (Vec::new(), [0]);
        while byte != *b"\n" {
            stream.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    };
    let greeting = if greeting { read_line(stream) } else { String::new() };
    stream.write_all(b"still here?\n").unwrap();
    assert_eq!(read_line(stream), "still here?\n");
    greeting
}

/// `--drain` is the most it waits, and `--now` does not wait at all.
fn does_not_wait_when_told(engine: Engine) {
    // Who names neither would be waited for 30 s.
    for (option, least, most) in [("--drain 2", 2, 30), ("--now", 0, 30)] {
        let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
        let mut stream = client::connect(&scenario.client, scenario.pod.socket(Family::V4, PORT)).unwrap();
        exchange(&mut stream, true);
        let start = Instant::now();
        let arguments = format!("detach --netns {} {option}", scenario.pod.path().display());
        let output = scenario.srcip.output(&arguments).unwrap();
        let took = start.elapsed();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("1 upstream connections were cut off"), "{said}");
        assert!(took >= Duration::from_secs(least) && took < Duration::from_secs(most), "{took:?}");
        assert!(!scenario.srcip.pin_path().exists());
    }
}

/// All programs, maps and links in the kernel, by id. Ids are not used twice, so what one instance has
/// made can be told from what other tests make meanwhile.
fn objects() -> BTreeSet<String> {
    let programs =
        loaded_programs().filter_map(Result::ok).map(|program| format!("program {}", program.id()));
    let links = loaded_links().filter_map(Result::ok).map(|link| format!("link {}", link.id()));
    let maps = loaded_maps().filter_map(Result::ok).map(|map| format!("map {}", map.id()));
    programs.chain(links).chain(maps).collect()
}

fn twenty_rounds_under_load(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Haproxy);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    let load = Load::start(&scenario.client, scenario.pod.socket(Family::V4, PORT), 1).unwrap();
    let mut seen = BTreeSet::new();
    for round in 0..20 {
        scenario.attach("");
        seen.extend(ids_of(&scenario));
        load.wait_for(5);
        scenario.srcip.detach(&scenario.pod, if round % 2 == 0 { "--now" } else { "--drain 1" }).unwrap();
    }
    let report = load.stop().unwrap();
    assert!(report.total >= 100, "{report:?}");
    assert!(seen.len() >= 20 * 20, "each round makes its own: {}", seen.len());
    // What the kernel frees after a grace period may take a moment.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left: Vec<_> = objects().intersection(&seen).cloned().collect();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "left behind: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    scenario.assert_direct(Family::V4);
}

/// The ids of the objects that one instance consists of, read from its pins.
fn ids_of(scenario: &Scenario) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let root = scenario.srcip.pin_path();
    for entry in std::fs::read_dir(root.join("maps")).unwrap() {
        let map = aya::maps::MapInfo::from_pin(entry.unwrap().path()).unwrap();
        found.insert(format!("map {}", map.id()));
    }
    for directory in [root.join("node"), pod_directory(root)] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let link = aya::programs::links::PinnedLink::from_pin(entry.unwrap().path()).unwrap();
            let info = aya::programs::links::FdLink::from(link).info().unwrap();
            found.insert(format!("link {}", info.id()));
            found.insert(format!("program {}", info.program_id()));
            // With the maps that are not pinned, such as the one with its constants.
            let program = loaded_programs().filter_map(Result::ok).find(|p| p.id() == info.program_id());
            let maps = program.unwrap().map_ids().unwrap().unwrap();
            found.extend(maps.into_iter().map(|id| format!("map {id}")));
        }
    }
    found
}

fn pod_directory(root: &std::path::Path) -> std::path::PathBuf {
    let mut pods = std::fs::read_dir(root.join("pods")).unwrap();
    pods.next().unwrap().unwrap().path()
}

/// The namespace has gone before the detach.
#[test]
fn a_namespace_that_has_gone() {
    for engine in [Engine::SkLookup, Engine::Tc] {
        let mut scenario = Scenario::empty(engine);
        scenario.attach("");
        let (name, path) = (scenario.pod.name().to_owned(), scenario.pod.path());
        let other = scenario.world.host("other").unwrap();
        drop(std::mem::replace(&mut scenario.pod, other));
        srcip_tests::process::sh(&format!("ip netns del {name}")).unwrap();
        let status = scenario.srcip.run("status -o json").unwrap();
        assert!(status.contains("the network namespace is gone"), "{status}");
        let said = scenario.srcip.run(&format!("detach --netns {} --now", path.display())).unwrap();
        assert_eq!(said, format!("{name} detached\n"));
        assert!(!scenario.srcip.pin_path().exists());
    }
}

/// Another pod has come in its place, by the same name and path.
#[test]
fn a_path_that_another_namespace_has_taken() {
    for take_over in [true, false] {
        let mut scenario = Scenario::empty(Engine::SkLookup);
        scenario.attach("");
        let (name, path) = (scenario.pod.name().to_owned(), scenario.pod.path());
        let other = scenario.world.host("other").unwrap();
        drop(std::mem::replace(&mut scenario.pod, other));
        srcip_tests::process::sh(&format!("ip netns del {name}")).unwrap();
        scenario.pod = scenario.world.host("pod").unwrap();
        assert_eq!(scenario.pod.path(), path);
        let before = traces(&scenario.pod);
        if take_over {
            scenario.attach("");
            let status = scenario.srcip.run("status -o json").unwrap();
            let cookie = scenario.pod.netns().cookie().unwrap().0;
            assert_eq!(status.matches("netns_cookie").count(), 1, "{status}");
            assert!(status.contains(&format!("\"netns_cookie\": {cookie},")), "{status}");
        }
        scenario.srcip.detach(&scenario.pod, "--now").unwrap();
        assert_eq!(traces(&scenario.pod), before);
        assert!(!scenario.srcip.pin_path().exists());
    }
}

/// Attached by a process' path, the process gone, the namespace alive: found all the same.
#[test]
fn a_path_that_has_gone() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let mut sleeper = scenario.pod.command("sleep").unwrap();
    sleeper.arg("60");
    let mut sleeper = scenario.pod.start("sleep", sleeper).unwrap();
    let before = traces(&scenario.pod);
    let cgroup = scenario.world.cgroup().display().to_string();
    let arguments = format!("attach --pid {} --proxy-port 15006 --cgroup {cgroup}", sleeper.pid());
    let said = scenario.srcip.run(&arguments).unwrap();
    let name = format!("pid-{}", sleeper.pid());
    assert!(said.starts_with(&format!("{name} attached")), "{said}");
    sleeper.kill();
    scenario.srcip.run(&format!("detach --name {name} --now")).unwrap();
    assert_eq!(traces(&scenario.pod), before);
}
