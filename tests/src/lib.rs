//! Hosts made of network namespaces, with real proxies on them.
//!
//! - [`host`]: a namespace as a host: its addresses, its processes.
//! - [`world`]: a test's hosts on one bridge, its cgroup, its BPF file system; removes them all.
//! - [`proxy`]: Envoy, HAProxy and nginx as distributions ship them.
//! - [`peer`]: the application, and clients in numbers, as processes of their own.
//! - [`srcip`]: the command under test.
//! - [`cluster`]: several nodes with pods, a router, a client outside, a load balancer.
//! - [`agent`]: a running node agent.
//! - [`mesh`]: rule sets of Istio and kube-proxy.
//! - [`manifests`]: what is deployed on clusters, rendered.
//! - [`load`]: a steady load of new connections. [`processor`]: processor time.
//! - [`observe`]: a running `srcip observe`.
//! - [`client`]: single connections from a host. [`options`]: of sockets.
//! - [`apiserver`]: a Kubernetes API server that fails as it is told to.
//! - [`cni`]: what a container runtime does with CNI plugins.
//! - [`containerd`]: a node with a container runtime, through [`cri`]; [`pod`]s on it, of [`image`]s.
//! - [`kubectl`]: the real one. [`scratch`]: a directory.
//! - [`stale`]: removes what a run that was killed left behind.

pub mod agent;
pub mod apiserver;
pub mod bare;
pub mod client;
pub mod cluster;
pub mod cni;
pub mod containerd;
pub mod cri;
pub mod host;
pub mod image;
pub mod kernel;
pub mod kubectl;
pub mod load;
pub mod manifests;
pub mod mesh;
pub mod observe;
pub mod options;
pub mod peer;
pub mod pod;
pub mod process;
pub mod processor;
pub mod proxy;
pub mod scratch;
pub mod srcip;
pub mod stale;
pub mod world;

use std::time::{Duration, Instant};

/// How long to wait for what has to come, also from a machine that stands still for a while. Nobody waits so long for
/// what does not come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Looks until there is something to be found, and panics if there never is.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until something holds, and panics if it never does.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    wait_for(what, || holds().then_some(()));
}

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
