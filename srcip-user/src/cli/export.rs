//! `srcip export`

use std::{
    num::{NonZeroU32, NonZeroU64},
    path::PathBuf,
    sync::Arc,
};

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::observe::TargetArgs;
use crate::{
    dataplane::Dataplane,
    http::{Address, Server},
    signals::Ending,
    telemetry::{
        export::{
            Exporter, Settings,
            access_log::{self, Target},
            labels::DEFAULT_MAX_WORKLOADS,
            size::parse_size,
        },
        record::EventKind,
    },
};

/// Export every connection: an access log, metrics for Prometheus, OpenTelemetry logs.
///
/// Runs until a signal ends it. Needs no agent, and nothing has to be attached.
#[derive(Debug, Args)]
pub(super) struct Export {
    #[command(flatten)]
    target: TargetArgs,
    /// Write a JSON object a line for every connection that has ended, to a file or, with `-`, to stdout.
    ///
    /// The names are those of `srcip observe -o json`. The file can be read by its owner and its group
    /// alone: it has clients' addresses.
    #[arg(long, value_name = "PATH", value_parser = parse_target)]
    access_log: Option<Target>,
    /// Rotate the access log before it is larger than this: bytes, or a number with KiB, MiB or GiB.
    ///
    /// PATH becomes PATH.1, that one PATH.2, and so on.
    #[arg(long, value_name = "SIZE", default_value = "100MiB", value_parser = parse_size)]
    access_log_max_size: NonZeroU64,
    /// How many files of the access log to keep, the current one included.
    #[arg(long, value_name = "N", default_value = "5")]
    access_log_max_files: NonZeroU32,
    /// Which events to log.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "EVENTS", default_value = "close")]
    access_log_events: Vec<LoggedEvent>,
    /// Serve metrics for Prometheus here, at /metrics; `none` for no metrics.
    ///
    /// No metric has an address in it, but the names of pods and how much they are used: think before
    /// serving to more than this machine.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9464")]
    metrics_address: Address,
    /// How many pods get metrics of their own; the rest share the workload "other".
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_WORKLOADS)]
    max_workloads: usize,
    /// Send a log record for every connection that has ended to an OpenTelemetry collector, over HTTP.
    #[cfg(feature = "otlp")]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<crate::telemetry::export::otlp::Endpoint>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum LoggedEvent {
    /// When it is established; the application's address may not be known yet.
    Open,
    /// When it has ended, with all that is known.
    Close,
}

impl From<LoggedEvent> for EventKind {
    fn from(event: LoggedEvent) -> Self {
        match event {
            LoggedEvent::Open => Self::Open,
            LoggedEvent::Close => Self::Close,
        }
    }
}

fn parse_target(text: &str) -> Result<Target, String> {
    match text {
        "" => Err("it takes a file, or `-` for stdout".to_owned()),
        "-" => Ok(Target::Stdout),
        path => Ok(Target::File(PathBuf::from(path))),
    }
}

impl Export {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require_watching("export")?;
        if !self.exports_something() {
            anyhow::bail!(
                "nothing to export: with --metrics-address none, give an --access-log{}",
                if cfg!(feature = "otlp") { " or an --otlp-endpoint" } else { "" }
            );
        }
        let observe = self.target.options()?;
        let settings = Settings {
            observe,
            access_log: self.access_log.map(|target| access_log::Settings {
                target,
                max_size: self.access_log_max_size,
                max_files: self.access_log_max_files,
                events: self.access_log_events.into_iter().map(Into::into).collect(),
            }),
            max_workloads: self.max_workloads,
            #[cfg(feature = "otlp")]
            otlp: self.otlp_endpoint,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(run(dataplane, settings, self.metrics_address));
        // What is still being read for a scrape is nobody's any more.
        runtime.shutdown_background();
        result
    }

    fn exports_something(&self) -> bool {
        #[cfg(feature = "otlp")]
        if self.otlp_endpoint.is_some() {
            return true;
        }
        self.metrics_address.0.is_some() || self.access_log.is_some()
    }
}

async fn run(dataplane: &Dataplane, settings: Settings, metrics: Address) -> Result<()> {
    // Before anything is started: a signal that comes now ends it properly, too.
    let ending = Ending::watch()?;
    let bind = |address| Server::bind(address, "metrics", "--metrics-address");
    let server = metrics.0.map(bind).transpose()?;
    let mut exporter = Exporter::start(dataplane, settings)?;
    let serving = match server {
        Some(server) => {
            eprintln!("metrics at http://{}/metrics", server.address()?);
            let (metrics, dataplane) = (exporter.metrics(), dataplane.clone());
            Some(tokio::spawn(
                server.run(move |question| Arc::clone(&metrics).page(question, dataplane.clone())),
            ))
        }
        None => None,
    };
    eprintln!("exporting");
    tokio::select! {
        () = ending.come()? => {}
        () = exporter.ended() => {}
    }
    let stopped = exporter.stop();
    if let Some(serving) = serving {
        serving.abort();
    }
    stopped
}
