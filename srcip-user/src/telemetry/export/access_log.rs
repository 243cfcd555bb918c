//! The access log: a JSON object a line, written by a thread of its own.

use std::{
    fs::File,
    io::{self, Write as _},
    num::{NonZeroU32, NonZeroU64},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{
    super::record::{EventKind, Record},
    metrics::{LogProblem, Metrics},
    rotate::RotatingFile,
};

/// Lines that may wait for the disk: some seconds of a busy node, and a few megabytes.
const QUEUE: usize = 16_384;
/// How long an end waits for what is queued. A reader of stdout may have stopped reading for good.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody looks whether stdout still has a reader while there is nothing to write.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the same trouble is told of: a full disk must not fill another one with messages.
const TELL_INTERVAL: Duration = Duration::from_secs(3600);

/// Where the log goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// Standard output.
    Stdout,
    /// A file.
    File(PathBuf),
}

/// What to log, and where to.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where to.
    pub target: Target,
    /// The size at which a file is rotated.
    pub max_size: NonZeroU64,
    /// How many files are kept, the current one included.
    pub max_files: NonZeroU32,
    /// Which records.
    pub events: Vec<EventKind>,
}

/// The log; dropping it leaves what is queued to chance.
#[derive(Debug)]
pub struct AccessLog {
    lines: SyncSender<Vec<u8>>,
    done: Receiver<()>,
    closed: Arc<AtomicBool>,
    metrics: Arc<Metrics>,
}

impl AccessLog {
    /// Opens it.
    pub fn open(settings: &Settings, metrics: &Arc<Metrics>) -> Result<Self> {
        let (output, name) = match &settings.target {
            Target::Stdout => {
                let stdout = io::stdout().as_fd().try_clone_to_owned();
                (Output::Stdout(stdout.context("cannot write to stdout")?.into()), "on stdout".to_owned())
            }
            Target::File(path) => (Output::File(open_file(path, settings)?), path.display().to_string()),
        };
        let (lines, queue) = mpsc::sync_channel(QUEUE);
        let (finished, done) = mpsc::sync_channel(1);
        let closed = Arc::new(AtomicBool::new(false));
        let writer =
            Writer { output, name, metrics: Arc::clone(metrics), closed: Arc::clone(&closed), told: None };
        thread::Builder::new().name("srcip-log".to_owned()).spawn(move || {
            writer.run(&queue);
            let _ = finished.send(());
        })?;
        Ok(Self { lines, done, closed, metrics: Arc::clone(metrics) })
    }

    /// Queues a record; never waits.
    pub fn write(&self, record: &Record) {
        let mut line = Vec::with_capacity(640);
        if serde_json::to_writer(&mut line, record).is_err() {
            self.metrics.log_failed(LogProblem::Write);
            return;
        }
        line.push(b'\n');
        match self.lines.try_send(line) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => self.metrics.log_failed(LogProblem::Queue),
            Err(TrySendError::Disconnected(_)) => self.metrics.log_failed(LogProblem::Write),
        }
    }

    /// Whether nobody reads stdout any more.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Writes what is queued.
    pub fn finish(self) {
        let Self { lines, done, .. } = self;
        drop(lines);
        if done.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the access log takes no more: what was queued for it is lost");
        }
    }
}

fn open_file(path: &Path, settings: &Settings) -> Result<RotatingFile> {
    RotatingFile::open(path, settings.max_size, settings.max_files).with_context(|| {
        format!(
            "cannot open the access log {}; it takes a file that is no symbolic link, in a directory that \
             exists and can be written to, or `-` for stdout",
            path.display()
        )
    })
}

enum Output {
    /// Unbuffered: what cannot be written is not tried again at the end of the process.
    Stdout(File),
    File(RotatingFile),
}

struct Writer {
    output: Output,
    name: String,
    metrics: Arc<Metrics>,
    closed: Arc<AtomicBool>,
    told: Option<Instant>,
}

impl Writer {
    fn run(mut self, queue: &Receiver<Vec<u8>>) {
        loop {
            match queue.recv_timeout(CHECK_INTERVAL) {
                Ok(line) => self.write(&line),
                Err(RecvTimeoutError::Timeout) => self.check(),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn write(&mut self, line: &[u8]) {
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        let written = match &mut self.output {
            Output::Stdout(stdout) => stdout.write_all(line),
            Output::File(file) => file.write_line(line),
        };
        match written {
            Ok(()) => self.metrics.log_written(),
            // Its reader has seen enough: no error.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.closed.store(true, Ordering::Relaxed);
            }
            Err(error) => {
                self.metrics.log_failed(LogProblem::Write);
                self.tell(&error);
            }
        }
    }

    fn tell(&mut self, error: &io::Error) {
        if self.told.is_some_and(|told| told.elapsed() < TELL_INTERVAL) {
            return;
        }
        self.told = Some(Instant::now());
        tracing::warn!(
            "cannot write the access log {}: {error}; its lines are lost until that is put right, and \
             counted in srcip_access_log_errors_total",
            self.name
        );
    }

    /// Notices a reader of stdout that has gone while there is nothing to write.
    fn check(&self) {
        let Output::Stdout(stdout) = &self.output else { return };
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLERR | PollFlags::POLLNVAL;
        if poll(&mut fds, PollTimeout::ZERO).is_ok()
            && fds[0].revents().is_some_and(|events| events.intersects(gone))
        {
            self.closed.store(true, Ordering::Relaxed);
        }
    }
}
