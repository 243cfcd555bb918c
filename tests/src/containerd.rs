//! A node with a container runtime: a containerd of its own, with runc and CNI plugins, on a [`Host`].
//!
//! It has a mount namespace with a `/run` and a `/var/lib` of its own: the machine's containerd, if there
//! is one, is not touched, and what it mounts is gone with its last process. All of its processes are in
//! the test's cgroup, a pod's below `kubepods/podUID` as a kubelet has them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    PATIENCE,
    cri::Cri,
    host::Host,
    image::{self, PAUSE},
    process::{Process, run},
    world::World,
};

/// Where distributions install CNI plugins.
const PLUGINS: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];

/// Gives the process a `/run` and a `/var/lib` below `$2`, with the world's directory `$1` where it is
/// outside, and becomes containerd. On a node everything is mounted shared.
const ENTER: &str = r#"
mount --rbind "$1" "$2$1"
mount --rbind "$2/run" /run
mount --bind "$2/var/lib" /var/lib
mount --make-rshared /
exec containerd --config "$3"
"#;

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    pub(crate) cri: Cri,
    pub(crate) directory: PathBuf,
    pub(crate) cgroup: String,
    socket: PathBuf,
    plugins: PathBuf,
    networks: PathBuf,
    process: Process,
}

impl Containerd {
    /// Starts it on `host`; its pods get their network as `conflist` says, a list of CNI plugins. Waits until
    /// it is ready.
    pub fn start(world: &World, host: &Host, conflist: &str) -> Result<Self> {
        let role = host.name().rsplit('-').next().context("a host has a name")?;
        let state = world.state()?.join(role);
        let directory = world.directory().join(role);
        let [plugins, networks] = ["cni-bin", "cni-net.d"].map(|name| directory.join(name));
        let inside = state.join(world.directory().strip_prefix("/")?);
        for directory in [&plugins, &networks, &inside, &state.join("var/lib"), &directory.join("logs")] {
            fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        }
        let installed = PLUGINS.iter().map(Path::new).find(|path| path.is_dir());
        let installed = installed.context("no CNI plugins: `cargo xtask setup test` installs them")?;
        for plugin in fs::read_dir(installed)? {
            let plugin = plugin?;
            symlink(plugin.path(), plugins.join(plugin.file_name()))?;
        }
        fs::write(networks.join("10-tests.conflist"), conflist)?;
        let config = directory.join("containerd.toml");
        fs::write(&config, configuration(&plugins, &networks))?;

        let mut command = host.command("unshare")?;
        command.args(["--mount", "--propagation", "private", "--", "sh", "-euc", ENTER, "enter"]);
        command.args([world.directory(), &state, &config]);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"));
        let mut process = host.start("containerd", command)?;
        let socket = state.join("run/containerd/containerd.sock");
        process.wait_until("serves its socket", |p| p.log().contains("containerd successfully booted"))?;
        let cri = Cri::connect(&socket)?;
        let cgroup = world.cgroup().file_name().context("a cgroup has a name")?;
        let cgroup = format!("/{}/kubepods", cgroup.to_str().context("a cgroup's name is ASCII")?);
        let containerd = Self { cri, directory, cgroup, socket, plugins, networks, process };
        containerd.import(&image::write(PAUSE, &containerd.directory)?, PAUSE)?;
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = containerd.cri.ready() {
            ensure!(Instant::now() < deadline, "containerd on {} is not ready: {error:#}", host.name());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(containerd)
    }

    /// The directory of the CNI plugins.
    pub fn plugins(&self) -> &Path {
        &self.plugins
    }

    /// The directory of the CNI configuration.
    pub fn networks(&self) -> &Path {
        &self.networks
    }

    /// Waits until a plugin of this name is in the configuration that pods are started with.
    pub fn wait_chained(&self, plugin: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.cri.network()?.contains(plugin) {
            ensure!(Instant::now() < deadline, "containerd does not know the plugin {plugin}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Imports an archive with the image `name`, and waits until pods can use it.
    pub fn import(&self, archive: &Path, name: &str) -> Result<()> {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.socket).args(["--namespace", "k8s.io", "images", "import"]);
        run(command.arg(archive))?;
        let deadline = Instant::now() + PATIENCE;
        while self.cri.image(name)?.is_none() {
            ensure!(Instant::now() < deadline, "{} has no image {name}", archive.display());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Makes an image of [`image`] and imports it.
    pub fn provide(&self, name: &str) -> Result<()> {
        self.import(&image::write(name, &self.directory)?, name)
    }

    /// A command on the node outside of all pods: with its files, on its network.
    pub fn command(&self, host: &Host, program: &Path) -> Result<Command> {
        let mut command = host.command("nsenter")?;
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.process.pid())).arg("--").arg(program);
        Ok(command)
    }
}

fn configuration(plugins: &Path, networks: &Path) -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]

[grpc]
address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
# Its profiles would stay loaded on the machine.
disable_apparmor = true
# Lowering the score takes CAP_SYS_RESOURCE, which root in a container need not have.
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{networks}"
"#,
        plugins = plugins.display(),
        networks = networks.display(),
    )
}
