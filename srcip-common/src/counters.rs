//! What a pod's programs count.

/// Counters of one pod, one copy per CPU; user space adds them up.
///
/// Each counts events on the connection path, never packets of an established connection.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Connection attempts handed to the proxy's listener. A retransmitted SYN counts again.
    pub steered: u64,
    /// Connection attempts for a port that is not steered, left to whoever listens there.
    pub passed: u64,
    /// Connection attempts refused because the proxy does not listen (`--on-proxy-down drop`).
    pub refused: u64,
    /// Connection attempts let through to the application because the proxy does not listen
    /// (`--on-proxy-down pass`).
    pub passed_proxy_down: u64,
    /// Connections that the proxy opened to the application with a client's address.
    pub upstream: u64,
    /// Of those, the ones that kept a source port the proxy had bound itself.
    pub upstream_port_kept: u64,
    /// Of those, the ones for which every source port tried was taken: the kernel chose one.
    pub upstream_ports_exhausted: u64,
    /// Steered connection attempts whose client port lies in the pod's own upstream range. Such a
    /// client can meet its own mirrored tuple. The `sk_lookup` engine, which does not see TCP flags, also counts what
    /// an upstream leg's end sends to an end that has gone: a last acknowledgement repeated under load.
    pub client_port_in_upstream_range: u64,
    /// Listeners that found every slot taken. They still answer as members of a reuseport group.
    pub listener_slots_full: u64,
    /// Packets refused by the `tc` engine because they could hide a connection attempt: fragments, which
    /// it sees before reassembly, and endless extension headers.
    pub disguised_refused: u64,
}

impl core::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        let Self {
            steered,
            passed,
            refused,
            passed_proxy_down,
            upstream,
            upstream_port_kept,
            upstream_ports_exhausted,
            client_port_in_upstream_range,
            listener_slots_full,
            disguised_refused,
        } = other;
        self.steered += steered;
        self.passed += passed;
        self.refused += refused;
        self.passed_proxy_down += passed_proxy_down;
        self.upstream += upstream;
        self.upstream_port_kept += upstream_port_kept;
        self.upstream_ports_exhausted += upstream_ports_exhausted;
        self.client_port_in_upstream_range += client_port_in_upstream_range;
        self.listener_slots_full += listener_slots_full;
        self.disguised_refused += disguised_refused;
    }
}
