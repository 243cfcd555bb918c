//! The watching program, loaded for this process alone: it goes when the process does.

use std::{fs::File, path::Path};

use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData, PerCpuArray, RingBuf},
    programs::{CgroupAttachMode, SockOps},
};
use srcip_common::telemetry::{Event, WatchCounters};

use crate::{
    WATCH_OBJECT,
    dataplane::error::{BpfContext as _, Error, FileContext as _, Result, load_error, object_error},
    netns::NetnsCookie,
};

pub(crate) const PROGRAM: &str = "srcip_watch";

/// Which network namespaces to watch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scope {
    /// All but one: the host's.
    AllBut(NetnsCookie),
    /// These.
    Only(Vec<NetnsCookie>),
}

/// A running watch.
///
/// The program never waits for its reader: what does not fit into the ring buffer is counted as lost.
pub struct Watch {
    /// Holds the program's link.
    _object: Ebpf,
    events: RingBuf<MapData>,
    counters: PerCpuArray<MapData, WatchCounters>,
    watched: HashMap<MapData, u64, u32>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Watches the processes of a cgroup v2 directory. Linux 5.15.
    pub fn start(scope: &Scope, cgroup: &Path) -> Result<Self> {
        let (all, except) = match scope {
            Scope::AllBut(cookie) => (1_u8, cookie.0),
            Scope::Only(_) => (0, 0),
        };
        let mut object = EbpfLoader::new()
            .override_global("WATCH_ALL", &all, true)
            .override_global("EXCEPT", &except, true)
            .load(WATCH_OBJECT)
            .map_err(object_error)?;
        let directory = File::open(cgroup).file("open the cgroup", cgroup)?;
        let program: &mut SockOps = crate::dataplane::object::program(&mut object, PROGRAM)?;
        program.load().map_err(|error| load_error(PROGRAM, error))?;
        program
            .attach(&directory, CgroupAttachMode::Single)
            .bpf(|| format!("attach {PROGRAM} to the cgroup {}", cgroup.display()))?;
        // Only now: a map that is taken out before is not found by the program.
        let events = take_map(&mut object, "EVENTS")?;
        let counters = take_map(&mut object, "WATCH_COUNTERS")?;
        let watched = take_map(&mut object, "WATCHED")?;
        let mut watch = Self { _object: object, events, counters, watched };
        if let Scope::Only(cookies) = scope {
            cookies.iter().try_for_each(|cookie| watch.watch(*cookie, 0))?;
        }
        Ok(watch)
    }

    /// Watches a network namespace, and leaves out the accepting end of its upstream legs, which bear
    /// `mark`; 0 if they bear none.
    pub fn watch(&mut self, netns: NetnsCookie, mark: u32) -> Result<()> {
        self.watched.insert(netns.0, mark, 0).bpf(|| "write the map WATCHED".to_owned())
    }

    /// Hands over what has been told since the last time; returns how many events that were.
    pub fn read(&mut self, mut each: impl FnMut(&Event)) -> usize {
        let mut count = 0;
        while let Some(item) = self.events.next() {
            debug_assert_eq!(item.len(), size_of::<Event>());
            // SAFETY: the program writes whole events, which any bytes are; the ring buffer aligns to
            // eight bytes only, so the event is copied out.
            let event = unsafe { item.as_ptr().cast::<Event>().read_unaligned() };
            drop(item);
            each(&event);
            count += 1;
        }
        count
    }

    /// What the program has counted, all CPUs together.
    pub fn counters(&self) -> Result<WatchCounters> {
        let mut sum = WatchCounters::default();
        let values = self.counters.get(&0, 0).bpf(|| "read the map WATCH_COUNTERS".to_owned())?;
        values.iter().for_each(|value| sum += *value);
        Ok(sum)
    }
}

fn take_map<T: TryFrom<aya::maps::Map, Error = aya::maps::MapError>>(
    object: &mut Ebpf,
    name: &str,
) -> Result<T> {
    let map = object.take_map(name).ok_or_else(|| missing(name))?;
    T::try_from(map).bpf(|| format!("use the map {name}"))
}

fn missing(name: &str) -> Error {
    Error::Bpf { action: format!("find the map {name}"), source: "the eBPF object does not have it".into() }
}
