//! Real pods: containerd, runc, the usual CNI plugins, Envoy and an application in containers.

use std::{net::SocketAddr, time::Duration};

use srcip_tests::{
    Family, client,
    cri::messages as m,
    image::{self, ENVOY, PEER},
    pod::{ContainerSpec, PodSpec},
};

use crate::cluster::Cluster;

const LIMIT: Duration = Duration::from_secs(60);

/// Steering a pod's containers as they are: from another node, from another pod, through a port of the node.
#[test]
fn pods_of_a_container_runtime_are_steered() {
    let cluster = Cluster::new();
    for name in [PEER, ENVOY] {
        cluster.containerd.provide(name).unwrap();
    }
    let mut spec = PodSpec::new("web");
    spec.host_ports.push((8080, 8000));
    let pod = cluster.run_sidecar_pod(spec);
    assert!(!cluster.ask(&pod, Family::V4).proxied);

    let attach = format!(
        "attach --netns {} --name web --proxy-port 15006 --cgroup {}",
        pod.netns().display(),
        cluster.world.cgroup().display()
    );
    cluster.srcip.run(&attach).unwrap();
    for family in Family::BOTH {
        let seen = cluster.ask(&pod, family);
        assert!(seen.proxied, "{seen:?}");
        assert_eq!(seen.peer.ip(), cluster.other_node.address(family));
    }

    // A port of the node: the portmap plugin's rules change the destination, not the client.
    let node_port = SocketAddr::new(cluster.node.address(Family::V4), 8080);
    let seen = client::ask_once(&cluster.other_node, node_port).unwrap();
    assert!(seen.proxied, "{seen:?}");
    assert_eq!(seen.peer.ip(), cluster.other_node.address(Family::V4));

    let client = cluster.containerd.run_pod(PodSpec::new("client")).unwrap();
    for family in Family::BOTH {
        let ask = format!("ask {}", pod.socket(family, 8000).unwrap());
        let container = ContainerSpec::new(&format!("client-{family:?}"), PEER, &ask);
        let container = cluster.containerd.start_container(&client, &container).unwrap();
        let code = cluster.containerd.wait_container(&container, LIMIT).unwrap();
        let log = container.log();
        assert_eq!(code, 0, "{log}");
        let [peer, _, proxied] = log.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{log}") };
        let peer: SocketAddr = peer.parse().unwrap();
        assert_eq!((peer.ip().to_canonical(), proxied), (client.socket(family, 0).unwrap().ip(), "true"));
    }

    cluster.srcip.run("detach --name web --now").unwrap();
    cluster.containerd.remove_pod(&pod).unwrap();
    cluster.containerd.remove_pod(&client).unwrap();
}

/// The image of `cargo xtask image` has all that srcip needs.
#[test]
fn srcip_runs_from_its_image() {
    let cluster = Cluster::new();
    let name = format!("docker.io/library/srcip:{}", env!("CARGO_PKG_VERSION"));
    cluster.containerd.import(&image::srcip().unwrap(), &name).unwrap();
    let pod = cluster.containerd.run_pod(PodSpec::new("srcip")).unwrap();
    let run = |container: &ContainerSpec| {
        let container = cluster.containerd.start_container(&pod, container).unwrap();
        let code = cluster.containerd.wait_container(&container, LIMIT).unwrap();
        (code, container.log())
    };

    // Its own program is what a container starts.
    let mut version = ContainerSpec::new("version", &name, "--version");
    version.security.readonly_rootfs = true;
    assert_eq!(run(&version), (0, format!("srcip {}\n", env!("CARGO_PKG_VERSION"))));

    // The programs load, from inside, on the machine's kernel.
    let pins = cluster.world.directory().join("bpf");
    let mut doctor = ContainerSpec::new("doctor", &name, "doctor --pin-path /sys/fs/bpf/srcip")
        .mounted(pins, "/sys/fs/bpf")
        .mounted("/sys/fs/cgroup", "/sys/fs/cgroup");
    doctor.security.readonly_rootfs = true;
    doctor.security.capabilities = Some(m::Capability {
        drop_capabilities: vec!["ALL".to_owned()],
        add_capabilities: ["BPF", "NET_ADMIN", "PERFMON", "SYS_ADMIN"].map(str::to_owned).to_vec(),
    });
    doctor.security.seccomp = Some(m::SecurityProfile {
        profile_type: m::ProfileType::Unconfined.into(),
        ..m::SecurityProfile::default()
    });
    let (code, log) = run(&doctor);
    assert_eq!(code, 0, "{log}");
}
