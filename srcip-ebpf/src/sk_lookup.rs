//! The default engine: once per new connection, the kernel asks which listener shall have it.
//!
//! Minimum kernel: 5.13 (`bpf_for_each_map_elem`; the program type is 5.9).

use aya_ebpf::{
    bindings::sk_action::{SK_DROP, SK_PASS},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use srcip_common::{
    counters::Counters,
    keys::ConnectionKey,
    packet::Endpoint,
    pod::{PASS_WHEN_PROXY_DOWN, STEER},
};
use srcip_ebpf::sys::{address, field};

use crate::{listeners, maps};

const TCP: u32 = 6;

#[sk_lookup]
pub fn srcip_sk_lookup(ctx: SkLookupContext) -> u32 {
    steer(&ctx)
}

/// The verdict:
///
/// - not TCP, not steered, or the pod talking to itself: pass, the kernel looks up as usual;
/// - the proxy's own connection to the application: pass;
/// - everything else: the proxy's listener;
/// - which is not there: drop, which the kernel answers with a reset, so that no connection ends up
///   in a socket it was not meant for; or pass, if the pod asked for that.
#[inline(always)]
fn steer(ctx: &SkLookupContext) -> u32 {
    let netns = maps::own_netns();
    let Some(pod) = maps::pod(netns) else { return SK_PASS };
    if !pod.has(STEER) {
        return SK_PASS;
    }
    let Some(Lookup { family, source, destination }) = Lookup::read(ctx) else { return SK_PASS };

    // `ingress_ifindex` would not do here: for a connection from the pod to its own address the kernel
    // reports the route's device, not lo (`inet_iif` prefers `rt_iif`). The addresses tell. A packet
    // from outside cannot carry them as its source: `fib_validate_source` drops it as a martian for IPv4,
    // and for IPv6 the answer would not leave the pod.
    if destination.address.is_loopback()
        || source.address.is_loopback()
        || maps::is_own(netns, source.address)
    {
        return SK_PASS;
    }
    if !pod.steered_ports.contains(destination.port) {
        maps::count(netns, |c: &mut Counters| &mut c.passed);
        return SK_PASS;
    }
    let connection =
        ConnectionKey::new(netns, (source.address, source.port), (destination.address, destination.port));
    if maps::take_pending(&connection) {
        return SK_PASS;
    }

    if pod.upstream_ports.contains(source.port) {
        maps::count(netns, |c: &mut Counters| &mut c.client_port_in_upstream_range);
    }
    if listeners::assign(ctx, netns, pod.proxy_port, family) {
        maps::learn_own(netns, destination.address);
        maps::count(netns, |c: &mut Counters| &mut c.steered);
        return SK_PASS;
    }
    if pod.has(PASS_WHEN_PROXY_DOWN) {
        maps::count(netns, |c: &mut Counters| &mut c.passed_proxy_down);
        SK_PASS
    } else {
        maps::count(netns, |c: &mut Counters| &mut c.refused);
        SK_DROP
    }
}

/// What is being looked up.
pub struct Lookup {
    pub family: u16,
    pub source: Endpoint,
    pub destination: Endpoint,
}

impl Lookup {
    #[inline(always)]
    pub fn read(ctx: &SkLookupContext) -> Option<Self> {
        let lookup = ctx.lookup;
        if field!(lookup, protocol) != TCP {
            return None;
        }
        let family = field!(lookup, family) as u16;
        let source = address!(lookup, family, remote_ip4, remote_ip6);
        let destination = address!(lookup, family, local_ip4, local_ip6);
        // One port is big-endian, the other is not: linux/bpf.h.
        let source_port = u16::from_be(field!(lookup, remote_port));
        Some(Self {
            family,
            source: Endpoint { address: source, port: source_port },
            destination: Endpoint { address: destination, port: field!(lookup, local_port) as u16 },
        })
    }
}
