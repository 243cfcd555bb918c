//! Agents of another build, and agents that are to do less: what they take over, and what they take away.

use std::{collections::BTreeMap, fs, net::TcpStream, path::PathBuf};

use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use serde_json::Value;
use srcip_tests::{
    Family,
    client::{self, ask},
    cluster::{agent::Agents, balancer, node::PodNetwork},
    load::Load,
};
use srcip_user::{NORTH_SOUTH_OBJECT, dataplane::record::TcHook, routing};

use super::NorthSouth;
use crate::upgrade::{differently, one_set};

/// How the programs of north-south are attached on a node: the number of tcx links, and of filters.
fn attached(test: &NorthSouth, node: u8) -> (usize, usize) {
    let host = &test.cluster.node(node).host;
    let links = ["node", "pods"].map(|directory| {
        let pins = Agents::srcip(&test.cluster, node).pin_path().join("northsouth").join(directory);
        fs::read_dir(pins).map_or(0, Iterator::count)
    });
    let devices = host.netns().run(routing::devices).unwrap().unwrap();
    let filters = devices.iter().map(|device| {
        let all = host.sh(&format!("tc filter show dev {} ingress", device.name));
        all.unwrap_or_default().matches("name srcip_").count()
    });
    (links.iter().sum(), filters.sum())
}

fn counters(test: &NorthSouth, node: u8) -> BTreeMap<String, u64> {
    let text = Agents::srcip(&test.cluster, node).run("status -o json").unwrap();
    let status: Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(status["north_south"]["counters"].clone()).unwrap()
}

/// The programs of a node, and their tags.
fn programs(test: &NorthSouth, node: u8) -> Vec<(String, u64)> {
    one_set(&Agents::srcip(&test.cluster, node).pin_path().join("northsouth"))
}

fn write(test: &NorthSouth, name: &str, object: &[u8]) -> PathBuf {
    let path = test.cluster.world.directory().join(name);
    fs::write(&path, object).unwrap();
    path
}

/// Over and over another build on the node that traffic enters by and on the one with the pod, and the first again.
fn rounds(options: &str, rounds: usize) {
    let mut test = NorthSouth::with_agents(PodNetwork::PointToPoint, &[1, 2], options);
    let other = write(&test, "other-build", &differently(NORTH_SOUTH_OBJECT));
    balancer::route(&test.cluster, &[3]).unwrap();
    let nodes = [3, 1];
    let expected = |node| if node == 3 { 1 } else { 2 };
    let ours = nodes.map(|node| programs(&test, node));
    let (vip, node_port) = (
        test.service.dialled(Family::V4),
        test.cluster.node(3).host.socket(Family::V6, test.service.node_port),
    );
    // Of the same frontends, each with its family: a port of the client's that has a connection by another frontend
    // of the pod's is a thing of its own.
    let mut established: Vec<TcpStream> = [vip, node_port]
        .into_iter()
        .flat_map(|to| [to; 6])
        .map(|to| client::connect(&test.cluster.client, to).unwrap())
        .collect();
    let loads = [vip, node_port].map(|to| Load::start(&test.cluster.client, to, 1).unwrap());
    for round in 0..rounds {
        for object in [Some(other.clone()), None] {
            test.agents.set_object(object.clone());
            for (node, ours) in nodes.into_iter().zip(&ours) {
                loads.iter().for_each(|load| load.wait_for(5));
                let before = counters(&test, node);
                test.agents.kill_and_restart(&test.cluster, node).unwrap();
                let theirs = programs(&test, node);
                let same = theirs.iter().filter(|program| ours.contains(program)).count();
                let of_ours = if object.is_none() { ours.len() } else { 0 };
                assert_eq!(
                    (theirs.len(), same),
                    (ours.len(), of_ours),
                    "round {round}: {theirs:?}, {ours:?}"
                );
                let (links, filters) = attached(&test, node);
                let count = expected(node);
                let by_links = options.is_empty() && TcHook::newest() == TcHook::Tcx;
                let wanted = if by_links { (count, 0) } else { (0, count) };
                assert_eq!((links, filters), wanted, "round {round}, node {node}");
                let after = counters(&test, node);
                assert!(before.iter().all(|(name, count)| after[name] >= *count), "{before:?} {after:?}");
                for stream in &mut established {
                    let seen = ask(stream).unwrap_or_else(|error| panic!("round {round}: {error:#}"));
                    let family = if seen.peer.is_ipv4() { Family::V4 } else { Family::V6 };
                    assert_eq!(seen.peer.ip(), test.cluster.client.address(family), "round {round}");
                }
            }
        }
    }
    let mut total = established.len();
    for load in loads {
        let report = load.stop().unwrap();
        assert_eq!((&report.failures[..], report.lost), (&[][..], 0), "{report:?}, {:?}", counters(&test, 3));
        total += report.total;
    }
    // Every connection was seen by one build or the other, and counted.
    let counted = counters(&test, 3);
    assert!(counted["new_flows"] + counted["new_flows_handed_on"] >= total as u64, "{counted:?}");
    println!("{total} connections over {} changes of programs", rounds * 4);
}

#[test]
fn upgraded_and_rolled_back_under_load() {
    rounds("", 6);
}

#[test]
fn filters_are_exchanged_under_load() {
    rounds("--tc-hook clsact", 5);
}

/// Programs that the kernel refuses: what was programmed and attached stays in force, and a new attempt needs no new
/// agent.
#[test]
fn programs_that_do_not_load_leave_those_that_do() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1], |service| service);
    let mut bad = NORTH_SOUTH_OBJECT.to_vec();
    let at = {
        let file = object::File::parse(&bad[..]).unwrap();
        let symbol = file.symbols().find(|symbol| symbol.name() == Ok("srcip_pod")).unwrap();
        let section = file.section_by_index(symbol.section_index().unwrap()).unwrap();
        (section.file_range().unwrap().0 + symbol.address()) as usize
    };
    // `r0 = r9`: BPF_ALU64 | BPF_MOV | BPF_X.
    bad[at..at + 8].copy_from_slice(&[0xbf, 0x90, 0, 0, 0, 0, 0, 0]);
    let object = write(&test, "bad-build", &bad);
    let ours = programs(&test, 1);
    let before = counters(&test, 1);
    test.agents.set_object(Some(object.clone()));
    test.agents.restart_until(&test.cluster, 1, "R9 !read_ok").unwrap();
    let told = "[-]north-south failed: it cannot be set up: the kernel refused to load the program srcip_pod";
    let page = test.agents.wait_for(&test.cluster, 1, "readyz", told).unwrap();
    assert!(page.contains("srcip doctor") && !page.contains("R9 !read_ok"), "{page}");
    assert!(page.contains("[+]attached ok") && page.contains("[+]loop ok"), "{page}");
    assert!(test.agents.probe(&test.cluster, 1, "livez").unwrap().contains("livez check passed"));
    // All of it is there, and works.
    assert_eq!(programs(&test, 1), ours);
    for family in Family::BOTH {
        for node in 1..=3 {
            test.assert_kept_by(node, family);
        }
    }
    assert!(counters(&test, 1)["new_flows"] > before["new_flows"]);
    // The cause goes.
    fs::write(&object, differently(NORTH_SOUTH_OBJECT)).unwrap();
    test.agents.wait_for(&test.cluster, 1, "readyz", "[+]north-south ok").unwrap();
    assert!(programs(&test, 1).iter().all(|program| !ours.contains(program)));
    for family in Family::BOTH {
        test.assert_kept_by(1, family);
    }
}

/// Nobody would keep true what it knows of pods: it goes, and with it what it holds on devices. What others have set
/// up by another path stays.
#[test]
fn an_agent_without_uplinks_takes_away_what_one_with_them_had_set_up() {
    for options in ["", "--tc-hook clsact"] {
        let mut test = NorthSouth::with_agents(PodNetwork::PointToPoint, &[1], options);
        assert_ne!(attached(&test, 1), (0, 0));
        test.assert_kept_by(1, Family::V4);
        // Nothing else takes it away: there was nothing of pods to detach.
        Agents::srcip(&test.cluster, 1).run("detach --all --now").unwrap();
        test.assert_kept_by(1, Family::V4);
        test.agents.set_options("");
        test.agents
            .restart_until(
                &test.cluster,
                1,
                "north-south, which an earlier agent had set up, has been removed",
            )
            .unwrap();
        test.agents.wait_for(&test.cluster, 1, "readyz", "readyz check passed").unwrap();
        assert_eq!(attached(&test, 1), (0, 0), "{options}");
        assert!(!Agents::srcip(&test.cluster, 1).pin_path().join("northsouth").exists());
        // Now it is kube-proxy's, which puts the node's address there.
        for family in Family::BOTH {
            let seen = test.ask_by(1, family).unwrap();
            assert_ne!(seen.peer.ip(), test.cluster.client.address(family), "{options}");
        }
        // Again, and nothing is said.
        test.agents.restart_until(&test.cluster, 1, "running").unwrap();
        assert_eq!(test.agents.log(1).matches("has been removed").count(), 1);
        // And back.
        test.agents.set_options(&format!("--uplink auto {options}"));
        test.agents.kill_and_restart(&test.cluster, 1).unwrap();
        test.assert_kept_by(1, Family::V4);
        // From another namespace than the devices are in.
        test.agents.stop(1).unwrap();
        let said = Agents::srcip(&test.cluster, 1).run("cleanup").unwrap();
        assert!(said.contains("north-south removed"), "{said}");
        assert_eq!(attached(&test, 1), (0, 0), "{options}");
        assert!(!Agents::srcip(&test.cluster, 1).pin_path().exists());
        let devices = test.cluster.node(1).host.sh("tc qdisc show").unwrap();
        assert!(!devices.contains("clsact"), "{devices}");
    }
}

/// Connections that are open then end with a reset, as they began by another way than the one they would go on by;
/// new ones are kube-proxy's at once.
#[test]
fn a_service_that_does_not_ask_any_more_is_kube_proxys_at_once() {
    let mut test = NorthSouth::new(PodNetwork::PointToPoint, &[1], |service| service);
    balancer::route(&test.cluster, &[2]).unwrap();
    let mut open = Family::BOTH.map(|family| {
        let mut stream = client::connect(&test.cluster.client, test.service.dialled(family)).unwrap();
        ask(&mut stream).unwrap();
        (family, stream)
    });
    test.update(|service| service.annotated = false);
    for (family, stream) in &mut open {
        let error = ask(stream).unwrap_err();
        let cause = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        assert_eq!(cause, Some(std::io::ErrorKind::ConnectionReset), "{family:?}: {error:#}");
        let seen = client::ask_once(&test.cluster.client, test.service.dialled(*family)).unwrap();
        assert_ne!(seen.peer.ip(), test.cluster.client.address(*family), "{family:?}: masqueraded");
    }
    test.update(|service| service.annotated = true);
    for family in Family::BOTH {
        test.assert_kept_by(2, family);
    }
}
