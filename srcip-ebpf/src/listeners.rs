//! The slots in which the proxies' listeners wait.

use aya_ebpf::{bindings::BPF_NOEXIST, programs::SkLookupContext};
use srcip_common::{
    counters::Counters,
    keys::{AF_INET, AF_INET6, LISTENER_SLOTS, ListenerKey, RegisteredKey},
};

use crate::maps::{self, LISTENERS, REGISTERED};

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

#[inline(always)]
fn assign_from(ctx: &SkLookupContext, netns: u64, port: u16, family: u16) -> bool {
    let mut key = ListenerKey { netns, port, family, slot: 0 };
    while key.slot < LISTENER_SLOTS {
        if LISTENERS.redirect_sk_lookup(ctx, key, 0).is_ok() {
            return true;
        }
        key.slot += 1;
    }
    false
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
