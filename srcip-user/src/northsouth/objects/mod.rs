//! What is kept of the Kubernetes objects that say where traffic from outside goes.
//!
//! - [`service`]: Services. [`slice`]: EndpointSlices. [`node`]: Nodes. [`gather`]: where a source puts them.
//!
//! Anything may be in them: whoever may make a Service wrote it. What is read is bounded, and an object that
//! is not right is refused by itself.

pub mod gather;
pub mod node;
pub mod service;
pub mod slice;

use std::{collections::BTreeMap, fmt, net::IpAddr, sync::Arc};

use serde::Serialize;

use crate::{
    agent::pod::{PodName, PodUid},
    text::printable,
};
use node::NodeInfo;
use service::ServiceInfo;
use slice::SliceInfo;

/// How much of somebody's text is shown, in characters.
const SHOWN: usize = 64;

/// The name of an object within the cluster, among those of its kind.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct ObjectName {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name within that.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Checks that these can be a namespace and a name.
    pub fn new(namespace: &str, name: &str) -> Option<Self> {
        let PodName { namespace, name } = PodName::new(namespace, name)?;
        Some(Self { namespace, name })
    }
}

/// `NAMESPACE/NAME`, as kubectl has it.
impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What is wrong with an object, as an Event tells it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Problem {
    /// In one CamelCase word; there are few.
    pub reason: &'static str,
    /// In a sentence. Printable, and no longer than an Event's note may be.
    pub note: String,
}

impl Problem {
    pub(super) fn new(reason: &'static str, note: impl Into<String>) -> Self {
        Self { reason, note: note.into() }
    }
}

/// A Service that is left to others as a whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Tells it from a later one of its name.
    pub uid: Option<PodUid>,
    /// Why.
    pub problem: Problem,
}

/// The objects of a cluster, as a source has them.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Objects {
    /// Which kinds have been seen.
    pub listed: Listed,
    /// The Services; or what is wrong with them.
    pub services: BTreeMap<ObjectName, Result<Arc<ServiceInfo>, Refused>>,
    /// The EndpointSlices. Of one that is not right, nothing is known.
    pub slices: BTreeMap<ObjectName, Arc<SliceInfo>>,
    /// The nodes.
    pub nodes: BTreeMap<Arc<str>, Arc<NodeInfo>>,
}

impl Objects {
    /// What tells a Service from a later one of its name.
    pub fn uid(&self, service: &ObjectName) -> Option<&PodUid> {
        match self.services.get(service)? {
            Ok(info) => info.uid.as_ref(),
            Err(refused) => refused.uid.as_ref(),
        }
    }

    /// Whether all have been seen once. Until then nobody may conclude that one is gone.
    pub fn is_synced(&self) -> bool {
        self.listed == Listed::ALL
    }
}

/// The kinds of which all objects have been seen once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Listed {
    /// Services.
    pub services: bool,
    /// EndpointSlices.
    pub slices: bool,
    /// Nodes.
    pub nodes: bool,
}

impl Listed {
    /// All of them.
    pub const ALL: Self = Self { services: true, slices: true, nodes: true };
}

/// The beginning of a text from elsewhere, without what terminals obey.
pub(super) fn shown(text: &str) -> String {
    let mut characters = text.chars();
    let mut beginning = printable(&characters.by_ref().take(SHOWN).collect::<String>());
    if characters.next().is_some() {
        beginning.push('…');
    }
    beginning
}

/// An address that a packet from another host can have: in its shortest form, and none that means a host to
/// itself, several hosts, or whoever is on the link.
fn unicast(text: &str) -> Option<IpAddr> {
    let address = text.parse::<IpAddr>().ok()?.to_canonical();
    let special = address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
    (!special).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_single_hosts_are_taken() {
        for good in ["10.0.0.1", "203.0.113.7", "2001:db8::1", "fd00::1"] {
            assert_eq!(unicast(good), Some(good.parse().unwrap()));
        }
        assert_eq!(unicast("::ffff:10.0.0.1"), Some("10.0.0.1".parse().unwrap()));
        for bad in [
            "",
            "x",
            "10.0.0.1/8",
            "010.0.0.1",
            "0.0.0.0",
            "127.0.0.1",
            "::1",
            "::",
            "224.0.0.1",
            "ff02::1",
            "169.254.169.254",
            "fe80::1",
            "255.255.255.255",
            "::ffff:127.0.0.1",
            "fe80::1%eth0",
        ] {
            assert_eq!(unicast(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_shown_is_short_and_obeyed_by_no_terminal() {
        assert_eq!(shown("a\u{1b}[2J"), "a\u{fffd}[2J");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), SHOWN + 1);
    }
}
