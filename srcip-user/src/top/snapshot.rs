//! The model at one moment.

use std::{cmp::Ordering, net::IpAddr, sync::Arc, time::Duration};

use super::{
    columns::Column,
    model::{Model, Row, Sees, Table},
};
use crate::netns::NetnsCookie;

/// What a line is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Key {
    /// A client.
    Client(IpAddr),
    /// A workload.
    Workload(NetnsCookie),
}

/// A row at one moment.
#[derive(Clone, Debug)]
pub struct Line {
    /// What it is about.
    pub key: Key,
    /// Fit to be printed, like all texts in here.
    pub name: Arc<str>,
    /// Workloads of the client, or clients of the workload; the latest first.
    pub peers: Vec<Arc<str>>,
    /// Open connections.
    pub open: u64,
    /// New connections per second.
    pub new: f64,
    /// Connections since the start.
    pub total: u64,
    /// Bytes per second from the client.
    pub rate_in: f64,
    /// Bytes per second to the client.
    pub rate_out: f64,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// The last round-trip time, in microseconds.
    pub rtt_us: Option<u32>,
    /// The average.
    pub average_rtt_us: Option<u32>,
    /// Connections of which the application sees the client.
    pub preserved: u64,
    /// Connections of which it sees something else.
    pub lost: u64,
    /// What it saw last.
    pub sees: Option<Sees>,
}

impl Line {
    fn of(key: Key, row: &Row, now: Duration) -> Self {
        Self {
            key,
            name: Arc::clone(&row.name),
            peers: row.peers.iter().cloned().collect(),
            open: row.open,
            new: row.new.per_second(now),
            total: row.total,
            rate_in: row.rate_in.per_second(now),
            rate_out: row.rate_out.per_second(now),
            bytes_in: row.bytes_in,
            bytes_out: row.bytes_out,
            rtt_us: row.rtt_us,
            average_rtt_us: row.average_rtt_us(),
            preserved: row.preserved,
            lost: row.lost,
            sees: row.sees,
        }
    }

    /// Connections of which it is not known what the application sees: the proxy has not connected yet.
    pub fn unknown(&self) -> u64 {
        self.total.saturating_sub(self.preserved + self.lost)
    }

    /// How much of what is known is lost.
    pub fn lost_share(&self) -> Option<f64> {
        let known = self.preserved + self.lost;
        (known > 0).then(|| self.lost as f64 / known as f64)
    }

    /// Whether a client or a workload in here has this in its name; case does not matter.
    pub fn contains(&self, lower: &str) -> bool {
        std::iter::once(&self.name).chain(&self.peers).any(|name| name.to_lowercase().contains(lower))
    }

    fn compare(&self, other: &Self, by: Column) -> Ordering {
        let number = |a: f64, b: f64| a.total_cmp(&b);
        match by {
            Column::Name => match (self.key, other.key) {
                // Addresses by number, names by letter.
                (Key::Workload(_), Key::Workload(_)) => self.name.cmp(&other.name),
                (a, b) => a.cmp(&b),
            },
            Column::Peer => self.peers.first().cmp(&other.peers.first()),
            Column::Open => self.open.cmp(&other.open),
            Column::New => number(self.new, other.new),
            Column::Total => self.total.cmp(&other.total),
            Column::RateIn => number(self.rate_in, other.rate_in),
            Column::RateOut => number(self.rate_out, other.rate_out),
            Column::BytesIn => self.bytes_in.cmp(&other.bytes_in),
            Column::BytesOut => self.bytes_out.cmp(&other.bytes_out),
            Column::Rtt => self.rtt_us.cmp(&other.rtt_us),
            Column::AverageRtt => self.average_rtt_us.cmp(&other.average_rtt_us),
            Column::Preserved => self.preserved.cmp(&other.preserved),
            Column::Lost => self.lost.cmp(&other.lost),
            Column::Unknown => self.unknown().cmp(&other.unknown()),
            Column::Verdict => number(self.lost_share().unwrap_or(-1.0), other.lost_share().unwrap_or(-1.0)),
            Column::Sees => {
                let text = |line: &Self| match line.sees {
                    Some(Sees::Other(ip)) => Some(ip),
                    _ => None,
                };
                text(self).cmp(&text(other))
            }
        }
    }
}

/// What the head says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Head {
    /// Open connections.
    pub open: u64,
    /// New connections per second.
    pub new: f64,
    /// Connections since the start.
    pub total: u64,
    /// Of those, the ones of which the application sees the client.
    pub preserved: u64,
    /// Of those, the ones of which it sees something else.
    pub lost: u64,
    /// Clients and workloads that had to go.
    pub dropped: u64,
    /// Connections that were not followed.
    pub unfollowed: u64,
}

impl Head {
    /// Connections of which it is not known what the application sees.
    pub fn unknown(&self) -> u64 {
        self.total.saturating_sub(self.preserved + self.lost)
    }
}

/// All of it at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The head.
    pub head: Head,
    /// By client.
    pub clients: Vec<Line>,
    /// By workload.
    pub workloads: Vec<Line>,
}

impl Snapshot {
    /// Takes one. `now` is the time since the start.
    pub fn take(model: &Model, now: Duration) -> Self {
        let totals = &model.totals;
        Self {
            head: Head {
                open: model.open() as u64,
                new: totals.new.per_second(now),
                total: totals.connections,
                preserved: totals.preserved,
                lost: totals.lost,
                dropped: model.clients.dropped + model.workloads.dropped,
                unfollowed: totals.unfollowed,
            },
            clients: lines(&model.clients, Key::Client, now),
            workloads: lines(&model.workloads, Key::Workload, now),
        }
    }
}

fn lines<K: Copy + Eq + std::hash::Hash>(
    table: &Table<K>,
    key: impl Fn(K) -> Key,
    now: Duration,
) -> Vec<Line> {
    table.iter().map(|(k, row)| Line::of(key(*k), row, now)).collect()
}

/// The order of lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Order {
    /// By what.
    pub by: Column,
    /// The other way round than this column usually goes.
    pub reversed: bool,
}

impl Order {
    /// Whether what is more comes first.
    pub fn descends(self) -> bool {
        self.by.descends() != self.reversed
    }
}

/// The lines that have `filter` in one of their names, in order. Among equals, more connections come first.
pub fn select(lines: &[Line], filter: &str, order: Order) -> Vec<Line> {
    let filter = filter.to_lowercase();
    let mut lines: Vec<_> = lines.iter().filter(|line| line.contains(&filter)).cloned().collect();
    lines.sort_by(|a, b| {
        let ordering = a.compare(b, order.by);
        let ordering = if order.descends() { ordering.reverse() } else { ordering };
        ordering.then_with(|| b.total.cmp(&a.total)).then_with(|| a.key.cmp(&b.key))
    });
    lines
}
