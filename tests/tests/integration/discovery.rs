//! Pods that run already are found by their cgroups, and no pod is taken for another.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::Path,
    time::Duration,
};

use srcip_tests::{
    host::Host,
    process::{Place, Process},
    world::World,
};
use srcip_user::{
    agent::{
        discovery::{Scan, scan},
        pod::PodUid,
    },
    netns::Netns,
};

/// Start times are in clock ticks, a hundredth of a second each.
const LATER: Duration = Duration::from_millis(30);

/// A UID that no other test has.
fn uid(number: u8) -> PodUid {
    PodUid::new(&format!("0f5c2a1e-8d1b-4b52-{number:04}-{:012}", std::process::id())).unwrap()
}

/// The kubelet's two ways to name a pod's cgroup, below whatever the kubelet itself is in.
fn cgroupfs(uid: &PodUid) -> String {
    format!("kubepods/burstable/pod{uid}")
}

fn systemd(uid: &PodUid) -> String {
    let uid = uid.as_str().replace('-', "_");
    format!("kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{uid}.slice")
}

/// Starts a program in a cgroup of the world, in a network namespace, and waits until it is there.
fn start(world: &World, cgroup: &str, netns: &Path, line: &str) -> Process {
    let directory = world.cgroup().join(cgroup);
    fs::create_dir_all(&directory).unwrap();
    let place = Place { netns: File::open(netns).unwrap(), cgroup_procs: directory.join("cgroup.procs") };
    let mut words = line.split(' ');
    let mut command = place.command(words.next().unwrap()).unwrap();
    command.args(words);
    let log = world.directory().join("discovery.log");
    let process = Process::start(line, command, &log).unwrap();
    std::thread::sleep(LATER);
    process
}

fn look(uids: &[&PodUid]) -> Scan {
    let wanted: BTreeSet<PodUid> = uids.iter().map(|uid| (*uid).clone()).collect();
    scan(Path::new("/proc"), &wanted).unwrap()
}

fn assert_found(scan: &Scan, uid: &PodUid, host: &Host) {
    assert!(scan.failed.is_empty(), "{scan:?}");
    let found = scan.found.get(uid).unwrap_or_else(|| panic!("{uid} is not in {scan:?}"));
    assert_eq!(found.id(), host.netns().id(), "{scan:?}");
}

#[test]
fn pods_are_found_by_either_naming() {
    let mut world = World::new().unwrap();
    let hosts = [world.host("a").unwrap(), world.host("b").unwrap()];
    let uids = [uid(1), uid(2)];
    let sandbox = format!("{}/3f1d", cgroupfs(&uids[0]));
    let _first = start(&world, &sandbox, &hosts[0].path(), "sleep 120");
    let sandbox = format!("{}/cri-containerd-3f1d.scope", systemd(&uids[1]));
    let mut second = start(&world, &sandbox, &hosts[1].path(), "sleep 120");
    let scan = look(&[&uids[0], &uids[1], &uid(3)]);
    assert_eq!(scan.found.len(), 2, "{scan:?}");
    assert_found(&scan, &uids[0], &hosts[0]);
    assert_found(&scan, &uids[1], &hosts[1]);
    second.kill();
    assert!(!look(&[&uids[1]]).found.contains_key(&uids[1]));
}

#[test]
fn what_pods_and_runtimes_do_inside_misleads_nobody() {
    let mut world = World::new().unwrap();
    let [pod, other] = [world.host("pod").unwrap(), world.host("other").unwrap()];
    let own = Path::new("/proc/self/ns/net");
    let [uid, victim] = [uid(4), uid(5)];
    for (number, cgroup) in [cgroupfs(&uid), systemd(&uid)].into_iter().enumerate() {
        let mut processes = vec![
            // Older than the sandbox: a monitor, and a runtime's helper that is still on the host's network.
            start(&world, &format!("{cgroup}/crio-conmon-3f1d.scope"), &other.path(), "sleep 120"),
            start(&world, &format!("{cgroup}/3f1d"), own, "sleep 120"),
        ];
        assert!(look(&[&uid]).found.is_empty(), "nothing of the pod itself runs yet");
        processes.push(start(&world, &format!("{cgroup}/pause"), &pod.path(), "sleep 120"));
        // A namespace of the application's own making, by its first process and by a child of it.
        processes.push(start(&world, &format!("{cgroup}/app"), &pod.path(), "unshare --net sleep 120"));
        let fork = "unshare --net --fork --kill-child sleep 120";
        processes.push(start(&world, &format!("{cgroup}/app"), &pod.path(), fork));
        // Cgroups that pretend to be another pod's.
        for pretended in [cgroupfs(&victim), systemd(&victim)] {
            processes.push(start(&world, &format!("{cgroup}/app/{pretended}/x"), &other.path(), "sleep 120"));
        }
        let scan = look(&[&uid, &victim]);
        assert_found(&scan, &uid, &pod);
        assert_eq!(scan.found.len(), 1, "layout {number}: {scan:?}");
        assert_ne!(scan.found[&uid].id(), Netns::open(own).unwrap().id());
    }
}
