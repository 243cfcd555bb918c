//! The sysctls of a pod's network namespace that the return route depends on.
//!
//! Everything here acts on the calling thread's network namespace.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
};

use rustix::{
    fs::{Mode, OFlags, openat},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
};

use crate::routing::{Result, RoutingError, failing_io};

/// Their values, by name.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Sysctls(BTreeMap<String, u8>);

/// What upstream legs need.
const NEEDED: [(&str, u8); 4] = [
    // The application's socket gets the mark that the connection's SYN had, and by that its answers find
    // their way back. Linux 3.15.
    ("net.ipv4.tcp_fwmark_accept", 1),
    // The same for what the kernel answers without a socket: a reset from a port nobody listens on.
    ("net.ipv4.fwmark_reflect", 1),
    ("net.ipv6.fwmark_reflect", 1),
    // A source port can be used again a second after the proxy has closed a connection from it, instead
    // of a minute. The default, 2, allows that for loopback addresses only, and upstream legs have a
    // client's: one client could open 450 connections a second, no more. Linux 4.19 for the default.
    ("net.ipv4.tcp_tw_reuse", 1),
];

/// The end of the names of two of them.
const REFLECT: &str = ".fwmark_reflect";

impl Sysctls {
    /// What upstream legs need, as far as this kernel has it.
    ///
    /// Where Istio's rules are in force beside ours (`beside_istio`), what the kernel answers without a socket is
    /// left as it was in `previous`: they mark what comes from clients, too, whose resets would come back into
    /// the pod. Those of upstream legs they bring back themselves, by conntrack.
    pub fn needed(previous: &Self, beside_istio: bool) -> Self {
        let needed = NEEDED.into_iter().filter_map(|(name, value)| {
            let previous = *previous.0.get(name)?;
            let leave = beside_istio && name.ends_with(REFLECT);
            Some((name.to_owned(), if leave { previous } else { value }))
        });
        Self(needed.collect())
    }

    /// Reads them.
    pub fn read() -> Result<Self> {
        let mut values = BTreeMap::new();
        for (name, _) in NEEDED {
            match fs::read_to_string(sysctl_path(name)) {
                Ok(text) => {
                    let value = text.trim().parse().map_err(io::Error::other);
                    values.insert(name.to_owned(), failing_io(&format!("read {name}"), value)?);
                }
                // A kernel without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound && name.starts_with("net.ipv6") => {}
                Err(source) => failing_io(&format!("read {name}"), Err(source))?,
            }
        }
        Ok(Self(values))
    }

    /// Which of `wanted` have another value in these.
    pub fn differing<'a>(&self, wanted: &'a Self) -> Vec<&'a str> {
        let differs = |(name, value): &(&String, &u8)| self.0.get(*name) != Some(*value);
        wanted.0.iter().filter(differs).map(|(name, _)| name.as_str()).collect()
    }

    /// Sets those that differ.
    pub fn write(&self) -> Result<()> {
        let current = Self::read()?;
        for (name, value) in self.0.iter().filter(|(name, value)| current.0.get(*name) != Some(value)) {
            write(name, &value.to_string()).map_err(|source| RoutingError {
                action: format!("set {name} to {value}"),
                source,
                hint: "; where /proc/sys is read-only, as in a container, that takes Linux 5.2, CAP_SYS_ADMIN, and \
                       a seccomp profile that allows fsopen and fsmount with it",
            })?;
        }
        Ok(())
    }
}

fn write(name: &str, value: &str) -> io::Result<()> {
    match fs::write(sysctl_path(name), value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => write_to_own_proc(name, value),
        written => written,
    }
}

/// Containers have /proc/sys mounted read-only. A procfs of our own is not, and nobody else sees it: it is
/// mounted nowhere. Linux 5.2.
fn write_to_own_proc(name: &str, value: &str) -> io::Result<()> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let path = format!("sys/{}", name.replace('.', "/"));
    let file = openat(proc, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    fs::File::from(file).write_all(value.as_bytes())
}

fn sysctl_path(name: &str) -> String {
    format!("/proc/sys/{}", name.replace('.', "/"))
}

/// The ephemeral ports that this namespace's own connections use.
pub fn ephemeral_ports() -> Result<(u16, u16)> {
    const PATH: &str = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = failing_io("read net.ipv4.ip_local_port_range", fs::read_to_string(PATH))?;
    let mut numbers = text.split_whitespace().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(first)), Some(Ok(last))) => Ok((first, last)),
        _ => failing_io("read net.ipv4.ip_local_port_range", Err(io::Error::other(text))),
    }
}
