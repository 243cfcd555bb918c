//! What the agent counts, for Prometheus, and what is attached. No label has an address; pods are labels
//! only of what is attached, and bounded.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, atomic::AtomicU64},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use srcip_common::LAYOUT_VERSION;

use super::{
    health::{Check, Health, Report},
    north_south_metrics::NorthSouthMetrics,
};
use crate::{
    dataplane::Dataplane,
    http::{Answer, Question},
    northsouth::controller::Standing,
    telemetry::export::{
        labels::WorkloadLabels,
        metrics::{PATH, not_here, page},
        node::Node,
    },
};

/// Buckets for what the agent does, from looking at one pod to a node that is busy, in seconds.
const SECONDS: [f64; 12] = [1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1., 5., 30.];

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfState {
    state: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfCheck {
    check: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfAction {
    action: &'static str,
    result: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfActionTime {
    action: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfRequest {
    request: &'static str,
    result: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfRequestTime {
    request: &'static str,
}

type Times<L> = Family<L, Histogram, fn() -> Histogram>;

/// How many pods stand how, of those that are to be steered or ask for it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PodCounts {
    /// Their connections go to their proxies.
    pub steered: usize,
    /// Their network namespaces are not known yet.
    pub pending: usize,
    /// They could not be attached.
    pub failed: usize,
    /// They ask for what cannot be done: how many for which reason.
    pub refused: BTreeMap<&'static str, usize>,
}

/// All that the agent counts.
#[derive(Debug)]
pub struct AgentMetrics {
    registry: Registry,
    checks: Family<OfCheck, Gauge>,
    pods: Family<OfState, Gauge>,
    refused: Family<OfReason, Gauge>,
    actions: Family<OfAction, Counter>,
    action_times: Times<OfActionTime>,
    rounds: Counter,
    last_round: Gauge<f64, AtomicU64>,
    source_up: Gauge,
    requests: Family<OfRequest, Counter>,
    request_times: Times<OfRequestTime>,
    repairs: Counter,
    chained: Gauge,
    lost_events: Counter,
    north_south: NorthSouthMetrics,
    node: Node,
}

impl AgentMetrics {
    /// Nothing counted yet; at most `max_workloads` pods get series of their own, and as many ports of Services.
    pub fn new(max_workloads: usize) -> Self {
        let times = || Histogram::new(SECONDS);
        let labels = Arc::new(Mutex::new(WorkloadLabels::new(max_workloads)));
        let mut metrics = Self {
            registry: Registry::default(),
            checks: Family::default(),
            pods: Family::default(),
            refused: Family::default(),
            actions: Family::default(),
            action_times: Family::new_with_constructor(times),
            rounds: Counter::default(),
            last_round: Gauge::default(),
            source_up: Gauge::default(),
            requests: Family::default(),
            request_times: Family::new_with_constructor(times),
            repairs: Counter::default(),
            chained: Gauge::default(),
            lost_events: Counter::default(),
            north_south: NorthSouthMetrics::new(max_workloads),
            node: Node::new(labels),
        };
        metrics.register();
        // There from the start: an alert on what is not there never fires.
        metrics.set_pods(&PodCounts::default());
        metrics
    }

    fn register(&mut self) {
        let Self { registry, .. } = self;
        registry.register(
            "srcip_build",
            "The version of the agent, and of the layout of its maps",
            Info::new([
                ("version", env!("CARGO_PKG_VERSION").to_owned()),
                ("layout", LAYOUT_VERSION.to_string()),
            ]),
        );
        registry.register(
            "srcip_agent_check",
            "1 for every check of /readyz that passes, 0 for those that fail",
            self.checks.clone(),
        );
        registry.register(
            "srcip_agent_pods",
            "Pods of this node that are to be steered, or ask for it: steered, pending (not started, as far \
             as is known), failed (tried again), refused (they ask for what cannot be done)",
            self.pods.clone(),
        );
        registry.register(
            "srcip_agent_refused_pods",
            "Pods that ask for what cannot be done, by the reason in their Events",
            self.refused.clone(),
        );
        registry.register(
            "srcip_agent_actions",
            "What the agent has done to pods' network namespaces, and whether it succeeded",
            self.actions.clone(),
        );
        registry.register_with_unit(
            "srcip_agent_action_duration",
            "How long that took",
            Unit::Seconds,
            self.action_times.clone(),
        );
        registry.register(
            "srcip_agent_rounds",
            "How often the agent has looked at everything",
            self.rounds.clone(),
        );
        registry.register_with_unit(
            "srcip_agent_last_round_timestamp",
            "When it did so last, since 1970",
            Unit::Seconds,
            self.last_round.clone(),
        );
        registry.register(
            "srcip_agent_source_up",
            "Whether the source of pods (the Kubernetes API, manifests) can be read",
            self.source_up.clone(),
        );
        registry.register(
            "srcip_agent_cni_requests",
            "Requests of the CNI plugin, and their results",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "srcip_agent_cni_request_duration",
            "How long those took",
            Unit::Seconds,
            self.request_times.clone(),
        );
        registry.register(
            "srcip_agent_conflist_repairs",
            "How often somebody had taken the plugin out of the node's CNI configuration",
            self.repairs.clone(),
        );
        registry.register(
            "srcip_agent_cni_chained",
            "Whether pods get the CNI plugin, where the agent is to install it",
            self.chained.clone(),
        );
        registry.register(
            "srcip_agent_events_lost",
            "Warning Events that did not get to the Kubernetes API",
            self.lost_events.clone(),
        );
        self.north_south.register(registry);
        registry.register_collector(Box::new(self.node.clone()));
    }

    /// Notes how the agent is.
    pub fn set_checks(&self, report: &Report) {
        for Check { name, problem } in &report.checks {
            self.checks.get_or_create(&OfCheck { check: name }).set(problem.is_none().into());
        }
    }

    /// Notes how the pods stand.
    pub fn set_pods(&self, counts: &PodCounts) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        for (state, count) in [
            ("steered", counts.steered),
            ("pending", counts.pending),
            ("failed", counts.failed),
            ("refused", counts.refused.values().sum()),
        ] {
            self.pods.get_or_create(&OfState { state }).set(number(count));
        }
        self.refused.clear();
        for (reason, count) in &counts.refused {
            self.refused.get_or_create(&OfReason { reason }).set(number(*count));
        }
    }

    /// Counts something that was done to a pod.
    pub fn acted(&self, action: &'static str, took: Duration, succeeded: bool) {
        let result = if succeeded { "success" } else { "failure" };
        self.actions.get_or_create(&OfAction { action, result }).inc();
        self.action_times.get_or_create(&OfActionTime { action }).observe(took.as_secs_f64());
    }

    /// Counts a look at everything, and notes whether the source could be read.
    pub fn round(&self, source_up: bool) {
        self.rounds.inc();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.last_round.set(now.as_secs_f64());
        self.source_up.set(source_up.into());
    }

    /// Counts a request of the CNI plugin.
    pub fn requested(&self, request: &'static str, result: &'static str, took: Duration) {
        self.requests.get_or_create(&OfRequest { request, result }).inc();
        self.request_times.get_or_create(&OfRequestTime { request }).observe(took.as_secs_f64());
    }

    /// The counter of Warning Events that did not arrive, for who sends them.
    pub fn lost_events(&self) -> Counter {
        self.lost_events.clone()
    }

    /// Counts a repair of the node's CNI configuration.
    pub fn repaired(&self) {
        self.repairs.inc();
    }

    /// Notes whether pods get the CNI plugin.
    pub fn set_chained(&self, is_chained: bool) {
        self.chained.set(is_chained.into());
    }

    /// Notes how north-south stands.
    pub fn set_north_south(&self, standing: &Standing) {
        self.north_south.set(standing);
    }

    /// Reads what north-south has counted. With thousands of Services that takes tens of milliseconds.
    async fn read_north_south(self: &Arc<Self>, dataplane: &Dataplane) {
        let (metrics, pin_path) = (Arc::clone(self), dataplane.pin_path().to_owned());
        let read = tokio::task::spawn_blocking(move || metrics.north_south.refresh(&pin_path));
        if let Err(error) = read.await {
            tracing::debug!("the counters of north-south cannot be read: {error}");
        }
    }

    /// Answers a scrape.
    pub(super) async fn page(
        self: Arc<Self>,
        question: Question,
        dataplane: Dataplane,
        health: Arc<Health>,
    ) -> Answer {
        if question.path != PATH {
            return not_here();
        }
        self.set_checks(&health.ready());
        self.read_north_south(&dataplane).await;
        self.node.refresh(&dataplane).await;
        self.node.retire();
        page(&self.registry, question.open_metrics)
    }
}

#[cfg(test)]
impl AgentMetrics {
    /// The page as it is, nothing read for it.
    pub(super) fn text_for_test(&self) -> String {
        page(&self.registry, false).body
    }

    /// With something of everything.
    pub(crate) fn full_page_for_test() -> String {
        let metrics = Self::new(250);
        let refused = BTreeMap::from([("HostNetwork", 1), ("InvalidAnnotation", 2)]);
        metrics.set_checks(&Health::new(Duration::MAX).ready());
        metrics.set_pods(&PodCounts { steered: 5, pending: 1, failed: 0, refused });
        metrics.acted("attach", Duration::from_millis(4), true);
        metrics.acted("attach", Duration::from_millis(400), false);
        metrics.round(true);
        metrics.requested("add", "steered", Duration::from_millis(7));
        metrics.repaired();
        metrics.lost_events().inc();
        metrics.node.fill_for_test();
        metrics.north_south.fill_for_test();
        metrics.text_for_test()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_on_the_page() {
        let page = AgentMetrics::full_page_for_test();
        for expected in [
            r#"srcip_build_info{version=""#,
            r#"srcip_agent_check{check="loop"} 1"#,
            r#"srcip_agent_check{check="synced"} 0"#,
            r#"srcip_agent_pods{state="steered"} 5"#,
            r#"srcip_agent_pods{state="failed"} 0"#,
            r#"srcip_agent_pods{state="refused"} 3"#,
            r#"srcip_agent_refused_pods{reason="InvalidAnnotation"} 2"#,
            r#"srcip_agent_actions_total{action="attach",result="failure"} 1"#,
            r#"srcip_agent_action_duration_seconds_bucket{le="0.005",action="attach"} 1"#,
            "srcip_agent_rounds_total 1",
            "srcip_agent_last_round_timestamp_seconds 1",
            "srcip_agent_source_up 1",
            r#"srcip_agent_cni_requests_total{request="add",result="steered"} 1"#,
            r#"srcip_agent_cni_request_duration_seconds_count{request="add"} 1"#,
            "srcip_agent_conflist_repairs_total 1",
            "srcip_agent_events_lost_total 1",
            r#"srcip_attachment_info{workload="attached","#,
            "srcip_north_south_up 1",
            r#"srcip_north_south_problems{reason="Conflict"} 2"#,
            r#"srcip_north_south_packets_total{what="to_endpoint"} 7"#,
            r#"srcip_north_south_service_flows_total{service="shop/web:http",what="handed_on"} 1"#,
            r#"srcip_north_south_service_bytes_total{service="shop/web:https",what="reply"} 1"#,
            r#"srcip_north_south_service_dropped_total{service="shop/web:http",what="no_endpoint"} 1"#,
        ] {
            assert!(page.contains(expected), "no {expected} in\n{page}");
        }
        // A reason that no pod has any more goes.
        let metrics = AgentMetrics::new(250);
        metrics
            .set_pods(&PodCounts { refused: BTreeMap::from([("HostNetwork", 1)]), ..PodCounts::default() });
        assert!(metrics.text_for_test().contains("HostNetwork"));
        metrics.set_pods(&PodCounts::default());
        assert!(!metrics.text_for_test().contains("HostNetwork"));
    }

    #[test]
    fn services_beyond_the_bound_share_a_label() {
        let metrics = AgentMetrics::new(1);
        metrics.north_south.fill_for_test();
        let page = metrics.text_for_test();
        for expected in [r#"{service="shop/web:http",what="here"} 1"#, r#"{service="other",what="here"} 1"#] {
            assert!(page.contains(expected), "no {expected} in\n{page}");
        }
        assert!(!page.contains("shop/web:https"), "{page}");
    }

    #[test]
    fn the_documentation_has_every_metric() {
        let text = concat!(
            include_str!("../../../docs/TELEMETRY.md"),
            include_str!("../../../docs/CONFIGURATION.md")
        );
        for line in AgentMetrics::full_page_for_test().lines() {
            if let Some(name) = line.strip_prefix("# TYPE ").and_then(|line| line.split(' ').next()) {
                assert!(text.contains(name), "the documentation lacks {name}");
            }
        }
    }
}
