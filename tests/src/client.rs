//! Single connections from a host.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};

use crate::{PATIENCE, host::Host};

/// How long to try what nobody answers: a SYN is sent three times by then.
const IN_VAIN: Duration = Duration::from_secs(5);

/// Opens a connection from `host`.
pub fn connect(host: &Host, to: SocketAddr) -> Result<TcpStream> {
    connect_from(host, None, to)
}

/// Opens a connection from `host`, from a local address if one is given.
pub fn connect_from(host: &Host, from: Option<SocketAddr>, to: SocketAddr) -> Result<TcpStream> {
    host.netns().run(|| connect_here(from, to))?
}

/// Tries to open a connection that should not come about; tells why it does not, or fails.
pub fn connect_in_vain(host: &Host, from: Option<SocketAddr>, to: SocketAddr) -> Result<anyhow::Error> {
    match host.netns().run(|| connect_within(IN_VAIN, from, to))? {
        Ok(_) => anyhow::bail!("{to} takes a connection"),
        Err(error) => Ok(error),
    }
}

/// Opens a connection from the calling thread's network namespace.
pub fn connect_here(from: Option<SocketAddr>, to: SocketAddr) -> Result<TcpStream> {
    connect_within(PATIENCE, from, to)
}

fn connect_within(limit: Duration, from: Option<SocketAddr>, to: SocketAddr) -> Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    if let Some(from) = from {
        socket.set_reuse_address(true)?;
        socket.bind(&from.into()).with_context(|| format!("binding {from}"))?;
    }
    socket.connect_timeout(&to.into(), limit).with_context(|| format!("connecting to {to}"))?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// What the application says of a connection: its two ends as the application's socket names them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Seen {
    /// `getpeername` of the application's socket.
    pub peer: SocketAddr,
    /// `getsockname` of the application's socket.
    pub local: SocketAddr,
    /// Whether the answer came through a proxy, which its headers tell.
    pub proxied: bool,
}

/// Asks `GET /seen` on a connection, which stays open.
pub fn ask(stream: &mut TcpStream) -> Result<Seen> {
    let response = http_get(stream, "/seen")?;
    let mut words = response.body.split_whitespace();
    let mut address = || -> Result<SocketAddr> {
        let word = words.next().with_context(|| format!("not an answer: {:?}", response.body))?;
        word.parse().with_context(|| word.to_owned())
    };
    let (peer, local) = (address()?, address()?);
    let head = response.head.to_ascii_lowercase();
    // Envoy and nginx name themselves as the server; the example for HAProxy adds a header.
    let proxied = ["\nserver: envoy", "\nserver: nginx", "\nvia: haproxy"].iter().any(|h| head.contains(h));
    let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
    Ok(Seen { peer: canonical(peer), local: canonical(local), proxied })
}

/// Connects, asks once, and closes.
pub fn ask_once(host: &Host, to: SocketAddr) -> Result<Seen> {
    ask(&mut connect(host, to)?)
}

/// The address that `GET /ip` reports, as httpbin does: `{"origin": "…"}`.
pub fn origin(host: &Host, to: SocketAddr) -> Result<IpAddr> {
    let response = http_get(&mut connect(host, to)?, "/ip")?;
    let json: serde_json::Value = serde_json::from_str(&response.body)?;
    Ok(json["origin"].as_str().context("no origin")?.parse()?)
}

/// What curl on `host` gets from a URL, whoever has signed the certificate.
pub fn curl(host: &Host, url: &str) -> Result<String> {
    host.sh(&format!(
        "curl --silent --show-error --insecure --globoff --max-time {} {url}",
        PATIENCE.as_secs()
    ))
}

/// An HTTP response.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Response {
    /// Status line and headers.
    pub head: String,
    /// What follows.
    pub body: String,
}

/// One request on a connection that stays open.
pub fn http_get(stream: &mut TcpStream, path: &str) -> Result<Response> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: httpbin\r\nUser-Agent: srcip-tests\r\n\r\n");
    stream.write_all(request.as_bytes()).context("sending the request")?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let read = reader.read_line(&mut head).context("reading the response")?;
        anyhow::ensure!(read > 0, "the connection was closed after {head:?}");
    }
    let lower = head.to_ascii_lowercase();
    let header = |name: &str| {
        lower.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned))
    };
    let mut body = Vec::new();
    if let Some(length) = header("content-length") {
        body.resize(length.trim().parse()?, 0);
        reader.read_exact(&mut body)?;
    } else if header("transfer-encoding").is_some() {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).context("a chunk's size")?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk)?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&chunk[..size]);
        }
    }
    anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{head}{}", String::from_utf8_lossy(&body));
    Ok(Response { head, body: String::from_utf8(body)? })
}
