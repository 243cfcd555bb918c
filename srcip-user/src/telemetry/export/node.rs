//! What is read when somebody scrapes: attachments and their counters, and how full the maps are.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use serde_json::Value;

use super::{
    labels::WorkloadLabels,
    metrics::{Metrics, lock},
};
use crate::dataplane::{
    Dataplane,
    error::{Result, chain},
    fill::{MAP_COUNT, MapFill},
    record::{EngineKind, State},
    status::{AttachmentStatus, CounterStatus},
};

/// How many maps are looked at.
pub const MAX_MAPS: usize = MAP_COUNT;
/// How old what is attached may be at a scrape.
const MAX_AGE: Duration = Duration::from_secs(10);
/// How long a scrape waits for it. While somebody attaches, the last one is shown.
pub const PATIENCE: Duration = Duration::from_secs(2);

macro_rules! counters {
    ($($name:ident: $help:literal,)+) => {
        /// The counters of an attachment: series, help, value.
        const TABLE: &[(&str, &str, fn(&CounterStatus) -> u64)] =
            &[$((concat!("srcip_", stringify!($name)), $help, |counters| counters.$name)),+];
    };
}

counters! {
    steered: "Connection attempts handed to the proxy's listener",
    passed: "Connection attempts for ports that are not steered",
    refused: "Connection attempts refused because the proxy does not listen",
    passed_proxy_down: "Connection attempts let through to the application because the proxy does not listen",
    upstream: "Connections that the proxy opened to the application with a client's address",
    upstream_port_kept: "Of those, the ones that kept a source port the proxy had bound itself",
    upstream_ports_exhausted: "Of those, the ones for which every source port tried was taken",
    client_port_in_upstream_range: "Steered connection attempts from a port in the pod's own upstream range",
    listener_slots_full: "Listeners of the proxy that found every slot taken",
    disguised_refused: "Packets refused by the tc engine because they could hide a connection attempt",
}

/// How many counters an attachment has.
pub const COUNTERS: usize = TABLE.len();

/// What there is to tell of an attachment.
#[derive(Debug)]
struct Attached {
    name: String,
    engine: EngineKind,
    state: State,
    listeners: u64,
    problems: u64,
    counters: CounterStatus,
}

impl From<AttachmentStatus> for Attached {
    fn from(status: AttachmentStatus) -> Self {
        Self {
            name: status.record.name,
            engine: status.record.engine,
            state: status.record.state,
            listeners: status.listeners.len() as u64,
            problems: status.problems.len() as u64,
            counters: status.counters,
        }
    }
}

/// What was read last.
#[derive(Debug, Default)]
pub struct Node {
    attachments: Vec<Attached>,
    maps: Vec<MapFill>,
    read: Option<Instant>,
    reading: bool,
    errors: u64,
}

#[cfg(test)]
impl Node {
    /// One of everything.
    pub(super) fn fill_for_test(&mut self) {
        self.read = Some(Instant::now());
        let counters = srcip_common::counters::Counters::default().into();
        let (engine, state) = (EngineKind::SkLookup, State::Attached);
        let name = "attached".to_owned();
        self.attachments = vec![Attached { name, engine, state, listeners: 2, problems: 0, counters }];
        self.maps = crate::dataplane::fill::for_test();
    }
}

impl Metrics {
    /// Reads what is attached if it has not been read for a while, and waits for it, not for long.
    pub async fn refresh_node(self: &Arc<Self>, dataplane: &Dataplane) {
        {
            let mut node = self.node.write().unwrap_or_else(PoisonError::into_inner);
            let fresh = node.read.is_some_and(|read| read.elapsed() < MAX_AGE);
            if fresh || node.reading {
                return;
            }
            node.reading = true;
        }
        let (metrics, dataplane) = (Arc::clone(self), dataplane.clone());
        let reading = tokio::task::spawn_blocking(move || metrics.read_node(&dataplane));
        // What takes longer goes on, and is there for the next scrape.
        let _ = tokio::time::timeout(PATIENCE, reading).await;
    }

    fn read_node(&self, dataplane: &Dataplane) {
        // Even if one of them cannot be read, the other is shown.
        let (status, maps) = (dataplane.status(), dataplane.map_fill());
        let mut node = self.node.write().unwrap_or_else(PoisonError::into_inner);
        node.reading = false;
        let status = status.map(|status| {
            node.attachments = status.attachments.into_iter().map(Attached::from).collect();
        });
        match status.and(maps) {
            Ok(maps) => (node.maps, node.read) = (maps, Some(Instant::now())),
            Err(error) => {
                if node.errors == 0 {
                    tracing::warn!(
                        "cannot read what is attached: {}; srcip_status_errors_total counts how often",
                        chain(&error)
                    );
                }
                node.errors += 1;
            }
        }
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, EncodeLabelSet)]
struct OfAttachment {
    workload: Arc<str>,
    engine: String,
    state: String,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, EncodeLabelSet)]
struct OfWorkload {
    workload: Arc<str>,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfMap {
    map: &'static str,
}

/// Encodes what was read last.
#[derive(Debug)]
pub(super) struct NodeCollector {
    pub(super) node: Arc<RwLock<Node>>,
    pub(super) labels: Arc<Mutex<WorkloadLabels>>,
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let node = self.node.read().unwrap_or_else(PoisonError::into_inner);
        // Several workloads may share the label for those beyond the bound.
        let mut infos = BTreeMap::new();
        let mut listeners: BTreeMap<OfWorkload, u64> = BTreeMap::new();
        let mut problems: BTreeMap<OfWorkload, u64> = BTreeMap::new();
        let mut counts: BTreeMap<OfWorkload, [u64; COUNTERS]> = BTreeMap::new();
        for attachment in &node.attachments {
            let workload = lock(&self.labels).of(&attachment.name, Instant::now());
            let label = OfWorkload { workload: Arc::clone(&workload) };
            let (engine, state) = (attachment.engine.to_string(), name(&attachment.state));
            infos.insert(OfAttachment { workload, engine, state }, 1_u64);
            *listeners.entry(label.clone()).or_default() += attachment.listeners;
            *problems.entry(label.clone()).or_default() += attachment.problems;
            let sums = counts.entry(label).or_insert([0; COUNTERS]);
            for (sum, (.., get)) in sums.iter_mut().zip(TABLE) {
                *sum += get(&attachment.counters);
            }
        }
        gauges(&mut encoder, "srcip_attachment_info", "A pod that srcip is attached to", infos)?;
        gauges(
            &mut encoder,
            "srcip_listeners",
            "Addresses that the proxy listens on at its port",
            listeners,
        )?;
        gauges(
            &mut encoder,
            "srcip_attachment_problems",
            "What is wrong with an attachment; `srcip status -o json` says what",
            problems,
        )?;
        for (index, (name, help, _)) in TABLE.iter().enumerate() {
            let values = counts.iter().map(|(label, sums)| (label.clone(), sums[index]));
            counters(&mut encoder, name, help, values)?;
        }
        let maps =
            |value: fn(&MapFill) -> u64| node.maps.iter().map(move |m| (OfMap { map: m.name }, value(m)));
        gauges(
            &mut encoder,
            "srcip_map_entries",
            "Entries of a map. REGISTERED, PENDING and HISTORY make room by themselves, and may be full",
            maps(|map| map.entries),
        )?;
        gauges(
            &mut encoder,
            "srcip_map_max_entries",
            "Entries that a map can have",
            maps(|m| m.max_entries),
        )?;
        let help = "How often what is attached could not be read.";
        let metric = encoder.encode_descriptor("srcip_status_errors", help, None, MetricType::Counter)?;
        ConstCounter::new(node.errors).encode(metric)?;
        let age = node.read.map_or(f64::NAN, |read| read.elapsed().as_secs_f64());
        let help = "How long ago what is attached was read.";
        let metric = encoder.encode_descriptor("srcip_status_age_seconds", help, None, MetricType::Gauge)?;
        ConstGauge::new(age).encode(metric)
    }
}

/// As in `srcip status -o json`.
fn name(state: &impl serde::Serialize) -> String {
    match serde_json::to_value(state) {
        Ok(Value::String(name)) => name,
        _ => "unknown".to_owned(),
    }
}

/// Encodes a family of counters; nothing if it has no series.
pub(super) fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// Encodes a family of gauges; nothing if it has no series.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let mut values = values.into_iter().peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?;
    for (labels, value) in values {
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
