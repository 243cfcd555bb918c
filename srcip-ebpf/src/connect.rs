//! Prepares upstream legs: the connections a proxy opens to its application with a client's address.
//!
//! Minimum kernel: 5.13 (`bpf_for_each_map_elem`; `bpf_setsockopt` in this program type is 5.8).

use core::ffi::{c_long, c_void};

use aya_ebpf::{
    bindings::bpf_sock_addr,
    helpers::generated::bpf_get_prandom_u32,
    macros::{cgroup_sock_addr, map},
    maps::Array,
    programs::SockAddrContext,
};
use srcip_common::{
    address::Address,
    counters::Counters,
    keys::{AF_INET, AF_INET6, ConnectionKey},
    packet::Endpoint,
    pod::Pod,
};
use srcip_ebpf::sys::{self, SO_MARK, SO_REUSEADDR, address, field, tcp_state, words};

use crate::maps::{self, PODS};

/// Let the call go on. These programs never forbid one.
pub const ALLOW: i32 = 1;
const SOCK_STREAM: u32 = 1;

/// Ports tried in the pod's order, so that each one rests as long as possible before it is used again.
const IN_ORDER: u32 = 24;
/// Of those, the ones that are not taken while the proxy's last connection from them is in TIME_WAIT.
/// After that they are: when all ports are, the next in order has waited longest.
const RESTED: u32 = 8;
/// Ports tried at random after those, to get out of a run of long-lived connections.
const AT_RANDOM: u32 = 72;

/// An entry for each attempt, with nothing in it: something to count by.
#[map]
static ATTEMPTS: Array<u8> = Array::pinned(IN_ORDER + AT_RANDOM, 0);

#[cgroup_sock_addr(connect4)]
pub fn srcip_connect4(ctx: SockAddrContext) -> i32 {
    let _ = prepare::<AF_INET>(&ctx);
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub fn srcip_connect6(ctx: SockAddrContext) -> i32 {
    let _ = prepare::<AF_INET6>(&ctx);
    ALLOW
}

/// The pod whose TCP socket this is.
#[inline(always)]
pub fn stream_of_pod(ctx: &SockAddrContext) -> Option<(u64, &'static Pod)> {
    if field!(ctx.sock_addr, type_) != SOCK_STREAM {
        return None;
    }
    let netns = sys::netns_cookie(ctx);
    Some((netns, maps::pod(netns)?))
}

#[inline(always)]
fn prepare<const FAMILY: u16>(ctx: &SockAddrContext) -> Option<()> {
    let (netns, pod) = stream_of_pod(ctx)?;
    let (source, destination) = ends(ctx.sock_addr, FAMILY)?;
    if !maps::is_upstream(netns, source.address, destination.address) {
        return None;
    }
    // The application's socket inherits this mark from the SYN (net.ipv4.tcp_fwmark_accept), and its
    // answers find their way back to the proxy by it.
    let _ = sys::set_socket_option(ctx, SO_MARK, pod.mark);
    maps::count(netns, |c: &mut Counters| &mut c.upstream);

    if source.port != 0 {
        if !pod.upstream_ports.contains(source.port) {
            maps::count(netns, |c: &mut Counters| &mut c.upstream_port_kept);
        }
        return None;
    }
    // Lets the port be used again for another destination, and while an old connection is in TIME_WAIT.
    let _ = sys::set_socket_option(ctx, SO_REUSEADDR, 1);
    if !choose_port::<FAMILY>(ctx, netns, pod, source.address, destination) {
        maps::count(netns, |c: &mut Counters| &mut c.upstream_ports_exhausted);
    }
    Some(())
}

#[inline(always)]
fn key(netns: u64, source: Endpoint, destination: Endpoint) -> ConnectionKey {
    ConnectionKey::new(netns, (source.address, source.port), (destination.address, destination.port))
}

/// What the search for a port works on.
struct Search {
    ctx: *mut bpf_sock_addr,
    pod: &'static Pod,
    netns: u64,
    source: Address,
    destination: Endpoint,
    cursor: u32,
    found: bool,
}

/// Binds the socket to a source port that neither a client nor another upstream leg uses.
///
/// The application's end of an upstream leg carries the tuple that a connection from the client's own
/// port would carry. If the client then came from that port, its SYN would reach the application's
/// socket instead of a listener, and hang. So the port is one that clients do not use.
#[inline(always)]
fn choose_port<const FAMILY: u16>(
    ctx: &SockAddrContext,
    netns: u64,
    pod: &'static Pod,
    source: Address,
    destination: Endpoint,
) -> bool {
    let mut search =
        Search { ctx: ctx.sock_addr, pod, netns, source, destination, cursor: pod.cursor, found: false };
    sys::for_each(&ATTEMPTS, try_port::<FAMILY>, &mut search);
    search.found
}

/// One attempt; 1 ends the search.
#[inline(never)]
unsafe extern "C" fn try_port<const FAMILY: u16>(
    _map: *mut c_void,
    attempt: *const u32,
    _value: *mut c_void,
    search: *mut Search,
) -> c_long {
    // SAFETY: verified: a key of the map, and the context that was given for this call.
    let (attempt, search) = unsafe { (*attempt, &mut *search) };
    let ctx = SockAddrContext::new(search.ctx);
    let netns = search.netns;
    let in_order = attempt < IN_ORDER;
    let take_time_wait = in_order && attempt >= RESTED;
    let cursor = if in_order {
        search.cursor = search.cursor.wrapping_add(1);
        store_cursor(netns, search.cursor);
        search.cursor
    } else {
        // SAFETY: takes nothing and only draws a number.
        unsafe { bpf_get_prandom_u32() }
    };
    let source = Endpoint { address: search.source, port: search.pod.upstream_ports.nth(cursor) };
    let key = key(netns, source, search.destination);
    // Two processors may try the same port at once; the one that notes it first has it.
    if !maps::reserve_pending(&key) {
        return 0;
    }
    if is_free(&ctx, source, search.destination, take_time_wait)
        && sys::bind(search.ctx, FAMILY, source).is_ok()
    {
        search.found = true;
        return 1;
    }
    maps::forget_pending(&key);
    0
}

#[inline(always)]
pub fn store_cursor(netns: u64, cursor: u32) {
    if let Some(pod) = PODS.get_ptr_mut(netns) {
        // SAFETY: verified: inside the map's value. Only a hint, so a lost update does no harm; volatile
        // because another processor may read it.
        unsafe { (&raw mut (*pod).cursor).write_volatile(cursor) };
    }
}

/// Whether a connection with these ends can be opened: no socket of the application, of a client who
/// came from this very port, or of the proxy itself has them already.
#[inline(always)]
fn is_free(ctx: &SockAddrContext, source: Endpoint, destination: Endpoint, take_time_wait: bool) -> bool {
    match sys::receiver_state(ctx, source, destination) {
        // In TIME_WAIT, a SYN reopens it: the kernel allows that to timestamps that have moved on.
        None | Some(tcp_state::LISTEN | tcp_state::TIME_WAIT) => {}
        Some(_) => return false,
    }
    match sys::receiver_state(ctx, destination, source) {
        None | Some(tcp_state::LISTEN) => true,
        // Makes connect fail with EADDRNOTAVAIL, unless it is at least a second old and
        // net.ipv4.tcp_tw_reuse is 1, as attach sets it.
        Some(tcp_state::TIME_WAIT) => take_time_wait,
        Some(_) => false,
    }
}

/// The socket's bound source, with port 0 if it has none yet, and where it connects to.
#[inline(always)]
fn ends(sock_addr: *mut bpf_sock_addr, family: u16) -> Option<(Endpoint, Endpoint)> {
    let sk = field!(sock_addr, __bindgen_anon_1.sk);
    if sk.is_null() {
        return None;
    }
    let source = address!(sk, family, src_ip4, src_ip6);
    let source = Endpoint { address: source, port: field!(sk, src_port) as u16 };
    Some((source, requested(sock_addr, family)))
}

/// What the system call was given: where to connect to, or what to bind.
#[inline(always)]
pub fn requested(sock_addr: *mut bpf_sock_addr, family: u16) -> Endpoint {
    // Each program may only read the words of its own family, which is a constant in each.
    let address = if family == AF_INET {
        Address::from_v4_be(field!(sock_addr, user_ip4))
    } else {
        Address::from_v6_be(words!(sock_addr, user_ip6))
    };
    Endpoint { address, port: u16::from_be(field!(sock_addr, user_port) as u16) }
}
