//! OpenTelemetry: a log record for each connection that has ended, to a collector over HTTP.
//!
//! Attributes have the names of the semantic conventions where there is one, else `srcip.…`. A collector
//! that is slow or down slows nothing: what does not fit into the queue is dropped, and counted.

use std::{
    net::SocketAddr,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use opentelemetry::logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _, Severity};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response, hyper::HyperClient};
use opentelemetry_otlp::{Protocol, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{BatchConfigBuilder, BatchLogProcessor, LogBatch, LogExporter, SdkLogger, SdkLoggerProvider},
};
use tokio::runtime::Runtime;

use super::{
    super::record::{EventKind, Leg, Record},
    metrics::{Metrics, OtlpResult},
};

/// Records that may wait.
const QUEUE: usize = 8192;
/// Records in one request.
const BATCH: usize = 512;
/// How long a record waits for others.
const DELAY: Duration = Duration::from_secs(1);
/// How long a request may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// What the requests go to.
const PATH: &str = "/v1/logs";

/// A collector: `http://HOST:PORT`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint(String);

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri = text.parse::<hyper::Uri>().ok().filter(|uri| uri.host().is_some_and(|h| !h.is_empty()));
        let Some(uri) = uri else {
            return Err(format!("{text:?} is not a collector's address: expected http://HOST:4318"));
        };
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(
                    "https is not spoken here: run a collector on the node, and let it encrypt what \
                            it forwards"
                        .to_owned(),
                );
            }
            _ => return Err(format!("{text:?} has no scheme: did you mean http://{text}?")),
        }
        let base = text.trim_end_matches('/');
        Ok(Self(if uri.path() == "/" { format!("{base}{PATH}") } else { base.to_owned() }))
    }
}

/// Sends records.
#[derive(Debug)]
pub struct Otlp {
    provider: SdkLoggerProvider,
    logger: SdkLogger,
    /// In the queue, or on their way.
    waiting: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
}

impl Otlp {
    /// Starts; whether there is a collector shows later.
    pub fn start(to: &Endpoint, metrics: &Arc<Metrics>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = InRuntime { client: HyperClient::with_default_connector(TIMEOUT, None), runtime };
        let exporter = opentelemetry_otlp::LogExporter::builder()
            .with_http()
            .with_http_client(client)
            .with_protocol(Protocol::HttpBinary)
            .with_endpoint(&to.0)
            .with_timeout(TIMEOUT)
            .build()
            .with_context(|| format!("cannot export to {}", to.0))?;
        let waiting = Arc::new(AtomicU64::new(0));
        let exporter = Counted {
            exporter,
            endpoint: to.0.clone(),
            waiting: Arc::clone(&waiting),
            metrics: Arc::clone(metrics),
            failures: AtomicU64::new(0),
        };
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let processor = BatchLogProcessor::builder(exporter).with_batch_config(batches).build();
        let resource = Resource::builder()
            .with_service_name("srcip")
            .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let provider =
            SdkLoggerProvider::builder().with_log_processor(processor).with_resource(resource).build();
        let logger = provider.logger("srcip");
        Ok(Self { provider, logger, waiting, metrics: Arc::clone(metrics) })
    }

    /// Queues a connection that has ended; never waits.
    pub fn export(&self, record: &Record) {
        if record.event != EventKind::Close {
            return;
        }
        // The SDK drops without telling how much, so its queue is kept from being full.
        if self.waiting.load(Ordering::Relaxed) >= QUEUE as u64 {
            self.metrics.otlp(OtlpResult::Dropped, 1);
            return;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut log = self.logger.create_log_record();
        log.set_event_name("srcip.connection.close");
        log.set_timestamp(SystemTime::UNIX_EPOCH + Duration::from_nanos(record.time.0));
        log.set_severity_number(Severity::Info);
        log.add_attributes(attributes(record));
        self.logger.emit(log);
    }

    /// Sends what is queued, for a few seconds at most.
    pub fn finish(self) {
        if self.provider.shutdown_with_timeout(TIMEOUT).is_err() {
            tracing::warn!(
                "the OpenTelemetry collector did not take the last {} records",
                self.waiting.load(Ordering::Relaxed)
            );
        }
    }
}

/// A connection, in OpenTelemetry's words.
fn attributes(record: &Record) -> Vec<(&'static str, AnyValue)> {
    let mut all: Vec<(&'static str, AnyValue)> = Vec::with_capacity(32);
    let downstream =
        (record.downstream_remote_address.map(|a| a.0), record.downstream_local_address.map(|a| a.0));
    let upstream = (record.upstream_local_address.map(|a| a.0), record.upstream_host.map(|a| a.0));
    let client = record.origin.map(|a| a.0).or(downstream.0);
    let server = downstream.1.or(upstream.1);
    // Of the socket that this record is about; of connections within the pod, the end that connected.
    let (local, peer) = match record.leg {
        Leg::Downstream | Leg::Direct => (downstream.1, downstream.0),
        Leg::Upstream => upstream,
        Leg::Outbound | Leg::Local => downstream,
    };
    let mut ends = |address: &'static str, port: &'static str, end: Option<SocketAddr>| {
        if let Some(end) = end {
            all.push((address, end.ip().to_string().into()));
            all.push((port, i64::from(end.port()).into()));
        }
    };
    ends("client.address", "client.port", client);
    ends("server.address", "server.port", server);
    ends("network.local.address", "network.local.port", local);
    ends("network.peer.address", "network.peer.port", peer);
    let mut add = |name, value: AnyValue| all.push((name, value));
    add("network.transport", "tcp".into());
    if let Some(peer) = peer {
        let ip = peer.ip().to_canonical();
        add("network.type", if ip.is_ipv4() { "ipv4" } else { "ipv6" }.into());
    }
    add("srcip.workload", record.workload.to_string().into());
    add("srcip.netns.cookie", record.netns_cookie.to_string().into());
    add("srcip.leg", record.leg.name().into());
    if let Some(preserved) = record.preserved {
        add("srcip.preserved", preserved.into());
    }
    for (name, value) in [
        ("srcip.downstream_remote_address", downstream.0),
        ("srcip.downstream_local_address", downstream.1),
        ("srcip.upstream_local_address", upstream.0),
        ("srcip.upstream_host", upstream.1),
    ] {
        if let Some(value) = value {
            add(name, value.to_string().into());
        }
    }
    for (name, value) in
        [("srcip.join", serde_json::to_value(record.join)), ("srcip.rule", serde_json::to_value(record.rule))]
    {
        if let Ok(serde_json::Value::String(value)) = value {
            add(name, value.into());
        }
    }
    if let Some(totals) = &record.totals {
        let number = |value: u64| AnyValue::Int(i64::try_from(value).unwrap_or(i64::MAX));
        add("srcip.bytes_sent", number(totals.bytes_sent));
        add("srcip.bytes_received", number(totals.bytes_received));
        add("srcip.duration", (totals.duration_ms / 1e3).into());
        add("srcip.rtt", (f64::from(totals.rtt_us) / 1e6).into());
        add("srcip.retransmits", i64::from(totals.retransmits).into());
        if let Ok(serde_json::Value::String(closed_by)) = serde_json::to_value(totals.closed_by) {
            add("srcip.closed_by", closed_by.into());
        }
    }
    all
}

/// Counts what becomes of the records.
#[derive(Debug)]
struct Counted {
    exporter: opentelemetry_otlp::LogExporter,
    endpoint: String,
    waiting: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
    failures: AtomicU64,
}

impl LogExporter for Counted {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count() as u64;
        let result = self.exporter.export(batch).await;
        self.waiting.fetch_sub(count, Ordering::Relaxed);
        match &result {
            Ok(()) => self.metrics.otlp(OtlpResult::Exported, count),
            Err(error) => {
                self.metrics.otlp(OtlpResult::Failed, count);
                if self.failures.fetch_add(1, Ordering::Relaxed) == 0 {
                    tracing::warn!(
                        "cannot export to {}: {error}; records are lost until it answers, and counted in \
                         srcip_otlp_records_total",
                        self.endpoint
                    );
                }
            }
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

/// The SDK exports from a thread of its own, which may wait; hyper wants a runtime.
#[derive(Debug)]
struct InRuntime {
    client: HyperClient,
    runtime: Runtime,
}

#[async_trait]
impl HttpClient for InRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        self.runtime.block_on(self.client.send_bytes(request))
    }
}

#[cfg(test)]
mod tests;
