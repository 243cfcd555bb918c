//! The other ends of a test's connections: an HTTP application like httpbin, a TCP application that
//! echoes, and clients that hold many connections. Also what a test has to kill.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use bytes::BytesMut;
use clap::{Parser, Subcommand};
use srcip_tests::{PATIENCE, client, options};
use srcip_user::cni::{config::Settings, install::Installer};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpSocket, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::Notify,
    task::JoinSet,
    time::timeout,
};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// An HTTP application.
    Httpbin { addresses: Vec<SocketAddr> },
    /// The same behind proxies that it believes: the client is the one they name.
    Forwarded { addresses: Vec<SocketAddr> },
    /// A TCP application: one line with the ends of the connection, then everything comes back.
    Echo { addresses: Vec<SocketAddr> },
    /// Opens connections to a TCP application and holds them; reads `check` and `close` from stdin.
    Hold(Clients),
    /// Does nothing until it is told to end.
    Pause,
    /// Asks the HTTP application at an address once, and prints what it saw.
    Ask {
        to: SocketAddr,
        #[arg(long)]
        from: Option<SocketAddr>,
    },
    /// Opens connections to a TCP application and closes each one once it has been greeted.
    Visit(Clients),
    /// The same as fast as it goes, for a time; prints how many there were, and their 99th percentile in
    /// microseconds.
    Hammer {
        to: SocketAddr,
        #[arg(long)]
        threads: usize,
        #[arg(long)]
        milliseconds: u64,
    },
    /// Installs the CNI plugin and removes it again, over and over.
    InstallCni { conf_dir: PathBuf, bin_dir: PathBuf, plugin: PathBuf },
}

#[derive(clap::Args)]
struct Clients {
    to: SocketAddr,
    #[arg(long)]
    count: usize,
    /// How many attempts are under way at a time.
    #[arg(long)]
    at_once: usize,
    /// Local addresses, each in turn.
    #[arg(long)]
    from: Vec<IpAddr>,
    /// The first connection's local port; the next one's is the next.
    #[arg(long)]
    from_port: Option<u16>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    // As many descriptors as there may be.
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    match Arguments::parse().role {
        Role::Httpbin { addresses } => serve(addresses, http).await,
        Role::Forwarded { addresses } => serve(addresses, forwarded).await,
        Role::Echo { addresses } => serve(addresses, echo).await,
        Role::Hold(clients) => hold(clients).await,
        Role::Pause => pause().await,
        Role::Ask { to, from } => {
            let seen = client::ask(&mut client::connect_here(from, to)?)?;
            println!("{} {} {}", seen.peer, seen.local, seen.proxied);
            Ok(())
        }
        Role::Visit(clients) => visit(clients).await,
        Role::Hammer { to, threads, milliseconds } => {
            hammer(to, threads, Duration::from_millis(milliseconds))
        }
        Role::InstallCni { conf_dir, bin_dir, plugin } => {
            let installer = Installer { conf_dir, bin_dir, plugin, settings: Settings::default() };
            println!("at work");
            for _ in 0..10_000 {
                installer.ensure()?;
                installer.remove()?;
            }
            Ok(())
        }
    }
}

async fn serve<F: Future<Output = Result<()>> + Send + 'static>(
    addresses: Vec<SocketAddr>,
    handle: fn(TcpStream) -> F,
) -> Result<()> {
    let mut listeners = JoinSet::new();
    for address in addresses {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(address).with_context(|| format!("binding {address}"))?;
        let listener = socket.listen(65535)?;
        listeners.spawn(async move {
            loop {
                match listener.accept().await {
                    // A connection that its client gives up is the client's affair.
                    Ok((stream, _)) => drop(tokio::spawn(handle(stream))),
                    Err(error) => {
                        println!("error: accept: {error}");
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                }
            }
        });
    }
    println!("listening");
    listeners.join_next().await.context("no address to listen on")?.context("a listener ended")
}

/// The first process of a PID namespace is deaf to signals that it does not ask for.
async fn pause() -> Result<()> {
    signal(SignalKind::terminate())?.recv().await;
    Ok(())
}

/// Lets `/hold` go on.
static RELEASED: Notify = Notify::const_new();

async fn http(stream: TcpStream) -> Result<()> {
    answer(stream, false).await
}

async fn forwarded(stream: TcpStream) -> Result<()> {
    answer(stream, true).await
}

/// The first of the addresses in `X-Forwarded-For`.
fn forwarded_for(head: &str) -> Option<&str> {
    let value = head.lines().find_map(|line| line.strip_prefix("x-forwarded-for:"))?;
    value.split(',').next().map(str::trim)
}

/// HTTP/1.1, as much as a sidecar needs: `/ip`, `/seen`; `/hold`, which is answered after somebody has asked for
/// `/release`.
async fn answer(mut stream: TcpStream, believes: bool) -> Result<()> {
    stream.set_nodelay(true)?;
    let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
    let mut buffer = BytesMut::with_capacity(2048);
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = buffer.split_to(end);
        let head = String::from_utf8_lossy(&head).to_lowercase();
        let path = head.split_whitespace().nth(1).unwrap_or("/");
        match path {
            "/hold" => {
                println!("holding {peer}");
                RELEASED.notified().await;
            }
            "/release" => RELEASED.notify_one(),
            _ => {}
        }
        let body = match path {
            "/ip" => {
                let own = peer.ip().to_canonical().to_string();
                let origin = forwarded_for(&head).filter(|_| believes).unwrap_or(&own);
                format!("{{\"origin\": \"{origin}\"}}\n")
            }
            "/seen" | "/hold" => format!("{peer} {local}"),
            _ => "ok\n".to_owned(),
        };
        let close = head.contains("\r\nconnection: close");
        let response = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nServer: httpbin\r\n{}\r\n{body}",
            body.len(),
            if close { "Connection: close\r\n" } else { "" },
        );
        stream.write_all(response.as_bytes()).await?;
        if close {
            return Ok(());
        }
    }
}

async fn echo(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let greeting = format!("{} {}\n", stream.peer_addr()?, stream.local_addr()?);
    stream.write_all(greeting.as_bytes()).await?;
    let mut buffer = vec![0; 16 * 1024];
    // By hand, not by splitting: the end of the input must go out only after all of it has.
    loop {
        let read = stream.read(&mut buffer).await?;
        if read == 0 {
            stream.shutdown().await?;
            return Ok(());
        }
        stream.write_all(&buffer[..read]).await?;
    }
}

async fn open(from: Option<SocketAddr>, to: SocketAddr) -> Result<BufReader<TcpStream>> {
    let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(from) = from {
        socket.set_reuseaddr(true)?;
        if from.port() == 0 {
            // The port is chosen at connect, so that each address has all of them for itself.
            bind_address_no_port(&socket)?;
        }
        socket.bind(from).with_context(|| format!("binding {from}"))?;
    }
    let stream = timeout(PATIENCE, socket.connect(to)).await.context("connect hangs")??;
    let own = stream.local_addr()?;
    let mut stream = BufReader::with_capacity(128, stream);
    let mut line = String::new();
    timeout(PATIENCE, stream.read_line(&mut line))
        .await
        .with_context(|| format!("no greeting for {own}"))??;
    let peer: SocketAddr = line.split_whitespace().next().context("closed at once")?.parse()?;
    if peer.ip().to_canonical() != own.ip().to_canonical() {
        bail!("the application sees {peer}, not {own}");
    }
    Ok(stream)
}

fn bind_address_no_port(socket: &TcpSocket) -> Result<()> {
    const IP_BIND_ADDRESS_NO_PORT: libc::c_int = 24;
    Ok(options::set(socket, libc::IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &1_i32.to_ne_bytes())?)
}

/// Opens all connections, and calls `keep` with each that is good.
async fn open_all(clients: Clients, mut keep: impl FnMut(BufReader<TcpStream>)) -> Result<()> {
    let Clients { to, count, at_once, from, from_port } = clients;
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let mut tasks = JoinSet::new();
    let mut good = 0;
    let mut settle = |opened: Result<BufReader<TcpStream>>| match opened {
        Ok(stream) => {
            good += 1;
            keep(stream);
        }
        Err(error) => println!("error: {error:#}"),
    };
    for i in 0..count {
        if tasks.len() >= at_once {
            settle(tasks.join_next().await.context("no task")??);
        }
        let address = if from.is_empty() { any } else { from[i % from.len()] };
        let port = from_port.map_or(0, |first| first + u16::try_from(i).unwrap_or(0));
        let bound = !from.is_empty() || from_port.is_some();
        tasks.spawn(open(bound.then(|| SocketAddr::new(address, port)), to));
    }
    while let Some(opened) = tasks.join_next().await {
        settle(opened?);
    }
    println!("opened {good}");
    Ok(())
}

async fn visit(clients: Clients) -> Result<()> {
    // A reset leaves no TIME_WAIT on the port, so that the next run can use it again.
    open_all(clients, |stream| drop(stream.into_inner().set_zero_linger())).await
}

/// One blocking thread for each connection at a time: nothing of a runtime's is measured along.
fn hammer(to: SocketAddr, threads: usize, time: Duration) -> Result<()> {
    use std::{io::Read as _, time::Instant};
    let end = Instant::now() + time;
    let workers: Vec<_> = (0..threads)
        .map(|_| {
            std::thread::spawn(move || -> Result<Vec<Duration>> {
                let mut times = Vec::new();
                let mut greeting = [0; 256];
                while Instant::now() < end {
                    let start = Instant::now();
                    let mut stream = std::net::TcpStream::connect(to)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    if stream.read(&mut greeting)? == 0 {
                        bail!("closed without a greeting");
                    }
                    times.push(start.elapsed());
                    // A reset leaves no TIME_WAIT on the port.
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                }
                Ok(times)
            })
        })
        .collect();
    let mut times = Vec::new();
    for worker in workers {
        times.extend(worker.join().map_err(|_| anyhow::anyhow!("a worker panicked"))??);
    }
    times.sort();
    let p99 = times.get((times.len() * 99).div_ceil(100).saturating_sub(1)).context("no connection")?;
    println!("opened {} p99 {}", times.len(), p99.as_micros());
    Ok(())
}

async fn hold(clients: Clients) -> Result<()> {
    let mut held = Vec::with_capacity(clients.count);
    open_all(clients, |stream| held.push(stream)).await?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match line.as_str() {
            "check" => {
                let mut good = 0;
                for (i, stream) in held.iter_mut().enumerate() {
                    match timeout(PATIENCE, check(stream, i)).await {
                        Ok(Ok(())) => good += 1,
                        Ok(Err(error)) => println!("error: {error:#}"),
                        Err(_) => println!("error: no echo"),
                    }
                }
                println!("checked {good}");
            }
            _ => break,
        }
    }
    Ok(())
}

async fn check(stream: &mut BufReader<TcpStream>, i: usize) -> Result<()> {
    let sent = format!("connection {i}\n");
    stream.get_mut().write_all(sent.as_bytes()).await?;
    let mut received = String::new();
    stream.read_line(&mut received).await?;
    if received != sent {
        bail!("sent {sent:?}, received {received:?}");
    }
    Ok(())
}
