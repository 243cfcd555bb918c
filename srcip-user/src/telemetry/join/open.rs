//! An open connection, and what there is to tell of it.

use std::{net::SocketAddr, sync::Arc};

use super::super::record::{
    DownstreamLocal, DownstreamRemote, EventKind, Join, Leg, Origin, Record, Rule, Timestamp, UpstreamHost,
    UpstreamLocal,
};
use crate::netns::NetnsCookie;

/// An open connection.
#[derive(Clone, Debug)]
pub(super) struct Open {
    pub(super) netns: NetnsCookie,
    pub(super) workload: Arc<str>,
    pub(super) leg: Leg,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) opened_ns: u64,
    pub(super) mark: u32,
    /// This end connected.
    pub(super) active: bool,
    pub(super) partner: Option<Partner>,
    /// The upstream leg's source hides the client.
    pub(super) hidden: bool,
}

/// The other leg, as far as it is known. Its addresses are kept: it may have ended by now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partner {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) join: Join,
    pub(super) rule: Rule,
}

impl Open {
    /// What there is to tell of it when `event` happens; its totals are known only at its end.
    pub(super) fn record(&self, event: EventKind, time: Timestamp) -> Record {
        let partner = self.partner;
        let mut record = Record {
            time,
            event,
            workload: Arc::clone(&self.workload),
            netns_cookie: self.netns,
            leg: self.leg,
            downstream_remote_address: None,
            downstream_local_address: None,
            upstream_local_address: None,
            upstream_host: None,
            origin: None,
            preserved: None,
            join: partner.map(|partner| partner.join),
            rule: partner.map(|partner| partner.rule),
            mark: self.mark,
            totals: None,
        };
        match self.leg {
            Leg::Downstream | Leg::Direct => {
                record.downstream_remote_address = Some(DownstreamRemote(self.remote));
                record.downstream_local_address = Some(DownstreamLocal(self.local));
                record.origin = Some(Origin(self.remote));
                record.upstream_local_address = partner.map(|p| UpstreamLocal(p.local));
                record.upstream_host = partner.map(|p| UpstreamHost(p.remote));
            }
            Leg::Upstream => {
                record.downstream_remote_address = partner.map(|p| DownstreamRemote(p.remote));
                record.downstream_local_address = partner.map(|p| DownstreamLocal(p.local));
                record.origin = partner.map(|p| Origin(p.remote));
                record.upstream_local_address = Some(UpstreamLocal(self.local));
                record.upstream_host = Some(UpstreamHost(self.remote));
            }
            Leg::Outbound | Leg::Local => {
                let (from, to) =
                    if self.active { (self.local, self.remote) } else { (self.remote, self.local) };
                record.downstream_remote_address = Some(DownstreamRemote(from));
                record.downstream_local_address = Some(DownstreamLocal(to));
            }
        }
        record.preserved = match (record.origin, record.seen_by_application()) {
            (Some(origin), Some(seen)) => Some(origin.ip() == seen),
            // Whoever the client is, it did not come over loopback.
            (None, Some(_)) if self.hidden => Some(false),
            _ => None,
        };
        record
    }
}
