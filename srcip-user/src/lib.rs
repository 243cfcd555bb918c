//! srcip's user-space side: loads the programs, keeps what they need in a pod's network namespace, and
//! reports what they do.
//!
//! - [`cli`]: the command line, one file per verb.
//! - [`dataplane`]: attach, detach, status; the two engines; pins.
//! - [`netns`], [`routing`], [`sysctl`], [`sockets`]: a pod's network namespace, its return route, its
//!   sockets.
//! - [`telemetry`]: every connection's origin.
//! - [`doctor`]: what a node can run. [`privileges`]: what srcip may do.

pub mod audit;
pub mod cli;
pub mod clsact;
pub mod dataplane;
pub mod doctor;
pub mod netns;
pub mod ports;
pub mod privileges;
pub mod routing;
pub mod sockets;
pub mod sysctl;
pub mod telemetry;

/// The compiled eBPF programs that steer.
pub static EBPF_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/srcip"));

/// The compiled eBPF program that watches.
pub static WATCH_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/srcip-watch"));
