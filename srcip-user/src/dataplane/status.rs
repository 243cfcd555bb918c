//! What is attached, as `status -o json` shows it. The names are stable.

use std::net::SocketAddr;

use serde::Serialize;

use super::{
    Dataplane,
    error::Result,
    hooks,
    maps::Maps,
    record::{Record, State},
};
use crate::{netns::Netns, sockets};

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
    /// What is attached.
    pub fn status(&self) -> Result<Status> {
        let Some(_lock) = self.pins.lock()? else {
            return Ok(Status { attachments: Vec::new() });
        };
        let records = self.records_locked()?;
        if records.is_empty() {
            return Ok(Status { attachments: Vec::new() });
        }
        let maps = Maps::open(&self.pins)?;
        let attachments =
            records.into_iter().map(|record| self.attachment_status(&maps, record)).collect::<Result<_>>()?;
        Ok(Status { attachments })
    }

    fn attachment_status(&self, maps: &Maps, record: Record) -> Result<AttachmentStatus> {
        let cookie = record.netns_cookie;
        let netns = self.find_netns(&record);
        let listeners = match &netns {
            Some(netns) => netns
                .run(sockets::tcp_sockets)?
                .unwrap_or_default()
                .into_iter()
                .filter(|s| s.is_listener() && s.local.port() == record.proxy_port)
                .map(|s| s.local)
                .collect::<Vec<_>>(),
            None => Vec::new(),
        };
        let registered_listeners = maps.registered_listeners(cookie, record.proxy_port);
        let upstream_connections = self.upstream_connections(cookie, netns.as_ref())?;
        let counters = CounterStatus::from(maps.counters(cookie)?);
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
        if let Some(cgroup) = &record.cgroup
            && hooks::cgroup_id(cgroup) != record.cgroup_id
        {
            problems.push(format!(
                "the cgroup {} has been removed, and the hooks with it: attach again",
                cgroup.display()
            ));
        }
        if record.cgroup.is_some() && !hooks::are_attached(&self.pins) {
            problems.push("hooks are missing: attach again".to_owned());
        }
        match (record.state, netns) {
            (State::Attaching, _) => {
                problems.push("the attach was interrupted: attach again, or detach".to_owned());
            }
            (State::Attached, Some(netns)) => {
                problems.extend(record.engine.engine().problems(&self.pins, netns, record));
            }
            (State::Attached | State::Draining, _) => {}
        }
        if counters.upstream_ports_exhausted > 0 {
            problems.push(format!(
                "{} upstream connections found no free source port: widen --upstream-ports",
                counters.upstream_ports_exhausted
            ));
        }
        if counters.upstream_port_kept > 0 {
            problems.push(format!(
                "the proxy took the source port of {} upstream connections itself, and clients may \
                 use those ports: set IP_BIND_ADDRESS_NO_PORT in the proxy, or attach with \
                 --upstream-port-at bind",
                counters.upstream_port_kept
            ));
        }
        problems
    }
}
