//! How the programs sit on devices: by links, or by filters of `clsact`; what others have there is left alone.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use aya::programs::{SchedClassifier, TcAttachType};
use srcip_tests::{
    Family,
    process::{run, sh},
    srcip::binary,
};
use srcip_user::{
    clsact::{self, Filter},
    dataplane::record::TcHook,
    northsouth::{
        Changes, Programmer as _,
        desired::{EndpointState, Place, Protocol, ServicePort},
    },
    routing::{self, Device},
};

use super::{
    Application, hooks, tcp_works,
    topology::{Pod, Site},
};

/// A node with a Service of one pod.
struct Rig {
    site: Site,
    pod: Pod,
    application: Application,
}

impl Rig {
    fn new(hook: TcHook) -> Self {
        let mut site = Site::by(hook, 1);
        let pod = site.pod(0);
        let application = Application::start(&pod.host, Family::V4);
        Self { site, pod, application }
    }

    fn service(&self) -> ServicePort {
        let mut service = self.site.service(Protocol::Tcp, Family::V4);
        service.endpoints.push(self.pod.endpoint(Family::V4, Place::Local, EndpointState::Ready));
        service
    }

    fn apply(&mut self) {
        let service = self.service();
        let changes = self.site.apply(0, [service]);
        assert_eq!(changes.missing_uplinks, Vec::<String>::new());
    }

    /// Whatever comes of it.
    fn try_apply(&mut self) -> Changes {
        let desired = self.site.desired(0, [self.service()]);
        let node = &mut self.site.nodes[0];
        node.host.netns().run(|| node.programmer.apply(&desired)).unwrap().unwrap()
    }

    fn works(&self) {
        tcp_works(&self.site, &self.application, Family::V4);
    }

    fn here<T: Send>(&self, look: impl FnOnce() -> T + Send) -> T {
        self.site.nodes[0].host.netns().run(look).unwrap()
    }

    fn device(&self, name: &str) -> Device {
        let devices = self.here(routing::devices).unwrap();
        devices.into_iter().find(|device| device.name == name).unwrap()
    }

    /// The filters with our programs on the uplink and the pod's device.
    fn filters(&self) -> [Vec<Filter>; 2] {
        [("eth0", "srcip_uplink"), ("pod1", "srcip_pod")].map(|(device, program)| {
            let device = self.device(device);
            self.here(|| clsact::filters(&device, program)).unwrap()
        })
    }

    /// How many programs sit on tcx there.
    fn tcx(&self) -> [usize; 2] {
        ["eth0", "pod1"].map(|device| {
            let (_, programs) =
                self.here(|| SchedClassifier::query_tcx(device, TcAttachType::Ingress)).unwrap();
            programs.len()
        })
    }

    fn tc(&self, arguments: &str) -> String {
        self.site.nodes[0].host.sh(&format!("tc {arguments}")).unwrap()
    }

    fn has_clsact(&self, device: &str) -> bool {
        self.tc(&format!("qdisc show dev {device}")).contains("clsact")
    }

    /// A filter of somebody else's that takes everything, and lets it through.
    fn add_foreign(&self, place: &str) {
        let mut command = self.site.nodes[0].host.command("tc").unwrap();
        command.args("filter add dev".split(' ')).args(place.split(' '));
        // Classic BPF: match everything.
        run(command.args(["bpf", "bytecode", "1,6 0 0 4294967295"])).unwrap();
    }
}

#[test]
fn filters_are_found_again_exchanged_in_place_and_removed() {
    let mut rig = Rig::new(TcHook::Clsact);
    rig.apply();
    rig.works();
    if TcHook::newest() == TcHook::Tcx {
        assert_eq!(rig.tcx(), [0, 0]);
    }
    let before = rig.filters();
    assert_eq!(before.each_ref().map(Vec::len), [1, 1]);
    // Again: one filter, not two.
    rig.apply();
    assert_eq!(rig.filters(), before);
    // Another process: its programs, in the same filters.
    rig.site.reopen(0);
    let after = rig.filters();
    for (before, after) in before.iter().flatten().zip(after.iter().flatten()) {
        assert_eq!((before.priority, before.handle), (after.priority, after.handle));
        assert_ne!(before.program, after.program);
    }
    rig.apply();
    assert_eq!(rig.filters(), after);
    rig.works();
    // Somebody takes all of it away; it is put back with the next change.
    rig.tc("qdisc del dev eth0 clsact");
    rig.apply();
    assert_eq!(rig.filters().each_ref().map(Vec::len), [1, 1]);
    rig.works();
    // Not from where the devices are.
    rig.site.remove(0);
    assert_eq!(rig.filters(), [[], []]);
    assert!(!rig.has_clsact("eth0") && !rig.has_clsact("pod1"));
    assert!(!rig.site.nodes[0].pins.join("northsouth").exists());
}

/// Not even one that is there first, and would end the chain before ours.
#[test]
fn others_filters_and_queueing_disciplines_stay_and_are_not_in_the_way() {
    let mut rig = Rig::new(TcHook::Clsact);
    rig.tc("qdisc add dev eth0 clsact");
    rig.add_foreign("eth0 ingress prio 1 protocol all");
    rig.add_foreign("eth0 egress prio 7");
    // As the CNI plugin `bandwidth` has it.
    rig.tc("qdisc add dev pod1 ingress");
    rig.apply();
    rig.works();
    rig.site.reopen(0);
    rig.apply();
    rig.works();
    assert_eq!(rig.filters().each_ref().map(Vec::len), [1, 1]);
    rig.site.remove(0);
    assert_eq!(rig.filters(), [[], []]);
    let shown = rig.tc("filter show dev eth0 ingress");
    assert_eq!(shown.lines().filter(|line| line.contains("handle")).count(), 1, "{shown}");
    assert!(rig.tc("filter show dev eth0 egress").contains("pref 7 bpf"));
    assert!(rig.tc("qdisc show dev pod1").contains("ingress"));

    // Ours, but somebody else has moved in.
    rig.tc("qdisc del dev eth0 clsact");
    rig.site.reopen(0);
    rig.apply();
    rig.add_foreign("eth0 egress prio 7");
    rig.site.remove(0);
    assert!(rig.tc("filter show dev eth0 egress").contains("pref 7 bpf"));
}

/// A filter that has our place and cannot share it: that device is left out, with the reason, and no other.
#[test]
fn a_device_that_takes_no_program_is_left_out_and_told_of() {
    let mut rig = Rig::new(TcHook::Clsact);
    rig.tc("qdisc add dev pod1 ingress");
    rig.add_foreign("pod1 ingress protocol ip prio 1");
    let changes = rig.try_apply();
    assert_eq!(changes.missing_uplinks, Vec::<String>::new());
    let told = changes.problems.join("\n");
    assert!(told.contains("the pod's device pod1 has no program") && told.contains("is left out"), "{told}");
    assert_eq!(rig.filters().each_ref().map(Vec::len), [1, 0]);
    rig.tc("filter del dev pod1 ingress");
    rig.apply();
    rig.works();
    rig.site.remove(0);
    assert!(rig.tc("qdisc show dev pod1").contains("ingress"));

    rig.tc("qdisc add dev eth0 clsact");
    rig.add_foreign("eth0 ingress protocol ip prio 1");
    rig.site.reopen(0);
    let told = rig.try_apply().missing_uplinks.join("\n");
    assert!(told.contains("the uplink eth0 has no program"), "{told}");
}

/// A kernel that gets another hook, or an agent that is told to use it: never two programs of a kind on a device, and
/// connections go on.
#[test]
fn what_is_attached_by_the_other_hook_is_moved() {
    if TcHook::newest() == TcHook::Clsact {
        println!("this kernel has no other");
        return;
    }
    let mut rig = Rig::new(TcHook::Tcx);
    rig.apply();
    rig.works();
    assert_eq!(rig.tcx(), [1, 1]);
    for hook in [TcHook::Clsact, TcHook::Tcx] {
        rig.site.reopen_by(hook, 0);
        rig.apply();
        rig.works();
        let (links, filters) = (rig.tcx(), rig.filters().map(|filters| filters.len()));
        let expected = if hook == TcHook::Tcx { ([1, 1], [0, 0]) } else { ([0, 0], [1, 1]) };
        assert_eq!((links, filters), expected, "{hook:?}");
    }
    assert!(!rig.has_clsact("eth0") && !rig.has_clsact("pod1"));
}

/// Uplinks that are named no more, devices that are gone, pods that are no endpoints any more.
#[test]
fn a_device_that_is_an_uplink_no_more_loses_its_program_and_a_pods_keeps_it() {
    for hook in hooks() {
        let mut rig = Rig::new(hook);
        rig.apply();
        let mut desired = rig.site.desired(0, []);
        desired.uplinks = vec![rig.device("pod1")];
        let other = rig.site.pod(0);
        let node = &mut rig.site.nodes[0];
        node.host.netns().run(|| node.programmer.apply(&desired)).unwrap().unwrap();
        let marks = |rig: &Rig| -> BTreeSet<String> {
            let root = rig.site.nodes[0].pins.join("northsouth");
            let cookie = rig.site.nodes[0].host.netns().cookie().unwrap().0.to_string();
            let directories: [PathBuf; 3] =
                [root.join("node"), root.join("pods"), root.join("filters").join(cookie)];
            let entries = directories.into_iter().filter_map(|path| fs::read_dir(path).ok()).flatten();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        };
        let [eth0, pod1] = ["eth0", "pod1"].map(|name| rig.device(name).index);
        assert_eq!(
            marks(&rig),
            BTreeSet::from([format!("uplink_{pod1}"), format!("pod_{pod1}")]),
            "{hook:?}"
        );
        if hook == TcHook::Clsact {
            assert!(!rig.has_clsact("eth0"));
        } else {
            assert_eq!(rig.tcx(), [0, 2]);
        }
        // What is behind it goes with it.
        rig.site.nodes[0].host.ip("link del pod1").unwrap();
        let desired = rig.site.desired(0, []);
        let node = &mut rig.site.nodes[0];
        node.host.netns().run(|| node.programmer.apply(&desired)).unwrap().unwrap();
        assert_eq!(marks(&rig), BTreeSet::from([format!("uplink_{eth0}")]), "{hook:?}");
        drop(other);
    }
}

/// The queueing discipline was made for one role of a device, and is needed in the other; then it goes with the last.
#[test]
fn what_was_made_for_a_device_goes_whatever_the_device_has_become() {
    let mut rig = Rig::new(TcHook::Clsact);
    let with_uplinks = |rig: &mut Rig, uplinks: &[&str], services: Vec<ServicePort>| {
        let mut desired = rig.site.desired(0, services);
        desired.uplinks = uplinks.iter().map(|name| rig.device(name)).collect();
        let node = &mut rig.site.nodes[0];
        let changes = node.host.netns().run(|| node.programmer.apply(&desired)).unwrap().unwrap();
        assert_eq!(changes.missing_uplinks, Vec::<String>::new());
    };
    with_uplinks(&mut rig, &["eth0", "pod1"], Vec::new());
    let service = rig.service();
    with_uplinks(&mut rig, &["eth0"], vec![service]);
    rig.works();
    assert_eq!(rig.filters().each_ref().map(Vec::len), [1, 1]);
    // And back.
    with_uplinks(&mut rig, &["eth0", "pod1"], Vec::new());
    rig.site.remove(0);
    assert!(!rig.has_clsact("eth0") && !rig.has_clsact("pod1"));
}

/// A device goes, and another one gets its number: what somebody has made on that one is not ours.
#[test]
fn a_device_with_the_number_of_one_that_went_keeps_its_queueing_discipline() {
    let mut rig = Rig::new(TcHook::Clsact);
    rig.apply();
    let index = rig.device("pod1").index;
    let node = &rig.site.nodes[0].host;
    node.ip("link del pod1").unwrap();
    node.ip(&format!("link add other.1 index {index} type bridge")).unwrap();
    rig.tc("qdisc add dev other.1 clsact");
    // As a pod's device it is remembered; as an uplink it gets a filter, and loses it again.
    let mut desired = rig.site.desired(0, []);
    desired.uplinks.push(rig.device("other.1"));
    let node = &mut rig.site.nodes[0];
    let changes = node.host.netns().run(|| node.programmer.apply(&desired)).unwrap().unwrap();
    assert_eq!(changes.missing_uplinks, Vec::<String>::new());
    rig.site.remove(0);
    assert!(rig.has_clsact("other.1"));
}

/// As in a container that has neither the host's processes nor its names.
#[test]
fn filters_in_a_namespace_that_cannot_be_seen_are_told_of_and_can_be_removed_later() {
    let mut rig = Rig::new(TcHook::Clsact);
    rig.apply();
    let (srcip, pins) = (binary("srcip"), rig.site.nodes[0].pins.clone());
    let cleanup = format!("{} cleanup --pin-path {}", srcip.display(), pins.display());
    let blind = format!("mount -t tmpfs none /run/netns && exec {cleanup}");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", &blind]);
    let output = command.output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    let cookie = rig.site.nodes[0].host.netns().cookie().unwrap().0;
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &b""[..]), "{told}");
    for part in ["cannot be seen from here", &cookie.to_string(), "northsouth/filters", "hostPID"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    assert_eq!(rig.filters().each_ref().map(Vec::len), [1, 1]);
    rig.works();
    assert_eq!(sh(&cleanup).unwrap().trim(), "north-south removed");
    assert_eq!(rig.filters(), [[], []]);
    assert!(!rig.has_clsact("eth0") && !rig.has_clsact("pod1"));
    assert!(!pins.join("northsouth").exists());
}

/// Killed between any two steps: what is there is found by whoever comes next.
#[test]
fn what_an_interrupted_agent_left_is_removed() {
    let rig = Rig::new(TcHook::Clsact);
    let [node] = &rig.site.nodes[..] else { unreachable!("one node") };
    let mark = |device: &str| {
        let cookie = node.host.netns().cookie().unwrap().0;
        let index = rig.device(device).index;
        node.pins.join(format!("northsouth/filters/{cookie}/uplink_{index}"))
    };
    // Before it made the queueing discipline, before the filter, and before it had said a word.
    fs::create_dir_all(mark("pod1").join("clsact_706f6431")).unwrap();
    fs::create_dir_all(mark("eth0").join("clsact_65746830")).unwrap();
    rig.tc("qdisc add dev eth0 clsact");
    rig.site.remove(0);
    assert!(!rig.has_clsact("eth0"));
    assert!(!node.pins.join("northsouth").exists());
}
