//! Where everything lives that outlives a process: a directory on bpffs.
//!
//! ```text
//! /sys/fs/bpf/srcip/maps/NAME       maps, shared by all programs
//!                   node/HOOK       links of the node-wide hooks
//!                   pods/COOKIE/…   links of one pod's programs
//! ```

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::error::{Error, FileContext as _, Result};
use crate::netns::NetnsCookie;

/// Where instances live unless told otherwise.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/srcip";
const BPFFS: &str = "/sys/fs/bpf";

/// The directory of one instance.
#[derive(Debug, Clone)]
pub struct Pins {
    root: PathBuf,
}

/// Held while an instance is changed; let go of when dropped, also by a crash.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

impl Pins {
    /// The instance at `root`, which need not exist.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The instance's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether there is anything.
    pub fn exists(&self) -> bool {
        self.root.is_dir()
    }

    /// The directory of the maps.
    pub fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    /// The directory of the node-wide hooks' links.
    pub fn node(&self) -> PathBuf {
        self.root.join("node")
    }

    /// The directory of a pod's links.
    pub fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.root.join("pods").join(cookie.to_string())
    }

    /// Makes the directories, on a BPF file system that is mounted if need be, and locks the instance.
    pub fn create(&self) -> Result<Lock> {
        self.ensure_bpffs()?;
        let lock = self.lock_new()?;
        for directory in [self.maps(), self.node(), self.root.join("pods")] {
            make_directory(&directory)?;
        }
        Ok(lock)
    }

    /// Locks an instance, `None` if there is none.
    pub fn lock(&self) -> Result<Option<Lock>> {
        loop {
            let file = match File::open(&self.root) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file.file("open", &self.root)?,
            };
            let lock = Flock::lock(file, FlockArg::LockExclusive);
            let file = lock.map_err(|(_, e)| e.into()).file("lock", &self.root)?;
            // Whoever had the lock may have removed the directory; then this one is of no use.
            if is_same(&file, &self.root) {
                return Ok(Some(Lock { _file: file }));
            }
        }
    }

    fn lock_new(&self) -> Result<Lock> {
        loop {
            make_directory(&self.root)?;
            if let Some(lock) = self.lock()? {
                return Ok(lock);
            }
        }
    }

    /// Removes what steers pods, and the instance's directory if nothing else is in it.
    pub fn remove_steering(&self) -> Result<()> {
        // The maps last: whoever is interrupted leaves no program that works on maps which nobody finds any more.
        for directory in [self.root.join("pods"), self.node(), self.maps()] {
            remove_tree(&directory)?;
        }
        match fs::remove_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            removed => removed.file("remove", &self.root),
        }
    }

    fn ensure_bpffs(&self) -> Result<()> {
        let no_bpffs = |why: String| Error::NoBpffs { path: self.root.clone(), why };
        // The closest directory that exists says which file system the pins will be on.
        let existing = self.root.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
        let is_bpffs = |path: &Path| statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC);
        if is_bpffs(existing) {
            return Ok(());
        }
        if !self.root.starts_with(BPFFS) {
            return Err(no_bpffs(String::new()));
        }
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700"))
            .map_err(|error| no_bpffs(format!(", and mounting one at {BPFFS} failed: {}", error.desc())))?;
        tracing::info!("mounted a BPF file system at {BPFFS}");
        Ok(())
    }
}

fn is_same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let (Ok(open), Ok(there)) = (file.metadata(), fs::metadata(path)) else { return false };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

pub(crate) fn make_directory(path: &Path) -> Result<()> {
    // Only root: whoever can open a pin can change what the programs do.
    DirBuilder::new().mode(0o700).recursive(true).create(path).file("create", path)
}

/// Removes a pin or a directory of pins. What is gone already is no error.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            for entry in fs::read_dir(path).file("read", path)? {
                remove_tree(&entry.file("read", path)?.path())?;
            }
            fs::remove_dir(path)
        }
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.file("remove", path),
    }
}
