//! srcip's user-space side: loads the programs, keeps what they need in a pod's network namespace, and
//! reports what they do.
//!
//! - [`cli`]: the command line, one file per verb.
//! - [`agent`]: the node agent.
//! - [`cni`]: the CNI plugin.
//! - [`dataplane`]: attach, detach, status; the two engines; pins.
//! - [`netns`], [`routing`], [`sysctl`], [`sockets`]: a pod's network namespace, its return route, its
//!   sockets.
//! - [`northsouth`]: traffic that enters the cluster.
//! - [`telemetry`]: every connection's origin. [`top`]: the same, live on a terminal.
//! - [`manifests`]: Kubernetes objects in files.
//! - [`doctor`]: what a node can run. [`privileges`]: what srcip may do.
//! - [`signals`]: ending on request. [`logging`]: what is told on stderr. [`http`]: serving pages.
//!   [`text`]: what may be printed.

pub mod agent;
pub mod audit;
pub mod cli;
pub mod clsact;
pub mod cni;
pub mod dataplane;
pub mod doctor;
pub mod http;
pub mod inotify;
pub mod logging;
pub mod manifests;
pub mod netns;
pub mod northsouth;
pub mod ports;
pub mod privileges;
pub mod routing;
pub mod signals;
pub mod sockets;
pub mod sysctl;
pub mod telemetry;
pub mod text;
pub mod top;

/// The compiled eBPF programs that steer.
pub static EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/srcip"));

/// The compiled eBPF program that watches.
pub static WATCH_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/srcip-watch"));

/// The compiled eBPF programs for traffic that enters the cluster.
pub static NORTH_SOUTH_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/srcip-northsouth"));
