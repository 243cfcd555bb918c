//! The slots in which the proxies' listeners wait.

use core::ffi::{c_long, c_void};

use aya_ebpf::{
    bindings::{BPF_NOEXIST, bpf_sk_lookup},
    macros::map,
    maps::Array,
    programs::SkLookupContext,
};
use srcip_common::{
    counters::Counters,
    keys::{AF_INET, AF_INET6, LISTENER_SLOTS, ListenerKey, RegisteredKey},
};

use srcip_ebpf::sys;

use crate::maps::{self, LISTENERS, REGISTERED};

/// An entry for each slot, with nothing in it: something to count by.
#[map]
static SLOTS: Array<u8> = Array::pinned(LISTENER_SLOTS, 0);

/// Hands the lookup to the first listener there is. The kernel picks another member itself if that one
/// belongs to a reuseport group.
#[inline(always)]
pub fn assign(ctx: &SkLookupContext, netns: u64, port: u16, family: u16) -> bool {
    // An IPv6 listener also takes IPv4 unless it is IPV6_V6ONLY; the kernel then answers
    // -EAFNOSUPPORT and the search goes on.
    family == AF_INET && assign_of(ctx, netns, port, AF_INET) || assign_of(ctx, netns, port, AF_INET6)
}

/// The same for a pod without hooks, whose listeners nobody has registered but the `tc` engine itself.
#[inline(always)]
pub fn assign_unregistered(ctx: &SkLookupContext, netns: u64, port: u16, family: u16) -> bool {
    family == AF_INET && assign_from(ctx, netns, port, AF_INET) || assign_from(ctx, netns, port, AF_INET6)
}

#[inline(always)]
fn assign_of(ctx: &SkLookupContext, netns: u64, port: u16, family: u16) -> bool {
    // A family without listeners would cost as many lookups as there are slots.
    maps::has_listened(ListenerKey { netns, port, family, slot: 0 }) && assign_from(ctx, netns, port, family)
}

/// What the search for a listener works on.
struct Search {
    lookup: *mut bpf_sk_lookup,
    key: ListenerKey,
    found: bool,
}

#[inline(always)]
fn assign_from(ctx: &SkLookupContext, netns: u64, port: u16, family: u16) -> bool {
    let key = ListenerKey { netns, port, family, slot: 0 };
    let mut search = Search { lookup: ctx.lookup, key, found: false };
    sys::for_each(&SLOTS, assign_slot, &mut search);
    search.found
}

/// Looks into one slot; 1 ends the search.
#[inline(never)]
unsafe extern "C" fn assign_slot(
    _map: *mut c_void,
    slot: *const u32,
    _value: *mut c_void,
    search: *mut Search,
) -> c_long {
    // SAFETY: verified: a key of the map, and the context that was given for this call.
    let (slot, search) = unsafe { (*slot, &mut *search) };
    let key = ListenerKey { slot, ..search.key };
    search.found = LISTENERS.redirect_sk_lookup(SkLookupContext::new(search.lookup), key, 0).is_ok();
    search.found.into()
}

/// Forgets that a listener has a slot.
#[inline(always)]
pub fn forget(netns: u64, socket: u64) {
    let _ = REGISTERED.remove(RegisteredKey { netns, socket });
}

/// Gives a listener a slot by `update`, which puts it there unless the slot is taken.
#[inline(always)]
pub fn register(
    netns: u64,
    port: u16,
    family: u16,
    socket: u64,
    mut update: impl FnMut(ListenerKey) -> bool,
) -> bool {
    let registered = RegisteredKey { netns, socket };
    if REGISTERED.insert(registered, 1, BPF_NOEXIST.into()).is_err() {
        return false;
    }
    let mut key = ListenerKey { netns, port, family, slot: 0 };
    // Before the slot is taken: nobody may find it taken and not look.
    maps::note_listened(key);
    while key.slot < LISTENER_SLOTS {
        if update(key) {
            return true;
        }
        key.slot += 1;
    }
    let _ = REGISTERED.remove(registered);
    maps::count(netns, |c: &mut Counters| &mut c.listener_slots_full);
    false
}
