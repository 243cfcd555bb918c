//! A signal as a normal end: what is under way is finished, what has been changed is put back.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
};

/// What a shell tells of a command that a signal has ended.
const ENDED_BY_SIGNAL: i32 = 128;

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
        for signal in [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_in(*signal, ignored)) {
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
