//! A signal as a normal end: what is under way is finished, what has been changed is put back.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::future::{pending, select_all};
use nix::sys::signal::{SigSet, Signal};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};
use tokio::signal::unix::{SignalKind, signal};

/// What a shell tells of a command that a signal has ended.
const ENDED_BY_SIGNAL: i32 = 128;

/// Those that ask for an end.
const SIGNALS: [i32; 3] = [SIGINT, SIGTERM, SIGHUP];

/// Whether a signal has asked this process to end.
#[derive(Clone, Debug, Default)]
pub struct Ending(Arc<AtomicBool>);

impl Ending {
    /// From now on SIGINT, SIGTERM and SIGHUP do not end this process but are noted; the second one ends
    /// it, should it be stuck.
    ///
    /// A signal that is ignored stays so: whoever started this process (`nohup`) has asked for that.
    pub fn watch() -> io::Result<Self> {
        let ending = Self::default();
        let ignored = ignored();
        for signal in SIGNALS.into_iter().filter(|signal| !is_in(*signal, ignored)) {
            // In this order: the first one finds the flag unset.
            flag::register_conditional_shutdown(signal, ENDED_BY_SIGNAL + signal, Arc::clone(&ending.0))?;
            flag::register(signal, Arc::clone(&ending.0))?;
        }
        // Whoever waits for signals himself has them blocked, and his children with him.
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        signals.thread_unblock()?;
        Ok(ending)
    }

    /// Whether one has come.
    pub fn has_come(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Waits until one has come, without asking again and again. Inside a tokio runtime.
    pub fn come(&self) -> io::Result<impl Future<Output = ()> + use<>> {
        let (ending, ignored) = (self.clone(), ignored());
        let watched = SIGNALS.into_iter().filter(|signal| !is_in(*signal, ignored));
        let mut signals =
            watched.map(|number| signal(SignalKind::from_raw(number))).collect::<io::Result<Vec<_>>>()?;
        Ok(async move {
            if signals.is_empty() {
                return pending().await;
            }
            // One that came before this was called is in the flag.
            while !ending.has_come() {
                select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv()))).await;
            }
        })
    }
}

/// The signals this process ignores, a bit each.
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

/// Whether a signal is in a mask, whose lowest bit is signal 1.
fn is_in(signal: i32, mask: u64) -> bool {
    mask >> (signal - 1) & 1 == 1
}
