//! Answers load balancers that ask whether this node has endpoints of a Service (`healthCheckNodePort`), as
//! kube-proxy does: `hcHandler` in Kubernetes' pkg/proxy/healthcheck/service_health.go.
//!
//! kube-proxy has these ports already where it runs: that is told, and no harm, for it answers the same.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper::{
    StatusCode,
    header::{HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS},
};
use serde_json::Value;
use tokio::{sync::watch, task::JoinHandle, time::timeout};

use super::model::HealthCheck;
use crate::http::{Answer, Server};

/// How many of a Service's pods the node has, for load balancers that weigh.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// How soon a port that another program had is tried again.
pub const RETRY: Duration = Duration::from_secs(5);

/// What is answered, and where.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Checks {
    /// By port.
    pub ports: BTreeMap<u16, HealthCheck>,
    /// Whether the data plane does what it should. If not, no port says that it has endpoints.
    pub healthy: bool,
}

/// Ports that cannot be listened on, and why.
#[derive(Clone, Debug, Default)]
pub struct Blocked(Arc<Mutex<BTreeMap<u16, String>>>);

impl Blocked {
    /// Those of this moment.
    pub fn all(&self) -> BTreeMap<u16, String> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Told once, as long as it stays so.
    fn add(&self, port: u16, check: &HealthCheck, error: &io::Error) {
        let service = &check.service;
        let why = match error.kind() {
            io::ErrorKind::AddrInUse => format!(
                "healthCheckNodePort {port} of {service} is another program's; if that is kube-proxy, it answers \
                 the same"
            ),
            _ => format!("cannot listen on healthCheckNodePort {port} of {service}: {error}"),
        };
        let mut blocked = self.lock();
        if blocked.get(&port) != Some(&why) {
            tracing::warn!("{why}; trying again every {RETRY:?}");
            blocked.insert(port, why);
        }
    }

    fn remove(&self, port: u16) {
        if self.lock().remove(&port).is_some() {
            tracing::info!("healthCheckNodePort {port} is not another program's any more");
        }
    }
}

/// Keeps a server on each port, until nobody can change the checks any more. Inside a tokio runtime.
pub async fn serve(mut checks: watch::Receiver<Checks>, blocked: Blocked) {
    let mut servers = BTreeMap::new();
    loop {
        let wanted = checks.borrow_and_update().clone();
        update(&mut servers, &wanted, &blocked);
        let changed = if servers.len() < wanted.ports.len() {
            timeout(RETRY, checks.changed()).await
        } else {
            Ok(checks.changed().await)
        };
        if let Ok(Err(_)) = changed {
            return;
        }
    }
}

/// A server on a port; it ends when dropped.
struct Running {
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

/// What one says.
#[derive(Clone, PartialEq, Eq)]
struct State {
    check: HealthCheck,
    healthy: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn update(servers: &mut BTreeMap<u16, Running>, wanted: &Checks, blocked: &Blocked) {
    servers.retain(|port, _| wanted.ports.contains_key(port));
    blocked.lock().retain(|port, _| wanted.ports.contains_key(port));
    for (port, check) in &wanted.ports {
        let state = State { check: check.clone(), healthy: wanted.healthy };
        if let Some(running) = servers.get(port) {
            running.state.send_replace(state);
            continue;
        }
        match listen(*port) {
            Ok(server) => {
                blocked.remove(*port);
                let (state, asked) = watch::channel(state);
                let task = tokio::spawn(server.run(move |_| {
                    let answer = answer(&asked.borrow());
                    async move { answer }
                }));
                servers.insert(*port, Running { state, task });
            }
            Err(error) => blocked.add(*port, check, &error),
        }
    }
}

/// On all addresses, of both families if there are both.
fn listen(port: u16) -> io::Result<Server> {
    const WHAT: &str = "health checks";
    Server::listen(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port), WHAT).or_else(|error| {
        match error.raw_os_error() {
            Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL) => {
                Server::listen(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port), WHAT)
            }
            _ => Err(error),
        }
    })
}

fn answer(state: &State) -> Answer {
    let State { check: HealthCheck { service, local_endpoints }, healthy } = state;
    let quoted = |text: &str| Value::from(text).to_string();
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {},\n\t\t\"name\": {}\n\t}},\n\t\"localEndpoints\": {},\n\t\
         \"serviceProxyHealthy\": {healthy}\n}}",
        quoted(&service.namespace),
        quoted(&service.name),
        local_endpoints
    );
    let mut answer = Answer::json(body);
    if *local_endpoints == 0 || !healthy {
        answer.status = StatusCode::SERVICE_UNAVAILABLE;
    }
    answer.headers = vec![
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(*local_endpoints)),
    ];
    answer
}

#[cfg(test)]
mod tests;
