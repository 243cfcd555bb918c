//! Hosts made of network namespaces, with real proxies on them.
//!
//! - [`host`]: a namespace as a host: its addresses, its processes.
//! - [`world`]: a test's hosts on one bridge, its cgroup, its BPF file system; removes them all.
//! - [`proxy`]: Envoy, HAProxy and nginx as distributions ship them.
//! - [`peer`]: the application, and clients in numbers, as processes of their own.
//! - [`srcip`]: the command under test.
//! - [`mesh`]: rule sets of Istio and kube-proxy.
//! - [`load`]: a steady load of new connections.
//! - [`client`]: single connections from a host.
//! - [`stale`]: removes what a run that was killed left behind.

pub mod client;
pub mod host;
pub mod load;
pub mod mesh;
pub mod peer;
pub mod process;
pub mod proxy;
pub mod srcip;
pub mod stale;
pub mod world;

/// The family a test runs in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}
