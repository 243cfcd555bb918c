//! What an attachment is: as asked for, and as remembered.

use std::{fmt, path::PathBuf};

use aya::util::KernelVersion;
use serde::{Deserialize, Serialize};
use srcip_common::{
    pod::{CHOOSE_PORT_AT_BIND, PASS_WHEN_PROXY_DOWN, Pod, STEER},
    ports::PortSet,
};

use crate::{
    netns::{Netns, NetnsCookie},
    ports::{PortList, UpstreamPortList, steered_ports},
    routing::{Device, ReturnRoute},
    sysctl::Sysctls,
};

/// Istio's own ports, never steered: merged telemetry and health (15020), readiness (15021), Envoy's
/// Prometheus endpoint (15090). Kubelets and scrapers reach them directly.
pub const ISTIO_PORTS: [u16; 3] = [15020, 15021, 15090];

pub(crate) fn never_steered(proxy_port: u16) -> Vec<u16> {
    [&[proxy_port], &ISTIO_PORTS[..]].concat()
}

/// A way to hand connections to the proxy's listener.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// An `sk_lookup` program in the pod's network namespace.
    SkLookup,
    /// A `tc` program on the pod's devices.
    Tc,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SkLookup => "sk-lookup",
            Self::Tc => "tc",
        })
    }
}

/// How a program is attached to a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TcHook {
    /// A tcx link, Linux 6.6.
    Tcx,
    /// A filter of the `clsact` queueing discipline.
    Clsact,
}

impl TcHook {
    /// What this kernel offers: tcx since Linux 6.6.
    pub fn newest() -> Self {
        let has_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
        if has_tcx { Self::Tcx } else { Self::Clsact }
    }
}

/// What happens to connections while the proxy does not listen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnProxyDown {
    /// Refuse them: what the proxy would check is not skipped.
    Drop,
    /// Let them through to the application.
    Pass,
}

/// When an upstream leg's source port is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum UpstreamPortAt {
    /// At `connect`, for proxies that bind with `IP_BIND_ADDRESS_NO_PORT`: Envoy, HAProxy, nginx.
    Connect,
    /// At `bind`, for proxies that take their port there.
    Bind,
}

/// The Kubernetes pod that an attachment is for.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name, which another pod may have had before.
    pub name: String,
    /// Its UID, which none had before.
    pub uid: String,
}

/// What to attach, and how.
#[derive(Debug)]
pub struct AttachSpec {
    /// The pod's network namespace.
    pub netns: Netns,
    /// A name for it; the path's last part if not given.
    pub name: Option<String>,
    /// Whose it is; if not given, it stays whose it was.
    pub pod: Option<PodRef>,
    /// The settings.
    pub settings: Settings,
    /// The engine, or `None` to pick one.
    pub engine: Option<EngineKind>,
    /// The `tc` engine's hook, or `None` to pick one.
    pub tc_hook: Option<TcHook>,
    /// The cgroup for the node-wide hooks.
    pub cgroup: CgroupChoice,
    /// Whether the host's own network namespace may be steered.
    pub host_netns: bool,
}

/// Where the node-wide hooks go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CgroupChoice {
    /// The root of cgroup v2.
    Root,
    /// A cgroup v2 directory.
    Path(PathBuf),
    /// Nowhere: the proxy does for itself what the hooks would.
    None,
}

/// The settings of an attachment; attaching again changes them in place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Port of the proxy's listener.
    pub proxy_port: u16,
    /// Ports to steer.
    pub include: PortList,
    /// Ports not to steer.
    pub exclude: PortList,
    /// While the proxy does not listen.
    pub on_proxy_down: OnProxyDown,
    /// The return route.
    pub route: ReturnRoute,
    /// Source ports of upstream legs.
    pub upstream_ports: UpstreamPortList,
    /// When those are chosen.
    pub upstream_port_at: UpstreamPortAt,
}

impl Settings {
    /// What the programs need of them.
    pub fn pod(&self) -> Pod {
        let own = never_steered(self.proxy_port);
        let mut flags = STEER;
        if self.on_proxy_down == OnProxyDown::Pass {
            flags |= PASS_WHEN_PROXY_DOWN;
        }
        if self.upstream_port_at == UpstreamPortAt::Bind {
            flags |= CHOOSE_PORT_AT_BIND;
        }
        Pod::new(
            steered_ports(&self.include, &self.exclude, &own),
            self.upstream_ports.ports,
            self.route.mark,
            self.proxy_port,
            flags,
        )
    }
}

/// How far an attachment has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Begun; if nobody is at it, it was interrupted, and attach or detach finishes the job.
    Attaching,
    /// Steering.
    Attached,
    /// No longer steering; the return route waits for upstream connections to end.
    Draining,
}

/// What is remembered of an attachment, as JSON in the kernel, next to what it describes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub name: String,
    /// The path it was attached by.
    pub netns: PathBuf,
    /// The namespace's cookie.
    pub netns_cookie: NetnsCookie,
    /// Inode number of its nsfs file, by which it is looked for. Another namespace may have it after this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns_inode: Option<u64>,
    /// The Kubernetes pod; none if it was attached by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// How far it has come.
    pub state: State,
    /// The engine.
    pub engine: EngineKind,
    /// Why this one.
    pub engine_reason: String,
    /// The one that was asked for; none if it was picked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine_wanted: Option<EngineKind>,
    /// Port of the proxy's listener.
    pub proxy_port: u16,
    /// Ports to steer, as written.
    pub include_inbound_ports: String,
    /// Ports not to steer, as written.
    pub exclude_inbound_ports: String,
    /// While the proxy does not listen.
    pub on_proxy_down: OnProxyDown,
    /// Routing mark of upstream legs.
    pub mark: u32,
    /// Number of the return route's table.
    pub route_table: u32,
    /// Source ports of upstream legs, as written.
    pub upstream_ports: String,
    /// When those are chosen.
    pub upstream_port_at: UpstreamPortAt,
    /// Where the node-wide hooks are; none if this attachment does without.
    pub cgroup: Option<PathBuf>,
    /// That cgroup's id, which tells it from another one at the same path.
    pub cgroup_id: Option<u64>,
    /// The sysctls as they were before, to be put back.
    pub previous_sysctls: Sysctls,
    /// How the `tc` engine is to attach.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tc_hook: Option<TcHook>,
    /// Where the `tc` engine sits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tc_devices: Vec<TcDevice>,
    /// Return routes of earlier settings: connections from that time still need them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier_routes: Vec<ReturnRoute>,
}

/// A device with the `tc` engine's program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TcDevice {
    /// The device.
    #[serde(flatten)]
    pub device: Device,
    /// How it is attached.
    pub hook: TcHook,
    /// Whether the `clsact` queueing discipline is ours to remove.
    pub created_clsact: bool,
}

impl Record {
    /// The return route.
    pub fn route(&self) -> ReturnRoute {
        ReturnRoute { mark: self.mark, table: self.route_table }
    }

    /// The settings it was attached with, if they can still be read.
    pub fn settings(&self) -> Option<Settings> {
        let exclude = match self.exclude_inbound_ports.as_str() {
            "" => PortList::none(),
            ports => ports.parse().ok()?,
        };
        Some(Settings {
            proxy_port: self.proxy_port,
            include: self.include_inbound_ports.parse().ok()?,
            exclude,
            on_proxy_down: self.on_proxy_down,
            route: self.route(),
            upstream_ports: self.upstream_ports.parse().ok()?,
            upstream_port_at: self.upstream_port_at,
        })
    }

    /// The ports whose connections go to the proxy; none if it is not steered now.
    pub fn steered_ports(&self) -> Option<PortSet> {
        let Settings { include, exclude, proxy_port, .. } = self.settings()?;
        let own = never_steered(proxy_port);
        (self.state != State::Draining).then(|| steered_ports(&include, &exclude, &own))
    }

    /// All return routes that may be in place.
    pub fn routes(&self) -> impl Iterator<Item = ReturnRoute> + '_ {
        self.earlier_routes.iter().copied().chain([self.route()])
    }

    /// What this attachment cannot promise, in words for people.
    pub fn missing_guarantees(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if self.cgroup.is_none() {
            missing.push("upstream connections are not marked: the proxy must set the mark itself");
            missing.push(
                "upstream source ports are not chosen: a client that connects from a mirrored port hangs",
            );
        }
        if self.engine == EngineKind::Tc {
            missing.push("connections are dropped, not refused, while the proxy does not listen");
        }
        missing
    }
}
