//! What the records add up to.

use std::{
    collections::VecDeque,
    hash::Hash,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustc_hash::FxHashMap;

use super::rate::Rate;
use crate::{
    netns::NetnsCookie,
    telemetry::record::{EventKind, Leg, Record},
    text::printable,
};

/// How many clients are kept, and how many workloads.
pub const ROWS: usize = 10_000;

/// How many open connections are followed.
pub const CONNECTIONS: usize = 250_000;

/// How many workloads of a client are kept, or clients of a workload.
const PEERS: usize = 8;

/// What the application sees of a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sees {
    /// The client's address.
    Client,
    /// This instead.
    Other(IpAddr),
}

/// What is counted of a client, or of a workload.
#[derive(Clone, Debug)]
pub struct Row {
    /// Tells it from an earlier row of the same client.
    id: u64,
    /// Fit to be printed.
    pub name: Arc<str>,
    /// Workloads of the client, or clients of the workload: the last ones, the latest first, fit to be
    /// printed.
    pub peers: VecDeque<Arc<str>>,
    /// Connections that are open.
    pub open: u64,
    /// Connections since the start.
    pub total: u64,
    /// Of those, the ones of which the application sees the client.
    pub preserved: u64,
    /// Of those, the ones of which it sees something else.
    pub lost: u64,
    /// New connections.
    pub new: Rate,
    /// Bytes from the client, of connections that have ended.
    pub bytes_in: u64,
    /// Bytes to the client, of connections that have ended.
    pub bytes_out: u64,
    /// The same per second.
    pub rate_in: Rate,
    /// The same per second.
    pub rate_out: Rate,
    /// Round-trip time to the client, in microseconds, of the connection that ended last.
    pub rtt_us: Option<u32>,
    rtt_sum: u64,
    rtt_count: u64,
    /// What the application saw last.
    pub sees: Option<Sees>,
    /// When something happened last.
    active: Duration,
}

impl Row {
    /// Average round-trip time of the connections that have ended.
    pub fn average_rtt_us(&self) -> Option<u32> {
        self.rtt_sum.checked_div(self.rtt_count).map(|average| average as u32)
    }

    fn judge(&mut self, before: Option<bool>, now: Option<bool>) {
        if before == now {
            return;
        }
        for (verdict, up) in [(before, false), (now, true)] {
            let count = match verdict {
                Some(true) => &mut self.preserved,
                Some(false) => &mut self.lost,
                None => continue,
            };
            *count = if up { *count + 1 } else { count.saturating_sub(1) };
        }
    }

    fn meet(&mut self, peer: &Arc<str>) {
        if self.peers.front() != Some(peer) {
            self.peers.retain(|known| known != peer);
            self.peers.truncate(PEERS - 1);
            self.peers.push_front(Arc::clone(peer));
        }
    }
}

/// Rows by key, no more than a limit.
#[derive(Debug)]
pub struct Table<K> {
    rows: FxHashMap<K, Row>,
    limit: usize,
    next: u64,
    /// How many rows had to go.
    pub dropped: u64,
}

impl<K: Copy + Eq + Hash> Table<K> {
    fn new(limit: usize) -> Self {
        Self { rows: FxHashMap::default(), limit, next: 0, dropped: 0 }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// All of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &Row)> {
        self.rows.iter()
    }

    /// The row of a key, made if there is none.
    fn row(&mut self, key: K, name: &str, now: Duration) -> &mut Row {
        if !self.rows.contains_key(&key) && self.rows.len() >= self.limit {
            self.make_room();
        }
        let next = &mut self.next;
        let row = self.rows.entry(key).or_insert_with(|| {
            *next += 1;
            Row {
                id: *next,
                name: "".into(),
                peers: VecDeque::new(),
                open: 0,
                total: 0,
                preserved: 0,
                lost: 0,
                new: Rate::default(),
                bytes_in: 0,
                bytes_out: 0,
                rate_in: Rate::default(),
                rate_out: Rate::default(),
                rtt_us: None,
                rtt_sum: 0,
                rtt_count: 0,
                sees: None,
                active: now,
            }
        });
        if *row.name != *name {
            row.name = name.into();
        }
        row.active = now;
        row
    }

    /// A row, if it is still the same one.
    fn same(&mut self, (key, id): (K, u64), now: Duration) -> Option<&mut Row> {
        let row = self.rows.get_mut(&key).filter(|row| row.id == id)?;
        row.active = now;
        Some(row)
    }

    /// Drops the tenth that has been silent for longest: one at a time, each would cost a look at all.
    fn make_room(&mut self) {
        let count = (self.limit / 10).max(1);
        let mut ages: Vec<_> = self.rows.iter().map(|(key, row)| (row.active, row.id, *key)).collect();
        ages.sort_unstable_by_key(|(active, id, _)| (*active, *id));
        for (_, _, key) in ages.into_iter().take(count) {
            self.rows.remove(&key);
            self.dropped += 1;
        }
    }
}

/// A connection into a pod: its network namespace, the client's end, the pod's end.
type Ends = (NetnsCookie, SocketAddr, SocketAddr);

/// An open connection into a pod.
#[derive(Clone, Copy, Debug)]
struct Connection {
    client: (IpAddr, u64),
    workload: (NetnsCookie, u64),
    preserved: Option<bool>,
}

/// Counts of everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Connections since the start.
    pub connections: u64,
    /// Of those, the ones of which the application sees the client.
    pub preserved: u64,
    /// Of those, the ones of which it sees something else.
    pub lost: u64,
    /// New connections.
    pub new: Rate,
    /// Connections that were not followed to their end, because too many were open.
    pub unfollowed: u64,
}

/// Clients and workloads since the start. What pods open to elsewhere is not counted: it has no client.
#[derive(Debug)]
pub struct Model {
    /// By the client's address.
    pub clients: Table<IpAddr>,
    /// By network namespace.
    pub workloads: Table<NetnsCookie>,
    /// All together.
    pub totals: Totals,
    open: FxHashMap<Ends, Connection>,
    limit: usize,
}

impl Default for Model {
    fn default() -> Self {
        Self::with_limits(ROWS, CONNECTIONS)
    }
}

impl Model {
    /// With other limits than usual: of rows, and of open connections.
    pub fn with_limits(rows: usize, connections: usize) -> Self {
        Self {
            clients: Table::new(rows),
            workloads: Table::new(rows),
            totals: Totals::default(),
            open: FxHashMap::default(),
            limit: connections,
        }
    }

    /// How many connections are open, of those that have opened since the start.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Takes in what has happened. `now` is the time since the start.
    pub fn record(&mut self, record: &Record, now: Duration) {
        let (Some(remote), Some(local)) = (record.downstream_remote_address, record.downstream_local_address)
        else {
            return;
        };
        let ends = (record.netns_cookie, remote.0, local.0);
        match (record.leg, record.event) {
            (Leg::Downstream | Leg::Direct, EventKind::Open) => self.opened(record, ends, now),
            (Leg::Downstream | Leg::Direct, EventKind::Close) => self.closed(record, ends, now),
            (Leg::Upstream, EventKind::Open) => self.judge(record, ends, now),
            (Leg::Upstream, EventKind::Close) | (Leg::Outbound | Leg::Local, _) => {}
        }
    }

    fn opened(&mut self, record: &Record, ends: Ends, now: Duration) {
        // The end of an earlier connection with the same ends was not told of.
        if let Some(earlier) = self.open.remove(&ends) {
            self.rows(&earlier, now)
                .into_iter()
                .flatten()
                .for_each(|row| row.open = row.open.saturating_sub(1));
        }
        let (netns, remote, _) = ends;
        let followed = self.open.len() < self.limit;
        let client_name: Arc<str> = remote.ip().to_string().into();
        let workload_name: Arc<str> = printable(&record.workload).into();
        let client = self.clients.row(remote.ip(), &client_name, now);
        client.meet(&workload_name);
        let workload = self.workloads.row(netns, &workload_name, now);
        workload.meet(&client_name);
        let connection =
            Connection { client: (remote.ip(), client.id), workload: (netns, workload.id), preserved: None };
        for row in [client, workload] {
            row.total += 1;
            row.new.add(1, now);
            row.open += u64::from(followed);
        }
        self.totals.connections += 1;
        self.totals.new.add(1, now);
        if followed {
            self.open.insert(ends, connection);
            self.judge(record, ends, now);
        } else {
            self.totals.unfollowed += 1;
        }
    }

    fn closed(&mut self, record: &Record, ends: Ends, now: Duration) {
        self.judge(record, ends, now);
        let Some(connection) = self.open.remove(&ends) else { return };
        for row in self.rows(&connection, now).into_iter().flatten() {
            row.open = row.open.saturating_sub(1);
            let Some(totals) = &record.totals else { continue };
            row.bytes_in = row.bytes_in.saturating_add(totals.bytes_received);
            row.bytes_out = row.bytes_out.saturating_add(totals.bytes_sent);
            row.rate_in.add(totals.bytes_received, now);
            row.rate_out.add(totals.bytes_sent, now);
            // None was measured.
            if totals.rtt_us > 0 {
                row.rtt_us = Some(totals.rtt_us);
                row.rtt_sum += u64::from(totals.rtt_us);
                row.rtt_count += 1;
            }
        }
    }

    /// Notes whether the application sees the client. Of several upstream connections for one of the
    /// client's, one that hides it is enough.
    fn judge(&mut self, record: &Record, ends: Ends, now: Duration) {
        let Some(verdict) = record.preserved else { return };
        let Some(connection) = self.open.get_mut(&ends) else { return };
        let before = connection.preserved;
        let after = Some(verdict && before != Some(false));
        connection.preserved = after;
        let connection = *connection;
        let sees = match record.seen_by_application() {
            Some(other) if !verdict => Some(Sees::Other(other)),
            _ => Some(Sees::Client),
        };
        for row in self.rows(&connection, now).into_iter().flatten() {
            row.judge(before, after);
            if after == Some(verdict) {
                row.sees = sees;
            }
        }
        if before != after {
            self.totals.lost += u64::from(after == Some(false));
            self.totals.preserved += u64::from(after == Some(true));
            self.totals.preserved -= u64::from(before == Some(true));
        }
    }

    /// The client's row and the workload's, unless they have been dropped.
    fn rows(&mut self, connection: &Connection, now: Duration) -> [Option<&mut Row>; 2] {
        [self.clients.same(connection.client, now), self.workloads.same(connection.workload, now)]
    }
}

#[cfg(test)]
pub(crate) mod tests;
