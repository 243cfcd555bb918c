//! Processes inside a host: in its network namespace and its test's cgroup, and gone with the test.

use std::{
    ffi::OsStr,
    fs::File,
    io::Write as _,
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::PATIENCE;

/// Where a process is to run.
#[derive(Debug)]
pub struct Place {
    /// Its network namespace.
    pub netns: File,
    /// `cgroup.procs` of its cgroup.
    pub cgroup_procs: PathBuf,
}

impl Place {
    /// A command that will run there and die with the thread that started it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let procs = File::options().write(true).open(&self.cgroup_procs);
        let procs = procs.with_context(|| self.cgroup_procs.display().to_string())?;
        let netns = self.netns.try_clone()?;
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        // SAFETY: only system calls on descriptors that the closure owns, no allocation.
        unsafe {
            command.pre_exec(move || enter(netns.as_raw_fd(), procs.as_raw_fd()));
        }
        Ok(command)
    }
}

fn enter(netns: RawFd, procs: RawFd) -> std::io::Result<()> {
    let check = |result: i64| {
        if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: plain system calls; the descriptors are open and the buffer is one byte long.
    unsafe {
        check(libc::write(procs, b"0".as_ptr().cast(), 1) as i64)?;
        check(i64::from(libc::setns(netns, libc::CLONE_NEWNET)))?;
        check(i64::from(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL)))
    }
}

/// A process that runs until it is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: File,
}

impl Process {
    /// Starts it; what it prints goes to a file that [`Self::log`] reads.
    pub fn start(name: impl Into<String>, mut command: Command, log: &std::path::Path) -> Result<Self> {
        let name = name.into();
        let log = File::options().create(true).append(true).read(true).open(log)?;
        command.stdout(log.try_clone()?).stderr(log.try_clone()?);
        let child = command.spawn().with_context(|| format!("starting {name} ({command:?})"))?;
        Ok(Self { name, child, log })
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        // At offsets of our own: the file's is where the process writes, at any moment.
        let mut text = Vec::new();
        let mut chunk = [0; 8192];
        loop {
            match self.log.read_at(&mut chunk, text.len() as u64) {
                Ok(0) => return String::from_utf8_lossy(&text).into_owned(),
                Ok(length) => text.extend_from_slice(&chunk[..length]),
                Err(error) => return error.to_string(),
            }
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.pid().cast_signed()), signal)?)
    }

    /// Writes a line to its standard input, which must be a pipe.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no pipe to its standard input")?;
        Ok(writeln!(stdin, "{line}")?)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until `done` holds, or fails with what it printed.
    pub fn wait_until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // First this: what it has done by its end, it has done.
            let running = self.is_running();
            if done(self) {
                return Ok(());
            }
            if !running || Instant::now() > deadline {
                let state = if running { "still runs" } else { "has ended" };
                bail!("{} {state} without: {what}\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end, at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} still runs after {limit:?}\n{}", self.name, self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it by SIGKILL and waits.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command to its end; fails with its output if it fails.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!(
            "{command:?} failed with {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(output)
}

/// Runs a program with arguments separated by blanks, on this machine.
pub fn sh(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().context("an empty command")?;
    let output = run(Command::new(program).args(words))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
