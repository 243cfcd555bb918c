//! Serves pages over HTTP. Whoever connects may be hostile: a connection gets one answer and few seconds,
//! and of too many, the oldest goes.

use std::{
    collections::VecDeque, convert::Infallible, future::Future, io, net::SocketAddr, str::FromStr,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{sleep, timeout},
};

/// Connections at a time. A page takes milliseconds, and there are few who ask for one.
const MAX_CONNECTIONS: usize = 32;
/// How long a request's head may take to come.
const HEAD_TIMEOUT: Duration = Duration::from_secs(3);
/// How long all of a connection may take.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);
/// A head that is longer is refused; hyper takes no less.
const MAX_HEAD: usize = 8192;

const PLAIN: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";

/// Where to serve, if at all. Not an `Option`, which clap takes for an optional argument.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address(pub Option<SocketAddr>);

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| {
            format!("{text:?} is not an address with a port: expected 127.0.0.1:9464, [::1]:9464 or none")
        })
    }
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Question {
    /// The path.
    pub path: String,
    /// What follows the question mark; empty if nothing does.
    pub query: String,
    /// Whether the answer may be in OpenMetrics.
    pub open_metrics: bool,
}

/// A page, or why there is none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// The media type.
    pub kind: &'static str,
    /// The text.
    pub body: String,
    /// Further headers.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl Answer {
    /// A page.
    pub fn page(kind: &'static str, body: String) -> Self {
        Self { status: StatusCode::OK, kind, body, headers: Vec::new() }
    }

    /// A page for programs.
    pub fn json(body: String) -> Self {
        Self::page(JSON, body)
    }

    /// A few words.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        Self { status, kind: PLAIN, body: body.into(), headers: Vec::new() }
    }

    fn respond(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(self.kind));
        response.headers_mut().extend(self.headers);
        response
    }
}

/// Takes connections on an address.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    what: &'static str,
}

impl Server {
    /// Listens, to serve `what`; `option` is the one that gives the address. Inside a tokio runtime.
    pub fn bind(address: SocketAddr, what: &'static str, option: &str) -> Result<Self> {
        Self::listen(address, what).with_context(|| {
            format!(
                "cannot serve {what} on {address}; if another program has the port, choose another with \
                 {option}, or `none` for no {what}"
            )
        })
    }

    /// The same, with nothing but the system's own words if that fails.
    pub fn listen(address: SocketAddr, what: &'static str) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener: TcpListener::from_std(listener)?, what })
    }

    /// Where it listens: the port is chosen now if none was asked for.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves for ever. Only GET and HEAD get to `answer`.
    pub async fn run<H, F>(self, answer: H)
    where
        H: Fn(Question) -> F + Clone + Send + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let mut connections: VecDeque<JoinHandle<()>> = VecDeque::new();
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: what is open has to end first.
                    tracing::debug!("cannot take a connection for {}: {error}", self.what);
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
            connections.push_back(tokio::spawn(serve(stream, self.what, answer.clone())));
        }
    }
}

async fn serve<H, F>(stream: TcpStream, what: &'static str, answer: H)
where
    H: Fn(Question) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let service = service_fn(move |request| {
        let answer = answer.clone();
        async move { Ok::<_, Infallible>(respond(&request, answer).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        // The next request is seconds away, and may well have a connection of its own.
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_TIMEOUT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!("a connection for {what}: {error}"),
        Err(_) => tracing::debug!("a connection for {what} took too long"),
    }
}

async fn respond<F: Future<Output = Answer>>(
    request: &Request<Incoming>,
    answer: impl Fn(Question) -> F,
) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = Answer::text(StatusCode::METHOD_NOT_ALLOWED, "GET or HEAD\n").respond();
        response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    let mut accepts = request.headers().get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let question = Question {
        path: request.uri().path().to_owned(),
        query: request.uri().query().unwrap_or_default().to_owned(),
        open_metrics: accepts.any(|value| value.contains("application/openmetrics-text")),
    };
    answer(question).await.respond()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!("none".parse(), Ok(Address(None)));
        assert!("[::1]:9464".parse::<Address>().is_ok());
        for bad in ["9464", ":9464", "localhost:9464", "127.0.0.1", ""] {
            assert!(bad.parse::<Address>().unwrap_err().contains("127.0.0.1:9464"), "{bad:?}");
        }
    }
}
