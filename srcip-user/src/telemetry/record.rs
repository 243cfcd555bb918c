//! What is told of a connection. Names in JSON are stable; the four address fields carry Envoy's names.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use crate::netns::NetnsCookie;

/// Mixing up a client's, a node's and a pod's address is what this project exists against: each role is
/// a type.
macro_rules! roles {
    ($($(#[$doc:meta])+ $name:ident,)+) => {$(
        $(#[$doc])+
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub SocketAddr);

        impl $name {
            /// Its address without the port.
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )+};
}

roles! {
    /// The client as the first hop in the pod saw it: its address and port.
    Origin,
    /// The other end of the connection that came into the pod.
    DownstreamRemote,
    /// The pod's end of the connection that came into the pod: where the client wanted to go, or the
    /// proxy's port where NAT has changed that.
    DownstreamLocal,
    /// The proxy's end of its connection to the application: what the application sees as its peer.
    UpstreamLocal,
    /// The application's end of that connection.
    UpstreamHost,
}

/// What a connection is to the pod.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Leg {
    /// Client to proxy.
    Downstream,
    /// Proxy to application, inside the pod.
    Upstream,
    /// Client to application, no proxy in between.
    Direct,
    /// Opened by the pod to somewhere else.
    Outbound,
    /// Inside the pod, for its own purposes.
    Local,
}

impl Leg {
    /// All there are.
    pub const ALL: [Self; 5] = [Self::Downstream, Self::Upstream, Self::Direct, Self::Outbound, Self::Local];

    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Downstream => "downstream",
            Self::Upstream => "upstream",
            Self::Direct => "direct",
            Self::Outbound => "outbound",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for Leg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How sure it is which downstream connection an upstream connection serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Join {
    /// No other is possible.
    Exact,
    /// Others are possible; [`Rule`] says how this one was chosen.
    Inferred,
}

/// What joined the two legs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// The client's address and port are on both legs.
    SameTuple,
    /// It was the only connection of this client to this destination.
    OnlyConnectionOfClient,
    /// The proxy hid the client's address, but only one connection was open to it.
    OnlyConnection,
    /// Of several, the one that had waited longest for an upstream connection, or of those the first that goes
    /// to the same destination.
    FirstWaiting,
    /// The youngest: all had an upstream connection, or the proxy hides whose it is.
    Youngest,
    /// No upstream connection was opened for it: it was given one that had served another connection.
    Pooled,
    /// Several upstream connections were opened for it; the last.
    Several,
}

impl Rule {
    /// Whether no other downstream connection is possible, if all are known.
    pub fn is_exact(self) -> bool {
        matches!(self, Self::SameTuple | Self::OnlyConnectionOfClient | Self::OnlyConnection)
    }
}

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// It was established.
    Open,
    /// It has ended.
    Close,
}

/// Who ended a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClosedBy {
    /// This pod's end sent the first FIN.
    Local,
    /// The other end sent the first FIN.
    Remote,
    /// There was no FIN: a reset by either end, or a timeout.
    Aborted,
}

/// What is known when a connection has ended.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Totals {
    /// Payload this end sent and the other acknowledged.
    pub bytes_sent: u64,
    /// Payload this end received.
    pub bytes_received: u64,
    /// From established to closed, in milliseconds.
    pub duration_ms: f64,
    /// Smoothed round-trip time in microseconds.
    pub rtt_us: u32,
    /// Segments this end retransmitted.
    pub retransmits: u32,
    /// Who ended it.
    pub closed_by: ClosedBy,
}

/// One line of `srcip observe -o json` and of the access log: one leg of a connection, opened or closed,
/// with what is known of the other leg by then.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Record {
    /// When it happened, RFC 3339 with microseconds, UTC.
    pub time: Timestamp,
    /// What happened.
    pub event: EventKind,
    /// The pod: the attachment's name, or that of the network namespace.
    pub workload: std::sync::Arc<str>,
    /// Its network namespace.
    pub netns_cookie: NetnsCookie,
    /// What this connection is to the pod.
    pub leg: Leg,
    /// The client's end of the downstream leg; for outbound and local connections, the end that
    /// connected.
    pub downstream_remote_address: Option<DownstreamRemote>,
    /// The proxy's end of the downstream leg, or the application's if there is no proxy.
    pub downstream_local_address: Option<DownstreamLocal>,
    /// The proxy's end of the upstream leg.
    pub upstream_local_address: Option<UpstreamLocal>,
    /// The application's end of the upstream leg.
    pub upstream_host: Option<UpstreamHost>,
    /// The client, as the first hop in the pod saw it.
    pub origin: Option<Origin>,
    /// Whether the application sees the origin's address; unknown before it has been connected to.
    pub preserved: Option<bool>,
    /// How sure the join is.
    pub join: Option<Join>,
    /// What it rests on.
    pub rule: Option<Rule>,
    /// The socket's mark.
    pub mark: u32,
    /// At its end.
    #[serde(flatten)]
    pub totals: Option<Totals>,
}

impl Record {
    /// The address the application sees as its peer, if it is known by now.
    pub fn seen_by_application(&self) -> Option<IpAddr> {
        match self.leg {
            Leg::Direct => self.downstream_remote_address.map(DownstreamRemote::ip),
            Leg::Downstream | Leg::Upstream => self.upstream_local_address.map(UpstreamLocal::ip),
            Leg::Outbound | Leg::Local => None,
        }
    }
}

/// A moment, in nanoseconds since 1970.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Timestamp(pub u64);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = i128::from(self.0);
        match jiff::Timestamp::from_nanosecond(nanoseconds) {
            Ok(timestamp) => write!(f, "{timestamp:.6}"),
            Err(_) => write!(f, "{nanoseconds}"),
        }
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
