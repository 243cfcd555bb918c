//! Behind which device of the node an endpoint is.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

use ipnet::IpNet;

use crate::routing::{self, RoutingError};

/// What is directly behind which device.
#[derive(Debug)]
pub(super) struct Routes {
    by_net: HashMap<IpNet, u32>,
    /// The prefix lengths there are, the longest first.
    lengths: Vec<u8>,
}

impl Routes {
    pub(super) fn read() -> Result<Self, RoutingError> {
        let by_net: HashMap<IpNet, u32> = routing::direct_routes()?.into_iter().collect();
        let lengths: BTreeSet<u8> = by_net.keys().map(IpNet::prefix_len).collect();
        Ok(Self { by_net, lengths: lengths.into_iter().rev().collect() })
    }

    /// The number of the device behind which an address is.
    pub(super) fn device(&self, ip: IpAddr) -> Option<u32> {
        self.lengths.iter().find_map(|&length| {
            let net = IpNet::new(ip, length).ok()?.trunc();
            self.by_net.get(&net).copied()
        })
    }
}
