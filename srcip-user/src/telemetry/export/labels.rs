//! Bounds how many workloads have series of their own: pods come and go, series stay.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

/// The label of all workloads beyond the bound.
pub const OTHER: &str = "other";

/// How many workloads have series of their own unless told otherwise: twice what a node usually runs.
pub const DEFAULT_MAX_WORKLOADS: usize = 250;

/// How long the series of a pod that has gone stay: a scraper has to see its last values.
pub const LINGER: Duration = Duration::from_secs(300);

/// The workloads that have series. First come, first served.
#[derive(Debug)]
pub struct WorkloadLabels {
    max: usize,
    /// When each was last there.
    known: HashMap<Arc<str>, Instant>,
    other: Arc<str>,
}

impl WorkloadLabels {
    /// With room for `max`.
    pub fn new(max: usize) -> Self {
        Self { max, known: HashMap::new(), other: OTHER.into() }
    }

    /// The label for a workload.
    pub fn of(&mut self, name: &str, now: Instant) -> Arc<str> {
        if let Some((known, _)) = self.known.get_key_value(name) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.max || name == OTHER {
            return Arc::clone(&self.other);
        }
        let name: Arc<str> = name.into();
        self.known.insert(Arc::clone(&name), now);
        name
    }

    /// Forgets the workloads that have been gone for long, and makes room for others; returns them.
    pub fn retire(&mut self, is_there: impl Fn(&str) -> bool, now: Instant) -> Vec<Arc<str>> {
        let mut gone = Vec::new();
        self.known.retain(|name, seen| {
            if is_there(name) {
                *seen = now;
            }
            let stays = now.saturating_duration_since(*seen) < LINGER;
            if !stays {
                gone.push(Arc::clone(name));
            }
            stays
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_beyond_the_bound_share_a_label() {
        let now = Instant::now();
        let mut labels = WorkloadLabels::new(2);
        let got: Vec<_> = ["a", "b", "c", "a", "d"].map(|name| labels.of(name, now)).into();
        assert_eq!(got.iter().map(|label| &**label).collect::<Vec<_>>(), ["a", "b", OTHER, "a", OTHER]);
    }

    #[test]
    fn a_workload_called_other_takes_no_room() {
        let now = Instant::now();
        let mut labels = WorkloadLabels::new(1);
        assert_eq!(&*labels.of(OTHER, now), OTHER);
        assert_eq!(&*labels.of("a", now), "a");
    }

    #[test]
    fn who_has_gone_makes_room_after_a_while() {
        let now = Instant::now();
        let mut labels = WorkloadLabels::new(2);
        labels.of("stays", now);
        labels.of("goes", now);
        let later = now + LINGER - Duration::from_secs(1);
        assert!(labels.retire(|name| name == "stays", later).is_empty());
        assert_eq!(&*labels.of("next", later), OTHER);
        let later = later + Duration::from_secs(2);
        assert_eq!(labels.retire(|name| name == "stays", later), ["goes".into()]);
        assert_eq!(&*labels.of("next", later), "next");
        assert_eq!(&*labels.of("stays", later), "stays");
    }
}
