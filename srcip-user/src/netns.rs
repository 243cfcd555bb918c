//! Network namespaces: opening one, telling it from others, running code inside.

use std::{
    fmt,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    panic,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns},
    sys::stat::Mode,
};

/// Where `ip netns add` keeps its namespaces.
const NAMED: &str = "/run/netns";

/// Why a network namespace could not be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The path leads nowhere.
    #[error(
        "network namespace {}: no such file; `ip netns list` shows the named ones, \
         and /proc/PID/ns/net is that of a process", .0.display()
    )]
    NotFound(PathBuf),
    /// The path is something else.
    #[error(
        "{} is not a network namespace; give a path such as /run/netns/NAME or /proc/PID/ns/net",
        .0.display()
    )]
    NotANetns(PathBuf),
    /// It is that of a process that this one may not look into.
    #[error(
        "network namespace {}: permission denied; to open that of another user's process takes CAP_SYS_PTRACE: \
         run as root, or give the container this capability", .0.display()
    )]
    Denied(PathBuf),
    /// The kernel refused.
    #[error("failed to {action} network namespace {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which namespace.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Tells network namespaces apart for as long as they live: device and inode of the nsfs file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// The inode number, which another namespace may have once this one has gone.
    pub fn inode(self) -> u64 {
        self.inode
    }
}

/// The kernel's name for a network namespace, unique until reboot. Programs know pods by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// An open network namespace; it lives at least as long as this does.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
    id: NetnsId,
}

impl Netns {
    /// Opens the namespace at `path`: `/run/netns/NAME`, `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        // Without O_NONBLOCK, opening a FIFO that someone put there would wait forever.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = match open(path, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ESRCH) => {
                return Err(NetnsError::NotFound(path.to_owned()));
            }
            Err(nix::Error::EACCES) => return Err(NetnsError::Denied(path.to_owned())),
            Err(error) => {
                return Err(NetnsError::Io { action: "open", path: path.to_owned(), source: error.into() });
            }
        };
        Self::from_file(file, path)
    }

    /// A namespace that somebody has opened already; `path` is where, for messages and the record.
    pub fn from_file(file: File, path: &Path) -> Result<Self, NetnsError> {
        if namespace_type(file.as_fd()) != Some(libc::CLONE_NEWNET) {
            return Err(NetnsError::NotANetns(path.to_owned()));
        }
        let metadata = file.metadata().map_err(|source| NetnsError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        })?;
        let id = NetnsId { device: metadata.dev(), inode: metadata.ino() };
        Ok(Self { file, path: path.to_owned(), id })
    }

    /// Opens the namespace of the process `pid`.
    pub fn of_process(pid: u32) -> Result<Self, NetnsError> {
        Self::open(&PathBuf::from(format!("/proc/{pid}/ns/net")))
    }

    /// All namespaces of this machine that can be reached, each once: the named ones and those of all
    /// processes.
    pub fn all() -> impl Iterator<Item = Self> {
        each_once(paths())
    }

    /// Finds a namespace by its cookie. If its inode number is known as well, that takes a `stat` for each
    /// process of the machine, not a visit to each namespace.
    pub fn find(cookie: NetnsCookie, inode: Option<u64>) -> Option<Self> {
        let may_be = |path: &PathBuf| {
            inode.is_none_or(|inode| std::fs::metadata(path).is_ok_and(|found| found.ino() == inode))
        };
        each_once(paths().filter(may_be)).find(|netns| netns.cookie().is_ok_and(|found| found == cookie))
    }

    /// The host's own, as far as this process can see it: that of the first process, or its own.
    pub fn host() -> Option<Self> {
        // In a container without the host's /proc, our own is the closest there is.
        [1, std::process::id()].into_iter().find_map(|pid| Self::of_process(pid).ok())
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tells it from other open namespaces.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Whether it is the one that the host's first process is in.
    pub fn is_host(&self) -> bool {
        Self::host().is_some_and(|host| host.id() == self.id())
    }

    /// The cookie of the calling thread's. Linux 5.14.
    pub fn cookie_here() -> io::Result<NetnsCookie> {
        netns_cookie().map(NetnsCookie)
    }

    /// Its cookie. Linux 5.14.
    pub fn cookie(&self) -> Result<NetnsCookie, NetnsError> {
        self.run(netns_cookie)?.map(NetnsCookie).map_err(|source| NetnsError::Io {
            action: "read the cookie of",
            path: self.path.clone(),
            source,
        })
    }

    /// Runs `f` inside, on a thread of its own, so that no other code ever finds itself in the wrong
    /// namespace, and hands back what it returns. A panic goes on in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let entered = thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                    Ok(f())
                })
                .join()
                .unwrap_or_else(|payload| panic::resume_unwind(payload))
        });
        entered.map_err(|error: nix::Error| NetnsError::Io {
            action: "enter",
            path: self.path.clone(),
            source: error.into(),
        })
    }
}

/// Where namespaces can be reached: by name, and by process.
fn paths() -> impl Iterator<Item = PathBuf> {
    let entries = |directory| std::fs::read_dir(directory).into_iter().flatten().flatten();
    let processes = entries("/proc")
        .filter(|entry| entry.file_name().as_encoded_bytes()[0].is_ascii_digit())
        .map(|entry| entry.path().join("ns/net"));
    entries(NAMED).map(|entry| entry.path()).chain(processes)
}

fn each_once(paths: impl Iterator<Item = PathBuf>) -> impl Iterator<Item = Netns> {
    let mut seen = std::collections::HashSet::new();
    paths.filter_map(|path| Netns::open(&path).ok()).filter(move |netns| seen.insert(netns.id()))
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The `CLONE_NEW…` flag of a namespace file, `None` for any other file. Linux 4.11.
fn namespace_type(file: BorrowedFd<'_>) -> Option<i32> {
    const NS_GET_NSTYPE: libc::c_ulong = 0xb703;
    // SAFETY: the descriptor is open, and this request takes no argument.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE as _) };
    (kind > 0).then_some(kind)
}

/// The cookie of the calling thread's network namespace.
fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    // SAFETY: creates a descriptor, checked below before it is used.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, and owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` is as long as `length` says.
    let error = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if error == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_is_a_netns_and_has_a_cookie() {
        let own = Netns::of_process(std::process::id()).unwrap();
        assert_ne!(own.cookie().unwrap().0, 0);
        assert_eq!(own.id(), Netns::open(Path::new("/proc/self/ns/net")).unwrap().id());
    }

    #[test]
    fn other_things_are_refused_by_name() {
        let missing = Netns::open(Path::new("/run/netns/srcip-no-such-name")).unwrap_err();
        assert!(missing.to_string().contains("/run/netns/srcip-no-such-name: no such file"));
        for path in ["/proc/self/ns/mnt", "/etc/hostname", "/tmp", "/dev/null"] {
            let error = Netns::open(Path::new(path)).unwrap_err();
            assert!(error.to_string().contains("is not a network namespace"), "{path}: {error}");
            let file = File::open(path).unwrap();
            let error = Netns::from_file(file, Path::new("/run/netns/a")).unwrap_err();
            assert!(error.to_string().starts_with("/run/netns/a is not a network namespace"), "{error}");
        }
    }
}
