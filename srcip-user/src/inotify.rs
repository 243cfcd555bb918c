//! Changes in directories, as the kernel tells of them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    path::Path,
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

/// How often events are read in one go: more may come all the time.
const READS: usize = 64;

/// Tells that something has changed in a directory, not what. Readable if so.
#[derive(Debug)]
pub struct DirectoryWatch(Inotify);

impl DirectoryWatch {
    /// Watches nothing yet. Fails if this user has no instance of inotify left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?))
    }

    /// Watches the directory that is at `path` now; one that is put in its place is another one. `None` if there is none.
    pub fn add(&self, path: &Path) -> Option<WatchDescriptor> {
        // Not IN_MODIFY: of a file that is being written, its end is of interest. A link is created whole.
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_ONLYDIR;
        self.0.add_watch(path, flags).ok()
    }

    /// Watches it no longer.
    pub fn remove(&self, watched: WatchDescriptor) {
        // It fails if that directory is gone.
        let _ = self.0.rm_watch(watched);
    }

    /// Takes what has been told; tells whether that was all.
    pub fn drain(&self) -> bool {
        (0..READS).any(|_| self.0.read_events().is_err())
    }
}

impl AsFd for DirectoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for DirectoryWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
