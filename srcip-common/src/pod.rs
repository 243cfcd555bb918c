//! What the programs know of a steered pod.

use crate::ports::{PortSet, UpstreamPorts};

/// [`Pod::flags`]: steer. Cleared while a detach drains; the upstream legs are still served then.
pub const STEER: u8 = 1;
/// [`Pod::flags`]: when the proxy does not listen, let connections through to the application.
pub const PASS_WHEN_PROXY_DOWN: u8 = 1 << 1;
/// [`Pod::flags`]: choose the upstream leg's port when the proxy binds, for a proxy that binds
/// without `IP_BIND_ADDRESS_NO_PORT`.
pub const CHOOSE_PORT_AT_BIND: u8 = 1 << 2;
/// [`Pod::flags`]: the `tc` engine has its `sk_lookup` companion.
pub const HAS_COMPANION: u8 = 1 << 3;

/// The mark of a steered proxy's listeners, and by that of the client's connections that they accept.
///
/// With `tcp_fwmark_accept` a connection takes the mark of its SYN, unless its listener has one
/// (`inet_request_mark`). Istio's TPROXY rules give the client's SYN the very mark by which upstream legs find
/// back into the pod: the answers to clients would stay in there, too. No rule looks at this one.
pub const LISTENER_MARK: u32 = 0x2130_0000;

/// A steered pod: the value under its netns cookie in the `PODS` map.
///
/// The kernel replaces a map value as a whole, so a program sees either the old or the new settings.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Ports whose connections go to the proxy: included, minus excluded, minus the proxy's own.
    pub steered_ports: PortSet,
    /// Source ports for upstream legs.
    pub upstream_ports: UpstreamPorts,
    /// Where the search for the next upstream port starts. Only a hint: two CPUs may read the same.
    pub cursor: u32,
    /// Routing mark of upstream legs, host byte order.
    pub mark: u32,
    /// Port of the proxy's listener, host byte order.
    pub proxy_port: u16,
    /// [`STEER`], [`PASS_WHEN_PROXY_DOWN`], [`CHOOSE_PORT_AT_BIND`], [`HAS_COMPANION`].
    pub flags: u8,
    padding: u8,
    padding2: u32,
}

impl Pod {
    /// A pod whose proxy listens on `proxy_port` (host byte order).
    pub fn new(
        steered_ports: PortSet,
        upstream_ports: UpstreamPorts,
        mark: u32,
        proxy_port: u16,
        flags: u8,
    ) -> Self {
        Self { steered_ports, upstream_ports, cursor: 0, mark, proxy_port, flags, padding: 0, padding2: 0 }
    }

    /// Whether all of `flag` is set.
    #[inline]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag == flag
    }
}
