//! Keeps the plugin installed: others write the same files, and some put theirs in place of ours.

use std::{
    io::{self, Write as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::install::{InstallError, Installer, Outcome};
use crate::inotify::DirectoryWatch;

/// How often everything is looked at, whether or not something is known to have changed.
const PERIOD: Duration = Duration::from_secs(60);
/// The same while there is nothing that could be watched, or something has failed.
const IMPATIENT: Duration = Duration::from_secs(5);
/// Who changes a file usually changes it more than once.
const SETTLE: Duration = Duration::from_millis(200);
/// After a repair the next one has to wait for this long, and twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Whoever has left it alone for so long does not fight with us.
const PEACE: Duration = Duration::from_secs(600);

/// How the installation stands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Installation {
    /// Whether pods get the plugin now.
    pub is_chained: bool,
    /// In words for people.
    pub words: String,
    /// How often it had to be put back.
    pub repairs: u64,
}

/// A thread that keeps the plugin installed; it ends when this is dropped, and leaves the plugin installed.
#[derive(Debug)]
pub struct Keeper {
    wake: UnixStream,
    installation: Arc<Mutex<Installation>>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// Starts it.
    pub fn start(installer: Installer) -> io::Result<Self> {
        let (wake, woken) = UnixStream::pair()?;
        let watch = DirectoryWatch::new()?;
        let unknown = "it has not been looked at yet".to_owned();
        let installation = Arc::new(Mutex::new(Installation { words: unknown, ..Installation::default() }));
        let keeping = Keeping {
            installer,
            watch,
            woken,
            installation: Arc::clone(&installation),
            pauses: Pauses::default(),
        };
        let thread = thread::Builder::new().name("cni".to_owned()).spawn(move || keeping.run())?;
        Ok(Self { wake, installation, thread: Some(thread) })
    }

    /// How it stands.
    pub fn installation(&self) -> Installation {
        self.installation.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.wake.write_all(b"x");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Keeping {
    installer: Installer,
    watch: DirectoryWatch,
    woken: UnixStream,
    installation: Arc<Mutex<Installation>>,
    pauses: Pauses,
}

impl Keeping {
    fn run(mut self) {
        loop {
            // First the watch, then the look: what changes in between is seen.
            let Installer { conf_dir, bin_dir, .. } = &self.installer;
            let watching = [conf_dir, bin_dir].map(|path| self.watch.add(path).is_some());
            let looked = self.installer.ensure();
            let is_settled = matches!(looked, Ok(Outcome::Chained { .. }));
            let pause = self.note(looked);
            if pause > Duration::ZERO && self.wait(pause, false) {
                return;
            }
            let period = if is_settled && watching == [true; 2] { PERIOD } else { IMPATIENT };
            if self.wait(period, true) || self.wait(SETTLE, false) {
                return;
            }
            // What has happened until now is seen by the next look.
            self.watch.drain();
        }
    }

    /// Says what has changed; returns how long to leave it alone.
    fn note(&mut self, looked: Result<Outcome, InstallError>) -> Duration {
        let mut installation = self.installation.lock().unwrap_or_else(PoisonError::into_inner);
        let was = installation.clone();
        let mut pause = Duration::ZERO;
        (installation.is_chained, installation.words) = match looked {
            Ok(Outcome::Chained { file, changed }) => {
                if changed && was.is_chained {
                    installation.repairs += 1;
                    pause = self.pauses.after_repair(Instant::now());
                    tracing::warn!(
                        "another component had changed {} or the plugin: it is as it was again (repair {}), \
                         and is not repaired again within {} s",
                        file.display(),
                        installation.repairs,
                        pause.as_secs()
                    );
                }
                (true, format!("chained into {}", file.display()))
            }
            Ok(Outcome::Waiting(why)) => (false, format!("waits: {why}")),
            Err(error) => (false, error.to_string()),
        };
        if installation.words != was.words {
            if installation.is_chained {
                tracing::info!("the CNI plugin is {}", installation.words);
            } else {
                tracing::warn!("the CNI plugin is not in use: {}", installation.words);
            }
        }
        pause
    }

    /// Waits, also for changes if wanted; tells whether it is time to end.
    fn wait(&self, time: Duration, for_changes: bool) -> bool {
        let events = if for_changes { PollFlags::POLLIN } else { PollFlags::empty() };
        let deadline = Instant::now() + time;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut files =
                [PollFd::new(self.woken.as_fd(), PollFlags::POLLIN), PollFd::new(self.watch.as_fd(), events)];
            let result = poll(&mut files, timeout);
            let [woken, _] = files.map(|file| file.any().unwrap_or(true));
            match result {
                Ok(0) => return false,
                Ok(_) => return woken,
                // A signal. Anything else cannot be, and would be told by every call.
                Err(nix::Error::EINTR) => {}
                Err(_) => return true,
            }
        }
    }
}

/// How long to wait after a repair.
#[derive(Debug, Default)]
struct Pauses {
    last: Option<(Instant, Duration)>,
}

impl Pauses {
    fn after_repair(&mut self, now: Instant) -> Duration {
        let pause = match self.last {
            Some((at, pause)) if now.saturating_duration_since(at) < PEACE + pause => {
                (pause * 2).min(LONGEST_PAUSE)
            }
            _ => FIRST_PAUSE,
        };
        self.last = Some((now, pause));
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_is_not_fought_for_ever() {
        let mut pauses = Pauses::default();
        let mut now = Instant::now();
        let mut repairs = 0;
        let end = now + Duration::from_secs(3600);
        while now < end {
            now += pauses.after_repair(now);
            repairs += 1;
        }
        assert!((15..25).contains(&repairs), "{repairs} repairs in an hour");
        assert_eq!(pauses.after_repair(now), LONGEST_PAUSE);
        assert_eq!(pauses.after_repair(now + PEACE * 2), FIRST_PAUSE);
    }
}
