//! A SOCK_SEQPACKET connection: whole messages, one of which may bring a descriptor.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    cmsg_space,
    sys::{
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
            connect, getsockopt, recvmsg, sendmsg, setsockopt, socket, sockopt,
        },
        time::{TimeVal, TimeValLike as _},
    },
};

use super::protocol::MAX_MESSAGE;

/// A connected socket.
#[derive(Debug)]
pub(super) struct Connection(OwnedFd);

/// A message and what came with it.
#[derive(Debug)]
pub(super) struct Packet {
    pub bytes: Vec<u8>,
    pub file: Option<File>,
}

/// A socket that is neither bound nor connected.
pub(super) fn new_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?)
}

impl Connection {
    /// Connects to who listens at `path`; waits at most until `deadline` if he has many before us.
    pub(super) fn connect(path: &Path, deadline: Instant) -> io::Result<Self> {
        let connection = Self(new_socket()?);
        setsockopt(&connection.0, sockopt::SendTimeout, &left_until(deadline)?)?;
        connect(connection.0.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(connection)
    }

    /// One that has been accepted.
    pub(super) fn accepted(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Whose the other end is: the user who connected, or who listened, when that was done.
    pub(super) fn peer_uid(&self) -> io::Result<u32> {
        Ok(getsockopt(&self.0, sockopt::PeerCredentials)?.uid())
    }

    /// Sends one message.
    pub(super) fn send(
        &self,
        bytes: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Instant,
    ) -> io::Result<()> {
        let descriptor = descriptor.map(|fd| [fd.as_raw_fd()]);
        let control: Vec<_> = descriptor.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
        loop {
            setsockopt(&self.0, sockopt::SendTimeout, &left_until(deadline)?)?;
            let message = [IoSlice::new(bytes)];
            // A peer that has gone is an error, not the end of this process.
            let flags = MsgFlags::MSG_NOSIGNAL;
            match sendmsg::<()>(self.0.as_raw_fd(), &message, &control, flags, None) {
                Ok(_) => return Ok(()),
                Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next message, `None` if the other end has closed.
    pub(super) fn receive(&self, deadline: Instant) -> io::Result<Option<Packet>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut control = cmsg_space!([RawFd; 1]);
        let (length, flags, descriptors) = loop {
            setsockopt(&self.0, sockopt::ReceiveTimeout, &left_until(deadline)?)?;
            let mut buffer = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            match recvmsg::<()>(self.0.as_raw_fd(), &mut buffer, Some(&mut control), flags) {
                // The descriptors first: whatever is wrong with the message, they are ours to close.
                Ok(message) => break (message.bytes, message.flags, owned(message.cmsgs()?)),
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        let invalid = |what: &str| Err(io::Error::new(io::ErrorKind::InvalidData, what));
        if flags.contains(MsgFlags::MSG_TRUNC) {
            return invalid("a message that is too long");
        }
        if flags.contains(MsgFlags::MSG_CTRUNC) || descriptors.len() > 1 {
            return invalid("a message with too many descriptors");
        }
        bytes.truncate(length);
        Ok(Some(Packet { bytes, file: descriptors.into_iter().next().map(File::from) }))
    }
}

/// The descriptors that came with a message.
fn owned(messages: impl Iterator<Item = ControlMessageOwned>) -> Vec<OwnedFd> {
    let descriptors = messages.filter_map(|message| match message {
        ControlMessageOwned::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    // SAFETY: the kernel has just made them for this process, and nobody else knows of them.
    descriptors.flatten().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect()
}

/// A time that sockets take; to them, zero is for ever.
fn left_until(deadline: Instant) -> io::Result<TimeVal> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let milliseconds = left.max(Duration::from_millis(1)).as_millis();
    Ok(TimeVal::milliseconds(i64::try_from(milliseconds).unwrap_or(i64::MAX)))
}
