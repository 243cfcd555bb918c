//! Registers listeners that were there before srcip: run once, in the pod's netns, at attach.
//!
//! Minimum kernel: 5.15 (`bpf_setsockopt` for this iterator, which itself is 5.8).

use core::ffi::c_void;

use aya_ebpf::{EbpfContext, bindings::BPF_NOEXIST, cty::c_int};
use aya_log_ebpf::info;
use srcip_common::pod::LISTENER_MARK;
use srcip_ebpf::sys::{self, tcp_state};

use crate::{
    listeners,
    maps::{self, LISTENERS},
};

/// `struct bpf_iter__tcp`: net/ipv4/tcp_ipv4.c.
#[repr(C)]
pub struct IterTcp {
    meta: *mut c_void,
    socket: *mut SockCommon,
    uid: u32,
}

/// The start of `struct sock_common`: include/net/sock.h. These fields lie here since Linux 3.13, and
/// the verifier checks every access against the running kernel's own description of the struct.
#[repr(C)]
struct SockCommon {
    addresses: [u32; 2],
    hash: u32,
    destination_port: u16,
    port: u16,
    family: u16,
    state: u8,
}

/// What aya-log wants of a context.
struct Iteration(*mut IterTcp);

impl EbpfContext for Iteration {
    fn as_ptr(&self) -> *mut c_void {
        self.0.cast()
    }
}

/// Called once for every TCP socket of the reader's netns, and once more with null at the end.
#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/tcp")]
pub extern "C" fn srcip_iter_tcp(ctx: *mut IterTcp) -> c_int {
    let _ = register(&Iteration(ctx));
    0
}

#[inline(always)]
fn register(ctx: &Iteration) -> Option<()> {
    let wanted = maps::wanted()?;
    // SAFETY: verified: the context is valid.
    let socket = unsafe { (*ctx.0).socket };
    if socket.is_null() {
        return None;
    }
    // SAFETY: verified: not null, and the iterator holds the socket while the program runs.
    let (port, family, state) = unsafe { ((*socket).port, (*socket).family, u32::from((*socket).state)) };
    if state != tcp_state::LISTEN || port != wanted.port {
        return None;
    }
    sys::set_mark(socket.cast(), LISTENER_MARK);
    let cookie = sys::socket_cookie(socket.cast());
    let registered = listeners::register(wanted.netns, port, family, cookie, |key| {
        sys::store_socket(&LISTENERS, &key, socket.cast(), BPF_NOEXIST.into()).is_ok()
    });
    if registered {
        info!(ctx, "listener registered: family {} port {}", family, port);
    }
    Some(())
}
