//! What is counted of north-south, for Prometheus.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use srcip_common::northsouth::counter::{Counts, ServiceCounter};

use crate::{
    dataplane::error::Result,
    northsouth::{controller::Standing, dataplane::read, desired::ServiceName},
    telemetry::export::{labels::WorkloadLabels, node::counters},
};

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfWhat {
    what: &'static str,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, EncodeLabelSet)]
struct OfService {
    service: Arc<str>,
    what: &'static str,
}

/// All of it; nothing but zeroes where the agent does not do north-south.
#[derive(Debug)]
pub(super) struct NorthSouthMetrics {
    up: Gauge,
    service_ports: Gauge,
    endpoints: Gauge,
    left_out: Gauge,
    problems: Family<OfReason, Gauge>,
    counted: Counted,
}

/// What the programs have counted, as it was read last.
#[derive(Clone, Debug)]
struct Counted {
    last: Arc<RwLock<Last>>,
    labels: Arc<Mutex<WorkloadLabels>>,
}

#[derive(Debug, Default)]
struct Last {
    packets: BTreeMap<&'static str, u64>,
    services: BTreeMap<ServiceName, Counts>,
}

impl NorthSouthMetrics {
    /// Nothing known yet; at most `max_services` ports of Services get series of their own.
    pub(super) fn new(max_services: usize) -> Self {
        let labels = Arc::new(Mutex::new(WorkloadLabels::new(max_services)));
        Self {
            up: Gauge::default(),
            service_ports: Gauge::default(),
            endpoints: Gauge::default(),
            left_out: Gauge::default(),
            problems: Family::default(),
            counted: Counted { last: Arc::default(), labels },
        }
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        let mut add = |name, help, gauge: &Gauge| registry.register(name, help, gauge.clone());
        add(
            "srcip_north_south_up",
            "Whether the node handles Services: 0 if something keeps it from that, or if it is not to",
            &self.up,
        );
        add("srcip_north_south_service_ports", "Ports of Services that are handled", &self.service_ports);
        add("srcip_north_south_endpoints", "Endpoints of these, on this node and others", &self.endpoints);
        add(
            "srcip_north_south_left_out",
            "Endpoints and frontends that could not be programmed, and are tried again",
            &self.left_out,
        );
        registry.register(
            "srcip_north_south_problems",
            "What Services ask for and do not get, by the reason in their Events",
            self.problems.clone(),
        );
        registry.register_collector(Box::new(self.counted.clone()));
    }

    /// Notes how it stands.
    pub(super) fn set(&self, standing: &Standing) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let services = &standing.plan.desired.services;
        self.up.set(standing.trouble.is_empty().into());
        self.service_ports.set(number(services.len()));
        self.endpoints.set(number(services.values().map(|port| port.endpoints.len()).sum()));
        self.left_out.set(number(standing.left_out.len()));
        let mut by_reason = BTreeMap::<_, i64>::new();
        for problem in standing.plan.problems.values().flatten() {
            *by_reason.entry(problem.reason).or_default() += 1;
        }
        self.problems.clear();
        for (reason, count) in by_reason {
            self.problems.get_or_create(&OfReason { reason }).set(count);
        }
    }

    /// Reads what the programs have counted; what cannot be read stays as it was.
    pub(super) fn refresh(&self, pin_path: &Path) {
        match Last::read(pin_path) {
            Ok(Some(last)) => self.counted.set(last),
            Ok(None) => {}
            Err(error) => tracing::debug!("the counters of north-south cannot be read: {error}"),
        }
    }

    /// One of everything.
    #[cfg(test)]
    pub(super) fn fill_for_test(&self) {
        self.up.set(1);
        self.problems.get_or_create(&OfReason { reason: "Conflict" }).set(2);
        let services = ["shop/web:http", "shop/web:https"].map(|name| (ServiceName::new(name), [1; 8]));
        let services = services.into_iter().filter_map(|(name, counts)| Some((name?, counts)));
        self.counted.set(Last { packets: [("to_endpoint", 7)].into(), services: services.collect() });
    }
}

impl Last {
    fn read(pin_path: &Path) -> Result<Option<Self>> {
        let (packets, services) = (read::counters(pin_path)?, read::counts(pin_path)?);
        Ok(packets.zip(services).map(|(packets, services)| Self { packets, services }))
    }
}

impl Counted {
    fn set(&self, last: Last) {
        let is_there =
            |name: &str| ServiceName::new(name).is_some_and(|name| last.services.contains_key(&name));
        self.labels.lock().unwrap_or_else(PoisonError::into_inner).retire(is_there, Instant::now());
        *self.last.write().unwrap_or_else(PoisonError::into_inner) = last;
    }

    /// By label: several Services may share the one for those beyond the bound.
    fn by_label(&self, services: &BTreeMap<ServiceName, Counts>) -> BTreeMap<Arc<str>, Counts> {
        let mut labels = self.labels.lock().unwrap_or_else(PoisonError::into_inner);
        let mut by_label = BTreeMap::<_, Counts>::new();
        for (name, counts) in services {
            let sums = by_label.entry(labels.of(name.as_str(), Instant::now())).or_default();
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum = sum.wrapping_add(*count);
            }
        }
        by_label
    }
}

/// How what is counted of a Service is shown: series, help, and what with which label.
type Shown = (&'static str, &'static str, &'static [(ServiceCounter, &'static str)]);

const OF_SERVICE: [Shown; 3] = [
    (
        "srcip_north_south_service_flows",
        "Flows to a port of a Service, that is TCP connections, and datagrams after three minutes' pause: those that \
         entered the cluster by this node, here to a pod of it, handed_on to another node; received are those that \
         another node has handed on to this one",
        &[
            (ServiceCounter::NewFlow, "here"),
            (ServiceCounter::NewFlowHandedOn, "handed_on"),
            (ServiceCounter::NewFlowReceived, "received"),
        ],
    ),
    (
        "srcip_north_south_service_bytes",
        "Octets of IP to and from endpoints of a port of a Service on this node",
        &[(ServiceCounter::RequestBytes, "request"), (ServiceCounter::ReplyBytes, "reply")],
    ),
    (
        "srcip_north_south_service_dropped",
        "Packets for a port of a Service that were dropped, by reason",
        &[
            (ServiceCounter::NoEndpoint, "no_endpoint"),
            (ServiceCounter::SourceRefused, "source_range"),
            (ServiceCounter::Collision, "collision"),
        ],
    ),
];

impl Collector for Counted {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::result::Result<(), fmt::Error> {
        let last = self.last.read().unwrap_or_else(PoisonError::into_inner);
        counters(
            &mut encoder,
            "srcip_north_south_packets",
            "Packets of Services from outside the cluster, by what became of them; new_flows, new_flows_handed_on and \
             new_flows_received count the first packet of each flow once more",
            last.packets.iter().map(|(what, count)| (OfWhat { what }, *count)),
        )?;
        let by_label = self.by_label(&last.services);
        for (name, help, shown) in OF_SERVICE {
            let series = by_label.iter().flat_map(|(service, counts)| {
                shown.iter().map(|&(counter, what)| {
                    let service = Arc::clone(service);
                    (OfService { service, what }, counts[counter as usize])
                })
            });
            counters(&mut encoder, name, help, series)?;
        }
        Ok(())
    }
}
