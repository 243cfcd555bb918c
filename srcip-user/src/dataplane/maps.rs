//! Handles on an instance's pinned maps.

use std::{
    collections::{HashMap, HashSet},
    mem,
    net::IpAddr,
    path::Path,
};

use aya::{
    Pod as MapValue,
    maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues, SockHash},
    util::nr_cpus,
};
use srcip_common::{
    LAYOUT_VERSION,
    counters::Counters,
    keys::{AddressKey, ConnectionKey, ListenerKey, RegisteredKey},
    pod::{Pod, STEER},
    telemetry::{Event, HISTORY_LENGTH},
};

use super::{
    error::{BpfContext as _, Error, Result},
    pins::Pins,
    record::Record,
};
use crate::netns::NetnsCookie;

/// Fits a map value; see `ATTACHMENTS` on the eBPF side.
const RECORD_SIZE: usize = 4096;

/// Records as last read, with their bytes: each attach looks at all of them, and few have changed.
#[derive(Default, Debug)]
pub struct Decoded(HashMap<u64, (Vec<u8>, Record)>);

/// The maps of one instance.
pub struct Maps {
    attachments: BpfHashMap<MapData, u64, [u8; RECORD_SIZE]>,
    pods: BpfHashMap<MapData, u64, Pod>,
    counters: PerCpuHashMap<MapData, u64, Counters>,
    addresses: BpfHashMap<MapData, AddressKey, u8>,
    listeners: SockHash<MapData, ListenerKey>,
    by_companion: BpfHashMap<MapData, ConnectionKey, u8>,
    listened: BpfHashMap<MapData, ListenerKey, u8>,
    registered: BpfHashMap<MapData, RegisteredKey, u8>,
    pending: BpfHashMap<MapData, ConnectionKey, u64>,
}

impl std::fmt::Debug for Maps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Maps").finish_non_exhaustive()
    }
}

impl Maps {
    /// Checks that the pinned maps, if there are any, are laid out as this version expects.
    pub fn check_layout(pins: &Pins) -> Result<()> {
        let path = pins.maps().join("LAYOUT");
        if !path.exists() {
            return Ok(());
        }
        let layout: Array<MapData, u32> = open(&path, Map::Array)?;
        let found = layout.get(&0, 0).bpf(|| format!("read {}", path.display()))?;
        // 0: whoever made the maps was interrupted before it wrote its number, so nothing is in them.
        if found != 0 && found != LAYOUT_VERSION {
            return Err(Error::OtherVersion {
                path: pins.root().to_owned(),
                found,
                expected: LAYOUT_VERSION,
            });
        }
        Ok(())
    }

    /// Writes the layout's number into freshly made maps.
    pub fn stamp_layout(pins: &Pins) -> Result<()> {
        let path = pins.maps().join("LAYOUT");
        let mut layout: Array<MapData, u32> = open(&path, Map::Array)?;
        layout.set(0, LAYOUT_VERSION, 0).bpf(|| format!("write {}", path.display()))
    }

    /// Opens the maps of an instance.
    pub fn open(pins: &Pins) -> Result<Self> {
        let maps = pins.maps();
        Ok(Self {
            attachments: open(&maps.join("ATTACHMENTS"), Map::HashMap)?,
            pods: open(&maps.join("PODS"), Map::HashMap)?,
            counters: open(&maps.join("COUNTERS"), Map::PerCpuHashMap)?,
            addresses: open(&maps.join("ADDRESSES"), Map::HashMap)?,
            listeners: open(&maps.join("LISTENERS"), Map::SockHash)?,
            by_companion: open(&maps.join("BY_COMPANION"), Map::LruHashMap)?,
            listened: open(&maps.join("LISTENED"), Map::HashMap)?,
            registered: open(&maps.join("REGISTERED"), Map::LruHashMap)?,
            pending: open(&maps.join("PENDING"), Map::LruHashMap)?,
        })
    }

    /// What is remembered of all attachments, read from nothing but the map that has it, which looks the
    /// same in all versions. A map that is there and cannot be read counts as one unreadable record.
    pub fn read_records(pins: &Pins, decoded: &mut Decoded) -> Vec<Result<Record>> {
        let path = pins.maps().join("ATTACHMENTS");
        if !path.exists() {
            return Vec::new();
        }
        let read = || "read the map ATTACHMENTS".to_owned();
        let map: BpfHashMap<MapData, u64, [u8; RECORD_SIZE]> = match open(&path, Map::HashMap) {
            Ok(map) => map,
            Err(error) => return vec![Err(error)],
        };
        let before = mem::take(&mut decoded.0);
        let mut decode_entry = |(cookie, value): (u64, [u8; RECORD_SIZE])| {
            let json = json(&value);
            let record = match before.get(&cookie) {
                Some((known, record)) if known == json => record.clone(),
                _ => decode(cookie, json)?,
            };
            decoded.0.insert(cookie, (json.to_vec(), record.clone()));
            Ok(record)
        };
        map.iter().map(|entry| entry.bpf(read).and_then(&mut decode_entry)).collect()
    }

    /// Whether the instance is known to have no attachment.
    pub fn are_unused(pins: &Pins) -> bool {
        let path = pins.maps().join("ATTACHMENTS");
        if !path.exists() {
            return true;
        }
        let map: Result<BpfHashMap<MapData, u64, [u8; RECORD_SIZE]>> = open(&path, Map::HashMap);
        map.is_ok_and(|map| map.keys().next().is_none())
    }

    /// What is remembered of one attachment.
    pub fn record(&self, cookie: NetnsCookie) -> Result<Option<Record>> {
        match self.attachments.get(&cookie.0, 0) {
            Ok(value) => decode(cookie.0, json(&value)).map(Some),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(error).bpf(|| "read the map ATTACHMENTS".to_owned()),
        }
    }

    /// Remembers an attachment.
    pub fn store_record(&mut self, record: &Record) -> Result<()> {
        let failed = |problem: &str| Error::Record { name: record.name.clone(), problem: problem.to_owned() };
        let json = serde_json::to_vec(record).map_err(|error| failed(&error.to_string()))?;
        let mut value = [0; RECORD_SIZE];
        // A zero byte ends it, so one must be left.
        if json.len() >= RECORD_SIZE {
            return Err(failed("is longer than 4 KiB; write the port lists as ranges"));
        }
        value[..json.len()].copy_from_slice(&json);
        let stored = self.attachments.insert(record.netns_cookie.0, value, 0);
        stored.bpf(|| "write the map ATTACHMENTS: 1024 pods are the most".to_owned())
    }

    /// Gives a pod its settings, and its counters if it has none yet.
    pub fn store_pod(&mut self, cookie: NetnsCookie, pod: Pod) -> Result<()> {
        if let Err(MapError::KeyNotFound) = self.counters.get(&cookie.0, 0) {
            let cpus = nr_cpus().map_err(|(path, error)| (path.to_owned(), error));
            let cpus = cpus.map_err(|(path, error)| format!("{path}: {error}"));
            let zero = vec![Counters::default(); cpus.bpf(|| "count the CPUs".to_owned())?];
            let zero = PerCpuValues::try_from(zero).bpf(|| "count the CPUs".to_owned())?;
            let stored = self.counters.insert(cookie.0, zero, 0);
            stored.bpf(|| "write the map COUNTERS".to_owned())?;
        }
        // Where it was, or anywhere: the ports that an attachment before this one used last may not have
        // rested yet.
        let mut pod = pod;
        pod.cursor = self.pods.get(&cookie.0, 0).map_or_else(|_| random(), |pod| pod.cursor);
        self.pods.insert(cookie.0, pod, 0).bpf(|| "write the map PODS".to_owned())
    }

    /// Stops steering; upstream legs are served on.
    pub fn stop_steering(&mut self, cookie: NetnsCookie) -> Result<()> {
        match self.pods.get(&cookie.0, 0) {
            Ok(mut pod) => {
                pod.flags &= !STEER;
                self.pods.insert(cookie.0, pod, 0).bpf(|| "write the map PODS".to_owned())
            }
            Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(error).bpf(|| "read the map PODS".to_owned()),
        }
    }

    /// Notes the addresses of a pod; those it no longer has are forgotten.
    pub fn store_addresses(&mut self, cookie: NetnsCookie, addresses: &[IpAddr]) -> Result<()> {
        let current: HashSet<AddressKey> =
            addresses.iter().map(|&ip| AddressKey { netns: cookie.0, address: ip.into() }).collect();
        for key in &current {
            self.addresses.insert(key, 1, 0).bpf(|| "write the map ADDRESSES".to_owned())?;
        }
        remove_keys(&mut self.addresses, |key| key.netns == cookie.0 && !current.contains(key))
    }

    /// Addresses of a pod: configured, and learned since.
    pub fn addresses(&self, cookie: NetnsCookie) -> HashSet<IpAddr> {
        self.all_addresses().remove(&cookie).unwrap_or_default()
    }

    /// The same of all pods; the map is read once.
    pub fn all_addresses(&self) -> HashMap<NetnsCookie, HashSet<IpAddr>> {
        let mut all: HashMap<_, HashSet<_>> = HashMap::new();
        for key in self.addresses.keys().filter_map(Result::ok) {
            all.entry(NetnsCookie(key.netns)).or_default().insert(key.address.into());
        }
        all
    }

    /// The counters of a pod, all CPUs together.
    pub fn counters(&self, cookie: NetnsCookie) -> Result<Counters> {
        let mut sum = Counters::default();
        match self.counters.get(&cookie.0, 0) {
            Ok(values) => values.iter().for_each(|value| sum += *value),
            Err(MapError::KeyNotFound) => {}
            Err(error) => Err(error).bpf(|| "read the map COUNTERS".to_owned())?,
        }
        Ok(sum)
    }

    /// How many listeners of each pod and port wait in slots; the map is read once.
    pub fn registered_listeners(&self) -> HashMap<(NetnsCookie, u16), usize> {
        let mut all = HashMap::new();
        for key in self.listeners.keys().filter_map(Result::ok) {
            *all.entry((NetnsCookie(key.netns), key.port)).or_default() += 1;
        }
        all
    }

    /// Forgets a pod, its record last: as long as that is there, the job can be taken up again.
    pub fn forget(&mut self, cookie: NetnsCookie) -> Result<()> {
        let netns = cookie.0;
        tolerate_missing(self.pods.remove(&netns))?;
        remove_sockets(&mut self.listeners, |key| key.netns == netns)?;
        remove_keys(&mut self.by_companion, |key| key.netns == netns)?;
        remove_keys(&mut self.listened, |key| key.netns == netns)?;
        remove_keys(&mut self.registered, |key| key.netns == netns)?;
        remove_keys(&mut self.pending, |key| key.netns == netns)?;
        remove_keys(&mut self.addresses, |key| key.netns == netns)?;
        tolerate_missing(self.counters.remove(&netns))?;
        tolerate_missing(self.attachments.remove(&netns))
    }
}

/// Events that may be overwritten while they are read are not: so many of the oldest.
const AT_RISK: u64 = 128;

/// What the recorder remembers.
pub(super) fn read_history(pins: &Pins) -> Result<Vec<Event>> {
    let path = pins.maps().join("HISTORY");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let history: Array<MapData, Event> = open(&path, Map::Array)?;
    let count: Array<MapData, u64> = open(&pins.maps().join("HISTORY_COUNT"), Map::Array)?;
    let written = count.get(&0, 0).bpf(|| "read the map HISTORY_COUNT".to_owned())?;
    let length = u64::from(HISTORY_LENGTH);
    let first = written.saturating_sub(length - AT_RISK);
    (first..written)
        .map(|number| history.get(&((number % length) as u32), 0).bpf(|| format!("read {}", path.display())))
        // One that is being written just now is not there yet.
        .filter(|event| event.as_ref().map_or(true, |event| event.kind != 0))
        .collect()
}

/// Tells the recorder to remember a pod's connections, whose upstream legs have a mark, or not to.
pub(super) fn record_pod(pins: &Pins, cookie: NetnsCookie, mark: Option<u32>) -> Result<()> {
    let path = pins.maps().join("WATCHED");
    if !path.exists() {
        return Ok(());
    }
    let mut watched: BpfHashMap<MapData, u64, u32> = open(&path, Map::HashMap)?;
    match mark {
        Some(mark) => watched.insert(cookie.0, mark, 0).bpf(|| "write the map WATCHED".to_owned()),
        None => tolerate_missing(watched.remove(&cookie.0)),
    }
}

/// Good enough to start at different places.
fn random() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(()) as u32
}

/// A zero byte ends it.
fn json(value: &[u8; RECORD_SIZE]) -> &[u8] {
    value.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn decode(cookie: u64, json: &[u8]) -> Result<Record> {
    serde_json::from_slice(json).map_err(|error| Error::Record {
        name: format!("netns cookie {cookie}"),
        problem: format!("cannot be read ({error}); `srcip cleanup` removes it"),
    })
}

pub(crate) fn open<T: TryFrom<Map, Error = MapError>>(path: &Path, kind: fn(MapData) -> Map) -> Result<T> {
    let data = MapData::from_pin(path).bpf(|| format!("open the pinned map {}", path.display()))?;
    T::try_from(kind(data)).bpf(|| format!("use the pinned map {}", path.display()))
}

fn remove_keys<K: MapValue, V: MapValue>(
    map: &mut BpfHashMap<MapData, K, V>,
    wanted: impl Fn(&K) -> bool,
) -> Result<()> {
    // First all keys, then the removals: removing while iterating restarts the iteration.
    let keys: Vec<K> = map.keys().filter_map(Result::ok).filter(|key| wanted(key)).collect();
    keys.iter().try_for_each(|key| tolerate_missing(map.remove(key)))
}

fn remove_sockets<K: MapValue>(map: &mut SockHash<MapData, K>, wanted: impl Fn(&K) -> bool) -> Result<()> {
    let keys: Vec<K> = map.keys().filter_map(Result::ok).filter(|key| wanted(key)).collect();
    keys.iter().try_for_each(|key| tolerate_missing(map.remove(key)))
}

pub(crate) fn tolerate_missing(result: Result<(), MapError>) -> Result<()> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result.bpf(|| "remove a key from a map".to_owned()),
    }
}
