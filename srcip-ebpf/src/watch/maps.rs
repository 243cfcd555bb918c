//! The watching program's maps. Each of its copies has its own; only the recorder's are pinned.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_RB_NO_WAKEUP},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use srcip_common::telemetry::{Event, HISTORY_LENGTH, OPEN, WatchCounters};
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

/// The recorder's memory: the last events. Whoever writes one overwrites the oldest.
#[map]
static HISTORY: Array<Event> = Array::with_max_entries(HISTORY_LENGTH, 0);

/// How many events the recorder has written.
#[map]
static HISTORY_COUNT: Array<u64> = Array::with_max_entries(1, 0);

/// Cookies of network namespaces to watch, with the mark of their upstream legs; 0 if they have none.
#[map]
static WATCHED: HashMap<u64, u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);

/// What had been received by sockets that wait in FIN_WAIT2.
#[map]
static RECEIVED: LruHashMap<u64, u64> = LruHashMap::with_max_entries(16384, 0);

/// How many events there were, and how many did not fit.
#[map]
static WATCH_COUNTERS: PerCpuArray<WatchCounters> = PerCpuArray::with_max_entries(1, 0);

/// Whether connections in this network namespace are to be told of: the mark of its upstream legs.
#[inline(always)]
pub fn watched(netns: u64) -> Option<u32> {
    if let Some(mark) = WATCHED.get_ptr(netns) {
        // SAFETY: verified: inside the map's value. Not preallocated, so it is freed only after an RCU
        // grace period; programs run under RCU.
        return Some(unsafe { mark.read_volatile() });
    }
    (WATCH_ALL.load() != 0 && netns != EXCEPT.load()).then_some(0)
}

/// Notes what a socket had received when it entered FIN_WAIT2.
#[inline(always)]
pub fn note_received(socket: u64, bytes: u64) {
    let _ = RECEIVED.insert(socket, bytes, 0);
}

/// The note again, which goes.
#[inline(always)]
pub fn take_received(socket: u64) -> Option<u64> {
    // SAFETY: verified: inside the map's value. An LRU map may hand the element to another socket while it
    // is read; the worst is a count that is wrong by one.
    let bytes = unsafe { RECEIVED.get_ptr(socket)?.read_volatile() };
    let _ = RECEIVED.remove(socket);
    Some(bytes)
}

/// Adds one to a counter. Atomically: a program in process context may be interrupted by one in softirq on
/// the same CPU, and no count may be lost.
#[inline(always)]
fn count(counter: impl FnOnce(&WatchCounters) -> &u64) {
    if let Some(counters) = WATCH_COUNTERS.get(0) {
        sys::add(counter(counters), 1);
    }
}

/// Tells, or keeps. Never waits: what does not fit is counted.
#[inline(always)]
pub fn emit(event: &Event) {
    if TELL.load() == 0 {
        keep(event);
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

#[inline(always)]
fn keep(event: &Event) {
    let Some(written) = HISTORY_COUNT.get(0) else { return };
    let index = sys::fetch_increment(written) as u32 % HISTORY_LENGTH;
    if let Some(place) = HISTORY.get_ptr_mut(index) {
        // SAFETY: verified: inside the map's value. The place is this program's own until all others have
        // been written once more; readers leave out those that may be overwritten while they read.
        unsafe { place.write(*event) };
    }
}
