//! The audit: which workloads do not see their clients' addresses, where the address is lost, and what
//! brings it back. It looks on and changes nothing.
//!
//! - [`netfilter`]: how connections come to a pod's proxy. [`cluster`]: nodes, Services, pods.
//! - [`cause`]: from what was seen to why. [`cure`]: from why to what to do.
//! - [`report`]: adds up. [`explain`]: one connection as a picture. [`frontend`]: the same before there is one, for what
//!   north-south handles.

pub mod cause;
pub mod cluster;
pub mod cure;
pub mod explain;
pub mod frontend;
pub mod netfilter;
pub mod report;
