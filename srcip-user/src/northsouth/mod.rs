//! North-south: traffic that enters the cluster reaches its endpoint with the client's address.
//!
//! ```text
//!  Services, EndpointSlices, Nodes ──▶ objects ──▶ model ──▶ desired ──▶ Programmer
//!                                                (pure) └──▶ health_check
//! ```
//!
//! - [`objects`]: what is kept of the cluster's objects. [`select`]: which Services are srcip's to handle.
//! - [`model`]: what that means for this node.
//! - [`desired`]: what shall be programmed, said in terms of Services: the interface between whoever knows the
//!   cluster and whoever knows the kernel.
//! - [`Programmer`]: who brings it about. [`dataplane`]: the one that does. [`health_check`]: answers load
//!   balancers.
//! - [`controller`]: sees to it that all is as it should be. [`run`]: starts it. [`status`]: shows it.

pub mod controller;
pub mod dataplane;
pub mod desired;
pub mod health_check;
pub mod model;
pub mod objects;
pub mod run;
pub mod select;
pub mod status;

use std::collections::BTreeMap;

use desired::{Desired, ServiceName};

use crate::dataplane::error::Result;

/// Brings the kernel to what is desired.
pub trait Programmer {
    /// Makes the kernel's state what is `desired`, whatever it was, and touches nothing that is right already.
    /// New connections meet a Service as it was or as it is to be, never in between; established ones go on.
    ///
    /// Acts on the calling thread's network namespace.
    fn apply(&mut self, desired: &Desired) -> Result<Changes>;

    /// What has been counted since the start, by name. The names are stable.
    fn counters(&self) -> Result<BTreeMap<&'static str, u64>>;
}

/// What an [`apply`](Programmer::apply) changed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Services that were added or changed in any way.
    pub changed: Vec<ServiceName>,
    /// Services that were removed.
    pub removed: Vec<ServiceName>,
    /// What could not be done for a Service, in words for the operator; the rest was.
    pub problems: Vec<String>,
    /// Uplinks that no traffic can be taken from, in words for the operator.
    pub missing_uplinks: Vec<String>,
    /// How many entries of maps were written or removed for all of it.
    pub writes: u64,
}

impl Changes {
    /// Whether there was nothing to do.
    pub fn is_empty(&self) -> bool {
        let Self { changed, removed, problems, missing_uplinks, writes: _ } = self;
        changed.is_empty() && removed.is_empty() && problems.is_empty() && missing_uplinks.is_empty()
    }
}
