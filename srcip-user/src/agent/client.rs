//! Asks the agent.

use std::{
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    packet::Connection,
    protocol::{
        AddAnswer, AddRequest, AgentStatus, Answer, CheckAnswer, CheckRequest, Request, decode, encode,
    },
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens, or who did has gone.
    #[error(
        "no agent answers at {}: it is not running, or is just starting; `kubectl -n srcip-system get pods -o \
         wide` shows whether this node has one, and its log what it lacks", .0.display()
    )]
    Absent(PathBuf),
    /// It did not answer in time.
    #[error("the agent at {} did not answer within {:.1} s", .0.display(), .1.as_secs_f32())]
    TimedOut(PathBuf, Duration),
    /// It is not root who listens there.
    #[error("{} belongs to user {uid}, not to root: whoever listens there is not the agent", .path.display())]
    NotRoot {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// It answered, but not this question.
    #[error("the agent did not do it: {0}")]
    Rejected(String),
    /// Something else.
    #[error("failed to ask the agent at {}: {source}", .path.display())]
    Io {
        /// Its socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Where the agent listens, and how long it has to answer.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    /// A client of the agent at `socket`, which has `timeout` for each answer.
    pub fn new(socket: &Path, timeout: Duration) -> Self {
        Self { socket: socket.to_owned(), timeout }
    }

    /// Steers a pod if it is to be.
    pub fn add(&self, request: AddRequest, netns: BorrowedFd<'_>) -> Result<AddAnswer, CallError> {
        match self.call(Request::Add(request), Some(netns))? {
            Answer::Add(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells whether a pod is as it should be.
    pub fn check(&self, request: CheckRequest, netns: BorrowedFd<'_>) -> Result<CheckAnswer, CallError> {
        match self.call(Request::Check(request), Some(netns))? {
            Answer::Check(answer) => Ok(answer),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells the agent something: [`Request::Del`], [`Request::Gc`].
    pub fn tell(&self, request: Request) -> Result<(), CallError> {
        match self.call(request, None)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// How the agent is.
    pub fn status(&self) -> Result<AgentStatus, CallError> {
        match self.call(Request::Status, None)? {
            Answer::Status(status) => Ok(status),
            other => Err(unexpected(&other)),
        }
    }

    /// What the agent logs, after a change if there is one.
    pub fn log_level(&self, filter: Option<String>) -> Result<String, CallError> {
        match self.call(Request::LogLevel { filter }, None)? {
            Answer::LogLevel(filter) => Ok(filter),
            other => Err(unexpected(&other)),
        }
    }

    fn call(&self, request: Request, descriptor: Option<BorrowedFd<'_>>) -> Result<Answer, CallError> {
        let deadline = Instant::now() + self.timeout;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe => CallError::Absent(self.socket.clone()),
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                CallError::TimedOut(self.socket.clone(), self.timeout)
            }
            _ => CallError::Io { path: self.socket.clone(), source: error },
        };
        let request = encode(request).map_err(CallError::Rejected)?;
        let connection = Connection::connect(&self.socket, deadline).map_err(failed)?;
        let uid = connection.peer_uid().map_err(failed)?;
        if uid != 0 {
            return Err(CallError::NotRoot { path: self.socket.clone(), uid });
        }
        connection.send(&request, descriptor, deadline).map_err(failed)?;
        // It has closed without a word: it has ended meanwhile.
        let packet = connection.receive(deadline).map_err(failed)?;
        let packet = packet.ok_or_else(|| CallError::Absent(self.socket.clone()))?;
        match decode(&packet.bytes, "the agent").map_err(CallError::Rejected)? {
            Answer::Rejected(why) => Err(CallError::Rejected(why)),
            answer => Ok(answer),
        }
    }
}

fn unexpected(answer: &Answer) -> CallError {
    CallError::Rejected(format!("it answered another question: {answer:?}"))
}
