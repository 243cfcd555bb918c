//! The agent's pages, each kind on an address of its own: the kubelet's probes, Prometheus', and what only
//! this machine should see.
//!
//! | path | where | what |
//! |---|---|---|
//! | `/livez` | health | 200 while the loop goes round |
//! | `/readyz` | health | 200 once every pod that is to be steered is; `?verbose` has a line for each check |
//! | `/metrics` | metrics | for Prometheus |
//! | `/config` | config | the configuration as it is in force, and what is logged, as JSON |

use std::{net::SocketAddr, sync::Arc};

use anyhow::Result;
use hyper::StatusCode;
use serde_json::json;

use super::{
    config::Config,
    health::{Health, Report},
    metrics::AgentMetrics,
};
use crate::{
    dataplane::Dataplane,
    http::{Address, Answer, Question, Server},
    logging::LogControl,
};

/// Where probes are answered unless told otherwise. The agent is on the host's network, where whoever can
/// reach the node could reach more than loopback.
pub const HEALTH_ADDRESS: &str = "127.0.0.1:9878";
/// Where metrics are served unless told otherwise.
pub const METRICS_ADDRESS: &str = "127.0.0.1:9879";
/// Where the configuration is shown unless told otherwise.
pub const CONFIG_ADDRESS: &str = "127.0.0.1:9880";

/// Where to serve what.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Addresses {
    /// `/livez`, `/readyz`.
    pub health: Address,
    /// `/metrics`.
    pub metrics: Address,
    /// `/config`.
    pub config: Address,
}

/// What is shown.
#[derive(Debug)]
pub struct Shown {
    /// How the agent is.
    pub health: Arc<Health>,
    /// What it counts.
    pub metrics: Arc<AgentMetrics>,
    /// What it is to do.
    pub config: Arc<Config>,
    /// What it logs.
    pub log: Arc<LogControl>,
    /// What is attached.
    pub dataplane: Dataplane,
}

/// Servers that listen already.
#[derive(Debug)]
pub struct Servers {
    health: Option<Server>,
    metrics: Option<Server>,
    config: Option<Server>,
}

impl Servers {
    /// Listens. Inside a tokio runtime.
    pub fn bind(addresses: &Addresses) -> Result<Self> {
        let bind = |address: Address, what, option| {
            address.0.map(|address| Server::bind(address, what, option)).transpose()
        };
        Ok(Self {
            health: bind(addresses.health, "probes", "--health-address")?,
            metrics: bind(addresses.metrics, "metrics", "--metrics-address")?,
            config: bind(addresses.config, "configuration", "--config-address")?,
        })
    }

    /// What is served where.
    pub fn urls(&self) -> Result<Vec<String>> {
        let url = |server: &Option<Server>, path: &str| {
            let address = server.as_ref().map(Server::address).transpose()?;
            Ok(address.map(|address: SocketAddr| format!("http://{address}{path}")))
        };
        let all =
            [url(&self.health, "/readyz"), url(&self.metrics, "/metrics"), url(&self.config, "/config")];
        all.into_iter().filter_map(Result::transpose).collect()
    }

    /// Serves for ever, even if it is nothing.
    pub async fn run(self, shown: Shown) {
        let Shown { health, metrics, config, log, dataplane } = shown;
        let checked = Arc::clone(&health);
        tokio::join!(
            run(self.health, move |question| {
                let answer = probe(&health, &question);
                async move { answer }
            }),
            run(self.metrics, move |question| {
                Arc::clone(&metrics).page(question, dataplane.clone(), Arc::clone(&checked))
            }),
            run(self.config, move |question| {
                let answer = configuration(&config, &log, &question);
                async move { answer }
            }),
        );
        std::future::pending().await
    }
}

async fn run<H, F>(server: Option<Server>, answer: H)
where
    H: Fn(Question) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    if let Some(server) = server {
        server.run(answer).await;
    }
}

fn probe(health: &Health, question: &Question) -> Answer {
    let report: Report = match question.path.as_str() {
        "/livez" => health.live(),
        "/readyz" => health.ready(),
        _ => return Answer::text(StatusCode::NOT_FOUND, "probes are at /livez and /readyz\n"),
    };
    let verbose = question.query.split('&').any(|part| matches!(part, "verbose" | "verbose=true"));
    let status = if report.is_good() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Answer::text(status, report.text(verbose))
}

fn configuration(config: &Config, log: &LogControl, question: &Question) -> Answer {
    if question.path != "/config" {
        return Answer::text(StatusCode::NOT_FOUND, "the configuration is at /config\n");
    }
    match serde_json::to_string_pretty(&json!({ "config": config, "log": log.filter() })) {
        Ok(text) => Answer::json(text + "\n"),
        Err(error) => Answer::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

#[cfg(test)]
mod tests;
