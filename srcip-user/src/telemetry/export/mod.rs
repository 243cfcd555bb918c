//! Exports every connection: an access log, Prometheus metrics, OpenTelemetry logs.
//!
//! ```text
//!               ┌──▶ access log ──▶ queue ──▶ file with rotation, or stdout
//!  observer ────┼──▶ metrics ◀── Prometheus
//!  (a thread)   └──▶ otlp ──▶ queue ──▶ collector
//! ```
//!
//! The thread that reads events never waits for anybody who takes them: what a queue has no room for is
//! dropped and counted.
//!
//! - [`access_log`]: a JSON object a line. [`rotate`]: the file it goes to. [`size`]: how its size is given.
//! - [`metrics`]: what is counted, and its page. [`labels`]: bounds the number of series. [`node`]: what is
//!   read when somebody scrapes.
//! - `otlp`: OpenTelemetry, with the feature `otlp`.

pub mod access_log;
pub mod labels;
pub mod metrics;
pub mod node;
#[cfg(feature = "otlp")]
pub mod otlp;
pub mod rotate;
pub mod size;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use tokio::sync::oneshot;

use self::{access_log::AccessLog, metrics::Metrics};
use super::{
    observer::{Observer, Options, POLL_INTERVAL},
    record::{EventKind, Record},
};
use crate::dataplane::Dataplane;

/// How often pods are looked for again: attaching one changes its name and what its connections are.
const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
/// How often the kernel is asked how many events there were.
const ACCOUNT_INTERVAL: Duration = Duration::from_millis(500);

/// What to export, and what of.
#[derive(Debug)]
pub struct Settings {
    /// What to observe.
    pub observe: Options,
    /// The access log, if one is wanted.
    pub access_log: Option<access_log::Settings>,
    /// How many workloads have series of their own.
    pub max_workloads: usize,
    /// The OpenTelemetry collector, if there is one.
    #[cfg(feature = "otlp")]
    pub otlp: Option<otlp::Endpoint>,
}

/// A running export.
#[derive(Debug)]
pub struct Exporter {
    metrics: Arc<Metrics>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
    ended: Option<oneshot::Receiver<()>>,
}

impl Exporter {
    /// Starts it; fails if connections cannot be observed, or the access log not be opened.
    pub fn start(dataplane: &Dataplane, settings: Settings) -> Result<Self> {
        let metrics = Arc::new(Metrics::new(settings.max_workloads));
        let sinks = Sinks::open(&settings, &metrics)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (started, has_started) = mpsc::sync_channel(1);
        let (ending, ended) = oneshot::channel();
        let thread = thread::Builder::new().name("srcip-observer".to_owned()).spawn({
            let (dataplane, stop) = (dataplane.clone(), Arc::clone(&stop));
            move || {
                // Told also by a panic, which drops it.
                let _ending: oneshot::Sender<()> = ending;
                let observer = match Observer::start(&dataplane, &settings.observe) {
                    Ok(observer) => observer,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return Ok(());
                    }
                };
                let _ = started.send(Ok(()));
                sinks.run(observer, &stop)
            }
        })?;
        has_started.recv().context("the thread that observes connections has ended")??;
        Ok(Self { metrics, stop, thread, ended: Some(ended) })
    }

    /// What has been counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Waits until it ends by itself: nobody reads the access log on stdout any more, or events cannot be
    /// read. [`Self::stop`] tells which.
    pub async fn ended(&mut self) {
        if let Some(ended) = self.ended.take() {
            // An error is the end, too: the other half was dropped.
            let _ = ended.await;
        }
    }

    /// Hands over what has happened until now, and ends. Takes a few seconds at most.
    pub fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Where records go.
struct Sinks {
    metrics: Arc<Metrics>,
    access_log: Option<AccessLog>,
    events: Vec<EventKind>,
    #[cfg(feature = "otlp")]
    otlp: Option<otlp::Otlp>,
}

impl Sinks {
    fn open(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Self> {
        let log = settings.access_log.as_ref();
        Ok(Self {
            access_log: log.map(|log| AccessLog::open(log, metrics)).transpose()?,
            events: log.map(|log| log.events.clone()).unwrap_or_default(),
            #[cfg(feature = "otlp")]
            otlp: settings.otlp.as_ref().map(|to| otlp::Otlp::start(to, metrics)).transpose()?,
            metrics: Arc::clone(metrics),
        })
    }

    fn run(mut self, observer: Observer, stop: &AtomicBool) -> Result<()> {
        let result = self.follow(observer, stop);
        self.close();
        result
    }

    fn follow(&mut self, mut observer: Observer, stop: &AtomicBool) -> Result<()> {
        self.metrics.account(&observer.accounting()?, observer.open_connections());
        let (mut accounted, mut refreshed) = (Instant::now(), Instant::now());
        loop {
            // Looked at before the ring buffer is, so that nothing from before the stop is left there.
            let stopping = stop.load(Ordering::Relaxed);
            observer.poll(|record| self.take(&record))?;
            if stopping || accounted.elapsed() >= ACCOUNT_INTERVAL {
                accounted = Instant::now();
                self.metrics.account(&observer.accounting()?, observer.open_connections());
            }
            if stopping || self.access_log.as_ref().is_some_and(AccessLog::is_closed) {
                return Ok(());
            }
            if refreshed.elapsed() >= REFRESH_INTERVAL {
                observer.refresh();
                self.metrics.retire(observer.workloads());
                refreshed = Instant::now();
            }
            sleep(POLL_INTERVAL);
        }
    }

    fn take(&mut self, record: &Record) {
        self.metrics.record(record);
        if let Some(log) = &self.access_log
            && self.events.contains(&record.event)
        {
            log.write(record);
        }
        #[cfg(feature = "otlp")]
        if let Some(otlp) = &self.otlp {
            otlp.export(record);
        }
    }

    fn close(self) {
        if let Some(log) = self.access_log {
            log.finish();
        }
        #[cfg(feature = "otlp")]
        if let Some(otlp) = self.otlp {
            otlp.finish();
        }
    }
}
