//! Connections from before anybody looked: what the recorder has kept of steered pods.

use super::{clock::Clock, join::Joiner, record::Record, workload::Workloads};
use crate::dataplane::{Dataplane, error::Result};

/// Records of what the recorder remembers, oldest first. A connection that was opened before that is left
/// out.
pub fn history(dataplane: &Dataplane, workloads: &Workloads) -> Result<Vec<Record>> {
    let mut events = dataplane.history()?;
    // Two processors may write in another order than they read the clock.
    events.sort_by_key(|event| (event.time_ns, event.kind));
    let mut joiner = Joiner::default();
    let clock = Clock::now();
    Ok(events.iter().filter_map(|event| joiner.event(event, clock, workloads)).collect())
}
