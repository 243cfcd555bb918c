//! Ctrl-C and SIGTERM as a normal end, after which everything is removed.

use std::{
    cell::Cell,
    fmt, fs,
    path::Path,
    sync::mpsc::{self, Receiver},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigSet, Signal};

/// The error of steps that were not taken any more.
#[derive(Debug)]
pub struct Interrupted(pub Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Keeps the signals from ending this process. Threads and child processes inherit that, so a Ctrl-C,
/// which the terminal sends to all of them, ends no child on its own, and a second one does not disturb
/// the removal.
pub fn block() -> Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("blocking signals")?;
    Ok(signals)
}

/// Tells the steps of the demonstration that it is to end.
#[derive(Debug)]
pub struct Signals {
    receiver: Receiver<Signal>,
    received: Cell<Option<Signal>>,
}

impl Signals {
    /// Waits for one of the blocked signals, then ends the processes in `cgroup`, so that a step that
    /// waits for one of them fails at once.
    pub fn watch(blocked: SigSet, cgroup: &Path) -> Self {
        let (sender, receiver) = mpsc::channel();
        let kill = cgroup.join("cgroup.kill");
        thread::spawn(move || {
            if let Ok(signal) = blocked.wait() {
                // Nobody is interested when the end has come already.
                let _ = sender.send(signal);
                let _ = fs::write(kill, "1");
            }
        });
        Self { receiver, received: Cell::new(None) }
    }

    /// The signal, if one has come.
    pub fn received(&self) -> Option<Signal> {
        self.pause(Duration::ZERO)
    }

    /// Fails if one has come.
    pub fn check(&self) -> Result<()> {
        self.received().map_or(Ok(()), |signal| Err(Interrupted(signal).into()))
    }

    /// Waits for one as long as `limit`.
    pub fn pause(&self, limit: Duration) -> Option<Signal> {
        if self.received.get().is_none() {
            self.received.set(self.receiver.recv_timeout(limit).ok());
        }
        self.received.get()
    }
}
