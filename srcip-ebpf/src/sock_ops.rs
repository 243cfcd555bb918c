//! Follows listeners and upstream legs through their lives, node-wide.
//!
//! Minimum kernel: 5.15 (`bpf_get_netns_cookie` in this program type).

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_NOEXIST, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB,
        BPF_SOCK_OPS_RTO_CB, BPF_SOCK_OPS_RTO_CB_FLAG, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_TCP_LISTEN_CB,
    },
    macros::sock_ops,
    programs::SockOpsContext,
};
use srcip_common::{
    keys::ConnectionKey,
    pod::{LISTENER_MARK, Pod},
};
use srcip_ebpf::{
    ends::Ends,
    sys::{self, field, tcp_state},
};

use crate::{
    listeners,
    maps::{self, LISTENERS, Note},
};

#[sock_ops]
pub fn srcip_sock_ops(ctx: SockOpsContext) -> u32 {
    let netns = sys::netns_cookie(&ctx);
    if let Some(pod) = maps::pod(netns) {
        follow(&ctx, netns, pod);
    }
    1
}

#[inline(always)]
fn follow(ctx: &SockOpsContext, netns: u64, pod: &Pod) {
    match ctx.op() {
        BPF_SOCK_OPS_TCP_LISTEN_CB => listening(ctx, netns, pod),
        // The SYN is about to leave. `connect` has noted the connection already if it chose the port;
        // this is for those whose port the proxy or the kernel chose.
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            let Ends { local, remote } = Ends::read(ctx);
            if maps::is_upstream(netns, local.0, remote.0) {
                maps::note_pending(&ConnectionKey::new(netns, local, remote), Note::Once);
                // To hear of retransmissions and of its end, however it ends.
                let flags = ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG | BPF_SOCK_OPS_RTO_CB_FLAG;
                let _ = ctx.set_cb_flags(flags as i32);
            }
        }
        // A SYN is about to leave once more.
        BPF_SOCK_OPS_RTO_CB if field!(ctx.ops, state) == tcp_state::SYN_SENT => {
            let Ends { local, remote } = Ends::read(ctx);
            maps::note_pending(&ConnectionKey::new(netns, local, remote), Note::Once);
        }
        // The ACK is about to leave. With SYN cookies the application's end has no socket yet, and the ACK
        // is looked up like the SYN.
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => {
            let Ends { local, remote } = Ends::read(ctx);
            if maps::is_upstream(netns, local.0, remote.0) {
                maps::note_pending(&ConnectionKey::new(netns, local, remote), Note::Standing);
            }
        }
        // The application's end stands.
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => {
            let Ends { local, remote } = Ends::read(ctx);
            maps::forget_pending(&ConnectionKey::new(netns, remote, local));
        }
        BPF_SOCK_OPS_STATE_CB if ctx.arg(1) == tcp_state::CLOSE => {
            let Ends { local, remote } = Ends::read(ctx);
            maps::forget_pending(&ConnectionKey::new(netns, local, remote));
        }
        _ => {}
    }
}

#[inline(always)]
fn listening(ctx: &SockOpsContext, netns: u64, pod: &Pod) {
    let port = ctx.local_port() as u16;
    if port != pod.proxy_port {
        return;
    }
    let family = ctx.family() as u16;
    let socket = sys::socket_cookie(ctx.as_ptr());
    sys::set_mark(ctx.as_ptr(), LISTENER_MARK);
    // It has just begun to listen: a slot it may have had before, it left when it stopped.
    listeners::forget(netns, socket);
    listeners::register(netns, port, family, socket, |key| {
        // SAFETY: verified: the context is valid, and the helper takes the socket it stands for.
        LISTENERS.update(key, unsafe { &mut *ctx.ops }, BPF_NOEXIST.into()).is_ok()
    });
}
