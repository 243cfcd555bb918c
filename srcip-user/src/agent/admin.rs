//! The agent's socket: takes requests of the CNI plugin and of the command line.
//!
//! Only root gets in: the socket has mode 0600, its directory is root's, and each peer is asked who it is.
//! A request is served on a thread of its own, a bounded number of them at a time; the rest wait in the
//! socket's queue.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::{
        socket::{Backlog, Shutdown, SockFlag, UnixAddr, accept4, bind, listen, shutdown},
        stat::{Mode, fchmod},
    },
    unistd::geteuid,
};

use super::{
    packet::{Connection, new_socket},
    protocol::{
        AddAnswer, AddRequest, AgentStatus, Answer, CheckAnswer, CheckRequest, DelRequest, Request, decode,
        encode_answer,
    },
};
use crate::netns::Netns;

/// Requests that are served at a time.
const MAX_REQUESTS: usize = 64;
/// Connections that wait for their turn.
const BACKLOG: i32 = 128;
/// A peer has so long to send its request, and to take its answer.
const PEER_TIMEOUT: Duration = Duration::from_secs(2);
/// A thread that serves a request needs little of its own.
const STACK: usize = 512 * 1024;

/// Does what is asked. Called on many threads at a time.
pub trait Handler: Send + Sync {
    /// Steers a pod if it is to be; returns within [`AddRequest::timeout`].
    fn add(&self, request: AddRequest, netns: Netns) -> AddAnswer;
    /// Tells whether a pod is as it should be.
    fn check(&self, request: CheckRequest, netns: Netns) -> CheckAnswer;
    /// A sandbox is about to go, or has gone.
    fn del(&self, request: DelRequest);
    /// Sandboxes may have gone without a word.
    fn gc(&self);
    /// How the agent is.
    fn status(&self) -> AgentStatus;
    /// Changes what is logged if there is a filter; returns the filter that holds, or why it does not.
    fn log_level(&self, filter: Option<String>) -> Result<String, String>;
}

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its directory is locked.
    #[error(
        "another agent runs on this node: it has {}; one node takes one agent (`srcip status` tells about \
         it), or give this one another --socket, in a directory of its own", .0.display()
    )]
    AnotherRuns(PathBuf),
    /// Its directory is not safe.
    #[error(
        "{} {why}: whoever that lets in could take the agent's place; give a --socket in a directory that \
         only root can change", .path.display()
    )]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is something else.
    #[error("{} is there, and is no socket; remove it, or give another --socket", .0.display())]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("failed to {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The socket; dropping it closes and removes it. Requests under way are finished if the process lives.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: Arc<OwnedFd>,
    ending: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
    /// Last, so that it goes last: whoever has it next finds no socket.
    _lock: Flock<File>,
}

impl Server {
    /// Listens at `path`. What a dead agent left there is replaced; a live one is in the way.
    pub fn start(path: &Path, handler: Arc<dyn Handler>) -> Result<Self, ServeError> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let lock = lock_directory(directory.unwrap_or(Path::new(".")), path)?;
        let failed = |action, source| ServeError::Io { action, path: path.to_owned(), source };
        match fs::symlink_metadata(path) {
            // We have the lock: its agent is dead.
            Ok(metadata) if metadata.file_type().is_socket() => {
                fs::remove_file(path).map_err(|error| failed("remove the stale socket", error))?;
            }
            Ok(_) => return Err(ServeError::NotASocket(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", error)),
        }
        let listener = bound(path).map_err(|error| failed("listen on the socket", error))?;
        let listener = Arc::new(listener);
        let ending = Arc::new(AtomicBool::new(false));
        let acceptor = {
            let (listener, ending) = (Arc::clone(&listener), Arc::clone(&ending));
            let accept = move || accept_all(&listener, &ending, &handler);
            thread::Builder::new().name("admin".to_owned()).stack_size(STACK).spawn(accept)
        };
        let acceptor = acceptor.map_err(|error| failed("start the thread that serves", error))?;
        Ok(Self { path: path.to_owned(), listener, ending, acceptor: Some(acceptor), _lock: lock })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        let _ = fs::remove_file(&self.path);
        // Wakes who waits in accept.
        let _ = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Makes the directory and locks it for as long as this agent lives.
fn lock_directory(directory: &Path, socket: &Path) -> Result<Flock<File>, ServeError> {
    let failed =
        |action| move |source: io::Error| ServeError::Io { action, path: directory.to_owned(), source };
    DirBuilder::new().mode(0o700).recursive(true).create(directory).map_err(failed("create"))?;
    let file = File::open(directory).map_err(failed("open"))?;
    let metadata = file.metadata().map_err(failed("look at"))?;
    let unsafe_because = |why| Err(ServeError::UnsafeDirectory { path: directory.to_owned(), why });
    if metadata.uid() != geteuid().as_raw() {
        return unsafe_because("belongs to another user");
    }
    if metadata.mode() & 0o022 != 0 {
        return unsafe_because("can be changed by other users than root");
    }
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
        nix::Error::EWOULDBLOCK => ServeError::AnotherRuns(socket.to_owned()),
        error => failed("lock")(error.into()),
    })
}

fn bound(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    // The name gets the socket's mode, so it never has a wider one.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

fn accept_all(listener: &OwnedFd, ending: &AtomicBool, handler: &Arc<dyn Handler>) {
    let slots = Arc::new(Slots::default());
    while !ending.load(Ordering::Relaxed) {
        let slot = Slots::take(&slots);
        let socket = match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            // SAFETY: just accepted, and owned by nobody else.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(_) if ending.load(Ordering::Relaxed) => return,
            Err(nix::Error::EINTR | nix::Error::ECONNABORTED) => continue,
            Err(error) => {
                // No descriptors or no memory left: may pass, and must not become a busy loop.
                tracing::warn!("failed to accept on the agent's socket: {}", error.desc());
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let handler = Arc::clone(handler);
        let serve = move || {
            let _slot = slot;
            serve(&Connection::accepted(socket), handler.as_ref());
        };
        let spawned = thread::Builder::new().name("admin-request".to_owned()).stack_size(STACK).spawn(serve);
        if let Err(error) = spawned {
            tracing::warn!("failed to start a thread for a request: {error}");
        }
    }
}

/// Serves one connection: one request, one answer.
fn serve(connection: &Connection, handler: &dyn Handler) {
    match connection.peer_uid() {
        Ok(0) => {}
        Ok(uid) => return tracing::warn!("refused user {uid} at the agent's socket: only root may ask"),
        Err(error) => return tracing::warn!("refused a peer at the agent's socket: {error}"),
    }
    let packet = match connection.receive(Instant::now() + PEER_TIMEOUT) {
        Ok(Some(packet)) => packet,
        // Somebody wanted to know whether we live.
        Ok(None) => return,
        Err(error) => return tracing::warn!("no request came over the agent's socket: {error}"),
    };
    let answer = answer(&packet.bytes, packet.file, handler);
    if let Answer::Rejected(why) = &answer {
        tracing::warn!("rejected a request: {why}");
    }
    let sent = encode_answer(answer)
        .map_err(io::Error::other)
        .and_then(|bytes| connection.send(&bytes, None, Instant::now() + PEER_TIMEOUT));
    if let Err(error) = sent {
        tracing::debug!("nobody took an answer: {error}");
    }
}

fn answer(bytes: &[u8], file: Option<File>, handler: &dyn Handler) -> Answer {
    let request: Request = match decode(bytes, "the peer") {
        Ok(request) => request,
        Err(why) => return Answer::Rejected(why),
    };
    if let Err(why) = request.validate() {
        return Answer::Rejected(why.to_owned());
    }
    let netns = |path: &Path| {
        let file = file.ok_or("the network namespace's descriptor is missing")?;
        Netns::from_file(file, path).map_err(|error| error.to_string())
    };
    match request {
        Request::Add(request) => match netns(&request.netns) {
            Ok(netns) => Answer::Add(handler.add(request, netns)),
            Err(why) => Answer::Rejected(why),
        },
        Request::Check(request) => match netns(&request.netns) {
            Ok(netns) => Answer::Check(handler.check(request, netns)),
            Err(why) => Answer::Rejected(why),
        },
        Request::Del(request) => {
            handler.del(request);
            Answer::Done
        }
        Request::Gc {} => {
            handler.gc();
            Answer::Done
        }
        Request::Status => Answer::Status(handler.status()),
        Request::LogLevel { filter } => {
            handler.log_level(filter).map_or_else(Answer::Rejected, Answer::LogLevel)
        }
    }
}

/// Counts the requests that are served.
#[derive(Debug, Default)]
struct Slots {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// One of them; free again when dropped, also by a panic.
#[derive(Debug)]
struct Slot(Arc<Slots>);

impl Slots {
    /// Waits for a free one and takes it.
    fn take(slots: &Arc<Self>) -> Slot {
        let taken = slots.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = slots.freed.wait_while(taken, |taken| *taken >= MAX_REQUESTS);
        *taken.unwrap_or_else(PoisonError::into_inner) += 1;
        Slot(Arc::clone(slots))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests;
