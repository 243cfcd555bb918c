//! What is counted, for Prometheus. No label has an address.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use hyper::StatusCode;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};

use super::{
    super::{
        observer::Accounting,
        record::{EventKind, Leg, Record},
        workload::Workloads,
    },
    labels::WorkloadLabels,
    node::Node,
};
use crate::{
    dataplane::Dataplane,
    http::{Answer, Question},
};

/// Buckets for payload, both ways together, in bytes.
const BYTES: [f64; 11] = [
    256.,
    1024.,
    4096.,
    16_384.,
    65_536.,
    262_144.,
    1_048_576.,
    4_194_304.,
    16_777_216.,
    67_108_864.,
    1_073_741_824.,
];
/// Buckets for round-trip times, from inside a pod to another continent, in seconds.
const RTT: [f64; 14] =
    [50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1.];
/// Buckets for how long connections last, from a single request to a day's session, in seconds.
const DURATION: [f64; 12] = [1e-3, 10e-3, 0.1, 0.5, 1., 5., 15., 60., 300., 1800., 7200., 86_400.];

/// Where metrics are.
pub(crate) const PATH: &str = "/metrics";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The most series there can be for so many workloads with series of their own.
pub const fn max_series(workloads: usize) -> usize {
    const LEGS: usize = Leg::ALL.len();
    const PRESERVED: usize = 3;
    // Connections, bytes sent, bytes received; an attachment's info, listeners, problems and counters.
    let per_workload = LEGS * PRESERVED + 2 * LEGS + 3 + super::node::COUNTERS;
    // Each with a bucket for what is above all others, a sum and a count.
    let histograms = LEGS * (BYTES.len() + RTT.len() + DURATION.len() + 3 * 3);
    // Workloads beyond the bound can have both engines in all three states.
    let others = 6;
    let maps = 2 * super::node::MAX_MAPS;
    // Build, open connections, events, events lost, log lines and errors, status errors and age, OTLP.
    let fixed = 1 + 1 + 2 + 2 + 1 + 2 + 1 + 1 + 3;
    (workloads + 1) * per_workload + histograms + others + maps + fixed
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfConnection {
    workload: Arc<str>,
    leg: &'static str,
    preserved: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfBytes {
    workload: Arc<str>,
    leg: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfLeg {
    leg: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfEvent {
    event: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfReason {
    reason: &'static str,
}

const PRESERVED: [&str; 3] = ["true", "false", "unknown"];

/// Why a line of the access log was lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogProblem {
    /// It could not be written.
    Write,
    /// Too many lines were waiting.
    Queue,
}

/// What became of a record for the OpenTelemetry collector.
#[cfg(feature = "otlp")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OtlpResult {
    /// The collector has taken it.
    Exported,
    /// The collector could not be reached, or refused it.
    Failed,
    /// Too many records were waiting.
    Dropped,
}

type Histograms = Family<OfLeg, Histogram, fn() -> Histogram>;

/// All that is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    labels: Arc<Mutex<WorkloadLabels>>,
    connections: Family<OfConnection, Counter>,
    sent: Family<OfBytes, Counter>,
    received: Family<OfBytes, Counter>,
    bytes: Histograms,
    rtt: Histograms,
    duration: Histograms,
    open: Gauge,
    accounting: Arc<Mutex<Accounting>>,
    log_lines: Counter,
    log_errors: Family<OfReason, Counter>,
    #[cfg(feature = "otlp")]
    otlp: Family<OfResult, Counter>,
    /// What is attached, and the maps; see [`super::node`].
    pub(super) node: Node,
}

#[cfg(feature = "otlp")]
#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfResult {
    result: &'static str,
}

impl Metrics {
    /// Nothing counted yet; at most `max_workloads` workloads get series of their own.
    pub fn new(max_workloads: usize) -> Self {
        let labels = Arc::new(Mutex::new(WorkloadLabels::new(max_workloads)));
        let node = Node::new(Arc::clone(&labels));
        let accounting = Arc::new(Mutex::new(Accounting::default()));
        let histogram = |buckets: fn() -> Histogram| Histograms::new_with_constructor(buckets);
        let mut metrics = Self {
            registry: Registry::default(),
            connections: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            bytes: histogram(|| Histogram::new(BYTES)),
            rtt: histogram(|| Histogram::new(RTT)),
            duration: histogram(|| Histogram::new(DURATION)),
            open: Gauge::default(),
            accounting,
            log_lines: Counter::default(),
            log_errors: Family::default(),
            #[cfg(feature = "otlp")]
            otlp: Family::default(),
            labels,
            node,
        };
        metrics.register();
        // There from the start: a rate needs the value from before the first error.
        for problem in [LogProblem::Write, LogProblem::Queue] {
            metrics.log_error(problem);
        }
        #[cfg(feature = "otlp")]
        for result in [OtlpResult::Exported, OtlpResult::Failed, OtlpResult::Dropped] {
            metrics.otlp(result, 0);
        }
        metrics
    }

    fn register(&mut self) {
        let Self { registry, .. } = self;
        registry.register(
            "srcip_build",
            "The version of the exporter",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register(
            "srcip_connections",
            "Connections that have ended, each leg by itself. Whether the application saw the client's \
             address (preserved) is known by then, if it ever is",
            self.connections.clone(),
        );
        let (bytes, seconds) = (Unit::Bytes, Unit::Seconds);
        registry.register_with_unit(
            "srcip_connection_sent",
            "Payload sent by this pod's end and acknowledged, of connections that have ended",
            bytes.clone(),
            self.sent.clone(),
        );
        registry.register_with_unit(
            "srcip_connection_received",
            "Payload received by this pod's end, of connections that have ended",
            bytes.clone(),
            self.received.clone(),
        );
        registry.register_with_unit(
            "srcip_connection",
            "Payload of a connection that has ended, both ways together",
            bytes,
            self.bytes.clone(),
        );
        registry.register_with_unit(
            "srcip_connection_rtt",
            "Smoothed round-trip time of a connection at its end",
            seconds.clone(),
            self.rtt.clone(),
        );
        registry.register_with_unit(
            "srcip_connection_duration",
            "How long a connection lasted, from established to closed",
            seconds,
            self.duration.clone(),
        );
        registry.register("srcip_open_connections", "Connections that are open now", self.open.clone());
        registry.register(
            "srcip_access_log_lines",
            "Lines written to the access log",
            self.log_lines.clone(),
        );
        registry.register(
            "srcip_access_log_errors",
            "Lines of the access log that were lost: they could not be written, or too many were waiting",
            self.log_errors.clone(),
        );
        #[cfg(feature = "otlp")]
        registry.register(
            "srcip_otlp_records",
            "Records for the OpenTelemetry collector: exported, failed to be, or dropped because too many \
             were waiting",
            self.otlp.clone(),
        );
        registry.register_collector(Box::new(EventCollector(Arc::clone(&self.accounting))));
        registry.register_collector(Box::new(self.node.clone()));
    }

    /// Takes a record in. Openings are not counted here: what a connection was is known at its end.
    pub fn record(&self, record: &Record) {
        let (EventKind::Close, Some(totals)) = (record.event, &record.totals) else { return };
        let workload = lock(&self.labels).of(&record.workload, Instant::now());
        let leg = record.leg.name();
        let preserved = match record.preserved {
            Some(true) => PRESERVED[0],
            Some(false) => PRESERVED[1],
            None => PRESERVED[2],
        };
        let of_bytes = OfBytes { workload: Arc::clone(&workload), leg };
        self.connections.get_or_create(&OfConnection { workload, leg, preserved }).inc();
        self.sent.get_or_create(&of_bytes).inc_by(totals.bytes_sent);
        self.received.get_or_create(&of_bytes).inc_by(totals.bytes_received);
        let leg = OfLeg { leg };
        self.bytes
            .get_or_create(&leg)
            .observe(totals.bytes_sent.saturating_add(totals.bytes_received) as f64);
        self.duration.get_or_create(&leg).observe(totals.duration_ms / 1e3);
        // 0: none was measured.
        if totals.rtt_us > 0 {
            self.rtt.get_or_create(&leg).observe(f64::from(totals.rtt_us) / 1e6);
        }
    }

    /// Notes how many events there were, and how many connections are open.
    pub fn account(&self, accounting: &Accounting, open: usize) {
        *lock(&self.accounting) = *accounting;
        self.open.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Forgets the series of workloads that have been gone for long.
    pub fn retire(&self, workloads: &Workloads) {
        let names: std::collections::HashSet<_> = workloads.iter().map(|(_, w)| &*w.name).collect();
        let gone = lock(&self.labels).retire(|name| names.contains(name), Instant::now());
        gone.iter().for_each(|workload| self.forget(workload));
    }

    fn forget(&self, workload: &Arc<str>) {
        for leg in Leg::ALL.map(Leg::name) {
            for preserved in PRESERVED {
                let labels = OfConnection { workload: Arc::clone(workload), leg, preserved };
                self.connections.remove(&labels);
            }
            let labels = OfBytes { workload: Arc::clone(workload), leg };
            self.sent.remove(&labels);
            self.received.remove(&labels);
        }
    }

    /// Counts a line that was written.
    pub fn log_written(&self) {
        self.log_lines.inc();
    }

    /// Counts a line that was lost.
    pub fn log_failed(&self, problem: LogProblem) {
        self.log_error(problem).inc();
    }

    fn log_error(&self, problem: LogProblem) -> Counter {
        let reason = match problem {
            LogProblem::Write => "write",
            LogProblem::Queue => "queue",
        };
        self.log_errors.get_or_create_owned(&OfReason { reason })
    }

    /// Counts records for the collector.
    #[cfg(feature = "otlp")]
    pub fn otlp(&self, result: OtlpResult, count: u64) {
        let result = match result {
            OtlpResult::Exported => "exported",
            OtlpResult::Failed => "failed",
            OtlpResult::Dropped => "dropped",
        };
        self.otlp.get_or_create(&OfResult { result }).inc_by(count);
    }

    /// All of it as text: OpenMetrics, or what Prometheus had before.
    pub fn encode(&self, open_metrics: bool) -> Result<String, fmt::Error> {
        encode(&self.registry, open_metrics)
    }

    /// Answers a scrape.
    pub async fn page(self: Arc<Self>, question: Question, dataplane: Dataplane) -> Answer {
        if question.path != PATH {
            return not_here();
        }
        self.node.refresh(&dataplane).await;
        page(&self.registry, question.open_metrics)
    }
}

/// What to say of other paths.
pub(crate) fn not_here() -> Answer {
    Answer::text(StatusCode::NOT_FOUND, "the metrics are at /metrics\n")
}

/// Everything of a registry, in the format that was asked for.
pub(crate) fn page(registry: &Registry, open_metrics: bool) -> Answer {
    match encode(registry, open_metrics) {
        Ok(page) => Answer::page(if open_metrics { OPEN_METRICS } else { CLASSIC }, page),
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

fn encode(registry: &Registry, open_metrics: bool) -> Result<String, fmt::Error> {
    let mut page = String::with_capacity(16 * 1024);
    text::encode(&mut page, registry)?;
    Ok(if open_metrics { page } else { classic(&page) })
}

/// The events, as the kernel and the reader counted them.
#[derive(Debug)]
struct EventCollector(Arc<Mutex<Accounting>>);

impl prometheus_client::collector::Collector for EventCollector {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder) -> Result<(), fmt::Error> {
        let all = *lock(&self.0);
        let families = [
            (
                "srcip_events",
                "Events of connections, as the kernel counted them",
                &[("open", all.opened), ("close", all.closed)][..],
            ),
            (
                "srcip_events_lost",
                "Events that did not fit into the ring buffer: the exporter was too slow",
                &[("open", all.opened_lost), ("close", all.closed_lost)],
            ),
        ];
        for (name, help, values) in families {
            super::node::counters(
                &mut encoder,
                name,
                help,
                values.iter().map(|(event, value)| (OfEvent { event }, *value)),
            )?;
        }
        Ok(())
    }
}

/// From OpenMetrics to the text format 0.0.4, where a counter's family has the name of its series.
fn classic(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    let mut help = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').map(|(_, help)| help);
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|l| l.split_once(' ')) {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some(help) = help.take() {
                text.push_str(&format!("# HELP {name}{suffix} {help}\n"));
            }
            text.push_str(&format!("# TYPE {name}{suffix} {kind}\n"));
        } else if !line.starts_with('#') {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// What is behind these locks is whole at any time.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod tests;
