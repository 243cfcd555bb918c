//! How full the maps are: an instance that has run out of room fails in ways that are hard to trace.

use std::path::Path;

use aya::{
    Pod as MapValue,
    maps::{Array, HashMap, Map, MapData, MapError, SockHash},
};
use serde::Serialize;
use srcip_common::{
    keys::{AddressKey, ConnectionKey, ListenerKey, RegisteredKey},
    pod::Pod,
};

use super::{
    Dataplane,
    error::{BpfContext as _, Result},
    maps::{Maps, open},
};

/// How full a map is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct MapFill {
    /// Its name, as in the architecture.
    pub name: &'static str,
    /// Its entries.
    pub entries: u64,
    /// How many it can have.
    pub max_entries: u64,
    /// Whether an old entry makes room for a new one: being full is what such a map is for.
    pub evicts: bool,
}

/// The maps that are looked at, and how to count what is in them.
const MAPS: [(&str, bool, Count); 6] = [
    ("PODS", false, |path, max| count::<u64, Pod>(path, Map::HashMap, max)),
    ("ADDRESSES", false, |path, max| count::<AddressKey, u8>(path, Map::HashMap, max)),
    ("LISTENERS", false, |path, max| {
        let map: SockHash<MapData, ListenerKey> = open(path, Map::SockHash)?;
        Ok(bounded(map.keys(), max))
    }),
    ("REGISTERED", true, |path, max| count::<RegisteredKey, u8>(path, Map::LruHashMap, max)),
    ("PENDING", true, |path, max| count::<ConnectionKey, u64>(path, Map::LruHashMap, max)),
    ("HISTORY", true, |path, max| {
        // An array, whose places are all there from the start.
        let written: Array<MapData, u64> = open(&path.with_file_name("HISTORY_COUNT"), Map::Array)?;
        Ok(written.get(&0, 0).bpf(|| "read the map HISTORY_COUNT".to_owned())?.min(max))
    }),
];

/// How many maps are looked at.
pub const MAP_COUNT: usize = MAPS.len();

type Count = fn(&Path, u64) -> Result<u64>;

impl Dataplane {
    /// How full the maps are; a system call per entry. Empty if nothing is attached.
    pub fn map_fill(&self) -> Result<Vec<MapFill>> {
        // Held only while the maps are looked up by name: who is counting is in nobody's way.
        let paths: Vec<_> = {
            let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
            Maps::check_layout(&self.pins)?;
            MAPS.into_iter()
                .map(|(name, evicts, count)| (name, evicts, count, self.pins.maps().join(name)))
                .filter(|(.., path)| path.exists())
                .collect()
        };
        let mut fill = Vec::new();
        for (name, evicts, count, path) in paths {
            // Detached since.
            if !path.exists() {
                continue;
            }
            let info = aya::maps::MapInfo::from_pin(&path);
            let info = info.bpf(|| format!("read what the map {} is", path.display()))?;
            let max_entries = u64::from(info.max_entries());
            fill.push(MapFill { name, entries: count(&path, max_entries)?, max_entries, evicts });
        }
        Ok(fill)
    }
}

/// All maps, half full.
#[cfg(test)]
pub(crate) fn for_test() -> Vec<MapFill> {
    MAPS.into_iter().map(|(name, evicts, _)| MapFill { name, entries: 8, max_entries: 16, evicts }).collect()
}

fn count<K: MapValue, V: MapValue>(path: &Path, kind: fn(MapData) -> Map, max: u64) -> Result<u64> {
    let map: HashMap<MapData, K, V> = open(path, kind)?;
    Ok(bounded(map.keys(), max))
}

/// Iterating starts over when the current key is removed; the bound makes that end.
fn bounded<K>(keys: impl Iterator<Item = Result<K, MapError>>, max: u64) -> u64 {
    keys.take(usize::try_from(max).unwrap_or(usize::MAX)).take_while(std::result::Result::is_ok).count()
        as u64
}
