//! What is attached, as `status -o json` shows it. The names are stable.

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{
    Dataplane,
    detach::{count_upstream, tcp_sockets},
    error::Result,
    maps::Maps,
    record::{Record, State},
};
use crate::{netns::Netns, sockets::TcpSocket};

/// The whole status.
#[derive(Debug, Serialize)]
pub struct Status {
    /// All attachments, by name.
    pub attachments: Vec<AttachmentStatus>,
}

/// One attachment.
#[derive(Debug, Serialize)]
pub struct AttachmentStatus {
    /// What was asked for and what is remembered.
    #[serde(flatten)]
    pub record: Record,
    /// Addresses the proxy listens on at its port.
    pub listeners: Vec<SocketAddr>,
    /// How many of them `sk-lookup` can hand connections to.
    pub registered_listeners: usize,
    /// Upstream connections that exist now.
    pub upstream_connections: usize,
    /// What this attachment cannot promise.
    pub missing_guarantees: Vec<&'static str>,
    /// What is wrong with it.
    pub problems: Vec<String>,
    /// Counters since the attach.
    pub counters: CounterStatus,
}

/// What the maps say of an attachment.
struct Seen {
    record: Record,
    own: HashSet<IpAddr>,
    registered_listeners: usize,
    counters: CounterStatus,
}

/// What there is to see of an attachment from outside of its pod.
#[derive(Debug)]
pub struct Glance {
    /// What was asked for and what is remembered.
    pub record: Record,
    /// How many listeners the proxy has.
    pub listeners: usize,
    /// How many things are wrong with it.
    pub problems: usize,
    /// Counters since the attach.
    pub counters: CounterStatus,
}

macro_rules! counter_status {
    ($($name:ident),+ $(,)?) => {
        /// The counters, as documented at `srcip_common::counters::Counters`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[expect(missing_docs, reason = "documented where they are counted")]
        pub struct CounterStatus { $(pub $name: u64),+ }

        impl From<srcip_common::counters::Counters> for CounterStatus {
            fn from(counters: srcip_common::counters::Counters) -> Self {
                let srcip_common::counters::Counters { $($name),+ } = counters;
                Self { $($name),+ }
            }
        }
    };
}

counter_status! {
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
}

impl Dataplane {
    /// What is attached. Takes a look at the sockets of each pod, 12 ms each with the kernel's usual table of
    /// 262,144 buckets; others can attach and detach meanwhile.
    pub fn status(&self) -> Result<Status> {
        let seen = self.seen()?;
        let attachments = seen.into_iter().map(|seen| self.attachment_status(seen)).collect::<Result<_>>()?;
        Ok(Status { attachments })
    }

    /// What the maps say.
    fn seen(&self) -> Result<Vec<Seen>> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
        let records = self.records_locked()?;
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let maps = Maps::open(&self.pins)?;
        let (mut addresses, registered) = (maps.all_addresses(), maps.registered_listeners());
        let seen = |record: Record| {
            let cookie = record.netns_cookie;
            Ok(Seen {
                own: addresses.remove(&cookie).unwrap_or_default(),
                registered_listeners: registered.get(&(cookie, record.proxy_port)).copied().unwrap_or(0),
                counters: maps.counters(cookie)?.into(),
                record,
            })
        };
        records.into_iter().map(seen).collect()
    }

    /// The same without looking into the pods, which takes no time: listeners are those that have registered.
    pub fn glance(&self) -> Result<Vec<Glance>> {
        self.seen()?.into_iter().map(|seen| self.glance_at(seen)).collect()
    }

    fn glance_at(&self, seen: Seen) -> Result<Glance> {
        // Without hooks, nobody registers.
        if seen.record.cgroup.is_none() {
            let AttachmentStatus { record, listeners, problems, counters, .. } =
                self.attachment_status(seen)?;
            return Ok(Glance { record, listeners: listeners.len(), problems: problems.len(), counters });
        }
        let Seen { record, registered_listeners: listeners, counters, .. } = seen;
        let is_down = listeners == 0 && record.state != State::Draining;
        let problems = usize::from(is_down)
            + usize::from(self.is_gone(&record)?)
            + self.missing(&record, None, &mut self.common()).len()
            + counter_problems(&counters).len();
        Ok(Glance { record, listeners, problems, counters })
    }

    fn attachment_status(&self, seen: Seen) -> Result<AttachmentStatus> {
        let Seen { record, own, registered_listeners, counters } = seen;
        let netns = self.find_netns(&record);
        let sockets = netns.as_ref().map(tcp_sockets).transpose()?.unwrap_or_default();
        let is_listener = |s: &&TcpSocket| s.is_listener() && s.local.port() == record.proxy_port;
        let listeners: Vec<_> = sockets.iter().filter(is_listener).map(|s| s.local).collect();
        let upstream_connections = count_upstream(&sockets, &own);
        let problems = self.problems(&record, netns.as_ref(), &listeners, &counters);
        Ok(AttachmentStatus {
            missing_guarantees: record.missing_guarantees(),
            record,
            listeners,
            registered_listeners,
            upstream_connections,
            problems,
            counters,
        })
    }

    fn problems(
        &self,
        record: &Record,
        netns: Option<&Netns>,
        listeners: &[SocketAddr],
        counters: &CounterStatus,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        if netns.is_none() {
            problems.push("the network namespace is gone: `srcip detach` removes the rest".to_owned());
        } else if listeners.is_empty() && record.state != State::Draining {
            problems.push(format!(
                "nothing listens on port {}: connections are {}",
                record.proxy_port,
                match record.on_proxy_down {
                    super::record::OnProxyDown::Drop => "refused",
                    super::record::OnProxyDown::Pass => "passed to the application",
                }
            ));
        }
        problems.extend(self.missing(record, netns, &mut self.common()));
        if record.state == State::Attached {
            problems.extend(netns.and_then(|netns| self.wrong_sysctls(netns, record)));
        }
        problems.extend(counter_problems(counters));
        problems
    }
}

/// What counters tell of problems.
fn counter_problems(counters: &CounterStatus) -> Vec<String> {
    let mut problems = Vec::new();
    if counters.upstream_ports_exhausted > 0 {
        problems.push(format!(
            "{} upstream connections found no free source port: widen --upstream-ports",
            counters.upstream_ports_exhausted
        ));
    }
    if counters.upstream_port_kept > 0 {
        problems.push(format!(
            "the proxy took the source port of {} upstream connections itself, and clients may use those ports: \
             set IP_BIND_ADDRESS_NO_PORT in the proxy, or attach with --upstream-port-at bind",
            counters.upstream_port_kept
        ));
    }
    problems
}
