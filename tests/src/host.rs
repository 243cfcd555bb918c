//! A network namespace as a host.

use std::{
    fs::File,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use srcip_user::{
    netns::Netns,
    sockets::{TcpSocket, tcp_sockets},
};

use crate::{
    Family, PATIENCE,
    process::{Place, Process, run, sh},
};

/// A host: a client, a node or a pod.
#[derive(Debug)]
pub struct Host {
    name: String,
    netns: Netns,
    place: Place,
    directory: PathBuf,
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
}

impl Host {
    /// Makes a namespace called `name`, with lo up. `cgroup` is where its processes go, `directory`
    /// where their files do.
    pub(crate) fn create(name: String, cgroup: &Path, directory: &Path) -> Result<Self> {
        sh(&format!("ip netns add {name}"))?;
        let path = PathBuf::from(format!("/run/netns/{name}"));
        let place = Place {
            netns: File::open(&path).with_context(|| path.display().to_string())?,
            cgroup_procs: cgroup.join("cgroup.procs"),
        };
        let host = Self {
            netns: Netns::open(&path)?,
            place,
            directory: directory.to_owned(),
            name,
            v4: Vec::new(),
            v6: Vec::new(),
        };
        host.sysctl("net.ipv6.conf.all.disable_ipv6", "0")?;
        host.ip("link set lo up")?;
        Ok(host)
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where it can be opened.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.name))
    }

    /// The directory for its processes' files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its first address of a family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4[0].into(),
            Family::V6 => self.v6[0].into(),
        }
    }

    /// All its addresses of a family.
    pub fn addresses(&self, family: Family) -> Vec<IpAddr> {
        match family {
            Family::V4 => self.v4.iter().copied().map(Into::into).collect(),
            Family::V6 => self.v6.iter().copied().map(Into::into).collect(),
        }
    }

    /// Its first address of a family, with a port.
    pub fn socket(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(family), port)
    }

    /// Gives it an address; IPv6 without duplicate address detection, which takes a second.
    pub fn add_address(&mut self, address: IpAddr) -> Result<()> {
        match address {
            IpAddr::V4(ip) => {
                self.ip(&format!("addr add {ip}/16 dev eth0"))?;
                self.v4.push(ip);
            }
            IpAddr::V6(ip) => {
                self.ip(&format!("-6 addr add {ip}/64 dev eth0 nodad"))?;
                self.v6.push(ip);
            }
        }
        Ok(())
    }

    /// Takes note of addresses that it has been given already.
    pub(crate) fn know_addresses(&mut self, (v4, v6): (Ipv4Addr, Ipv6Addr)) {
        self.v4.push(v4);
        self.v6.push(v6);
    }

    /// Runs `ip` in the namespace.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        sh(&format!("ip -n {} {arguments}", self.name))
    }

    /// Sets a sysctl of the namespace.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let written = self.netns.run(|| std::fs::write(&path, value))?;
        written.with_context(|| format!("setting {name} to {value} in {}", self.name))
    }

    /// Reads a sysctl of the namespace.
    pub fn read_sysctl(&self, name: &str) -> Result<String> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let text = self.netns.run(|| std::fs::read_to_string(&path))?;
        Ok(text.with_context(|| format!("reading {name} in {}", self.name))?.trim().to_owned())
    }

    /// A command that runs on this host.
    pub fn command(&self, program: &str) -> Result<Command> {
        self.place.command(program)
    }

    /// Runs a program with arguments separated by blanks, on this host.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command")?;
        let output = run(self.command(program)?.args(words))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Feeds `input` to a program on this host, as `iptables-restore` wants it.
    pub fn feed(&self, line: &str, input: &str) -> Result<()> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().context("an empty command")?)?;
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| line.to_owned())?;
        child.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{line} failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Starts a process on this host.
    pub fn start(&self, name: &str, command: Command) -> Result<Process> {
        let log = self.directory.join(format!("{}-{name}.log", self.name));
        Process::start(name, command, &log)
    }

    /// Its TCP sockets.
    pub fn tcp_sockets(&self) -> Result<Vec<TcpSocket>> {
        Ok(self.netns.run(tcp_sockets)??)
    }

    /// Whether somebody listens on `port`.
    pub fn listens(&self, port: u16) -> bool {
        let sockets = self.tcp_sockets().unwrap_or_default();
        sockets.iter().any(|socket| socket.is_listener() && socket.local.port() == port)
    }

    /// Waits until somebody listens on `port`.
    pub fn wait_open(&self, port: u16) -> Result<()> {
        self.wait_listens(port, true)
    }

    /// Waits until nobody listens on `port`.
    pub fn wait_closed(&self, port: u16) -> Result<()> {
        self.wait_listens(port, false)
    }

    fn wait_listens(&self, port: u16, wanted: bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.listens(port) != wanted {
            let who = if wanted { "nobody on" } else { "somebody still on" };
            ensure!(Instant::now() < deadline, "{who} {} listens on port {port}", self.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
