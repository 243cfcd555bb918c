//! Connections.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, Shutdown, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
    time::sleep,
};

use super::{Shared, answer::answer};

/// Connections at a time.
const MAX_CONNECTIONS: usize = 256;

/// A port that is kept also while connections to it are refused.
pub(super) struct Door {
    address: SocketAddr,
    /// Bound; it listens or it does not.
    socket: Socket,
}

impl Door {
    pub(super) fn open() -> Result<Self> {
        let any = Self::bound((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = any.local_addr()?.as_socket().expect("bound to an address of IPv4");
        // A port that was asked for by its number is kept when the socket ceases to listen.
        Ok(Self { address, socket: Self::bound(address)? })
    }

    fn bound(address: SocketAddr) -> Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    fn listen(&self) -> Result<TcpListener> {
        self.socket.listen(64)?;
        Ok(TcpListener::from_std(self.socket.try_clone()?.into())?)
    }

    /// Ceases to listen: that is what shutting down means to a socket that does.
    fn refuse(&self) -> Result<()> {
        Ok(self.socket.shutdown(Shutdown::Both)?)
    }
}

/// Serves until told to stop.
pub(super) async fn run(door: Door, shared: Arc<Shared>, mut stop: watch::Receiver<()>) {
    let mut connections = JoinSet::new();
    let (mut faults, mut cuts) = (shared.faults.subscribe(), shared.cuts.subscribe());
    // They may have been set before this began.
    faults.mark_changed();
    let mut listener = door.listen().ok();
    loop {
        tokio::select! {
            _ = stop.changed() => return,
            _ = cuts.changed() => connections.abort_all(),
            _ = faults.changed() => {
                let refuse = faults.borrow_and_update().refuse;
                if refuse && listener.is_some() {
                    listener = None;
                    connections.abort_all();
                    door.refuse().expect("it listened");
                } else if !refuse && listener.is_none() {
                    listener = door.listen().ok();
                }
            }
            Some(_) = connections.join_next() => {}
            Some(taken) = accept(listener.as_ref()), if connections.len() < MAX_CONNECTIONS => {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let service = service_fn(move |request| {
                        let shared = Arc::clone(&shared);
                        async move { Ok::<_, Infallible>(answer(&shared, request).await) }
                    });
                    let connection = http1::Builder::new().timer(TokioTimer::new()).serve_connection(taken, service);
                    // Connections end as they like; who made them sees it.
                    let _ = connection.await;
                });
            }
        }
    }
}

/// The next connection; `None` if none is taken.
async fn accept(listener: Option<&TcpListener>) -> Option<TokioIo<TcpStream>> {
    let listener = listener?;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return Some(TokioIo::new(stream)),
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}
