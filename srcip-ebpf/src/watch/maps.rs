//! The watching program's maps. Each of its copies has its own; only the recorder's are pinned.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP},
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use srcip_common::telemetry::{Event, NOBODY, OPEN, WatchCounters};
use srcip_ebpf::sys;

/// Tell by the ring buffer; 0 for the recorder, which only keeps [`HISTORY`].
#[unsafe(no_mangle)]
static TELL: Global<u8> = Global::new(1);

/// Watch every network namespace but [`EXCEPT`], not only those in [`WATCHED`].
#[unsafe(no_mangle)]
static WATCH_ALL: Global<u8> = Global::new(0);

/// Cookie of a network namespace not to watch: the host's own.
#[unsafe(no_mangle)]
static EXCEPT: Global<u64> = Global::new(0);

/// What is told, in the order it happened.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// The recorder's memory: the last connections by socket, each with its last event.
#[map]
static HISTORY: LruHashMap<u64, Event> = LruHashMap::with_max_entries(8192, 0);

/// Cookies of the network namespaces to watch.
#[map]
static WATCHED: HashMap<u64, u8> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// How many events there were, and how many did not fit.
#[map]
static WATCH_COUNTERS: PerCpuArray<WatchCounters> = PerCpuArray::with_max_entries(1, 0);

/// What is known of an open connection; goes with its socket.
#[btf_map]
pub static CONNECTIONS: SkStorage<Connection> = SkStorage::new();

/// The value of [`CONNECTIONS`].
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Connection {
    pub opened_ns: u64,
    /// `bytes_acked` when it was established.
    pub acked: u64,
    /// `bytes_received` when it was established.
    pub received: u64,
    /// `bytes_received` when it entered FIN_WAIT2.
    pub received_at_fin_wait2: u64,
    pub role: u8,
    pub closed_by: u8,
    pub fin_received: u8,
    pub padding: u8,
    pub padding2: u32,
}

impl Connection {
    /// Notes who closed it, unless that is known.
    #[inline(always)]
    pub fn close_by(&mut self, who: u8) {
        if self.closed_by == NOBODY {
            self.closed_by = who;
        }
    }
}

/// Adds one to a counter. Atomically: a program in process context may be interrupted by one in softirq on
/// the same CPU, and no count may be lost.
#[inline(always)]
pub fn count(counter: impl FnOnce(&WatchCounters) -> &u64) {
    if let Some(counters) = WATCH_COUNTERS.get(0) {
        sys::increment(counter(counters));
    }
}

/// Whether connections in this network namespace are to be told of.
#[inline(always)]
pub fn is_watched(netns: u64) -> bool {
    if WATCH_ALL.load() != 0 {
        return netns != EXCEPT.load();
    }
    WATCHED.get_ptr(netns).is_some()
}

/// Tells, or keeps. Never waits: what does not fit is counted.
#[inline(always)]
pub fn emit(event: Event) {
    if TELL.load() == 0 {
        let _ = HISTORY.insert(event.socket, event, 0);
        return;
    }
    // The reader looks several times a second by itself: waking it for each event would cost the
    // connection more than everything else here.
    let told = EVENTS.output::<Event>(event, BPF_RB_NO_WAKEUP.into()).is_ok();
    if event.kind == OPEN {
        count(|c| &c.opened);
        if !told {
            count(|c| &c.opened_lost);
        }
    } else {
        count(|c| &c.closed);
        if !told {
            count(|c| &c.closed_lost);
        }
    }
}
