//! `srcip agent`

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use super::{SocketArg, TcHookArg};
use crate::{
    agent::{
        config::{CniConfig, Config},
        north_south,
        run::{Options, SourceChoice, run},
        serve::{Addresses, CONFIG_ADDRESS, HEALTH_ADDRESS, METRICS_ADDRESS},
    },
    cni::{
        config::{PLUGIN, Settings},
        install::Installer,
    },
    dataplane::Dataplane,
    http::Address,
    logging::{LogControl, LogFormat, Style},
    northsouth::desired::ReturnPath,
    telemetry::export::labels::DEFAULT_MAX_WORKLOADS,
};

/// Run the node agent: steer the pods of this node that ask for it.
///
/// A pod asks by the annotation sidecar.istio.io/interceptionMode "TPROXY", or by srcip.io/steer "true" and
/// srcip.io/proxy-port; a selector in the configuration can ask for many. Pods are learned from the Kubernetes
/// API, or from manifests.
///
/// What the agent attaches works without it: it may be killed, restarted and replaced by another version while
/// connections go on. SIGTERM ends it and leaves everything attached; `srcip cleanup` removes all.
#[derive(Debug, Args)]
pub(super) struct Agent {
    /// Learn pods from the YAML and JSON files of this directory instead of the Kubernetes API.
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
    /// This node's name, as `kubectl get nodes` has it. With --manifests it is optional.
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node_name: Option<String>,
    /// How to reach the Kubernetes API [default: as KUBECONFIG says, else as the cluster tells its pods].
    #[arg(long, value_name = "FILE", conflicts_with = "manifests")]
    kubeconfig: Option<PathBuf>,
    /// The agent's configuration, a YAML file: selectors, mark, upstream ports, how long to drain.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    socket: SocketArg,
    /// Serve the kubelet's probes here, at /livez and /readyz; `none` for none.
    #[arg(long, value_name = "ADDRESS", default_value = HEALTH_ADDRESS)]
    health_address: Address,
    /// Serve metrics for Prometheus here, at /metrics; `none` for none.
    #[arg(long, value_name = "ADDRESS", default_value = METRICS_ADDRESS)]
    metrics_address: Address,
    /// Show the configuration here, at /config; `none` for none.
    #[arg(long, value_name = "ADDRESS", default_value = CONFIG_ADDRESS)]
    config_address: Address,
    /// How many pods get metrics of their own, and how many ports of Services.
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_WORKLOADS)]
    max_workloads: usize,
    /// Install the CNI plugin, and chain it into the configuration that the container runtime has in this
    /// directory, so that pods are steered before they start.
    #[arg(long, value_name = "DIR", requires = "cni_bin_dir")]
    cni_conf_dir: Option<PathBuf>,
    /// Where the container runtime has its CNI plugins.
    #[arg(long, value_name = "DIR", requires = "cni_conf_dir")]
    cni_bin_dir: Option<PathBuf>,
    /// The CNI plugin to install [default: srcip-cni beside this program].
    #[arg(long, value_name = "FILE", requires = "cni_conf_dir")]
    cni_plugin: Option<PathBuf>,
    /// Handle Services that ask for it by srcip.io/north-south "true": traffic that enters by this device reaches
    /// their pods with the client's address. Give it several times for several devices; `auto` takes those of the
    /// default routes. Without it, what an earlier agent has set up for Services is removed.
    #[arg(long, value_name = "DEV", requires = "node_name")]
    uplink: Vec<String>,
    /// How the answers of pods on other nodes reach the client.
    #[arg(long, value_enum, default_value = "direct", requires = "uplink")]
    return_path: ReturnPathArg,
    /// How programs are attached to uplinks and pods' devices.
    #[arg(long, value_enum, default_value = "auto", requires = "uplink")]
    tc_hook: TcHookArg,
    /// What the log looks like.
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// What is logged: a level, or TARGET=LEVEL, several with commas; -v adds to it, and `srcip loglevel`
    /// changes it while the agent runs.
    #[arg(long, value_name = "FILTER", default_value = "info", env = "SRCIP_LOG")]
    log: String,
    /// Where to look for the pods' processes.
    #[arg(long, value_name = "DIR", default_value = "/proc", hide = true)]
    proc: PathBuf,
}

/// See [`ReturnPath`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ReturnPathArg {
    /// Straight from the pod's node.
    Direct,
    /// Back through the node that the client came to, where the network lets only that one use its address.
    Tunnel,
}

impl Agent {
    /// How the log begins.
    pub(super) fn logging(&self) -> (&str, Style) {
        (&self.log, Style::Service(self.log_format))
    }

    pub(super) fn run(self, dataplane: &Dataplane, log: LogControl) -> Result<()> {
        crate::privileges::require("agent")?;
        let config = self.config.as_deref().map(Config::read).transpose()?.unwrap_or_default();
        let north_south = self.node_name.clone().filter(|_| !self.uplink.is_empty());
        let north_south = north_south.map(|node| north_south::Options {
            node,
            uplinks: self.uplink,
            return_path: match self.return_path {
                ReturnPathArg::Direct => ReturnPath::Direct,
                ReturnPathArg::Tunnel => ReturnPath::Tunnel,
            },
            hook: self.tc_hook.hook(),
        });
        let source = match (self.manifests, self.node_name) {
            (Some(directory), node) => SourceChoice::Manifests { directory, node },
            (None, Some(node)) => SourceChoice::Kubernetes { node, kubeconfig: self.kubeconfig },
            (None, None) => bail!(
                "which node is this? Give --node-name (in a DaemonSet, the variable NODE_NAME from the field \
                 spec.nodeName), or --manifests DIR to do without the Kubernetes API"
            ),
        };
        let CniConfig { timeout_seconds, on_agent_absent, on_unknown } = config.cni;
        let cni = match (self.cni_conf_dir, self.cni_bin_dir) {
            (Some(conf_dir), Some(bin_dir)) => Some(Installer {
                conf_dir,
                bin_dir,
                plugin: match self.cni_plugin {
                    Some(plugin) => plugin,
                    None => std::env::current_exe()?.with_file_name(PLUGIN),
                },
                settings: Settings {
                    socket: self.socket.socket.clone(),
                    timeout_seconds: timeout_seconds.into(),
                    on_agent_absent,
                    on_unknown,
                    selectors: !config.steer.selectors.is_empty(),
                    pin_path: dataplane.pin_path().to_owned(),
                },
            }),
            _ => None,
        };
        run(Options {
            dataplane: dataplane.clone(),
            config,
            source,
            proc: self.proc,
            socket: self.socket.socket,
            addresses: Addresses {
                health: self.health_address,
                metrics: self.metrics_address,
                config: self.config_address,
            },
            max_workloads: self.max_workloads,
            cni,
            north_south,
            log,
        })
    }
}
