//! Tells health and metrics what the loop does.

use std::{sync::Arc, time::Duration};

use super::{
    board::{Board, PodState},
    health::Health,
    metrics::{AgentMetrics, PodCounts},
    source::Snapshot,
    worker::Observer,
};

/// What the loop tells goes here.
#[derive(Clone, Debug)]
pub struct Reporter {
    /// Told whether the loop lives, and has done what it is there for.
    pub health: Arc<Health>,
    /// Told what it does.
    pub metrics: Arc<AgentMetrics>,
}

impl Observer for Reporter {
    fn beat(&self, doing: &'static str) {
        self.health.beat(doing);
    }

    fn acted(&self, kind: &'static str, took: Duration, succeeded: bool) {
        self.metrics.acted(kind, took, succeeded);
    }

    fn round(&self, board: &Board, snapshot: &Snapshot) {
        let standing = board.read();
        let mut counts = PodCounts::default();
        let mut unattached = Vec::new();
        for (name, state) in standing.pods.values() {
            match state {
                PodState::Steered => counts.steered += 1,
                PodState::Pending => counts.pending += 1,
                PodState::Refused(problem) => *counts.refused.entry(problem.reason).or_default() += 1,
                PodState::Failed(error) => {
                    counts.failed += 1;
                    unattached.push(format!("{name}: {error}"));
                }
            }
        }
        self.metrics.set_pods(&counts);
        self.metrics.round(snapshot.trouble.is_none());
        self.health.set_synced(snapshot.synced);
        self.health.set_troubles(standing.troubles.clone());
        self.health.set_unattached(unattached);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::agent::{
        board::Standing,
        decide::Problem,
        pod::{PodName, PodUid},
    };

    #[test]
    fn a_round_is_told_to_both() {
        let health = Arc::new(Health::new(Duration::from_secs(60)));
        let metrics = Arc::new(AgentMetrics::new(10));
        let reporter = Reporter { health: Arc::clone(&health), metrics: Arc::clone(&metrics) };
        let board = Board::default();
        let synced = Snapshot { synced: true, ..Snapshot::default() };
        let refused = Problem { reason: "HostNetwork", note: String::new() };
        let states = [PodState::Steered, PodState::Pending, PodState::Refused(refused)];
        let pods = |states: Vec<PodState>| -> BTreeMap<_, _> {
            let pod = |(number, state)| {
                let name = PodName::new("shop", &format!("web-{number}")).unwrap();
                (PodUid::new(&format!("{number}")).unwrap(), (name, state))
            };
            states.into_iter().enumerate().map(pod).collect()
        };
        reporter.beat("attach");
        board.publish(Standing { pods: pods(states.to_vec()), ..Standing::default() });
        reporter.round(&board, &Snapshot::default());
        assert!(!health.ready().is_good(), "not synced");
        reporter.round(&board, &synced);
        assert!(health.ready().is_good(), "{:?}", health.ready());
        let failed = PodState::Failed("no bpffs".to_owned());
        board.publish(Standing { pods: pods(vec![failed]), ..Standing::default() });
        reporter.round(&board, &synced);
        assert!(health.ready().text(false).contains("shop/web-0: no bpffs"));
        let page = metrics.text_for_test();
        assert!(page.contains(r#"srcip_agent_pods{state="failed"} 1"#), "{page}");
        assert!(page.contains("srcip_agent_rounds_total 3"), "{page}");
    }
}
