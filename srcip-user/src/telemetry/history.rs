//! Connections from before anybody looked: what the recorder has kept of steered pods.

use srcip_common::telemetry::{CLOSE, Event, NOBODY, OPEN};

use super::{
    join::{Clock, Joiner},
    record::Record,
    workload::Workloads,
};
use crate::dataplane::{Dataplane, error::Result};

/// Records of the connections that the recorder remembers, oldest first. Those that have ended count twice:
/// when they opened and when they closed.
pub fn history(dataplane: &Dataplane, workloads: &Workloads) -> Result<Vec<Record>> {
    let mut events = Vec::new();
    for event in dataplane.history()? {
        let opened = Event { kind: OPEN, closed_ns: 0, closed_by: NOBODY, ..event };
        events.push((event.opened_ns, opened));
        if event.kind == CLOSE {
            events.push((event.closed_ns, event));
        }
    }
    // With the same time, an end cannot come before its beginning.
    events.sort_by_key(|(time, event)| (*time, event.kind));
    let mut joiner = Joiner::default();
    let clock = Clock::now();
    Ok(events.iter().filter_map(|(_, event)| joiner.event(event, clock, workloads)).collect())
}
