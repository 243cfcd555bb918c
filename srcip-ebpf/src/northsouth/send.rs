//! Finds the way of a packet and sends it there, past netfilter.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, TC_ACT_REDIRECT,
        bpf_fib_lookup, bpf_redir_neigh,
    },
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_redirect_neigh},
};
use srcip_common::{
    address::Address,
    keys::{AF_INET, AF_INET6},
    northsouth::{counter::Counter, packet::Datagram},
};

use crate::{Verdict, size, skb::Skb, work::Way};

/// Looks for a way from `from` to `to` for a packet as it is. [`Verdict::REDIRECT`] if there is one.
#[inline(always)]
pub fn find(skb: Skb, datagram: &Datagram, way: &mut Way, from: Address, to: Address) -> Verdict {
    (way.from, way.to) = (from, to);
    (way.size, way.overhead) = (size::wire(skb, datagram), 0);
    route(skb, way)
}

/// Asks the routing table. [`Verdict::REDIRECT`] if there is a way, else what becomes of the packet: the route
/// takes less, or it leads nowhere, or to this host itself, or the host does not forward.
#[inline(never)]
pub fn route(skb: Skb, way: &mut Way) -> Verdict {
    let fib = &mut way.fib;
    // SAFETY: all-zero is a valid value of this plain C struct.
    *fib = unsafe { core::mem::zeroed() };
    fib.ifindex = skb.device();
    fib.__bindgen_anon_1.tot_len = if way.size > 0xffff { 0xffff } else { way.size as u16 };
    if way.from.v4_be().is_some() {
        fib.family = AF_INET as u8;
        fib.__bindgen_anon_3.ipv4_src = way.from.words()[3];
        fib.__bindgen_anon_4.ipv4_dst = way.to.words()[3];
    } else {
        fib.family = AF_INET6 as u8;
        fib.__bindgen_anon_3.ipv6_src = way.from.words();
        fib.__bindgen_anon_4.ipv6_dst = way.to.words();
    }
    let length = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: verified: the struct lies in a map's value and is `length` bytes long.
    let found = unsafe { fib_lookup(skb.ctx().as_ptr(), fib, length, 0) };
    if found == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
        // SAFETY: integers, all of them.
        let mtu = u32::from(unsafe { fib.__bindgen_anon_1.mtu_result });
        return Verdict::too_big(mtu.saturating_sub(way.overhead));
    }
    // A neighbour that is not known yet will be asked for when the packet is sent.
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) && found != i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
        return Verdict::pass(Counter::NoRoute);
    }
    way.device = fib.ifindex;
    way.neighbour.nh_family = fib.family.into();
    // The gateway, if there is one: of IPv4 it may have an IPv6 address.
    // SAFETY: integers, all of them; for IPv4 only the first word counts.
    way.neighbour.__bindgen_anon_1.ipv6_nh = unsafe { fib.__bindgen_anon_4.ipv6_dst };
    Verdict::REDIRECT
}

/// Sends the packet there.
#[inline(always)]
pub fn redirect(way: &mut Way) -> Verdict {
    let length = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: verified: the struct lies in a map's value and is `length` bytes long.
    let code = unsafe { bpf_redirect_neigh(way.device, &raw mut way.neighbour, length, 0) };
    if code == i64::from(TC_ACT_REDIRECT) { Verdict::REDIRECT } else { Verdict::drop(Counter::Failed) }
}
