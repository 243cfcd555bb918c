//! Pods and their containers, on a node's [`Containerd`].

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use srcip_user::{netns::Netns, sockets::tcp_sockets};

use crate::{
    Family, PATIENCE,
    containerd::Containerd,
    cri::messages::{self as m, ContainerState, NamespaceMode},
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// What a pod is to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its namespace in the cluster.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, unique on this machine.
    pub uid: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether it is on the node's network, and sees the node's processes.
    pub on_node: bool,
    /// Whether it sees the node's processes anyway.
    pub sees_node: bool,
    /// Ports of the node that lead to ports of the pod.
    pub host_ports: Vec<(u16, u16)>,
}

impl PodSpec {
    /// A pod in the namespace `default`.
    pub fn new(name: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Self {
            namespace: "default".to_owned(),
            name: name.to_owned(),
            uid: format!("{:08x}-0000-4000-8000-{number:012x}", std::process::id()),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            on_node: false,
            sees_node: false,
            host_ports: Vec::new(),
        }
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    fn namespaces(&self) -> m::NamespaceOption {
        let mode = if self.on_node { NamespaceMode::Node } else { NamespaceMode::Pod };
        let pid = if self.on_node || self.sees_node { NamespaceMode::Node } else { NamespaceMode::Container };
        m::NamespaceOption { network: mode.into(), pid: pid.into() }
    }
}

/// What a container is to be.
#[derive(Clone, Debug, Default)]
pub struct ContainerSpec {
    /// Its name in the pod.
    pub name: String,
    /// Its image.
    pub image: String,
    /// The program, if not the image's.
    pub command: Vec<String>,
    /// The program's arguments.
    pub args: Vec<String>,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// The node's files that it sees.
    pub mounts: Vec<m::Mount>,
    /// User, capabilities, seccomp and the like.
    pub security: m::LinuxContainerSecurityContext,
}

impl ContainerSpec {
    /// A container of an image, with arguments separated by blanks.
    pub fn new(name: &str, image: &str, arguments: &str) -> Self {
        Self {
            name: name.to_owned(),
            image: image.to_owned(),
            args: arguments.split_whitespace().map(str::to_owned).collect(),
            ..Self::default()
        }
    }

    /// Shows it a file or directory of the node.
    #[must_use]
    pub fn mounted(mut self, from: impl Into<PathBuf>, to: &str) -> Self {
        self.mounts.push(m::Mount {
            container_path: to.to_owned(),
            host_path: from.into().display().to_string(),
            ..m::Mount::default()
        });
        self
    }
}

/// A pod that runs.
#[derive(Debug)]
pub struct Pod {
    /// The runtime's name for it.
    pub id: String,
    /// What it is.
    pub spec: PodSpec,
    /// Its addresses, the first one the runtime's choice.
    pub addresses: Vec<IpAddr>,
    pid: u32,
    config: m::PodSandboxConfig,
}

/// A container that has been started.
#[derive(Debug)]
pub struct Container {
    /// The runtime's name for it.
    pub id: String,
    /// Its first process.
    pub pid: u32,
    log: PathBuf,
}

impl Pod {
    /// Its address of a family, with a port.
    pub fn socket(&self, family: Family, port: u16) -> Result<SocketAddr> {
        let wanted = |ip: &&IpAddr| ip.is_ipv4() == (family == Family::V4);
        let ip = self.addresses.iter().find(wanted);
        Ok(SocketAddr::new(*ip.with_context(|| format!("{} has no address of {family:?}", self.id))?, port))
    }

    /// Where its network namespace can be opened.
    pub fn netns(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.pid).into()
    }

    /// Waits until somebody in it listens on `port`.
    pub fn wait_open(&self, port: u16) -> Result<()> {
        let netns = Netns::open(&self.netns())?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let sockets = netns.run(tcp_sockets)??;
            if sockets.iter().any(|socket| socket.is_listener() && socket.local.port() == port) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "nobody in {} listens on port {port}", self.spec.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Container {
    /// What it has printed.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        // TIME stdout F TEXT
        text.lines().filter_map(|line| line.splitn(4, ' ').nth(3)).map(|line| format!("{line}\n")).collect()
    }
}

impl Containerd {
    /// Makes a pod: when this returns, its network is there, and nothing runs in it.
    pub fn run_pod(&self, spec: PodSpec) -> Result<Pod> {
        let logs = self.directory.join("logs").join(&spec.uid);
        fs::create_dir_all(&logs)?;
        let hash = |map: &BTreeMap<String, String>| map.clone().into_iter().collect::<HashMap<_, _>>();
        let config = m::PodSandboxConfig {
            metadata: Some(m::PodSandboxMetadata {
                name: spec.name.clone(),
                uid: spec.uid.clone(),
                namespace: spec.namespace.clone(),
            }),
            hostname: if spec.on_node { String::new() } else { spec.name.clone() },
            log_directory: logs.display().to_string(),
            port_mappings: spec
                .host_ports
                .iter()
                .map(|&(host, pod)| m::PortMapping { host_port: host.into(), container_port: pod.into() })
                .collect(),
            labels: hash(&spec.labels),
            annotations: hash(&spec.annotations),
            linux: Some(m::LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/pod{}", self.cgroup, spec.uid),
                security_context: Some(m::LinuxSandboxSecurityContext {
                    namespace_options: Some(spec.namespaces()),
                    // So that its containers may be.
                    privileged: spec.on_node,
                }),
            }),
        };
        let id = self.cri.run_pod(config.clone())?;
        let answer = self.cri.pod_status(&id)?;
        let network = answer.status.context("no status")?.network.unwrap_or_default();
        let addresses = [network.ip].into_iter().chain(network.additional_ips.into_iter().map(|a| a.ip));
        let addresses = addresses.filter(|text| !text.is_empty());
        let addresses = addresses.map(|text| text.parse().with_context(|| text.clone()));
        Ok(Pod { addresses: addresses.collect::<Result<_>>()?, pid: pid(&answer.info)?, id, spec, config })
    }

    /// Starts a container in a pod.
    pub fn start_container(&self, pod: &Pod, spec: &ContainerSpec) -> Result<Container> {
        let mut security = spec.security.clone();
        security.namespace_options = Some(pod.spec.namespaces());
        let log_path = format!("{}.log", spec.name);
        let log = PathBuf::from(&pod.config.log_directory).join(&log_path);
        let env = spec.env.iter().map(|(k, v)| m::KeyValue { key: k.clone(), value: v.clone() });
        let config = m::ContainerConfig {
            metadata: Some(m::ContainerMetadata { name: spec.name.clone(), attempt: 0 }),
            image: Some(m::ImageSpec { image: spec.image.clone() }),
            command: spec.command.clone(),
            args: spec.args.clone(),
            envs: env.collect(),
            mounts: spec.mounts.clone(),
            log_path,
            linux: Some(m::LinuxContainerConfig { security_context: Some(security) }),
        };
        let id = self.cri.create_container(&pod.id, pod.config.clone(), config)?;
        self.cri.start_container(&id).with_context(|| format!("the container {}", spec.name))?;
        // One that has ended has no process any more.
        let pid = pid(&self.cri.container_status(&id)?.info).unwrap_or_default();
        Ok(Container { id, pid, log })
    }

    /// Waits for a container's end; returns its exit code.
    pub fn wait_container(&self, container: &Container, limit: Duration) -> Result<i32> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.cri.container_status(&container.id)?.status.context("no status")?;
            if status.state() == ContainerState::Exited {
                return Ok(status.exit_code);
            }
            if Instant::now() > deadline {
                bail!("the container {} still runs after {limit:?}\n{}", container.id, container.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends a container, by SIGKILL after `grace`.
    pub fn stop_container(&self, container: &Container, grace: Duration) -> Result<()> {
        self.cri.stop_container(&container.id, grace)
    }

    /// Ends a pod and its containers, and removes them.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.cri.stop_pod(&pod.id)?;
        self.cri.remove_pod(&pod.id)
    }
}

fn pid(info: &HashMap<String, String>) -> Result<u32> {
    let text = info.get("info").context("the runtime tells no details")?;
    let value: Value = serde_json::from_str(text)?;
    let pid = value["pid"].as_u64().filter(|&pid| pid > 0).context("the runtime tells no process")?;
    Ok(pid.try_into()?)
}
