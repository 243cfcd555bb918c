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
        BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use srcip_common::telemetry::{ABORTED, ACTIVE, CLOSE, Event, LOCAL, NOBODY, OPEN, PASSIVE, REMOTE};
use srcip_ebpf::{
    ends::Ends,
    sys::{self, field, tcp_state},
};

use crate::maps::{CONNECTIONS, Connection};

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
    if !maps::is_watched(netns) {
        return;
    }
    let socket = field!(ctx.ops, __bindgen_anon_2.sk);
    if socket.is_null() {
        return;
    }
    let connection = Connection {
        opened_ns: sys::boot_ns(),
        // The SYN counts as a byte, on the side that sent it.
        acked: field!(ctx.ops, bytes_acked),
        received: field!(ctx.ops, bytes_received),
        received_at_fin_wait2: 0,
        role,
        closed_by: NOBODY,
        fin_received: 0,
        padding: 0,
        padding2: 0,
    };
    if sys::new_socket_storage(&CONNECTIONS, socket, connection).is_none() {
        maps::count(|c| &c.untracked);
        return;
    }
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
    maps::emit(event(ctx, netns, socket, &connection, OPEN));
}

#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    let socket = field!(ctx.ops, __bindgen_anon_2.sk);
    if socket.is_null() {
        return;
    }
    let Some(connection) = sys::socket_storage(&CONNECTIONS, socket) else { return };
    // SAFETY: verified: inside the map's value, which lives as long as the socket. The socket is locked
    // while its state changes, so nobody else is at it.
    let connection = unsafe { &mut *connection };
    let (old, new) = (ctx.arg(0), ctx.arg(1));
    match new {
        tcp_state::FIN_WAIT1 => connection.close_by(LOCAL),
        tcp_state::CLOSE_WAIT => {
            connection.close_by(REMOTE);
            connection.fin_received = 1;
        }
        tcp_state::FIN_WAIT2 => connection.received_at_fin_wait2 = field!(ctx.ops, bytes_received),
        tcp_state::CLOSING => connection.fin_received = 1,
        tcp_state::CLOSE => {
            connection.close_by(ABORTED);
            // A socket that nobody holds any more leaves FIN_WAIT2 without the other end's FIN.
            if old == tcp_state::FIN_WAIT2
                && field!(ctx.ops, bytes_received) != connection.received_at_fin_wait2
            {
                connection.fin_received = 1;
            }
            let mut event = event(ctx, sys::netns_cookie(ctx), socket, connection, CLOSE);
            event.closed_ns = sys::boot_ns();
            // A FIN counts as a byte.
            event.bytes_received = event.bytes_received.wrapping_sub(connection.fin_received.into());
            let sent_fin = matches!(old, tcp_state::FIN_WAIT2 | tcp_state::CLOSING | tcp_state::LAST_ACK);
            if sent_fin && field!(ctx.ops, snd_una) == field!(ctx.ops, snd_nxt) {
                event.bytes_sent = event.bytes_sent.wrapping_sub(1);
            }
            maps::emit(event);
        }
        _ => {}
    }
}

#[inline(always)]
fn event(
    ctx: &SockOpsContext,
    netns: u64,
    socket: *mut bpf_sock,
    connection: &Connection,
    kind: u8,
) -> Event {
    let ops = ctx.ops;
    let Ends { local, remote } = Ends::read(ctx);
    Event {
        netns,
        socket: sys::socket_cookie(ctx.as_ptr()),
        opened_ns: connection.opened_ns,
        closed_ns: 0,
        bytes_sent: field!(ops, bytes_acked).wrapping_sub(connection.acked),
        bytes_received: field!(ops, bytes_received).wrapping_sub(connection.received),
        local: local.0,
        remote: remote.0,
        local_port: local.1,
        remote_port: remote.1,
        // The kernel keeps it in eighths.
        srtt_us: field!(ops, srtt_us) >> 3,
        retransmits: field!(ops, total_retrans),
        mark: field!(socket, mark),
        kind,
        role: connection.role,
        closed_by: connection.closed_by,
        padding: 0,
        padding2: 0,
    }
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
