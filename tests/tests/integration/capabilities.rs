//! The agent with exactly what its DaemonSet gives it, in a container of a real runtime: capabilities, no new
//! privileges, a read-only root, the runtime's seccomp profile. What fails without each capability.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::PathBuf,
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Container as KubernetesContainer, PodSpec as KubernetesPod, Volume},
};
use serde_json::{Value, json};
use srcip_tests::{
    Family, client,
    cri::messages as m,
    image::{self, ENVOY, PEER},
    manifests::{deploy, object, render},
    pod::{Container, ContainerSpec, Pod, PodSpec},
    process::sh,
    wait_until,
};

use crate::cluster::Cluster;

const LIMIT: Duration = Duration::from_secs(60);

/// What the kubelet hides and write-protects unless a container is privileged.
const MASKED: [&str; 11] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// A node with a pod that asks to be steered.
struct Node {
    pod: Pod,
    cluster: Cluster,
    image: String,
}

impl Node {
    fn new() -> Self {
        let cluster = Cluster::new();
        for name in [PEER, ENVOY] {
            cluster.containerd.provide(name).unwrap();
        }
        let image = format!("docker.io/library/srcip:{}", env!("CARGO_PKG_VERSION"));
        cluster.containerd.import(&image::srcip().unwrap(), &image).unwrap();
        let spec = PodSpec::new("web").annotated("sidecar.istio.io/interceptionMode", "TPROXY");
        let manifest = json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "namespace": spec.namespace, "name": spec.name, "uid": spec.uid, "annotations": spec.annotations,
            },
            "spec": {"containers": []},
            "status": {"phase": "Running"},
        });
        let directory = cluster.world.directory();
        for name in ["manifests", "config", "run"] {
            fs::create_dir(directory.join(name)).unwrap();
        }
        fs::write(directory.join("manifests/web.yaml"), manifest.to_string()).unwrap();
        // This machine's other pods are not the test's: its cgroup stands for the root.
        let config = format!("resyncSeconds: 1\ncgroup: {}\n", cluster.world.cgroup().display());
        fs::write(directory.join("config/agent.yaml"), config).unwrap();
        let pod = cluster.run_sidecar_pod(spec);
        Self { pod, cluster, image }
    }

    /// A container of a DaemonSet's pod, without a capability.
    fn container(
        &self,
        pod: &KubernetesPod,
        container: &KubernetesContainer,
        without: Option<&str>,
    ) -> ContainerSpec {
        let host_ip = self.cluster.node.address(Family::V4).to_string();
        let args = container.args.iter().flatten();
        let args =
            args.map(|arg| arg.replace("$(NODE_NAME)", "n1").replace("$(HOST_IP)", &host_ip)).collect();
        let context = container.security_context.as_ref().unwrap();
        let capabilities = context.capabilities.as_ref().unwrap();
        let add = capabilities.add.iter().flatten();
        assert_eq!(context.seccomp_profile.as_ref().unwrap().type_, "RuntimeDefault");
        let security = m::LinuxContainerSecurityContext {
            capabilities: Some(m::Capability {
                add_capabilities: add.filter(|name| Some(name.as_str()) != without).cloned().collect(),
                drop_capabilities: capabilities.drop.clone().unwrap(),
            }),
            privileged: context.privileged == Some(true),
            run_as_user: context.run_as_user.map(|value| m::Int64Value { value }),
            readonly_rootfs: context.read_only_root_filesystem == Some(true),
            no_new_privs: context.allow_privilege_escalation == Some(false),
            masked_paths: MASKED.map(str::to_owned).into(),
            readonly_paths: READ_ONLY.map(str::to_owned).into(),
            seccomp: Some(m::SecurityProfile {
                profile_type: m::ProfileType::RuntimeDefault.into(),
                ..m::SecurityProfile::default()
            }),
            ..m::LinuxContainerSecurityContext::default()
        };
        let mounts = container.volume_mounts.iter().flatten();
        let mounts = mounts.map(|mount| m::Mount {
            container_path: mount.mount_path.clone(),
            host_path: self.source(pod, &mount.name),
            readonly: mount.read_only == Some(true),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => m::MountPropagation::HostToContainer.into(),
                _ => m::MountPropagation::Private.into(),
            },
        });
        ContainerSpec {
            name: container.name.clone(),
            image: self.image.clone(),
            args,
            mounts: mounts.collect(),
            security,
            ..ContainerSpec::default()
        }
    }

    /// What a volume is here.
    fn source(&self, pod: &KubernetesPod, name: &str) -> String {
        let volume = pod.volumes.iter().flatten().find(|volume| volume.name == name).unwrap();
        let directory = self.cluster.world.directory();
        match volume {
            Volume { config_map: Some(_), .. } => directory.join("config").display().to_string(),
            Volume { host_path: Some(host), .. } => match host.path.as_str() {
                "/sys/fs/bpf" => directory.join("bpf").display().to_string(),
                "/run/srcip" => directory.join("run").display().to_string(),
                "/etc/cni/net.d" => self.cluster.containerd.networks().display().to_string(),
                "/opt/cni/bin" => self.cluster.containerd.plugins().display().to_string(),
                "/sys/fs/cgroup" => "/sys/fs/cgroup".to_owned(),
                path => panic!("a host path that the tests do not know: {path}"),
            },
            _ => panic!("{name}: a volume of another kind"),
        }
    }

    /// The pod of an overlay's DaemonSet.
    fn daemon_set_pod(overlay: &str, name: &str) -> KubernetesPod {
        let objects = render(&deploy().join("kubernetes/overlays").join(overlay)).unwrap();
        let daemon_set: DaemonSet = object(&objects, "DaemonSet", name).unwrap();
        let pod = daemon_set.spec.unwrap().template.spec.unwrap();
        assert_eq!((pod.host_network, pod.host_pid), (Some(true), Some(true)));
        pod
    }

    /// Starts a container in a pod on the node's network, with the node's processes.
    fn start(&self, name: &str, container: &ContainerSpec) -> Container {
        let mut spec = PodSpec::new(name);
        spec.on_node = true;
        let pod = self.cluster.containerd.run_pod(spec).unwrap();
        self.cluster.containerd.start_container(&pod, container).unwrap()
    }

    fn start_agent(&self, overlay: &str, without: Option<&str>) -> Container {
        let pod = Self::daemon_set_pod(overlay, "srcip-agent");
        let mut container = self.container(&pod, &pod.containers[0], without);
        container.args.push("--manifests=/manifests".to_owned());
        let container = container.mounted(self.cluster.world.directory().join("manifests"), "/manifests");
        self.start("srcip-agent", &container)
    }

    /// What a command prints in the pod's network namespace.
    fn inside(&self, command: &str) -> String {
        sh(&format!("nsenter --net={} {command}", self.pod.netns().display())).unwrap()
    }

    /// What srcip may have changed in the pod and on the node.
    fn traces(&self) -> String {
        let netns = self.pod.netns();
        let inside = |command: &str| sh(&format!("nsenter --net={} {command}", netns.display())).unwrap();
        let mut text =
            ["ip rule", "ip -6 rule", "ip route show table all", "bpftool net"].map(inside).concat();
        text += &inside("sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv4.tcp_tw_reuse");
        for directory in [self.cluster.containerd.networks(), self.cluster.containerd.plugins()] {
            let mut files: Vec<_> =
                fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            text += &format!("{files:?}\n");
        }
        text += &fs::read_to_string(self.cluster.containerd.networks().join("10-tests.conflist")).unwrap();
        text += &format!("{}", self.cluster.world.directory().join("bpf/srcip").exists());
        text
    }

    /// Has the CNI directories and the configuration belong to somebody else, as some distributions have it. Returns
    /// the configuration.
    fn give_away_cni(&self) -> PathBuf {
        let containerd = &self.cluster.containerd;
        let configuration = containerd.networks().join("10-tests.conflist");
        for path in [containerd.networks(), containerd.plugins(), &configuration] {
            std::os::unix::fs::chown(path, Some(997), Some(997)).unwrap();
            let mode = if path.is_dir() { 0o755 } else { 0o644 };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        configuration
    }

    fn wait_until_steered(&self, agent: &Container) {
        let deadline = Instant::now() + LIMIT;
        while !self.cluster.ask(&self.pod, Family::V4).proxied {
            assert!(Instant::now() < deadline, "not steered:\n{}", agent.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

#[test]
fn the_daemon_set_has_what_the_agent_needs() {
    let node = Node::new();
    let agent = node.start_agent("agent", None);
    node.wait_until_steered(&agent);
    for family in Family::BOTH {
        let seen = node.cluster.ask(&node.pod, family);
        assert!(seen.proxied, "{seen:?}");
        assert_eq!(seen.peer.ip(), node.cluster.other_node.address(family));
    }
    // It is as confined as it is meant to be.
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid)).unwrap();
    assert!(status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"), "{status}");
    // NET_ADMIN, SYS_PTRACE, SYS_ADMIN.
    let effective = 1_u64 << 12 | 1 << 19 | 1 << 21;
    assert!(status.contains(&format!("CapEff:\t{effective:016x}")), "{status}");
    let probe = |path: &str| {
        let mut stream = client::connect(&node.cluster.node, "127.0.0.1:9878".parse().unwrap()).unwrap();
        client::http_get(&mut stream, path)
    };
    probe("/livez").unwrap();
    // At the end of the round that attached the pod.
    wait_until("ready", || probe("/readyz").is_ok());

    // Istio's rule comes after the attach: the agent sees it, and attaches the pod again.
    assert_eq!(node.inside("sysctl -n net.ipv4.fwmark_reflect"), "1\n");
    node.inside("ip rule add fwmark 1337 lookup 133");
    let deadline = Instant::now() + LIMIT;
    while node.inside("sysctl -n net.ipv4.fwmark_reflect") != "0\n" {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_fails_without_net_admin() {
    refused_without("NET_ADMIN", &["CAP_NET_ADMIN", "rules and routes of pods"]);
}

#[test]
fn what_fails_without_sys_admin() {
    refused_without(
        "SYS_ADMIN",
        &["CAP_SYS_ADMIN", "enter a pod's network namespace", "CAP_BPF", "CAP_PERFMON"],
    );
}

/// The agent does not start without what it could do nothing without, and says so.
fn refused_without(capability: &str, parts: &[&str]) {
    let node = Node::new();
    let agent = node.start_agent("agent", Some(capability));
    assert_eq!(node.cluster.containerd.wait_container(&agent, LIMIT).unwrap(), 1);
    let log = agent.log();
    for part in parts.iter().chain(&["give the container these capabilities"]) {
        assert!(log.contains(part), "{part:?} is not in: {log}");
    }
    assert!(!node.cluster.ask(&node.pod, Family::V4).proxied);
}

#[test]
fn what_fails_without_sys_ptrace() {
    let node = Node::new();
    let agent = node.start_agent("agent", Some("SYS_PTRACE"));
    let deadline = Instant::now() + LIMIT;
    while !agent.log().contains("CAP_SYS_PTRACE") {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!node.cluster.ask(&node.pod, Family::V4).proxied);
}

#[test]
fn what_fails_without_dac_override() {
    not_installed_without("DAC_OVERRIDE", "permission denied");
}

#[test]
fn what_fails_without_chown() {
    not_installed_without("CHOWN", "operation not permitted");
}

/// Pods that run are steered; the plugin is not chained into the network's configuration, and that is told.
fn not_installed_without(capability: &str, why: &str) {
    let node = Node::new();
    let configuration = node.give_away_cni();
    let before = fs::read_to_string(&configuration).unwrap();
    let agent = node.start_agent("with-cni", Some(capability));
    node.wait_until_steered(&agent);
    let deadline = Instant::now() + LIMIT;
    let is_told = |log: String| {
        log.to_lowercase()
            .lines()
            .any(|line| line.contains("the cni plugin is not in use") && line.contains(why))
    };
    while !is_told(agent.log()) {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    loop {
        let mut stream = client::connect(&node.cluster.node, "127.0.0.1:9878".parse().unwrap()).unwrap();
        // Its body is in the error once it is no 200.
        let ready = client::http_get(&mut stream, "/readyz?verbose");
        let ready = ready.map_or_else(|error| error.to_string(), |_| String::new()).to_lowercase();
        let failed = ready.lines().find(|line| line.starts_with("[-]cni failed: "));
        if failed.is_some_and(|line| line.contains(why)) {
            break;
        }
        assert!(Instant::now() < deadline, "{ready}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(fs::read_to_string(&configuration).unwrap(), before);
}

/// Who only looks on has less, and sees connections all the same.
#[test]
fn audit_only_has_what_it_needs() {
    let node = Node::new();
    let objects = render(&deploy().join("kubernetes/overlays/audit-only")).unwrap();
    let daemon_set: DaemonSet = object(&objects, "DaemonSet", "srcip-audit").unwrap();
    let pod = daemon_set.spec.unwrap().template.spec.unwrap();
    assert_eq!((pod.host_network, pod.host_pid), (None, Some(true)));
    let mut container = node.container(&pod, &pod.containers[0], None);
    container.args.push(format!("--cgroup={}", node.cluster.world.cgroup().display()));
    let mut spec = PodSpec::new("srcip-audit");
    spec.sees_node = true;
    let audit = node.cluster.containerd.run_pod(spec).unwrap();
    let container = node.cluster.containerd.start_container(&audit, &container).unwrap();
    audit.wait_open(9464).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", container.pid)).unwrap();
    let effective = 1_u64 << 19 | 1 << 21;
    assert!(status.contains(&format!("CapEff:\t{effective:016x}")), "{status}");

    let client = node.cluster.other_node.address(Family::V4);
    let deadline = Instant::now() + LIMIT;
    loop {
        node.cluster.ask(&node.pod, Family::V4);
        let log = container.log();
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let is_ours = |line: &Value| {
            line["downstream_remote_address"].as_str().is_some_and(|a| a.starts_with(&format!("{client}:")))
                && line["preserved"] == true
        };
        if lines.any(|line| is_ours(&line)) {
            break;
        }
        assert!(Instant::now() < deadline, "{log}");
        std::thread::sleep(Duration::from_millis(50));
    }
    wait_until("they are counted", || {
        let address = audit.socket(Family::V4, 9464).unwrap();
        let mut stream = client::connect(&node.cluster.node, address).unwrap();
        client::http_get(&mut stream, "/metrics").unwrap().body.contains("srcip_connections_total{")
    });
}

/// The agent and its plugin, and then the overlay that takes both away, which has no more than the agent has.
#[test]
fn uninstall_leaves_nothing() {
    let node = Node::new();
    let configuration = node.give_away_cni();
    let before = node.traces();
    let agent = node.start_agent("with-cni", None);
    node.wait_until_steered(&agent);
    let deadline = Instant::now() + LIMIT;
    while !node.traces().contains("\"srcip-cni\"") {
        assert!(Instant::now() < deadline, "{}", agent.log());
        std::thread::sleep(Duration::from_millis(50));
    }
    // Its end changes nothing.
    node.cluster.containerd.stop_container(&agent, Duration::from_secs(10)).unwrap();
    assert_eq!(node.cluster.containerd.wait_container(&agent, LIMIT).unwrap(), 0, "{}", agent.log());
    assert!(node.cluster.ask(&node.pod, Family::V4).proxied);
    assert_ne!(node.traces(), before);

    let pod = Node::daemon_set_pod("uninstall", "srcip-uninstall");
    let cleanup = &pod.init_containers.as_ref().unwrap()[0];
    let cleanup = node.start("srcip-uninstall", &node.container(&pod, cleanup, None));
    assert_eq!(node.cluster.containerd.wait_container(&cleanup, LIMIT).unwrap(), 0, "{}", cleanup.log());
    assert_eq!(node.traces(), before);
    let owner = fs::metadata(&configuration).unwrap();
    assert_eq!((owner.uid(), owner.gid()), (997, 997));
    assert!(!node.cluster.ask(&node.pod, Family::V4).proxied);
}
