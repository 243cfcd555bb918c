//! Standard output that does not keep this process from ending.

use std::{
    io::{self, Write},
    os::fd::AsFd as _,
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use crate::signals::Ending;

/// As much as a pipe takes without waiting if it takes anything: `PIPE_BUF`.
const PIECE: usize = 4096;

/// How often it is looked whether to end while the reader is slow, in milliseconds.
const PATIENCE: u8 = 50;

/// Standard output, unbuffered. A reader that stands still is waited for, but not once this process is to
/// end.
#[derive(Debug)]
pub(super) struct Pipe {
    ending: Ending,
}

impl Pipe {
    pub(super) fn new(ending: Ending) -> Self {
        Self { ending }
    }

    /// Whether nobody reads it any more, which is to be known also while there is nothing to write.
    pub(super) fn is_closed(&self) -> bool {
        let gone = PollFlags::POLLERR | PollFlags::POLLNVAL;
        matches!(self.look(PollFlags::empty(), PollTimeout::ZERO), Ok(events) if events.intersects(gone))
    }

    fn look(&self, wanted: PollFlags, timeout: PollTimeout) -> Result<PollFlags, Errno> {
        let stdout = io::stdout();
        let mut fds = [PollFd::new(stdout.as_fd(), wanted)];
        poll(&mut fds, timeout)?;
        Ok(fds[0].revents().unwrap_or(PollFlags::POLLERR))
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.look(PollFlags::POLLOUT, PATIENCE.into()) {
                Ok(events) if !events.is_empty() => break,
                Ok(_) | Err(Errno::EINTR) if self.ending.has_come() => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(nix::unistd::write(io::stdout(), &bytes[..bytes.len().min(PIECE)])?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
