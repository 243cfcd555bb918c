//! The north-south programs: what clients outside the cluster send to a Service reaches an endpoint with the
//! client's address, and the answer goes back with the address the client dialled.
//!
//! ```text
//!            uplink                              host side of a pod's device
//!  client ──▶ srcip_uplink ─ destination := pod ──────────────▶ pod
//!         │        └ endpoint on another node: encapsulated ──▶ its srcip_uplink ──▶ pod
//!  client ◀──────────────────── source := frontend ─ srcip_pod ◀── pod
//! ```
//!
//! Nothing passes netfilter: both programs redirect. What is not for a frontend, and what is not understood,
//! goes on to the stack untouched. An object of its own, loaded once per node.
//!
//! The stack of a program is 512 octets: the larger steps are functions of their own, which return numbers, and
//! what they hand to each other is in [`work`].
//!
//! - [`request`]: client to endpoint. [`choose`]: which one. [`reply`]: endpoint to client.
//! - [`fragments`]: what has no ports. [`tunnel`]: between nodes. [`icmp`]: errors of a flow. [`size`]: what does not fit.
//! - [`rewrite`], [`send`], [`skb`]: the packet. [`maps`]: all maps.
//!
//! Minimum kernel: 5.14 by what is called here and by who attaches it (`bpf_redirect_neigh` is of 5.10, `bpf_check_mtu`
//! of 5.12); 6.1 is the oldest it has run on.

#![no_std]
#![no_main]

mod choose;
mod fragments;
mod icmp;
mod maps;
mod reply;
mod request;
mod rewrite;
mod send;
mod size;
mod skb;
mod tunnel;
mod work;

use aya_ebpf::{
    bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC},
    macros::classifier,
    programs::TcContext,
};
use srcip_common::northsouth::{
    ServiceId,
    counter::{Counter, ServiceCounter},
    packet::{self, Datagram, Extent, ICMP, ICMPV6, TCP, UDP},
};

use crate::{size::Sender, skb::Skb, work::Header};

/// What becomes of a packet: one number, as functions in the kernel return it.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Verdict(i32);

impl Verdict {
    /// On to the next program, to the next filter with clsact, to the stack.
    pub const PASS: Self = Self(TC_ACT_UNSPEC);
    /// To where a helper has noted.
    pub const REDIRECT: Self = Self(TC_ACT_REDIRECT);

    /// Above all actions of the kernel.
    const TOO_BIG: i32 = 1 << 24;

    /// Passes, for a reason that is counted.
    #[inline(always)]
    pub fn pass(reason: Counter) -> Self {
        maps::count(reason);
        Self::PASS
    }

    /// Drops, for a reason that is counted.
    #[inline(always)]
    pub fn drop(reason: Counter) -> Self {
        maps::count(reason);
        Self(TC_ACT_SHOT)
    }

    /// The same, counted for a service too.
    #[inline(always)]
    pub fn drop_of(service: ServiceId, reason: ServiceCounter) -> Self {
        maps::count_of(service, reason, 1);
        Self(TC_ACT_SHOT)
    }

    /// Untouched so far, it is to go back to its sender: it may have at most `mtu` octets.
    #[inline(always)]
    pub fn too_big(mtu: u32) -> Self {
        Self(Self::TOO_BIG | (mtu & 0xffff) as i32)
    }

    #[inline(always)]
    fn conclude(self, skb: Skb, datagram: &Datagram, sender: Sender) -> i32 {
        if self.0 & Self::TOO_BIG == 0 || self == Self::PASS {
            return self.0;
        }
        size::tell(skb, datagram, (self.0 & 0xffff) as u32, sender).0
    }
}

/// Ingress of an uplink.
#[classifier]
pub fn srcip_uplink(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let (Some(work), Some(datagram)) = (work::get(), Header::Outer.place()) else { return Verdict::PASS.0 };
    let read = whole(skb, datagram);
    if read != Verdict::REDIRECT {
        return read.0;
    }
    let mut from = choose::nobody(datagram.family);
    if datagram.protocol == datagram.family.encapsulated() {
        let received = tunnel::receive(skb, datagram);
        if received != Verdict::REDIRECT {
            return received.0;
        }
        from = datagram.source;
        let read = whole(skb, datagram);
        if read != Verdict::REDIRECT {
            return read.0;
        }
    }
    let verdict = match datagram.protocol {
        TCP | UDP => request::from_client(skb, work, datagram, &from),
        ICMP | ICMPV6 => icmp::from_outside(skb, work, datagram, &from),
        _ => Verdict::PASS,
    };
    verdict.conclude(skb, datagram, Sender::Client)
}

/// Ingress of the host side of a pod's device: what the pod sends.
#[classifier]
pub fn srcip_pod(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    let (Some(work), Some(datagram)) = (work::get(), Header::Outer.place()) else { return Verdict::PASS.0 };
    let read = whole(skb, datagram);
    if read != Verdict::REDIRECT {
        return read.0;
    }
    let verdict = match datagram.protocol {
        TCP | UDP => reply::from_pod(skb, work, datagram),
        ICMP | ICMPV6 => icmp::from_pod(skb, work, datagram),
        _ => Verdict::PASS,
    };
    verdict.conclude(skb, datagram, Sender::Pod)
}

/// Reads the packet's outermost IP header. [`Verdict::REDIRECT`] if it is one that can be looked at.
#[inline(never)]
fn whole(skb: Skb, datagram: &mut Datagram) -> Verdict {
    let Some(family) = skb.family() else { return Verdict::PASS };
    if !packet::read(&skb, 0, family, Extent::Whole, datagram) {
        return Verdict::pass(Counter::Malformed);
    }
    if !fragments::known(datagram) {
        return Verdict::pass(Counter::Fragment);
    }
    Verdict::REDIRECT
}

/// Dual MIT/GPL: some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
