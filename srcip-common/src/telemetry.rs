//! What the watching program tells of TCP connections.

use crate::address::Address;

/// [`Event::kind`]: a connection was established.
pub const OPEN: u8 = 1;
/// [`Event::kind`]: a connection that was told of as open has ended.
pub const CLOSE: u8 = 2;

/// [`Event::role`]: this end was connected to (`accept`).
pub const PASSIVE: u8 = 1;
/// [`Event::role`]: this end connected (`connect`).
pub const ACTIVE: u8 = 2;

/// [`Event::closed_by`]: still open.
pub const NOBODY: u8 = 0;
/// [`Event::closed_by`]: this end sent the first FIN.
pub const LOCAL: u8 = 1;
/// [`Event::closed_by`]: the other end sent the first FIN.
pub const REMOTE: u8 = 2;
/// [`Event::closed_by`]: no FIN at all. A reset, sent or received, or a timeout.
pub const ABORTED: u8 = 3;

/// One end of one TCP connection, when it opens and again when it closes.
///
/// A connection inside a pod has two ends there. Both are told of, but for the accepting end of what
/// srcip's steered proxy opens, which has nothing to say that the other end has not.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Cookie of the network namespace this end is in.
    pub netns: u64,
    /// Cookie of the socket, which the kernel never uses twice.
    pub socket: u64,
    /// When it happened, in nanoseconds since boot.
    pub time_ns: u64,
    /// On close: payload that the other end acknowledged, in bytes.
    pub bytes_sent: u64,
    /// On close: payload received in order, in bytes.
    pub bytes_received: u64,
    /// This end's address.
    pub local: Address,
    /// The other end's address.
    pub remote: Address,
    /// Host byte order.
    pub local_port: u16,
    /// Host byte order.
    pub remote_port: u16,
    /// Smoothed round-trip time in microseconds.
    pub srtt_us: u32,
    /// Segments retransmitted.
    pub retransmits: u32,
    /// The socket's mark, host byte order.
    pub mark: u32,
    /// [`OPEN`], [`CLOSE`].
    pub kind: u8,
    /// On open: [`PASSIVE`], [`ACTIVE`].
    pub role: u8,
    /// On close: [`LOCAL`], [`REMOTE`], [`ABORTED`].
    pub closed_by: u8,
    pub padding: u8,
    pub padding2: u32,
}

/// How many events the recorder keeps.
pub const HISTORY_LENGTH: u32 = 16384;

/// What the watching program counts, exactly: `opened` is the number of [`OPEN`] events that a reader
/// got or will get, plus `opened_lost`; the same goes for `closed`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WatchCounters {
    /// Connections established.
    pub opened: u64,
    /// Of those, the ones whose event did not fit into the ring buffer.
    pub opened_lost: u64,
    /// Connections closed.
    pub closed: u64,
    /// Of those, the ones whose event did not fit into the ring buffer.
    pub closed_lost: u64,
}

impl core::ops::AddAssign for WatchCounters {
    fn add_assign(&mut self, other: Self) {
        let Self { opened, opened_lost, closed, closed_lost } = other;
        self.opened += opened;
        self.opened_lost += opened_lost;
        self.closed += closed;
        self.closed_lost += closed_lost;
    }
}
