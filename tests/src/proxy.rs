//! Real proxies: unmodified packages, with the configurations that the documentation shows.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;

use crate::{PATIENCE, cluster::gateway::HTTPS_PORT, host::Host, process::Process};

/// The port of every sidecar here, as Istio has it.
pub const PROXY_PORT: u16 = 15006;

/// A proxy and what it is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Envoy, HTTP, with the client's address.
    Envoy,
    /// Envoy, TCP, with the client's address: one upstream connection per client connection.
    EnvoyTcp,
    /// Envoy as an ingress gateway.
    EnvoyGateway,
    /// Envoy as a mesh sets it up by default: dials from 127.0.0.6.
    EnvoyRedirect,
    /// HAProxy, HTTP, with the client's address.
    Haproxy,
    /// HAProxy, TCP, with the client's address.
    HaproxyTcp,
    /// HAProxy as a stand-in for [`Self::EnvoyRedirect`].
    HaproxyRedirect,
    /// nginx, HTTP, with the client's address.
    Nginx,
}

impl Kind {
    /// The three that speak HTTP with the client's address.
    pub const HTTP: [Self; 3] = [Self::Envoy, Self::Haproxy, Self::Nginx];

    fn template(self) -> &'static str {
        match self {
            Self::Envoy => include_str!("../../deploy/examples/envoy.yaml"),
            Self::EnvoyTcp => include_str!("../../deploy/examples/envoy-tcp.yaml"),
            Self::EnvoyGateway => include_str!("../../deploy/examples/envoy-gateway.yaml"),
            Self::EnvoyRedirect => include_str!("../../deploy/examples/envoy-redirect.yaml"),
            Self::Haproxy | Self::HaproxyTcp | Self::HaproxyRedirect => {
                include_str!("../../deploy/examples/haproxy.cfg")
            }
            Self::Nginx => include_str!("../../deploy/examples/nginx.conf"),
        }
    }

    fn is_envoy(self) -> bool {
        matches!(self, Self::Envoy | Self::EnvoyTcp | Self::EnvoyGateway | Self::EnvoyRedirect)
    }

    /// Where it listens.
    fn port(self) -> u16 {
        if self == Self::EnvoyGateway { HTTPS_PORT } else { PROXY_PORT }
    }
}

/// Where Envoy is: what `cargo xtask` found or installed.
pub fn envoy() -> Option<PathBuf> {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/envoy");
    let named = std::env::var_os("SRCIP_ENVOY").map(PathBuf::from);
    [named, Some(installed)].into_iter().flatten().find(|path| path.is_file())
}

/// Envoy with the mark that Istio gives to upstream legs in TPROXY mode.
pub fn with_istios_mark(config: String) -> String {
    config.replace("original_src.v3.OriginalSrc\n", "original_src.v3.OriginalSrc\n        mark: 1337\n")
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running proxy.
#[derive(Debug)]
pub struct Proxy {
    kind: Kind,
    host: String,
    directory: PathBuf,
    config: PathBuf,
    /// Who it runs as: options for `setpriv`.
    identity: Vec<String>,
    /// Envoy's shared memory has a number per machine, not per network namespace.
    base_id: u32,
    epoch: u32,
    process: Process,
    /// Processes that a restart has replaced; they end by themselves.
    replaced: Vec<Process>,
}

impl Proxy {
    /// Starts a proxy on `host` and waits until it listens.
    pub fn start(host: &Host, kind: Kind) -> Result<Self> {
        Self::start_with(host, kind, |config| config)
    }

    /// The same with a change to its configuration.
    pub fn start_with(host: &Host, kind: Kind, change: impl FnOnce(String) -> String) -> Result<Self> {
        let mut proxy = Self::spawn(host, kind, change)?;
        proxy.wait_listening(host)?;
        Ok(proxy)
    }

    /// The same without waiting.
    pub fn spawn(host: &Host, kind: Kind, change: impl FnOnce(String) -> String) -> Result<Self> {
        Self::spawn_as(host, kind, "", change)
    }

    /// The same as somebody else: `identity` has options for `setpriv`, separated by blanks.
    pub fn spawn_as(
        host: &Host,
        kind: Kind,
        identity: &str,
        change: impl FnOnce(String) -> String,
    ) -> Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = host.directory().join(format!("{}-proxy{number}", host.name()));
        fs::create_dir_all(&directory)?;
        let config = change(localise(kind, &directory));
        let extension = if kind.is_envoy() { "yaml" } else { "conf" };
        let path = directory.join(format!("proxy.{extension}"));
        fs::write(&path, config)?;
        let identity: Vec<_> = identity.split_whitespace().map(str::to_owned).collect();
        if !identity.is_empty() {
            // Its access log and what else it writes.
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
        }
        // Unique on this machine as far as this run goes; Envoy takes numbers below 2^32.
        let base_id = std::process::id() % 40_000 * 1000 + number;
        let process = launch(host, kind, &identity, &path, base_id, 0, None)?;
        Ok(Self {
            kind,
            host: host.name().to_owned(),
            directory,
            config: path,
            identity,
            base_id,
            epoch: 0,
            process,
            replaced: Vec::new(),
        })
    }

    /// Waits until it listens on its port, of several the last.
    pub fn wait_listening(&mut self, host: &Host) -> Result<()> {
        let port = self.kind.port();
        self.process.wait_until("listens on its port", |_| host.listens(port))
    }

    /// Its process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// What it wrote to its access log.
    pub fn access_log(&self) -> String {
        fs::read_to_string(self.directory.join("access.log")).unwrap_or_default()
    }

    /// Reloads its configuration the way its operators do, without a gap: HAProxy starts a process that
    /// takes the listeners over, nginx gets SIGHUP.
    pub fn reload(&mut self, host: &Host) -> Result<()> {
        match self.kind {
            Kind::Nginx => {
                let before = self.workers();
                self.process.signal(Signal::SIGHUP)?;
                let pid = self.process.pid();
                self.process.wait_until("has new workers", |_| {
                    let now = children(pid);
                    !now.is_empty() && now.iter().all(|worker| !before.contains(worker))
                })
            }
            Kind::Haproxy | Kind::HaproxyTcp => {
                let old = self.process.pid();
                let process =
                    launch(host, self.kind, &self.identity, &self.config, 0, self.epoch + 1, Some(old))?;
                self.epoch += 1;
                let previous = std::mem::replace(&mut self.process, process);
                self.replaced.push(previous);
                self.wait_replaced()
            }
            kind => bail!("{kind:?} has no reload; it has a hot restart"),
        }
    }

    /// The processes of an nginx that do its work.
    fn workers(&self) -> Vec<String> {
        children(self.process.pid())
    }

    /// A command for HAProxy's administrative socket.
    pub fn admin(&self, host: &Host, line: &str) -> Result<()> {
        let socket = self.directory.join("admin.sock").display().to_string();
        host.feed(&format!("socat -t5 - UNIX-CONNECT:{socket}"), &format!("{line}\n"))
    }

    /// Envoy's hot restart: the new process takes listeners and statistics over from the old one, which
    /// then drains and ends.
    pub fn hot_restart(&mut self, host: &Host) -> Result<()> {
        let epoch = self.epoch + 1;
        let process = launch(host, self.kind, &self.identity, &self.config, self.base_id, epoch, None)?;
        self.epoch = epoch;
        let previous = std::mem::replace(&mut self.process, process);
        self.replaced.push(previous);
        self.process.wait_until("takes over", |p| p.log().contains("starting main dispatch loop"))?;
        self.wait_replaced()
    }

    fn wait_replaced(&mut self) -> Result<()> {
        let host = &self.host;
        for old in &mut self.replaced {
            old.wait(PATIENCE).with_context(|| format!("the replaced proxy on {host} has to end"))?;
        }
        self.replaced.clear();
        Ok(())
    }

    /// Ends it at once.
    pub fn kill(mut self) {
        if self.kind == Kind::Nginx {
            // Its workers outlive a master that is killed; told to end, it takes them along.
            let _ = self.process.signal(Signal::SIGTERM);
            let _ = self.process.wait(PATIENCE);
        }
        self.process.kill();
    }
}

/// Removes what no end of Envoy does: its shared memory, which is named after its base ID. So are the logs
/// in a run's directory.
pub(crate) fn remove_shared_memory(run: &Path) {
    for entry in fs::read_dir(run).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let base_id = name.split_once("-envoy-").and_then(|(_, rest)| rest.split('-').next());
        if let Some(base_id) = base_id.and_then(|digits| digits.parse::<u64>().ok()) {
            // Envoy multiplies it by ten.
            let _ = fs::remove_file(format!("/dev/shm/envoy_shared_memory_{}", base_id * 10));
        }
    }
}

fn children(pid: u32) -> Vec<String> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    fs::read_to_string(path).unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

/// The example, with its files in `directory`.
fn localise(kind: Kind, directory: &Path) -> String {
    let file = |name: &str| directory.join(name).display().to_string();
    let template = kind.template();
    match kind {
        Kind::Envoy | Kind::EnvoyTcp | Kind::EnvoyGateway | Kind::EnvoyRedirect => {
            template.replace("/dev/stdout", &file("access.log"))
        }
        Kind::Haproxy => template.replace("/run/haproxy-sidecar.sock", &file("admin.sock")),
        Kind::HaproxyTcp => template
            .replace("/run/haproxy-sidecar.sock", &file("admin.sock"))
            .replace("mode http\n", "mode tcp\n")
            .replace("    http-response set-header via haproxy\n", ""),
        Kind::HaproxyRedirect => template
            .replace("/run/haproxy-sidecar.sock", &file("admin.sock"))
            .replace("source 0.0.0.0 usesrc clientip", "source 127.0.0.6")
            // HAProxy asks conntrack for the original destination, but only of IPv4 sockets.
            .replace("bind :::15006 v4v6", "bind 0.0.0.0:15006"),
        Kind::Nginx => template.replace("/run/nginx-sidecar.pid", &file("nginx.pid")).replace(
            "http {\n",
            &format!(
                "http {{\n    client_body_temp_path {0};\n    proxy_temp_path {0};\n    \
                 fastcgi_temp_path {0};\n    uwsgi_temp_path {0};\n    scgi_temp_path {0};\n",
                file("temp")
            ),
        ),
    }
}

fn launch(
    host: &Host,
    kind: Kind,
    identity: &[String],
    config: &Path,
    base_id: u32,
    epoch: u32,
    replaces: Option<u32>,
) -> Result<Process> {
    let directory = config.parent().context("a configuration in a directory")?;
    let config = config.display().to_string();
    let command = |program: &str| -> Result<_> {
        if identity.is_empty() {
            return host.command(program);
        }
        let mut command = host.command("setpriv")?;
        command.args(identity).arg(program);
        Ok(command)
    };
    let (name, command) = match kind {
        Kind::Envoy | Kind::EnvoyTcp | Kind::EnvoyGateway | Kind::EnvoyRedirect => {
            let envoy =
                envoy().context("no Envoy: `cargo xtask setup` installs it, or name one in SRCIP_ENVOY")?;
            let mut command = command(&envoy.display().to_string())?;
            command.args(["--config-path", &config, "--concurrency", "2", "--log-level", "info"]);
            command.args(["--base-id", &base_id.to_string(), "--restart-epoch", &epoch.to_string()]);
            command.args(["--drain-time-s", "1", "--parent-shutdown-time-s", "2"]);
            // Else the access log comes after ten seconds.
            command.args(["--file-flush-interval-msec", "50"]);
            command.args(["--socket-path", &format!("@srcip-{base_id}")]);
            command.args(["--service-cluster", "sidecar", "--service-node", host.name()]);
            ("envoy", command)
        }
        Kind::Haproxy | Kind::HaproxyTcp | Kind::HaproxyRedirect => {
            let mut command = command("/usr/sbin/haproxy")?;
            command.args(["-db", "-f", &config]);
            if let Some(pid) = replaces {
                let socket = directory.join("admin.sock").display().to_string();
                command.args(["-x", &socket, "-sf", &pid.to_string()]);
            }
            ("haproxy", command)
        }
        Kind::Nginx => {
            let mut command = command("/usr/sbin/nginx")?;
            let prefix = directory.display().to_string();
            command.args(["-p", &prefix, "-c", &config, "-g", "daemon off;"]);
            ("nginx", command)
        }
    };
    host.start(&format!("{name}-{base_id}-{epoch}"), command)
}
