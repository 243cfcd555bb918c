//! What can go wrong with the data plane: what failed, on which object, the likely cause, the cure.

use std::{io, path::PathBuf};

use aya::{EbpfError, programs::ProgramError};

use super::build::Shape;
use crate::{netns::NetnsError, routing::RoutingError};

/// An error of the data plane.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A network namespace could not be used.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The return route could not be changed.
    #[error("{0}{where_}", where_ = .1.as_ref().map_or(String::new(), |name| format!(" (in {name})")))]
    Routing(#[source] RoutingError, Option<String>),
    /// The host's own network namespace was given.
    #[error(
        "{} is the host's own network namespace: steering it would take every connection to this \
         machine, the SSH session included; pass --host-netns if that is what you want", .0.display()
    )]
    HostNetns(PathBuf),
    /// The pin path is not on bpffs, and none could be mounted.
    #[error(
        "{} is not on a BPF file system{why}; mount one with `mount -t bpf bpf /sys/fs/bpf`, or give a \
         --pin-path below an existing one", .path.display()
    )]
    NoBpffs {
        /// The pin path.
        path: PathBuf,
        /// More, starting with a separator.
        why: String,
    },
    /// The pins were made by a version that lays its maps out differently.
    #[error(
        "the pins at {} were left by another version of srcip (map layout {found}, this one uses \
         {expected}). Nothing was changed, what is attached works on. To go over to this version, run \
         `srcip cleanup`, which takes the pods' connections past their proxies, and attach again; or go on \
         with that version", .path.display()
    )]
    OtherVersion {
        /// The pin path.
        path: PathBuf,
        /// Its layout.
        found: u32,
        /// Ours.
        expected: u32,
    },
    /// A pinned map is not what this build's programs can share, though the layout has the same number.
    #[error(
        "the pinned map {} is another one than this version of srcip uses ({found}; expected {expected}). \
         Nothing was changed, what is attached works on. To go over to this version, run `srcip cleanup`, \
         which takes the pods' connections past their proxies, and attach again; or go on with the version \
         that made it", .path.display()
    )]
    OtherShape {
        /// Its pin.
        path: PathBuf,
        /// What it is.
        found: Shape,
        /// What it should be.
        expected: Shape,
    },
    /// A program did not pass the kernel's verifier.
    #[error(
        "the kernel refused to load the program {program}: {source}\nverifier log:\n{log}\n\
         This kernel may be older than the program needs; `srcip doctor` tells"
    )]
    Rejected {
        /// Its name.
        program: String,
        /// The verifier's words.
        log: String,
        /// What the system call returned.
        source: io::Error,
    },
    /// Another BPF operation failed.
    #[error("failed to {action}: {source}")]
    Bpf {
        /// What was tried, and on what.
        action: String,
        /// What aya or the kernel said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A file operation failed.
    #[error("failed to {action} {}: {source}", .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The name belongs to another namespace.
    #[error(
        "the name {name:?} is taken by the attachment of {}; detach that one first, or give another \
         --name", .netns.display()
    )]
    NameTaken {
        /// The name.
        name: String,
        /// Who has it.
        netns: PathBuf,
    },
    /// There is no such attachment.
    #[error("{0} is not attached; `srcip status` lists what is")]
    NotAttached(String),
    /// The node-wide hooks sit on another cgroup.
    #[error(
        "the hooks of this instance are attached to the cgroup {}, not {}; use the same --cgroup, or \
         another --pin-path for a second instance", .attached.display(), .wanted.display()
    )]
    OtherCgroup {
        /// Where they are.
        attached: PathBuf,
        /// Where they were wanted.
        wanted: PathBuf,
    },
    /// There may be filters in network namespaces that cannot be entered, because nothing leads to them.
    #[error(
        "of north-south there may be filters left, in network namespaces that cannot be seen from here (their \
         cookies: {cookies}; no process that may be looked at is in them, and no name below /run/netns is \
         theirs): the programs {programs} still use its maps. What they are found again by, {}, was left as \
         well. End the agent, if one runs, and run `srcip cleanup` where these can be seen: on the host itself, \
         or in a pod with hostPID", .path.display()
    )]
    FiltersUnseen {
        /// Where the pins say that there are filters.
        path: PathBuf,
        /// The namespaces' cookies.
        cookies: String,
        /// The numbers of the programs.
        programs: String,
    },
    /// The engine asked for cannot run here.
    #[error("the {engine} engine cannot run here: {reason}; {cure}")]
    EngineUnavailable {
        /// Its name.
        engine: &'static str,
        /// What is missing.
        reason: String,
        /// What to do.
        cure: &'static str,
    },
    /// What user space remembers of an attachment is too long or unreadable.
    #[error("the record of attachment {name:?} {problem}")]
    Record {
        /// The attachment.
        name: String,
        /// What is wrong, and the cure.
        problem: String,
    },
}

/// A result of the data plane.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns aya's errors into [`Error::Bpf`] with what was being done.
pub(crate) trait BpfContext<T> {
    fn bpf(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> BpfContext<T> for std::result::Result<T, E> {
    fn bpf(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Bpf { action: action(), source: source.into() })
    }
}

/// The same for files.
pub(crate) trait FileContext<T> {
    fn file(self, action: &'static str, path: &std::path::Path) -> Result<T>;
}

impl<T> FileContext<T> for io::Result<T> {
    fn file(self, action: &'static str, path: &std::path::Path) -> Result<T> {
        self.map_err(|source| Error::File { action, path: path.to_owned(), source })
    }
}

/// A program's load error, with the verifier's log if there is one.
pub(crate) fn load_error(program: &str, error: ProgramError) -> Error {
    match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            Error::Rejected { program: program.to_owned(), log: verifier_log.to_string(), source: io_error }
        }
        other => Error::Bpf { action: format!("load the program {program}"), source: other.into() },
    }
}

/// An object's load error; a map of another shape under a pinned name shows here.
pub(crate) fn object_error(error: EbpfError) -> Error {
    Error::Bpf { action: "load the eBPF object".to_owned(), source: chain(&error).into() }
}

/// An error with its causes, each once: some errors name theirs, some leave out the one that matters.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
