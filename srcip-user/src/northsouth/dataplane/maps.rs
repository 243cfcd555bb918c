//! Handles on the pinned maps, and what can be read back from them.

use std::collections::{BTreeMap, HashMap as Table, HashSet};

use aya::maps::{Array, HashMap, LpmTrie, Map, MapData, MapError, PerCpuArray};
use srcip_common::{
    address::Address,
    northsouth::{
        Config, Endpoint, EndpointKey, Frontend, FrontendKey, LAYOUT_VERSION, RangeKey, Service, ServiceId,
        counter::{Counter, Counts, ServiceCounters},
    },
};

use super::{Key, write::Programmed};
use crate::{
    dataplane::{
        error::{BpfContext as _, Error, Result},
        maps::{open, tolerate_missing},
        pins::Pins,
    },
    northsouth::desired::ServiceName,
};

/// A family, a service's name, and zeroes.
type Name = [u8; 192];

/// The maps that user space writes.
pub(super) struct Maps {
    pub(super) names: HashMap<MapData, ServiceId, Name>,
    pub(super) frontends: HashMap<MapData, FrontendKey, Frontend>,
    pub(super) services: HashMap<MapData, ServiceId, Service>,
    pub(super) endpoints: HashMap<MapData, EndpointKey, Endpoint>,
    pub(super) ranges: LpmTrie<MapData, RangeKey, u8>,
    pub(super) nodes: HashMap<MapData, Address, u32>,
    config: Array<MapData, Config>,
    counters: PerCpuArray<MapData, u64>,
    /// `None`: an earlier version has made the maps, and only its programs have run; they count nothing by Service.
    pub(super) service_counters: Option<HashMap<MapData, ServiceId, ServiceCounters>>,
    /// How many entries have been written or removed.
    pub(super) writes: u64,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

/// Checks that the pinned maps, if there are any, are laid out as this version expects.
pub(super) fn check_layout(pins: &Pins) -> Result<()> {
    let path = pins.maps().join("NS_LAYOUT");
    if !path.exists() {
        return Ok(());
    }
    let layout: Array<MapData, u32> = open(&path, Map::Array)?;
    let found = layout.get(&0, 0).bpf(|| format!("read {}", path.display()))?;
    // 0: whoever made the maps was interrupted before it wrote its number, so nothing is in them.
    if found != 0 && found != LAYOUT_VERSION {
        return Err(Error::OtherVersion { path: pins.root().to_owned(), found, expected: LAYOUT_VERSION });
    }
    Ok(())
}

/// Writes the layout's number into freshly made maps.
pub(super) fn stamp_layout(pins: &Pins) -> Result<()> {
    let path = pins.maps().join("NS_LAYOUT");
    let mut layout: Array<MapData, u32> = open(&path, Map::Array)?;
    layout.set(0, LAYOUT_VERSION, 0).bpf(|| format!("write {}", path.display()))
}

impl Maps {
    pub(super) fn open(pins: &Pins) -> Result<Self> {
        let maps = pins.maps();
        let service_counters = maps.join("NS_SERVICE_COUNTERS");
        let service_counters =
            service_counters.exists().then(|| open(&service_counters, Map::HashMap)).transpose()?;
        Ok(Self {
            names: open(&maps.join("NS_NAMES"), Map::HashMap)?,
            frontends: open(&maps.join("NS_FRONTENDS"), Map::HashMap)?,
            services: open(&maps.join("NS_SERVICES"), Map::HashMap)?,
            endpoints: open(&maps.join("NS_ENDPOINTS"), Map::HashMap)?,
            ranges: open(&maps.join("NS_RANGES"), Map::LpmTrie)?,
            nodes: open(&maps.join("NS_NODES"), Map::HashMap)?,
            config: open(&maps.join("NS_CONFIG"), Map::Array)?,
            counters: open(&maps.join("NS_COUNTERS"), Map::PerCpuArray)?,
            service_counters,
            writes: 0,
        })
    }

    /// All that has been programmed, by this process or one before.
    pub(super) fn read_back(&self) -> Result<BTreeMap<Key, Programmed>> {
        let mut services = Table::new();
        let mut keys = Vec::new();
        for entry in self.names.iter() {
            let (id, name) = entry.bpf(|| "read the map NS_NAMES".to_owned())?;
            if let Some(key) = decode(&name) {
                services.insert(id, Programmed::new(id));
                keys.push((id, key));
            }
        }
        for entry in self.frontends.iter() {
            let (key, frontend) = entry.bpf(|| "read the map NS_FRONTENDS".to_owned())?;
            if let Some(service) = services.get_mut(&frontend.service) {
                service.frontends.insert(key, frontend.flags);
            }
        }
        for entry in self.endpoints.iter() {
            let (key, endpoint) = entry.bpf(|| "read the map NS_ENDPOINTS".to_owned())?;
            if let Some(service) = services.get_mut(&key.service) {
                let index = key.index as u16;
                service.endpoints.insert(index, endpoint);
                service.next = service.next.max(index.saturating_add(1)) % u16::MAX;
            }
        }
        for key in self.ranges.keys() {
            let key = key.bpf(|| "read the map NS_RANGES".to_owned())?;
            let range = key.data();
            if let Some(service) = services.get_mut(&range.service) {
                let bits = key.prefix_len() - (RangeKey::BITS - 128);
                service.ranges.insert((range.client.into(), bits));
            }
        }
        for id in self.counted()? {
            if let Some(service) = services.get_mut(&id) {
                service.is_counted = true;
            }
        }
        Ok(keys.into_iter().filter_map(|(id, key)| Some((key, services.remove(&id)?))).collect())
    }

    /// The services that there is a place for to be counted at.
    fn counted(&self) -> Result<Vec<ServiceId>> {
        let keys = self.service_counters.iter().flat_map(HashMap::keys);
        keys.map(|id| id.bpf(|| "read the map NS_SERVICE_COUNTERS".to_owned())).collect()
    }

    /// Forgets what was counted of other services than these: a version that counts nothing by Service has taken them
    /// away.
    pub(super) fn sweep_counters(&mut self, existing: &HashSet<ServiceId>) -> Result<()> {
        let mut gone = self.counted()?.into_iter().filter(|id| !existing.contains(id));
        gone.try_for_each(|id| self.remove_counters(id))
    }

    /// Forgets what was counted of a service.
    pub(super) fn remove_counters(&mut self, id: ServiceId) -> Result<()> {
        self.writes += 1;
        self.service_counters.as_mut().map_or(Ok(()), |counters| tolerate_missing(counters.remove(&id)))
    }

    /// What a service is, if it is there.
    pub(super) fn service(&self, id: ServiceId) -> Result<Option<Service>> {
        match self.services.get(&id, 0) {
            Ok(service) => Ok(Some(service)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).bpf(|| "read the map NS_SERVICES".to_owned()),
        }
    }

    /// Gives a number its service.
    pub(super) fn name(&mut self, id: ServiceId, key: &Key) -> Result<()> {
        let mut name: Name = [0; 192];
        name[0] = if key.v4 { b'4' } else { b'6' };
        let text = key.name.as_str().as_bytes();
        name[1..=text.len()].copy_from_slice(text);
        self.writes += 1;
        self.names
            .insert(id, name, 0)
            .bpf(|| "write the map NS_NAMES: 65536 services are the most".to_owned())
    }

    /// Says which addresses are nodes, and which of them ours.
    pub(super) fn write_nodes(&mut self, wanted: &Table<Address, u32>, config: Config) -> Result<()> {
        let write = || "write the map NS_NODES".to_owned();
        let mut known = Table::new();
        for entry in self.nodes.iter() {
            let (address, flags) = entry.bpf(|| "read the map NS_NODES".to_owned())?;
            known.insert(address, flags);
        }
        for (address, flags) in wanted {
            if known.remove(address) != Some(*flags) {
                self.nodes.insert(address, flags, 0).bpf(write)?;
                self.writes += 1;
            }
        }
        for address in known.into_keys() {
            tolerate_missing(self.nodes.remove(&address))?;
            self.writes += 1;
        }
        if self.config.get(&0, 0).bpf(|| "read the map NS_CONFIG".to_owned())? != config {
            self.config.set(0, config, 0).bpf(|| "write the map NS_CONFIG".to_owned())?;
            self.writes += 1;
        }
        Ok(())
    }

    /// The counters, all CPUs together.
    pub(super) fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        let read = |counter: Counter| {
            let values = self.counters.get(&(counter as u32), 0);
            let values = values.bpf(|| "read the map NS_COUNTERS".to_owned())?;
            Ok((counter.name(), values.iter().sum()))
        };
        Counter::ALL.iter().map(|&counter| read(counter)).collect()
    }

    /// What has been counted of each Service, both families together; without those that are not counted.
    pub(super) fn counts(&self) -> Result<BTreeMap<ServiceName, Counts>> {
        let mut counts = BTreeMap::new();
        let Some(service_counters) = &self.service_counters else { return Ok(counts) };
        for entry in self.names.iter() {
            let (id, name) = entry.bpf(|| "read the map NS_NAMES".to_owned())?;
            let Some(key) = decode(&name) else { continue };
            let counters = match service_counters.get(&id, 0) {
                Ok(counters) => counters,
                // It is being made, or taken away, or an earlier version has made it.
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(error).bpf(|| "read the map NS_SERVICE_COUNTERS".to_owned()),
            };
            let sums: &mut Counts = counts.entry(key.name).or_default();
            for (sum, count) in sums.iter_mut().zip(counters.sum()) {
                *sum = sum.wrapping_add(count);
            }
        }
        Ok(counts)
    }
}

/// What [`Maps::name`] wrote, `None` if somebody else did.
pub(super) fn decode(name: &Name) -> Option<Key> {
    let text = name[1..].split(|&byte| byte == 0).next()?;
    Some(Key { name: ServiceName::new(str::from_utf8(text).ok()?)?, v4: name[0] == b'4' })
}
