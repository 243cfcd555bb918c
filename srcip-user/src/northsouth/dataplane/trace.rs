//! What is programmed, read from the pinned maps; nothing is loaded, and nothing changed.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use aya::maps::{HashMap, Map, MapData, MapError, lpm_trie::Key as TrieKey};
use ipnet::IpNet;
use srcip_common::{
    address::Address,
    northsouth::{
        Affinity, AffinityKey, Endpoint, EndpointKey, Flow, FlowKey, Frontend, FrontendKey, OWN, RESTRICTED,
        RangeKey, Service, ServiceId, lookup::NONE,
    },
};

use super::{
    maps::{Maps, check_layout, decode},
    pins,
    read::range,
};
use crate::{
    dataplane::{
        error::{BpfContext as _, Result},
        maps::open,
    },
    northsouth::desired::{FrontendAddress, ServiceName},
};

/// The maps of one instance.
pub struct Reader {
    maps: Maps,
    flows: HashMap<MapData, FlowKey, Flow>,
    affinity: HashMap<MapData, AffinityKey, Affinity>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

/// A frontend, and what stands behind it.
#[derive(Debug)]
pub struct Handled {
    /// The port of a Service that has it.
    pub name: ServiceName,
    /// Its number in the maps.
    pub id: ServiceId,
    /// The address is a node's; if so, whether this node's.
    pub node: Option<bool>,
    /// Who may come; `None`: everybody.
    pub ranges: Option<Vec<IpNet>>,
    /// Its settings and tables.
    pub service: Box<Service>,
    /// The endpoints that its tables name, by their numbers.
    pub endpoints: BTreeMap<u16, Endpoint>,
}

impl Reader {
    /// Opens the maps of the instance at `pin_path`; `None` if north-south has never been set up there.
    pub fn open(pin_path: &Path) -> Result<Option<Self>> {
        let pins = pins(pin_path);
        let (flows, affinity) = (pins.maps().join("NS_FLOWS"), pins.maps().join("NS_AFFINITY"));
        if !flows.exists() {
            return Ok(None);
        }
        check_layout(&pins)?;
        Ok(Some(Self {
            maps: Maps::open(&pins)?,
            flows: open(&flows, Map::LruHashMap)?,
            affinity: open(&affinity, Map::LruHashMap)?,
        }))
    }

    /// What answers at an address, as the programs look it up: by the address itself, or as a NodePort. `None` if
    /// nothing does, or it is being removed just now.
    pub fn handled(&self, to: SocketAddr, protocol: u8) -> Result<Option<Handled>> {
        let address = Address::from(to.ip());
        let flags = found(self.maps.nodes.get(&address, 0), "NS_NODES")?;
        let node = flags.map(|flags| flags & OWN != 0);
        let any_node = match to {
            SocketAddr::V4(_) => FrontendAddress::ANY_NODE_V4,
            SocketAddr::V6(_) => FrontendAddress::ANY_NODE_V6,
        };
        let look = |address| {
            let key = FrontendKey::new(address, to.port(), protocol);
            found(self.maps.frontends.get(&key, 0), "NS_FRONTENDS")
        };
        let frontend = match look(address)? {
            None if node.is_some() => look(any_node.0.into())?,
            frontend => frontend,
        };
        let Some(Frontend { service: id, flags }) = frontend else { return Ok(None) };
        let name = found(self.maps.names.get(&id, 0), "NS_NAMES")?;
        let (Some(key), Some(service)) = (name.as_ref().and_then(decode), self.maps.service(id)?) else {
            return Ok(None);
        };
        let ranges = (flags & RESTRICTED != 0).then(|| self.ranges(id)).transpose()?;
        let endpoints = self.endpoints(id, &service)?;
        Ok(Some(Handled { name: key.name, id, node, ranges, service: Box::new(service), endpoints }))
    }

    fn endpoints(&self, id: ServiceId, service: &Service) -> Result<BTreeMap<u16, Endpoint>> {
        let mut endpoints = BTreeMap::new();
        for &index in service.tables.as_flattened() {
            if index == NONE || endpoints.contains_key(&index) {
                continue;
            }
            let key = EndpointKey { service: id, index: index.into() };
            if let Some(endpoint) = found(self.maps.endpoints.get(&key, 0), "NS_ENDPOINTS")? {
                endpoints.insert(index, endpoint);
            }
        }
        Ok(endpoints)
    }

    fn ranges(&self, id: ServiceId) -> Result<Vec<IpNet>> {
        let mut ranges = Vec::new();
        for key in self.maps.ranges.keys() {
            let key = key.bpf(|| "read the map NS_RANGES".to_owned())?;
            let RangeKey { service, client } = key.data();
            if service != id {
                continue;
            }
            let bits = key.prefix_len() - (RangeKey::BITS - 128);
            ranges.extend(range(client.into(), bits));
        }
        ranges.sort();
        Ok(ranges)
    }

    /// Whether a client may use a service's restricted frontends.
    pub fn is_in_range(&self, service: ServiceId, client: IpAddr) -> Result<bool> {
        let key = TrieKey::new(RangeKey::BITS, RangeKey { service, client: client.into() });
        Ok(found(self.maps.ranges.get(&key, 0), "NS_RANGES")?.is_some())
    }

    /// What is known of a flow.
    pub fn flow(&self, key: &FlowKey) -> Result<Option<Flow>> {
        found(self.flows.get(key, 0), "NS_FLOWS")
    }

    /// Where a client of a service with affinity went last.
    pub fn affinity(&self, service: ServiceId, client: IpAddr) -> Result<Option<Affinity>> {
        found(self.affinity.get(&AffinityKey { service, client: client.into() }, 0), "NS_AFFINITY")
    }
}

fn found<T>(result: std::result::Result<T, MapError>, map: &str) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(error) => Err(error).bpf(|| format!("read the map {map}")),
    }
}
