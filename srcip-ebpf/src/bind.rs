//! Chooses the upstream leg's port for proxies that take it at `bind`.
//!
//! Envoy, HAProxy and nginx set `IP_BIND_ADDRESS_NO_PORT` and get their port at `connect`, where the
//! destination is known and a better choice can be made. A proxy without it would be given a port of
//! the system's ephemeral range right here, and clients use those. Only for pods that ask for it: a
//! program cannot see whether the option is set.
//!
//! Minimum kernel: 5.12 (`bpf_setsockopt` in this program type).

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use srcip_common::{
    keys::{AF_INET, AF_INET6},
    pod::CHOOSE_PORT_AT_BIND,
};
use srcip_ebpf::sys::{self, SO_REUSEADDR};

use crate::{
    connect::{ALLOW, requested, store_cursor, stream_of_pod},
    maps,
};

#[cgroup_sock_addr(bind4)]
pub fn srcip_bind4(ctx: SockAddrContext) -> i32 {
    let _ = choose(&ctx, AF_INET);
    ALLOW
}

#[cgroup_sock_addr(bind6)]
pub fn srcip_bind6(ctx: SockAddrContext) -> i32 {
    let _ = choose(&ctx, AF_INET6);
    ALLOW
}

#[inline(always)]
fn choose(ctx: &SockAddrContext, family: u16) -> Option<()> {
    let (netns, pod) = stream_of_pod(ctx)?;
    if !pod.has(CHOOSE_PORT_AT_BIND) {
        return None;
    }
    let source = requested(ctx.sock_addr, family);
    if source.port != 0 || !maps::is_foreign(netns, source.address) {
        return None;
    }
    let _ = sys::set_socket_option(ctx, SO_REUSEADDR, 1);
    let cursor = pod.cursor.wrapping_add(1);
    store_cursor(netns, cursor);
    let port = pod.upstream_ports.nth(cursor);
    // SAFETY: verified: `user_port` is one of the fields a bind program may write.
    unsafe { (*ctx.sock_addr).user_port = u32::from(port.to_be()) };
    Some(())
}
