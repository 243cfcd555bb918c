//! A test's world: hosts on one bridge, a cgroup for their processes, a BPF file system for srcip.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use srcip_user::dataplane::hooks::cgroup_root;

use crate::{
    host::Host,
    process::sh,
    srcip::Srcip,
    stale::{self, RUN_DIRECTORY, STATE_DIRECTORY},
};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Hosts that reach each other, and nothing else. Dropping it removes them, also in a panic.
///
/// ```text
///  client ─┐
///  client ─┤ node: br0 ├─ pod
///          │           ├─ pod
/// ```
#[derive(Debug)]
pub struct World {
    prefix: String,
    directory: PathBuf,
    cgroup: PathBuf,
    hosts_cgroup: PathBuf,
    node: Host,
    hosts: u8,
    made: Vec<String>,
    diagnosed: AtomicBool,
}

impl World {
    /// An empty world with a node.
    pub fn new() -> Result<Self> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "network namespaces and BPF take root; run `cargo xtask test`, which sees to it"
        );
        stale::remove_first();
        let prefix = format!("{}{}-", stale::prefix(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let base = prefix.trim_end_matches('-');
        let directory = Path::new(RUN_DIRECTORY).join(base);
        stale::create_directory(&directory.join("bpf"))?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), &directory.join("bpf"), Some("bpf"), flags, Some("mode=0700"))
            .context("mounting a BPF file system")?;
        let cgroup = cgroup_root().context("no cgroup v2 is mounted")?.join(base);
        fs::create_dir(&cgroup).with_context(|| cgroup.display().to_string())?;
        let name = format!("{prefix}node");
        // Version 2 lets a cgroup have processes or hand on controllers, and pods' cgroups need the latter.
        let hosts_cgroup = cgroup.join("hosts");
        fs::create_dir(&hosts_cgroup)?;
        let node = Host::create(name.clone(), &hosts_cgroup, &directory)?;
        let world = Self {
            prefix,
            directory,
            cgroup,
            hosts_cgroup,
            node,
            hosts: 0,
            made: vec![name],
            diagnosed: AtomicBool::new(false),
        };
        world.node.ip("link add br0 type bridge")?;
        world.node.ip("link set br0 up")?;
        Ok(world)
    }

    /// The node, which carries the bridge.
    pub fn node(&self) -> &Host {
        &self.node
    }

    /// The directory for files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory for what is too much for [`Self::directory`], which may be in memory.
    pub fn state(&self) -> Result<PathBuf> {
        let path = self.state_path();
        stale::create_directory(&path).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    fn state_path(&self) -> PathBuf {
        Path::new(STATE_DIRECTORY).join(self.prefix.trim_end_matches('-'))
    }

    /// The cgroup that all hosts' processes are below.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Adds a host with an address of each family.
    pub fn host(&mut self, role: &str) -> Result<Host> {
        self.host_in(role, &self.hosts_cgroup.clone())
    }

    /// Adds one whose processes are where the kubelet has those of the pod with this UID.
    pub fn pod(&mut self, role: &str, uid: &str) -> Result<Host> {
        let cgroup = self.cgroup.join(format!("kubepods/burstable/pod{uid}/app"));
        fs::create_dir_all(&cgroup).with_context(|| cgroup.display().to_string())?;
        self.host_in(role, &cgroup)
    }

    fn host_in(&mut self, role: &str, cgroup: &Path) -> Result<Host> {
        self.hosts += 1;
        let n = self.hosts;
        let name = format!("{}{role}", self.prefix);
        self.made.push(name.clone());
        let mut host = Host::create(name.clone(), cgroup, &self.directory)?;
        let node = self.node.name();
        sh(&format!("ip -n {node} link add veth{n} type veth peer name eth0 netns {name}"))?;
        self.node.ip(&format!("link set veth{n} master br0 up"))?;
        // No link-local address, which would turn up a second later, in the middle of a test.
        host.ip("link set eth0 addrgenmode none up")?;
        host.add_address(Self::v4(n, 1).into())?;
        host.add_address(Self::v6(n, 1).into())?;
        Ok(host)
    }

    /// Adds a namespace without any device but lo, as a container runtime makes it.
    pub fn sandbox(&mut self, role: &str) -> Result<Host> {
        let name = format!("{}{role}", self.prefix);
        self.made.push(name.clone());
        Host::create(name, &self.cgroup, &self.directory)
    }

    /// The `i`th IPv4 address of the `n`th host.
    fn v4(n: u8, i: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 133, n, i)
    }

    /// The `i`th IPv6 address of the `n`th host.
    fn v6(n: u8, i: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd13, 0x37, 0, 0, 0, 0, n.into(), i.into())
    }

    /// Gives a host as many IPv4 addresses as it is to have.
    pub fn add_addresses(&self, host: &mut Host, count: u8) -> Result<()> {
        let IpAddr::V4(first) = host.address(crate::Family::V4) else {
            unreachable!("the first of the IPv4 addresses")
        };
        (2..=count).try_for_each(|i| host.add_address(Self::v4(first.octets()[2], i).into()))
    }

    /// The command under test, with an instance of its own.
    pub fn srcip(&self) -> Srcip {
        self.srcip_instance("srcip")
    }

    /// The same with a second instance.
    pub fn srcip_instance(&self, name: &str) -> Srcip {
        Srcip::new(self.directory.join("bpf").join(name), self.cgroup.clone())
    }

    /// Prints what is known of this world, for a test that failed; once.
    pub fn diagnose(&self) {
        if self.diagnosed.swap(true, Ordering::Relaxed) {
            return;
        }
        eprintln!("--- the world of the failed test ---");
        for name in &self.made {
            eprintln!("to look inside while it lasts: ip netns exec {name} bash");
            let show = |program: &str, arguments: &[&str]| {
                let output =
                    Command::new("ip").args(["netns", "exec", name, program]).args(arguments).output();
                if let Ok(output) = output {
                    let text = String::from_utf8_lossy(&output.stdout).into_owned();
                    let lines: Vec<_> = text.lines().take(40).collect();
                    eprintln!("$ {program} {}\n{}", arguments.join(" "), lines.join("\n"));
                }
            };
            show("ss", &["-Htanp"]);
            show("ip", &["rule"]);
        }
        let instances = fs::read_dir(self.directory.join("bpf")).into_iter().flatten().flatten();
        for instance in instances {
            let srcip = Srcip::new(instance.path(), self.cgroup.clone());
            if let Ok(status) = srcip.run("status -o json") {
                eprintln!("$ srcip status -o json\n{status}");
            }
        }
        if let Ok(links) = sh("bpftool link") {
            eprintln!("$ bpftool link\n{links}");
        }
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(20)..].join("\n");
                eprintln!("--- {} ---\n{last}", entry.path().display());
            }
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.diagnose();
        }
        // Processes first: the rest is in use while they live.
        stale::remove_cgroup(&self.cgroup);
        stale::remove_directory(&self.directory);
        for name in &self.made {
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
        let _ = fs::remove_dir_all(self.state_path());
        // The last world takes the parents with it.
        let _ = fs::remove_dir(RUN_DIRECTORY);
        let _ = fs::remove_dir(STATE_DIRECTORY);
    }
}
