//! Detach: steering stops at once, the return route stays while connections need it.

use std::{
    collections::HashSet,
    net::IpAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use super::{
    Dataplane,
    error::{Error, Result},
    in_netns,
    maps::{Decoded, Maps, record_pod},
    pins::remove_tree,
    record::{EngineKind, Record, State},
};
use crate::{
    netns::{Netns, NetnsCookie},
    sockets::{self, TcpSocket},
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

/// What [`Dataplane::try_finish`] found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Drain {
    /// It still has this many upstream connections, and time.
    Waiting(usize),
    /// It is over.
    Done(Detached),
}

impl Dataplane {
    /// Stops steering a pod. What its established connections need stays until [`Self::finish_detach`].
    pub fn stop(&self, record: &Record) -> Result<()> {
        let Some(_lock) = self.pins.lock()? else {
            return Err(Error::NotAttached(record.name.clone()));
        };
        let cookie = record.netns_cookie;
        let mut maps = Maps::open(&self.pins)?;
        let mut current = maps.record(cookie)?.ok_or_else(|| Error::NotAttached(record.name.clone()))?;
        let netns = self.find_netns(&current);
        maps.stop_steering(cookie)?;
        for engine in EngineKind::ALL {
            engine.engine().detach(&self.pins, netns.as_ref(), &current)?;
        }
        current.state = State::Draining;
        maps.store_record(&current)
    }

    /// Waits until `deadline` for the upstream connections of a stopped pod, and removes the rest.
    /// `progress` is told how many there still are.
    pub fn finish_detach(
        &self,
        record: &Record,
        deadline: Instant,
        mut progress: impl FnMut(usize),
    ) -> Result<Detached> {
        loop {
            match self.try_finish(record, deadline)? {
                Drain::Waiting(left) => progress(left),
                Drain::Done(detached) => return Ok(detached),
            }
            sleep(DRAIN_POLL);
        }
    }

    /// Removes the rest of a stopped pod if it has no upstream connections left, or `deadline` has passed;
    /// does not wait.
    pub fn try_finish(&self, record: &Record, deadline: Instant) -> Result<Drain> {
        let cookie = record.netns_cookie;
        let netns = self.find_netns(record);
        // The lock is free meanwhile: other pods can come and go.
        let left = self.upstream_connections(cookie, netns.as_ref())?;
        if left > 0 && Instant::now() < deadline {
            return Ok(Drain::Waiting(left));
        }

        let Some(_lock) = self.pins.lock()? else { return Ok(Drain::Done(Detached::Clean)) };
        let mut maps = Maps::open(&self.pins)?;
        let detached = match maps.record(cookie)? {
            None => Detached::Clean,
            Some(current) if current.state != State::Draining => Detached::Reattached,
            Some(current) => {
                self.tear_down(&mut maps, &current, netns.as_ref())?;
                if left > 0 { Detached::Cut(left) } else { Detached::Clean }
            }
        };
        Ok(Drain::Done(detached))
    }

    /// Removes an attachment at once, in whatever state it is: one whose namespace has gone has nothing to
    /// wait for. That it is not there is no error.
    pub fn forget(&self, record: &Record) -> Result<()> {
        let Some(_lock) = self.pins.lock()? else { return Ok(()) };
        let mut maps = Maps::open(&self.pins)?;
        match maps.record(record.netns_cookie)? {
            Some(current) => self.tear_down(&mut maps, &current, self.find_netns(&current).as_ref()),
            None => Ok(()),
        }
    }

    /// Removes every trace of steering from this instance, whatever state it is in and whichever version made it.
    /// Returns the names that were attached.
    pub fn cleanup(&self) -> Result<Vec<String>> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        let mut failed = None;
        for record in Maps::read_records(&self.pins, &mut Decoded::default()) {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    tracing::warn!("{error}; rules, routes and sysctls of that pod stay as they are");
                    continue;
                }
            };
            let netns = self.find_netns(&record);
            match self.undo(&record, netns.as_ref()) {
                Ok(()) => names.push(record.name),
                // The others are cleaned up all the same; this one can be tried again.
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                self.objects().forget_instance();
                self.pins.remove_steering()?;
                Ok(names)
            }
        }
    }

    /// The namespace of an attachment, if it still exists, wherever it can be reached.
    pub fn find_netns(&self, record: &Record) -> Option<Netns> {
        let is_it = |netns: &Netns| {
            record.netns_inode.is_none_or(|inode| inode == netns.id().inode())
                && netns.cookie().is_ok_and(|cookie| cookie == record.netns_cookie)
        };
        let there = Netns::open(&record.netns).ok().filter(is_it);
        let search = || Netns::find(record.netns_cookie, record.netns_inode);
        there.or_else(|| self.whereabouts.find(record.netns_cookie, is_it, search))
    }

    /// Connections from a foreign address inside the pod: the proxy's upstream legs.
    pub fn upstream_connections(&self, cookie: NetnsCookie, netns: Option<&Netns>) -> Result<usize> {
        let Some(netns) = netns else { return Ok(0) };
        let Ok(maps) = Maps::open(&self.pins) else { return Ok(0) };
        Ok(count_upstream(&tcp_sockets(netns)?, &maps.addresses(cookie)))
    }

    /// Removes all that an attachment consists of, and the instance if it was the last one.
    fn tear_down(&self, maps: &mut Maps, record: &Record, netns: Option<&Netns>) -> Result<()> {
        self.take_away(maps, record, netns)?;
        self.remove_if_unused();
        Ok(())
    }

    /// Removes all that an attachment consists of. `netns` is `None` if it is gone.
    pub(super) fn take_away(&self, maps: &mut Maps, record: &Record, netns: Option<&Netns>) -> Result<()> {
        self.undo(record, netns)?;
        record_pod(&self.pins, record.netns_cookie, None)?;
        self.whereabouts.forget(record.netns_cookie);
        maps.forget(record.netns_cookie)
    }

    /// Takes back what an attachment changed outside of the maps.
    fn undo(&self, record: &Record, netns: Option<&Netns>) -> Result<()> {
        for engine in EngineKind::ALL {
            engine.engine().detach(&self.pins, netns, record)?;
        }
        if let Some(netns) = netns {
            netns
                .run(|| {
                    record.routes().try_for_each(|route| route.remove())?;
                    record.previous_sysctls.write()
                })?
                .map_err(|e| in_netns(e, netns))?;
        }
        remove_tree(&self.pins.pod(record.netns_cookie))
    }

    /// Removes the instance if it is known to have no attachment. The caller holds the lock.
    pub(super) fn remove_if_unused(&self) {
        if !Maps::are_unused(&self.pins) {
            return;
        }
        self.objects().forget_instance();
        if let Err(error) = self.pins.remove_steering() {
            tracing::warn!("{error}");
        }
    }
}

/// The sockets of a pod.
pub(super) fn tcp_sockets(netns: &Netns) -> Result<Vec<TcpSocket>> {
    netns.run(sockets::tcp_sockets)?.map_err(|source| Error::File {
        action: "read the sockets of",
        path: netns.path().to_owned(),
        source,
    })
}

/// How many of them are upstream legs.
pub(super) fn count_upstream(sockets: &[TcpSocket], own: &HashSet<IpAddr>) -> usize {
    let is_foreign = |ip: IpAddr| !ip.is_loopback() && !ip.is_unspecified() && !own.contains(&ip);
    sockets.iter().filter(|s| s.is_connection() && is_foreign(s.local.ip())).count()
}
