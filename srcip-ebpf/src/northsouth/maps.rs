//! All maps of the north-south programs, pinned by name, and the small questions asked of them.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::bpf_get_smp_processor_id,
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, lpm_trie::Key},
};
use srcip_common::{
    address::Address,
    northsouth::{
        Affinity, AffinityKey, Config, Endpoint, EndpointKey, Flow, FlowKey, FragmentKey, Fragments,
        Frontend, FrontendKey, OWN, RangeKey, Service, ServiceId,
        counter::{Counter, PARTS, ServiceCounter, ServiceCounters},
        packet::Family,
    },
};
use srcip_ebpf::sys;

/// [`srcip_common::northsouth::LAYOUT_VERSION`] of whoever made these maps.
#[map]
static NS_LAYOUT: Array<u32> = Array::pinned(1, 0);

/// The name of each service, ended by zeroes. No program reads it: it is how user space finds its services
/// again.
#[map]
static NS_NAMES: HashMap<ServiceId, [u8; 192]> = HashMap::pinned(65536, BPF_F_NO_PREALLOC);

#[map]
static NS_FRONTENDS: HashMap<FrontendKey, Frontend> = HashMap::pinned(262_144, BPF_F_NO_PREALLOC);

#[map]
static NS_SERVICES: HashMap<ServiceId, Service> = HashMap::pinned(65536, BPF_F_NO_PREALLOC);

#[map]
static NS_ENDPOINTS: HashMap<EndpointKey, Endpoint> = HashMap::pinned(1_048_576, BPF_F_NO_PREALLOC);

/// Who may use restricted frontends.
#[map]
static NS_RANGES: LpmTrie<RangeKey, u8> = LpmTrie::pinned(262_144, BPF_F_NO_PREALLOC);

/// The nodes' addresses; [`OWN`] for this one's.
#[map]
static NS_NODES: HashMap<Address, u32> = HashMap::pinned(65536, BPF_F_NO_PREALLOC);

#[map]
static NS_CONFIG: Array<Config> = Array::pinned(1, 0);

/// Both directions of every flow. The least recently used one makes room: its table finds the endpoint again, if
/// the endpoints have not changed meanwhile.
#[map]
pub static NS_FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::pinned(524_288, 0);

#[map]
pub static NS_AFFINITY: LruHashMap<AffinityKey, Affinity> = LruHashMap::pinned(131_072, 0);

/// Datagrams on their way in fragments. A datagram's fragments come one close upon the other.
#[map]
pub static NS_FRAGMENTS: LruHashMap<FragmentKey, Fragments> = LruHashMap::pinned(16_384, 0);

#[map]
static NS_COUNTERS: PerCpuArray<u64> = PerCpuArray::pinned(64, 0);

/// What has been counted of each service. User space makes the entry and takes it away, with the service.
#[map]
static NS_SERVICE_COUNTERS: HashMap<ServiceId, ServiceCounters> = HashMap::pinned(65536, BPF_F_NO_PREALLOC);

/// Adds one.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(number) = NS_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: verified: inside the map's value, this CPU's own. Both programs run in softirq, where
        // nothing else that counts interrupts them.
        unsafe { *number += 1 };
    }
}

/// Counts for a service, and for all of them together.
#[inline(always)]
pub fn count_of(service: ServiceId, counter: ServiceCounter, n: u64) {
    if let Some(all) = counter.of_all() {
        count(all);
    }
    let Some(counters) = NS_SERVICE_COUNTERS.get_ptr(service) else { return };
    // SAFETY: takes nothing, returns the processor that the program runs on.
    let part = unsafe { bpf_get_smp_processor_id() } as usize % PARTS;
    // SAFETY: verified: inside the map's value. As in `frontend`; all who write to it add.
    let counters = unsafe { &*counters };
    sys::add(&counters.parts[part][counter as usize], n);
}

/// What answers at this address: by the address itself, or, if it is a node's, as a NodePort.
#[inline(always)]
pub fn frontend(family: Family, address: Address, port: u16, protocol: u8) -> Option<Frontend> {
    let look = |address| {
        let found = NS_FRONTENDS.get_ptr(FrontendKey::new(address, port, protocol))?;
        // SAFETY: verified: inside the map's value. Not preallocated, so it is freed only after an RCU grace
        // period; programs run under RCU. The same goes for every map here but the LRU ones.
        Some(unsafe { found.read_volatile() })
    };
    look(address).or_else(|| {
        NS_NODES.get_ptr(address)?;
        look(match family {
            Family::V4 => Address::from_v4_be(0),
            Family::V6 => Address::from_v6_be([0; 4]),
        })
    })
}

/// The service of a number.
#[inline(always)]
pub fn service(id: ServiceId) -> Option<&'static Service> {
    // SAFETY: as in `frontend`; it is replaced, never written to.
    unsafe { NS_SERVICES.get(id) }
}

/// An endpoint of a service.
#[inline(always)]
pub fn endpoint(service: ServiceId, index: u32) -> Option<&'static Endpoint> {
    // SAFETY: as in `frontend`; it is replaced, never written to.
    unsafe { NS_ENDPOINTS.get(EndpointKey { service, index }) }
}

/// Whether a client may use a service's restricted frontends.
#[inline(always)]
pub fn in_range(service: ServiceId, client: Address) -> bool {
    NS_RANGES.get(Key::new(RangeKey::BITS, RangeKey { service, client })).is_some()
}

/// Whether this address is a node's, and if so, whether this node's.
#[inline(always)]
pub fn node(address: Address) -> Option<bool> {
    let flags = NS_NODES.get_ptr(address)?;
    // SAFETY: as in `frontend`.
    Some(unsafe { flags.read_volatile() } & OWN != 0)
}

/// The address that this node encapsulates from.
#[inline(always)]
pub fn own_address(family: Family) -> Option<Address> {
    let config = NS_CONFIG.get(0)?;
    let own = match family {
        Family::V4 => config.own_v4,
        Family::V6 => config.own_v6,
    };
    (!own.is_unspecified()).then_some(own)
}

/// What is known of a flow. An LRU map may hand the element to another flow meanwhile: then a packet goes astray,
/// of a flow that had been idle for longer than half a million others.
#[inline(always)]
pub fn flow(key: &FlowKey) -> Option<&'static mut Flow> {
    let flow = NS_FLOWS.get_ptr_mut(key)?;
    // SAFETY: verified: inside the map's value; what several processors write at a time is a clock and flags.
    Some(unsafe { &mut *flow })
}

/// Forgets it.
#[inline(always)]
pub fn forget_flow(key: &FlowKey) {
    let _ = NS_FLOWS.remove(key);
}

/// Notes that a flow's packet has come.
#[inline(always)]
pub fn touch(flow: &mut Flow, closes: bool) {
    flow.seen_ns = sys::boot_ns();
    if closes {
        flow.flags |= srcip_common::northsouth::CLOSING;
    }
}
