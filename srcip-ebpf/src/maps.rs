//! All maps, and the small questions asked of them.
//!
//! They are pinned by name and shared by every program of an instance: the node's hooks and each
//! pod's `sk_lookup` or `tc` program.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST},
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuHashMap, SockHash},
};
use srcip_common::{
    address::Address,
    counters::Counters,
    keys::{AddressKey, ConnectionKey, ListenerKey, RegisteredKey},
    pod::Pod,
};
use srcip_ebpf::sys;

const MAX_PODS: u32 = 1024;

/// Netns cookie of the pod that a per-pod program was loaded for. `sk_lookup` programs have no helper
/// to ask for it, and a constant is cheaper.
#[unsafe(no_mangle)]
static NETNS_COOKIE: Global<u64> = Global::new(0);

/// Whose listeners the iterator is to register: netns and port. Not pinned: it lies between the process that
/// runs the iterator and the copy that this process has loaded.
#[map]
static WANTED: Array<ListenerKey> = Array::with_max_entries(1, 0);

/// [`srcip_common::LAYOUT_VERSION`] of whoever made these maps.
#[map]
static LAYOUT: Array<u32> = Array::pinned(1, 0);

/// What user space remembers of an attachment, as JSON: name, paths, the sysctl's old value. No
/// program reads it; it lies here to live exactly as long as what it describes.
#[map]
static ATTACHMENTS: HashMap<u64, [u8; 4096]> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);

/// Steered pods by netns cookie.
#[map]
pub static PODS: HashMap<u64, Pod> = HashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);

/// Counters by netns cookie.
#[map]
static COUNTERS: PerCpuHashMap<u64, Counters> = PerCpuHashMap::pinned(MAX_PODS, BPF_F_NO_PREALLOC);

/// Addresses of the pods: what was configured at attach, and what clients have reached since.
#[map]
static ADDRESSES: HashMap<AddressKey, u8> = HashMap::pinned(16384, BPF_F_NO_PREALLOC);

/// The proxies' listeners. A socket leaves by itself when it closes.
#[map]
pub static LISTENERS: SockHash<ListenerKey> = SockHash::pinned(16384, 0);

/// Under the key of its first slot: whether a pod has ever had a listener of this port and family. If not,
/// no slot need be looked at.
#[map]
static LISTENED: HashMap<ListenerKey, u8> = HashMap::pinned(16384, BPF_F_NO_PREALLOC);

/// Which listeners have a slot.
#[map]
pub static REGISTERED: LruHashMap<RegisteredKey, u8> = LruHashMap::pinned(16384, 0);

/// Upstream legs that may pass `sk_lookup`: the time of the note, in nanoseconds since boot, with a
/// [`Note`] in its lowest bits.
#[map]
static PENDING: LruHashMap<ConnectionKey, u64> = LruHashMap::pinned(65536, 0);

/// What a note in [`PENDING`] is good for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// One packet: a SYN that is about to leave. Nobody else can use it while the application's queue is
    /// full.
    Once = 0,
    /// `connect` is choosing a port and nobody else may choose it. Its own search looks sockets up, and
    /// those lookups run `sk_lookup` as well.
    Reservation = 1,
    /// All packets until the application's end stands. Only with SYN cookies is there anything to look up
    /// by then: the last ACK, and, if that is dropped, the data that follows it.
    Standing = 2,
}

impl Note {
    const BITS: u64 = 3;

    #[inline(always)]
    fn now(self) -> u64 {
        sys::boot_ns() & !Self::BITS | self as u64
    }

    /// How long it is good. A reservation is used or given up within a system call, but for a connect that
    /// fails before its SYN. A SYN is retransmitted for 127 s with the default
    /// `net.ipv4.tcp_syn_retries`.
    #[inline(always)]
    fn max_age_ns(value: u64) -> u64 {
        if value & Self::BITS == Self::Reservation as u64 { 1_000_000_000 } else { 180_000_000_000 }
    }
}

/// Connection attempts that `tc` leaves to its companion.
#[map]
pub static BY_COMPANION: LruHashMap<ConnectionKey, u8> = LruHashMap::pinned(16384, 0);

/// The pod that this copy of a per-pod program serves.
#[inline(always)]
pub fn own_netns() -> u64 {
    NETNS_COOKIE.load()
}

/// The netns and port whose listeners the iterator registers.
#[inline(always)]
pub fn wanted() -> Option<&'static ListenerKey> {
    WANTED.get(0)
}

/// Whether this pod has ever had a listener of this port and family.
#[inline(always)]
pub fn has_listened(key: ListenerKey) -> bool {
    LISTENED.get_ptr(ListenerKey { slot: 0, ..key }).is_some()
}

/// Notes that a listener is about to have a slot. The key is copied: one whose address is taken stays in
/// memory, and the verifier gives up on a loop that counts there.
#[inline(always)]
pub fn note_listened(key: ListenerKey) {
    let _ = LISTENED.insert(ListenerKey { slot: 0, ..key }, 1, 0);
}

/// The pod with this netns cookie, if it is steered.
#[inline(always)]
pub fn pod(netns: u64) -> Option<&'static Pod> {
    // SAFETY: `PODS` is not preallocated, so a value replaced or removed meanwhile is freed only
    // after an RCU grace period; programs run under RCU.
    unsafe { PODS.get(netns) }
}

/// Adds one to a counter of the pod.
#[inline(always)]
pub fn count(netns: u64, counter: impl FnOnce(&mut Counters) -> &mut u64) {
    if let Some(counters) = COUNTERS.get_ptr_mut(netns) {
        // SAFETY: a per-CPU value; programs do not migrate while they run. A program that interrupts
        // another one on the same CPU can at worst lose one count.
        let counter = counter(unsafe { &mut *counters });
        *counter += 1;
    }
}

/// Whether `address` is one of the pod's own.
#[inline(always)]
pub fn is_own(netns: u64, address: Address) -> bool {
    ADDRESSES.get_ptr(AddressKey { netns, address }).is_some()
}

/// Remembers that clients reach the pod at `address`, for one that was added after the attach.
#[inline(always)]
pub fn learn_own(netns: u64, address: Address) {
    if !is_own(netns, address) {
        let key = AddressKey { netns, address };
        // Full: the pod's proxy then has to mark connections to this address itself.
        let _ = ADDRESSES.insert(key, 1, BPF_NOEXIST.into());
    }
}

/// A source that only a transparent proxy can have: neither the pod's own, nor loopback, nor unset.
#[inline(always)]
pub fn is_foreign(netns: u64, source: Address) -> bool {
    !source.is_unspecified() && !source.is_loopback() && !is_own(netns, source)
}

/// Whether a connection between these is an upstream leg: from a foreign address to the pod itself.
#[inline(always)]
pub fn is_upstream(netns: u64, source: Address, destination: Address) -> bool {
    is_foreign(netns, source) && (destination.is_loopback() || is_own(netns, destination))
}

/// The note of an upstream leg, if there is one that is still good.
#[inline(always)]
fn pending(key: &ConnectionKey) -> Option<u64> {
    // SAFETY: an LRU map may hand the element to another key while it is read; the worst is a wrong
    // age, and only for a connection evicted among 65536 that are all in mid-handshake.
    let value = unsafe { *PENDING.get(key)? };
    (sys::boot_ns().wrapping_sub(value & !Note::BITS) < Note::max_age_ns(value)).then_some(value)
}

/// Notes an upstream leg.
#[inline(always)]
pub fn note_pending(key: &ConnectionKey, note: Note) {
    let _ = PENDING.insert(key, note.now(), 0);
}

/// Notes an upstream leg whose port is being chosen, unless there is one with the same ends.
#[inline(always)]
pub fn reserve_pending(key: &ConnectionKey) -> bool {
    if PENDING.insert(key, Note::Reservation.now(), BPF_NOEXIST.into()).is_ok() {
        return true;
    }
    let is_stale = pending(key).is_none();
    if is_stale {
        note_pending(key, Note::Reservation);
    }
    is_stale
}

/// Whether a packet of this connection may pass. Uses the note up if it is for one packet: of two at the
/// same time, one passes.
#[inline(always)]
pub fn take_pending(key: &ConnectionKey) -> bool {
    match pending(key) {
        Some(value) if value & Note::BITS == Note::Once as u64 => PENDING.remove(key).is_ok(),
        Some(_) => true,
        None => false,
    }
}

/// Takes the note back.
#[inline(always)]
pub fn forget_pending(key: &ConnectionKey) {
    let _ = PENDING.remove(key);
}
