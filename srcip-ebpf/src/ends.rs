//! Both ends of a `sock_ops` program's socket.

use aya_ebpf::programs::SockOpsContext;
use srcip_common::address::Address;

use crate::sys::{address, field};

/// Both ends of the context's socket; ports in host byte order.
pub struct Ends {
    pub local: (Address, u16),
    pub remote: (Address, u16),
}

impl Ends {
    #[inline(always)]
    pub fn read(ctx: &SockOpsContext) -> Self {
        let ops = ctx.ops;
        let family = field!(ops, family) as u16;
        // A dual-stack socket that speaks IPv4 says AF_INET6 and has mapped addresses: the same key.
        let local = address!(ops, family, local_ip4, local_ip6);
        let remote = address!(ops, family, remote_ip4, remote_ip6);
        // `remote_port` is a big-endian u32 whose upper half is the port; `local_port` is not.
        let remote_port = u32::from_be(field!(ops, remote_port)) as u16;
        Self { local: (local, field!(ops, local_port) as u16), remote: (remote, remote_port) }
    }
}
