//! What is read when somebody scrapes: attachments and their counters, and how full the maps are.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{MetricType, TypedMetric, counter::ConstCounter, gauge::ConstGauge},
};
use serde_json::Value;

use super::{labels::WorkloadLabels, metrics::lock};
use crate::dataplane::{
    Dataplane,
    error::{Result, chain},
    fill::{MAP_COUNT, MapFill},
    record::{EngineKind, State},
    status::{CounterStatus, Glance},
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

impl From<Glance> for Attached {
    fn from(Glance { record, listeners, problems, counters }: Glance) -> Self {
        Self {
            name: record.name,
            engine: record.engine,
            state: record.state,
            listeners: listeners as u64,
            problems: problems as u64,
            counters,
        }
    }
}

/// What was read last.
#[derive(Debug, Default)]
struct Last {
    attachments: Vec<Attached>,
    maps: Vec<MapFill>,
    read: Option<Instant>,
    reading: bool,
    errors: u64,
}

/// What is attached, read when somebody asks.
#[derive(Clone, Debug)]
pub struct Node {
    last: Arc<RwLock<Last>>,
    labels: Arc<Mutex<WorkloadLabels>>,
}

#[cfg(test)]
impl Node {
    /// One of everything.
    pub(crate) fn fill_for_test(&self) {
        let mut last = self.last.write().unwrap();
        last.read = Some(Instant::now());
        let counters = srcip_common::counters::Counters::default().into();
        let (engine, state) = (EngineKind::SkLookup, State::Attached);
        let name = "attached".to_owned();
        last.attachments = vec![Attached { name, engine, state, listeners: 2, problems: 0, counters }];
        last.maps = crate::dataplane::fill::for_test();
    }
}

impl Node {
    /// Nothing read yet.
    pub fn new(labels: Arc<Mutex<WorkloadLabels>>) -> Self {
        Self { last: Arc::default(), labels }
    }

    /// Reads what is attached if it has not been read for a while, and waits for it, not for long.
    pub async fn refresh(&self, dataplane: &Dataplane) {
        {
            let mut node = self.last.write().unwrap_or_else(PoisonError::into_inner);
            let fresh = node.read.is_some_and(|read| read.elapsed() < MAX_AGE);
            if fresh || node.reading {
                return;
            }
            node.reading = true;
        }
        let (node, dataplane) = (self.clone(), dataplane.clone());
        let reading = tokio::task::spawn_blocking(move || node.read(&dataplane));
        // What takes longer goes on, and is there for the next scrape.
        let _ = tokio::time::timeout(PATIENCE, reading).await;
    }

    /// Forgets the labels of what has not been attached for long. For who has labels of attachments alone.
    pub fn retire(&self) {
        let last = self.last.read().unwrap_or_else(PoisonError::into_inner);
        let names: HashSet<_> = last.attachments.iter().map(|attached| attached.name.as_str()).collect();
        lock(&self.labels).retire(|name| names.contains(name), Instant::now());
    }

    fn read(&self, dataplane: &Dataplane) {
        // Even if one of them cannot be read, the other is shown.
        let (seen, maps) = (dataplane.glance(), dataplane.map_fill());
        let mut node = self.last.write().unwrap_or_else(PoisonError::into_inner);
        node.reading = false;
        let seen = seen.map(|seen| node.attachments = seen.into_iter().map(Attached::from).collect());
        match seen.and(maps) {
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
impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let node = self.last.read().unwrap_or_else(PoisonError::into_inner);
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
pub(crate) fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    family(encoder, name, help, values.into_iter().map(|(labels, value)| (labels, ConstCounter::new(value))))
}

/// Encodes a family of gauges; nothing if it has no series.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let gauge = |value| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
    family(encoder, name, help, values.into_iter().map(|(labels, value)| (labels, gauge(value))))
}

fn family<L: EncodeLabelSet, M: EncodeMetric + TypedMetric>(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (L, M)>,
) -> Result<(), fmt::Error> {
    let mut values = values.peekable();
    if values.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, &format!("{help}."), None, M::TYPE)?;
    for (labels, metric) in values {
        metric.encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}
