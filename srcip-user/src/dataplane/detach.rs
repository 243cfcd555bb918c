//! Detach: steering stops at once, the return route stays while connections need it.

use std::{
    net::IpAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use super::{
    Dataplane,
    error::{Error, Result},
    in_netns,
    maps::Maps,
    pins::remove_tree,
    record::{Record, State},
};
use crate::{
    netns::{Netns, NetnsCookie},
    sockets,
};

/// How often a draining pod is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(100);

/// How a detach went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Detached {
    /// Nothing was left to wait for.
    Clean,
    /// This many upstream connections were cut off from their answers.
    Cut(usize),
    /// Somebody attached the pod again meanwhile; it stays attached.
    Reattached,
}

impl Dataplane {
    /// Stops steering a pod, waits up to `drain` for its upstream connections, and removes the rest.
    /// `progress` is told how many there still are.
    pub fn detach(
        &self,
        record: &Record,
        drain: Duration,
        mut progress: impl FnMut(usize),
    ) -> Result<Detached> {
        let cookie = record.netns_cookie;
        let netns = self.find_netns(record);
        {
            let Some(_lock) = self.pins.lock()? else {
                return Err(Error::NotAttached(record.name.clone()));
            };
            let mut maps = Maps::open(&self.pins)?;
            let mut current = maps.record(cookie)?.ok_or_else(|| Error::NotAttached(record.name.clone()))?;
            maps.stop_steering(cookie)?;
            current.engine.engine().detach(&self.pins, netns.as_ref(), &current)?;
            current.state = State::Draining;
            maps.store_record(&current)?;
        }

        // The lock is free meanwhile: other pods can come and go.
        let deadline = Instant::now() + drain;
        let mut left = self.upstream_connections(cookie, netns.as_ref())?;
        while left > 0 && Instant::now() < deadline {
            progress(left);
            sleep(DRAIN_POLL);
            left = self.upstream_connections(cookie, netns.as_ref())?;
        }

        let Some(_lock) = self.pins.lock()? else { return Ok(Detached::Clean) };
        let mut maps = Maps::open(&self.pins)?;
        match maps.record(cookie)? {
            None => Ok(Detached::Clean),
            Some(current) if current.state != State::Draining => Ok(Detached::Reattached),
            Some(current) => {
                self.tear_down(&mut maps, &current, netns.as_ref())?;
                Ok(if left > 0 { Detached::Cut(left) } else { Detached::Clean })
            }
        }
    }

    /// Removes every trace of this instance, whatever state it is in. Returns the names that were
    /// attached.
    pub fn cleanup(&self) -> Result<Vec<String>> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        // Unreadable maps are no reason to leave them: without their pins they are gone. What lies in
        // the namespaces (rules, routes) can then only be found by whoever knows the namespace.
        match Maps::check_layout(&self.pins).and_then(|()| Maps::open(&self.pins)) {
            Ok(mut maps) => match maps.records() {
                Ok(records) => {
                    for record in records {
                        let netns = self.find_netns(&record);
                        self.tear_down(&mut maps, &record, netns.as_ref())?;
                        names.push(record.name);
                    }
                }
                Err(error) => tracing::warn!("{error}"),
            },
            Err(error) => tracing::debug!("nothing can be read back: {error}"),
        }
        self.pins.remove_all()?;
        Ok(names)
    }

    /// The namespace of an attachment, if it still exists, wherever it can be reached.
    pub fn find_netns(&self, record: &Record) -> Option<Netns> {
        let is_it = |netns: &Netns| netns.cookie().is_ok_and(|c| c == record.netns_cookie);
        Netns::open(&record.netns).ok().filter(is_it).or_else(|| Netns::find(record.netns_cookie))
    }

    /// Connections from a foreign address inside the pod: the proxy's upstream legs.
    pub fn upstream_connections(&self, cookie: NetnsCookie, netns: Option<&Netns>) -> Result<usize> {
        let Some(netns) = netns else { return Ok(0) };
        let Ok(maps) = Maps::open(&self.pins) else { return Ok(0) };
        let own = maps.addresses(cookie);
        let sockets = netns.run(sockets::tcp_sockets)?.map_err(|source| Error::File {
            action: "read the sockets of",
            path: netns.path().to_owned(),
            source,
        })?;
        let is_foreign = |ip: IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !own.contains(&ip);
        Ok(sockets.iter().filter(|s| s.is_connection() && is_foreign(s.local.ip())).count())
    }

    /// Removes all that an attachment consists of, and the instance if it was the last one.
    pub(super) fn tear_down(&self, maps: &mut Maps, record: &Record, netns: Option<&Netns>) -> Result<()> {
        let cookie = record.netns_cookie;
        record.engine.engine().detach(&self.pins, netns, record)?;
        if let Some(netns) = netns {
            netns
                .run(|| {
                    record.route().remove()?;
                    record.previous_sysctls.write()
                })?
                .map_err(|e| in_netns(e, netns))?;
        }
        remove_tree(&self.pins.pod(cookie))?;
        maps.forget(cookie)?;
        self.remove_if_unused();
        Ok(())
    }

    /// Removes the instance if it has no attachment. The caller holds the lock.
    pub(super) fn remove_if_unused(&self) {
        let used =
            Maps::open(&self.pins).and_then(|maps| maps.records()).is_ok_and(|records| !records.is_empty());
        if !used && let Err(error) = self.pins.remove_all() {
            tracing::warn!("{error}");
        }
    }
}
