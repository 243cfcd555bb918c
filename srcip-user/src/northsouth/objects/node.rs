//! A Node: where packets for its pods are sent.

use std::{net::IpAddr, sync::Arc};

use k8s_openapi::api::core::v1::Node;

use super::{ObjectName, unicast};

/// A node has one or two of each kind and family.
const MAX_ADDRESSES: usize = 16;

/// A node, as far as north-south needs it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeInfo {
    /// Its name.
    pub name: Arc<str>,
    /// By which the other nodes reach it (`InternalIP`), the preferred one first.
    pub internal: Vec<IpAddr>,
    /// By which clients may (`ExternalIP`).
    pub external: Vec<IpAddr>,
}

impl NodeInfo {
    /// Takes what matters out of a node; `None` if it has no name. Addresses that are none are left out.
    pub fn from_object(node: &Node) -> Option<Self> {
        // A node is in no namespace; its name is like those of objects that are.
        let name = ObjectName::new("default", node.metadata.name.as_deref()?)?.name;
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        let of = |kind: &str| {
            let of_kind = addresses.clone().filter(|address| address.type_ == kind);
            of_kind.filter_map(|address| unicast(&address.address)).take(MAX_ADDRESSES).collect()
        };
        Some(Self { name, internal: of("InternalIP"), external: of("ExternalIP") })
    }

    /// By which the other nodes reach it, in a family.
    pub fn address(&self, is_ipv4: bool) -> Option<IpAddr> {
        self.internal.iter().copied().find(|address| address.is_ipv4() == is_ipv4)
    }

    /// All its addresses.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.internal.iter().chain(&self.external).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_by_kind_and_family() {
        let node = serde_json::json!({
            "metadata": {"name": "n1"},
            "status": {"addresses": [
                {"type": "Hostname", "address": "n1"},
                {"type": "ExternalIP", "address": "203.0.113.1"},
                {"type": "InternalIP", "address": "10.0.0.1"},
                {"type": "InternalIP", "address": "fd00::1"},
                {"type": "InternalIP", "address": "127.0.0.1"},
                {"type": "InternalIP", "address": "rubbish"},
            ]},
        });
        let node = NodeInfo::from_object(&serde_json::from_value(node).unwrap()).unwrap();
        assert_eq!(node.address(true), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(node.address(false), Some("fd00::1".parse().unwrap()));
        assert_eq!(node.addresses().count(), 3);
        assert_eq!(NodeInfo::from_object(&Node::default()), None);
    }
}
