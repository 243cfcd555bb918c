//! Serves the metrics over HTTP. Whoever connects may be hostile: a connection gets one answer and few
//! seconds, and of too many, the oldest goes.

use std::{collections::VecDeque, convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ACCEPT, ALLOW, CONTENT_TYPE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::metrics::Metrics;
use crate::dataplane::Dataplane;

/// Connections at a time. A scrape takes milliseconds, and there are few scrapers.
const MAX_CONNECTIONS: usize = 32;
/// How long a request's head may take to come.
const HEAD_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all of a connection may take.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A head that is longer is refused; hyper takes no less.
const MAX_HEAD: usize = 8192;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
const PLAIN: &str = "text/plain; charset=utf-8";

/// Takes connections on an address.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
}

impl Server {
    /// Listens. Inside a tokio runtime.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let listen = || -> std::io::Result<TcpListener> {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let listener = listen().with_context(|| {
            format!(
                "cannot serve metrics on {address}; if another program has the port, choose another with \
                 --metrics-address, or `none` for no metrics"
            )
        })?;
        Ok(Self { listener })
    }

    /// Where it listens: the port is chosen now if none was asked for.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves for ever.
    pub async fn run(self, metrics: Arc<Metrics>, dataplane: Dataplane) {
        let mut connections: VecDeque<JoinHandle<()>> = VecDeque::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: what is open has to end first.
                    tracing::debug!("cannot take a connection for metrics: {error}");
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            connections.retain(|connection| !connection.is_finished());
            if connections.len() >= MAX_CONNECTIONS
                && let Some(oldest) = connections.pop_front()
            {
                oldest.abort();
            }
            let serving = serve(stream, Arc::clone(&metrics), dataplane.clone());
            connections.push_back(tokio::spawn(serving));
        }
    }
}

async fn serve(stream: TcpStream, metrics: Arc<Metrics>, dataplane: Dataplane) {
    let service = service_fn(move |request| {
        let (metrics, dataplane) = (Arc::clone(&metrics), dataplane.clone());
        async move { Ok::<_, Infallible>(answer(&request, &metrics, &dataplane).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        // The next scrape is seconds away, and may well have a connection of its own.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a connection for metrics: {error}"),
        Err(_) => tracing::debug!("a connection for metrics took too long"),
    }
}

async fn answer(
    request: &Request<Incoming>,
    metrics: &Arc<Metrics>,
    dataplane: &Dataplane,
) -> Response<Full<Bytes>> {
    if request.uri().path() != "/metrics" {
        return text(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n");
        response.headers_mut().insert(ALLOW, hyper::header::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    metrics.refresh_node(dataplane).await;
    let accepts = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let open_metrics = accepts.into_iter().any(|value| value.contains("application/openmetrics-text"));
    match metrics.encode(open_metrics) {
        Ok(page) => respond(StatusCode::OK, if open_metrics { OPEN_METRICS } else { CLASSIC }, page),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    respond(status, PLAIN, body.to_owned())
}

fn respond(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}
