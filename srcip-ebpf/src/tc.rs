//! The second engine: ingress of the pod's device, for nodes where `sk_lookup` cannot run.
//!
//! It sees every packet, lets those of established connections go at the first look, and finds the
//! proxy's listener by port, so nothing has to be registered. Minimum kernel: 5.7 (`bpf_sk_assign`).

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_UNSPEC,
        bpf_fib_lookup, bpf_sock,
        sk_action::{SK_DROP, SK_PASS},
    },
    helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_sk_assign, bpf_skb_load_bytes_relative},
    macros::{classifier, sk_lookup},
    programs::{SkLookupContext, TcContext},
};
use srcip_common::{
    address::Address,
    counters::Counters,
    keys::{AF_INET, AF_INET6, ConnectionKey, LISTENER_SLOTS, ListenerKey},
    packet::{self, Endpoint, Header, Packet, Parsed, Segment},
    pod::{HAS_COMPANION, PASS_WHEN_PROXY_DOWN, Pod, STEER},
};
use srcip_ebpf::sys::{self, field, tcp_state};

use crate::{
    listeners,
    maps::{self, BY_COMPANION, LISTENERS},
    sk_lookup::Lookup,
};

/// Go on: to the next program with tcx, to the next filter with clsact.
const NEXT: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT;

#[classifier]
pub fn srcip_tc(ctx: TcContext) -> i32 {
    let netns = maps::own_netns();
    let Some(pod) = maps::pod(netns) else { return NEXT };
    if !pod.has(STEER) {
        return NEXT;
    }
    // The kernel keeps this in network byte order.
    let ethertype = u16::from_be(field!(ctx.skb.skb, protocol) as u16);
    match packet::parse(&Skb(&ctx), ethertype) {
        Parsed::Segment(segment) => steer(&ctx, netns, pod, &segment),
        Parsed::Disguised => {
            maps::count(netns, |c: &mut Counters| &mut c.disguised_refused);
            DROP
        }
        Parsed::Other => NEXT,
    }
}

/// The verdict: as in `sk_lookup`, but for what belongs to a connection that stands, and with a drop
/// where that one can refuse.
#[inline(always)]
fn steer(ctx: &TcContext, netns: u64, pod: &Pod, segment: &Segment) -> i32 {
    let Segment { source, destination, .. } = *segment;
    if !pod.steered_ports.contains(destination.port) {
        if segment.is_syn() {
            maps::count(netns, |c: &mut Counters| &mut c.passed);
        }
        return NEXT;
    }
    let mut reopens = false;
    match sys::receiver_state(ctx, source, destination) {
        // Nobody, or whoever listens on that port: what is to be replaced. Not only for SYNs: with SYN
        // cookies it is the last ACK that makes the connection.
        None | Some(tcp_state::LISTEN) => {}
        Some(tcp_state::TIME_WAIT) if segment.is_syn() => reopens = true,
        Some(_) => return NEXT,
    }
    if !is_local(ctx, segment) {
        return NEXT;
    }
    if segment.is_fragment {
        // Reassembled further up, it would be looked up like any other and find the application. No
        // stack fragments what opens a connection.
        maps::count(netns, |c: &mut Counters| &mut c.disguised_refused);
        return DROP;
    }
    if segment.is_syn() && pod.upstream_ports.contains(source.port) {
        maps::count(netns, |c: &mut Counters| &mut c.client_port_in_upstream_range);
    }
    let to = Handover {
        connection: ConnectionKey::new(
            netns,
            (source.address, source.port),
            (destination.address, destination.port),
        ),
        reopens,
        has_companion: pod.has(HAS_COMPANION),
    };
    if hand_over(ctx, pod.proxy_port, destination.address, &to) {
        maps::learn_own(netns, destination.address);
        if segment.is_syn() {
            maps::count(netns, |c: &mut Counters| &mut c.steered);
        }
        return NEXT;
    }
    if pod.has(PASS_WHEN_PROXY_DOWN) {
        if segment.is_syn() {
            maps::count(netns, |c: &mut Counters| &mut c.passed_proxy_down);
        }
        NEXT
    } else {
        if segment.is_syn() {
            maps::count(netns, |c: &mut Counters| &mut c.refused);
        }
        DROP
    }
}

/// A packet that is to go to the proxy's listener.
struct Handover {
    connection: ConnectionKey,
    /// It is a SYN for a connection in TIME_WAIT.
    reopens: bool,
    /// Whether [`srcip_tc_companion`] is there.
    has_companion: bool,
}

/// Gives the packet to the proxy's listener, bound to the pod's address, to all, or to loopback.
#[inline(always)]
fn hand_over(ctx: &TcContext, port: u16, own: Address, packet: &Handover) -> bool {
    let loopback = match own.v4_be() {
        Some(_) => Address::from_v4_be(u32::from_ne_bytes([127, 0, 0, 1])),
        None => Address::from_v6_be([0, 0, 0, 1_u32.to_be()]),
    };
    hand_over_at(ctx, Endpoint { address: own, port }, packet)
        || hand_over_at(ctx, Endpoint { address: loopback, port }, packet)
}

#[inline(always)]
fn hand_over_at(ctx: &TcContext, listener: Endpoint, packet: &Handover) -> bool {
    let Handover { connection, reopens, has_companion } = packet;
    // From nobody: no established connection can match, only a listener.
    let nobody = match listener.address.v4_be() {
        Some(_) => Address::from_v4_be(0),
        None => Address::from_v6_be([0; 4]),
    };
    let nobody = Endpoint { address: nobody, port: 0 };
    sys::with_receiver(ctx, nobody, listener, |socket, state| {
        // SAFETY: verified: the socket is held by the caller until this returns.
        let assign = || unsafe { bpf_sk_assign(ctx.as_ptr(), socket, 0) } == 0;
        let by_companion = || {
            // Where there are hooks they have registered it already; this is for nodes without.
            // SAFETY: as above.
            let family = unsafe { (*socket.cast::<bpf_sock>()).family } as u16;
            let key = ListenerKey {
                netns: connection.netns,
                port: listener.port,
                family,
                slot: LISTENER_SLOTS - 1,
            };
            let _ = sys::store_socket(&LISTENERS, &key, socket, BPF_NOEXIST.into());
            *has_companion && BY_COMPANION.insert(connection, 1, 0).is_ok()
        };
        state == tcp_state::LISTEN && (*reopens && by_companion() || assign() || by_companion())
    })
    .unwrap_or(false)
}

/// The companion of this engine in the pod's netns, from Linux 5.9 on: answers the lookup of packets that
/// a listener cannot simply be assigned to.
///
/// - A SYN for a connection in TIME_WAIT must reach that socket, which gives way to the listener that the
///   kernel then looks up; assigned to a listener directly, the SYN would be dropped as a duplicate
///   (`inet_csk_reqsk_queue_hash_add`, since Linux 6.10).
/// - Before Linux 6.6, `bpf_sk_assign` refuses listeners with `SO_REUSEPORT`.
///
/// Such a packet is noted and passes.
#[sk_lookup]
pub fn srcip_tc_companion(ctx: SkLookupContext) -> u32 {
    let netns = maps::own_netns();
    let (Some(pod), Some(Lookup { family, source, destination })) = (maps::pod(netns), Lookup::read(&ctx))
    else {
        return SK_PASS;
    };
    let key =
        ConnectionKey::new(netns, (source.address, source.port), (destination.address, destination.port));
    if BY_COMPANION.remove(key).is_err()
        || listeners::assign_unregistered(&ctx, netns, pod.proxy_port, family)
    {
        SK_PASS
    } else {
        // It was there a moment ago; the application must not have what was meant for it.
        SK_DROP
    }
}

/// Whether the packet is for the pod itself. One that is to be forwarded must not get a socket: the
/// kernel drops those.
#[inline(always)]
fn is_local(ctx: &TcContext, segment: &Segment) -> bool {
    // SAFETY: all-zero is a valid value of this plain C struct.
    let mut params: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    params.ifindex = field!(ctx.skb.skb, ingress_ifindex);
    let (source, destination) = (segment.source.address, segment.destination.address);
    match (source.v4_be(), destination.v4_be()) {
        (Some(source), Some(destination)) => {
            params.family = AF_INET as u8;
            params.__bindgen_anon_3.ipv4_src = source;
            params.__bindgen_anon_4.ipv4_dst = destination;
        }
        _ => {
            params.family = AF_INET6 as u8;
            params.__bindgen_anon_3.ipv6_src = source.words();
            params.__bindgen_anon_4.ipv6_dst = destination.words();
        }
    }
    let size = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: verified: the struct is on the stack and `size` bytes long.
    let verdict = unsafe { fib_lookup(ctx.as_ptr(), &raw mut params, size, 0) };
    // A host that does not forward says so before it looks; all it gets is its own.
    verdict == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) || verdict == i64::from(BPF_FIB_LKUP_RET_FWD_DISABLED)
}

/// An `skb` from its network header on, linear or not.
struct Skb<'a>(&'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn load<H: Header>(&self, offset: u32) -> Option<H> {
        const FROM_NETWORK_HEADER: u32 = 1;
        let mut header = core::mem::MaybeUninit::<H>::uninit();
        // SAFETY: verified: the destination is on the stack and as long as said.
        let error = unsafe {
            bpf_skb_load_bytes_relative(
                self.0.as_ptr().cast(),
                offset,
                header.as_mut_ptr().cast::<c_void>(),
                size_of::<H>() as u32,
                FROM_NETWORK_HEADER,
            )
        };
        // SAFETY: the helper filled all of it, and any bytes are a valid header.
        (error == 0).then(|| unsafe { header.assume_init() })
    }
}
