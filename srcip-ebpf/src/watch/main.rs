//! The watching program: tells of every TCP connection of the pods it is to watch, when it opens and when
//! it closes. It changes nothing.
//!
//! An object of its own, because everybody who looks on loads it for himself: with his own ring buffer,
//! he neither takes events from anybody else nor slows anybody down, and what he loaded goes when his
//! process ends, however it ends. The steering hooks attach it once more, as a recorder, which keeps the
//! last connections for those who ask later.
//!
//! Minimum kernel: 5.15 (`bpf_get_netns_cookie` in this program type).

#![no_std]
#![no_main]

mod maps;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB,
        BPF_SOCK_OPS_STATE_CB_FLAG,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use srcip_common::telemetry::{ABORTED, ACTIVE, CLOSE, Event, LOCAL, NOBODY, OPEN, PASSIVE, REMOTE};
use srcip_ebpf::{
    ends::Ends,
    sys::{self, field, tcp_state},
};

#[sock_ops]
pub fn srcip_watch(ctx: SockOpsContext) -> u32 {
    match ctx.op() {
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => opened(&ctx, PASSIVE),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => opened(&ctx, ACTIVE),
        BPF_SOCK_OPS_STATE_CB => changed(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn opened(ctx: &SockOpsContext, role: u8) {
    let netns = sys::netns_cookie(ctx);
    let Some(upstream_mark) = maps::watched(netns) else { return };
    let mark = mark(ctx);
    // The application's end of an upstream leg has its SYN's mark (net.ipv4.tcp_fwmark_accept).
    if role == PASSIVE && mark != 0 && mark == upstream_mark {
        return;
    }
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    maps::emit(&Event { role, ..event(ctx, netns, mark, OPEN) });
}

#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    if new == tcp_state::FIN_WAIT2 {
        maps::note_received(sys::socket_cookie(ctx.as_ptr()), field!(ctx.ops, bytes_received));
        return;
    }
    // Only of what has been established.
    if new != tcp_state::CLOSE || old == tcp_state::SYN_SENT || old == tcp_state::SYN_RECV {
        return;
    }
    let netns = sys::netns_cookie(ctx);
    if maps::watched(netns).is_none() {
        return;
    }
    let mut event = event(ctx, netns, mark(ctx), CLOSE);
    // A FIN counts as a byte, in either direction. The state tells whose came first, and what has come.
    let (closed_by, fin_received, fin_sent) = match old {
        tcp_state::LAST_ACK => (REMOTE, true, true),
        tcp_state::CLOSING => (LOCAL, true, true),
        // A socket that nobody holds any more leaves this state without the other end's FIN.
        tcp_state::FIN_WAIT2 => {
            let before = maps::take_received(event.socket);
            (LOCAL, before.is_some_and(|before| before != event.bytes_received), true)
        }
        tcp_state::CLOSE_WAIT => (ABORTED, true, false),
        _ => (ABORTED, false, false),
    };
    event.closed_by = closed_by;
    if fin_received {
        event.bytes_received = event.bytes_received.wrapping_sub(1);
    }
    if fin_sent && field!(ctx.ops, snd_una) == field!(ctx.ops, snd_nxt) {
        event.bytes_sent = event.bytes_sent.wrapping_sub(1);
    }
    maps::emit(&event);
}

#[inline(always)]
fn event(ctx: &SockOpsContext, netns: u64, mark: u32, kind: u8) -> Event {
    let ops = ctx.ops;
    let Ends { local, remote } = Ends::read(ctx);
    Event {
        netns,
        socket: sys::socket_cookie(ctx.as_ptr()),
        time_ns: sys::boot_ns(),
        bytes_sent: field!(ops, bytes_acked),
        bytes_received: field!(ops, bytes_received),
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        // The kernel keeps it in eighths.
        srtt_us: field!(ops, srtt_us) >> 3,
        retransmits: field!(ops, total_retrans),
        mark,
        kind,
        role: 0,
        closed_by: NOBODY,
        padding: 0,
        padding2: 0,
    }
}

#[inline(always)]
fn mark(ctx: &SockOpsContext) -> u32 {
    let socket = field!(ctx.ops, __bindgen_anon_2.sk);
    if socket.is_null() { 0 } else { field!(socket, mark) }
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
