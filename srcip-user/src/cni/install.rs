//! Installs the plugin on the node, and takes it away again: its binary in the directory of plugins, and its
//! entry in the configuration of the node's network.
//!
//! Every file is replaced as a whole, so that whoever reads one finds the old or the new one; and the binary
//! is there before the entry, and goes after it. Agents that do this at the same time take turns, by a lock
//! on the directory.

use std::{
    fs::{self, File, Metadata},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::{
    config::{PLUGIN, Settings},
    conflist::{List, check_single, entry, wrap},
};

/// The longest configuration that is looked at, in bytes.
const MAX_FILE: u64 = 1 << 20;
/// How often a file is looked at again that somebody else changes at the same time.
const TRIES: u32 = 5;
/// The most files of a directory that are looked at.
const MAX_FILES: usize = 1000;
/// Ours until they get their name. Runtimes look at `.conf`, `.conflist` and `.json` only.
const TEMPORARY: (&str, &str) = (".srcip-", ".tmp");
/// Ends the name of a list around a single plugin: `10-x.conf` has `10-x-srcip.conflist`, which is sorted
/// before it (`-` comes before `.`), so that the runtime takes that one.
const WRAPPER: &str = "-srcip.conflist";

/// What is installed where.
#[derive(Clone, Debug)]
pub struct Installer {
    /// Where the runtime has its networks' configurations: `/etc/cni/net.d`.
    pub conf_dir: PathBuf,
    /// Where the runtime has its plugins: `/opt/cni/bin`.
    pub bin_dir: PathBuf,
    /// The plugin's binary.
    pub plugin: PathBuf,
    /// What the plugin is told.
    pub settings: Settings,
}

/// How it stands after a look.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The plugin is chained into this file; `changed` if something had to be done for that.
    Chained {
        /// Which file.
        file: PathBuf,
        /// Whether something was missing.
        changed: bool,
    },
    /// There is no network yet into which it could be chained: why.
    Waiting(String),
}

/// Why something could not be installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The runtime's configuration is not one that can be changed.
    #[error("{} is left alone, and pods start without being steered: {why}", .path.display())]
    LeftAlone {
        /// Which.
        path: PathBuf,
        /// Why, and the cure.
        why: String,
    },
    /// Somebody else was faster.
    #[error("{} is being changed by somebody else again and again", .0.display())]
    Overtaken(PathBuf),
    /// The kernel refused.
    #[error("failed to {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

type Result<T, E = InstallError> = std::result::Result<T, E>;

trait Context<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| InstallError::Io { action, path: path.to_owned(), source })
    }
}

/// A file that was there.
#[derive(Debug)]
struct Found {
    path: PathBuf,
    text: String,
    metadata: Metadata,
}

impl Installer {
    /// Where the plugin's binary goes.
    pub fn binary(&self) -> PathBuf {
        self.bin_dir.join(PLUGIN)
    }

    /// Sees to it that all is in place. What is, is not touched.
    pub fn ensure(&self) -> Result<Outcome> {
        let installed = self.ensure_binary()?;
        if !self.conf_dir.is_dir() {
            return Ok(Outcome::Waiting(format!("the directory {} does not exist", self.conf_dir.display())));
        }
        let _lock = lock(&self.conf_dir)?;
        remove_temporary(&self.conf_dir)?;
        let chained = unless_overtaken(|| {
            let Some(active) = self.active()? else { return Ok(None) };
            if is_list(&active.path) { self.chain(&active) } else { self.wrap(&active) }.map(Some)
        })?;
        let Some((file, chained)) = chained else {
            return Ok(Outcome::Waiting(format!("no network is configured in {}", self.conf_dir.display())));
        };
        let removed = self.remove_wrappers(&file)?;
        Ok(Outcome::Chained { file, changed: installed || chained || removed })
    }

    /// Takes everything away that [`Self::ensure`] has made, and nothing else; returns what was changed.
    pub fn remove(&self) -> Result<Vec<PathBuf>> {
        let mut changed = Vec::new();
        let mut failure = None;
        if self.conf_dir.is_dir() {
            let _lock = lock(&self.conf_dir)?;
            remove_temporary(&self.conf_dir)?;
            for path in self.candidates()?.into_iter().filter(|path| is_list(path)) {
                match unless_overtaken(|| self.unchain(&path)) {
                    Ok(true) => changed.push(path),
                    Ok(false) => {}
                    // The others first.
                    Err(error) => failure = Some(error),
                }
            }
        }
        // A network whose plugin is missing starts no pod: the binary stays as long as its entry.
        if let Some(error) = failure {
            return Err(error);
        }
        if self.bin_dir.is_dir() {
            let _lock = lock(&self.bin_dir)?;
            remove_temporary(&self.bin_dir)?;
            if remove(&self.binary())? {
                changed.push(self.binary());
            }
        }
        Ok(changed)
    }

    /// Tells whether there was something to do.
    fn ensure_binary(&self) -> Result<bool> {
        let wanted = File::open(&self.plugin).context("open the plugin's binary", &self.plugin)?;
        fs::create_dir_all(&self.bin_dir).context("create", &self.bin_dir)?;
        let _lock = lock(&self.bin_dir)?;
        remove_temporary(&self.bin_dir)?;
        let target = self.binary();
        let is_executable = |metadata: Metadata| metadata.is_file() && metadata.mode() & 0o777 == 0o755;
        if fs::symlink_metadata(&target).is_ok_and(is_executable)
            && File::open(&target).and_then(|there| is_same(&there, &wanted)).is_ok_and(|same| same)
        {
            return Ok(false);
        }
        (&wanted).rewind().context("read", &self.plugin)?;
        replace(&target, &mut &wanted, 0o755, None)?;
        Ok(true)
    }

    /// The files that the runtime looks at, in its order.
    fn candidates(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.conf_dir).context("read", &self.conf_dir)?;
        let mut paths: Vec<_> = entries
            .take(MAX_FILES)
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| {
                path.extension().is_some_and(|end| end == "conf" || end == "conflist" || end == "json")
            })
            .collect();
        paths.sort();
        Ok(paths)
    }

    /// The file that the runtime takes, wrappers of ours aside: the first that it can read.
    fn active(&self) -> Result<Option<Found>> {
        for path in self.candidates()?.into_iter().filter(|path| !is_wrapper(path)) {
            let checked = read(&path).and_then(|found| {
                if is_list(&path) {
                    List::parse(&found.text).map(|_| ())
                } else {
                    check_single(&found.text)
                }?;
                Ok(found)
            });
            match checked {
                Ok(found) if found.metadata.is_file() => return Ok(Some(found)),
                // The runtime would follow it; we would put a file in its place.
                Ok(_) => {
                    let why = "it is a symbolic link; replace it by the file it leads to".to_owned();
                    return Err(InstallError::LeftAlone { path, why });
                }
                // The runtime takes the next one as well.
                Err(why) => tracing::warn!("{} is no network's configuration: {why}", path.display()),
            }
        }
        Ok(None)
    }

    /// Chains the plugin into a list; returns where, and whether there was something to do.
    fn chain(&self, active: &Found) -> Result<(PathBuf, bool)> {
        let left_alone = |why| InstallError::LeftAlone { path: active.path.clone(), why };
        let list = List::parse(&active.text).map_err(left_alone)?;
        let text = list.with_plugin(&entry(&self.settings)).map_err(left_alone)?;
        if let Some(text) = &text {
            active.replace(text)?;
        }
        Ok((active.path.clone(), text.is_some()))
    }

    /// Puts a list around a single plugin; returns where, and whether there was something to do.
    fn wrap(&self, active: &Found) -> Result<(PathBuf, bool)> {
        let left_alone = |why| InstallError::LeftAlone { path: active.path.clone(), why };
        let text = wrap(&active.text, &entry(&self.settings)).map_err(left_alone)?;
        let stem = active.path.file_stem().unwrap_or_default().to_string_lossy();
        let path = active.path.with_file_name(format!("{stem}{WRAPPER}"));
        if read(&path).is_ok_and(|found| found.text == text && found.metadata.is_file()) {
            return Ok((path, false));
        }
        replace(&path, &mut text.as_bytes(), active.metadata.mode() & 0o7777, Some(&active.metadata))?;
        Ok((path, true))
    }

    /// Removes wrappers of networks that are no longer the node's; tells whether there were any.
    fn remove_wrappers(&self, keep: &Path) -> Result<bool> {
        let mut removed = false;
        for path in self.candidates()?.into_iter().filter(|path| is_wrapper(path) && path != keep) {
            removed |= is_ours(&path) && remove(&path)?;
        }
        Ok(removed)
    }

    /// Takes the plugin out of a list; tells whether it was in it.
    fn unchain(&self, path: &Path) -> Result<bool> {
        let left_alone = |why: &str| InstallError::LeftAlone {
            path: path.to_owned(),
            why: format!("{why}; take {PLUGIN} out of it by hand"),
        };
        let Ok(found) = read(path) else { return Ok(false) };
        let list = match List::parse(&found.text) {
            Ok(list) if list.has_plugin() => list,
            Err(why) if found.text.contains(PLUGIN) => return Err(left_alone(&why)),
            Ok(_) | Err(_) => return Ok(false),
        };
        if is_wrapper(path) {
            return remove(path);
        }
        if !found.metadata.is_file() {
            return Err(left_alone("it is a symbolic link"));
        }
        let without = list.without_plugin().ok_or_else(|| left_alone("it has no other plugin"))?;
        found.replace(&without)?;
        Ok(true)
    }
}

impl Found {
    /// Replaces the file. If somebody else has done that meanwhile, it stays, and is looked at again.
    fn replace(&self, text: &str) -> Result<()> {
        if read(&self.path).is_ok_and(|now| now.text == self.text) {
            let mode = self.metadata.mode() & 0o7777;
            return replace(&self.path, &mut text.as_bytes(), mode, Some(&self.metadata));
        }
        Err(InstallError::Overtaken(self.path.clone()))
    }
}

/// Does something again if somebody else was faster, a few times.
fn unless_overtaken<T>(mut something: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..TRIES {
        match something() {
            Err(InstallError::Overtaken(_)) => {}
            done => return done,
        }
    }
    something()
}

fn is_list(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "conflist")
}

fn is_wrapper(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(WRAPPER))
}

/// Whether a wrapper, by its name, is one.
fn is_ours(path: &Path) -> bool {
    read(path).is_ok_and(|found| List::parse(&found.text).is_ok_and(|list| list.has_plugin()))
}

/// Reads a configuration, also through a symbolic link; the metadata are the link's then.
fn read(path: &Path) -> std::result::Result<Found, String> {
    let failed = |error: io::Error| error.to_string();
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    // Without O_NONBLOCK, opening a FIFO that someone put there would wait forever.
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err("it is not a file".to_owned());
    }
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    Ok(Found { path: path.to_owned(), text, metadata })
}

/// Whether two files have the same contents.
fn is_same(a: &File, b: &File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (BufReader::new(a), BufReader::new(b));
    loop {
        let (some, other) = (a.fill_buf()?, b.fill_buf()?);
        let length = some.len().min(other.len());
        if some[..length] != other[..length] || length == 0 {
            return Ok(some.is_empty() && other.is_empty());
        }
        a.consume(length);
        b.consume(length);
    }
}

/// Waits until no other agent is at work in a directory.
fn lock(directory: &Path) -> Result<Flock<File>> {
    let file = File::open(directory).context("open", directory)?;
    let locked = Flock::lock(file, FlockArg::LockExclusive);
    locked.map_err(|(_, error)| error.into()).context("lock", directory)
}

/// Puts a file in place of what is there, as a whole, with the owner of `like`.
fn replace(path: &Path, contents: &mut dyn io::Read, mode: u32, like: Option<&Metadata>) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut write = || -> io::Result<()> {
        let mut builder = tempfile::Builder::new();
        let mut file = builder.prefix(TEMPORARY.0).suffix(TEMPORARY.1).tempfile_in(directory)?;
        io::copy(contents, file.as_file_mut())?;
        // While it is ours: a file of somebody else's takes one more capability.
        file.as_file().set_permissions(fs::Permissions::from_mode(mode))?;
        let own = file.as_file().metadata()?;
        // Giving a file to somebody else takes a capability.
        if let Some(like) = like.filter(|like| (like.uid(), like.gid()) != (own.uid(), own.gid())) {
            fchown(file.as_file(), Some(like.uid()), Some(like.gid()))?;
        }
        file.as_file().sync_all()?;
        file.persist(path)?;
        File::open(directory)?.sync_all()
    };
    write().context("write", path)
}

/// Removes a file; tells whether there was one.
fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).context("remove", path),
    }
}

/// Removes what an agent left that was killed while it wrote. We have the lock, so none is at it.
fn remove_temporary(directory: &Path) -> Result<()> {
    let (prefix, suffix) = TEMPORARY;
    for entry in fs::read_dir(directory).context("read", directory)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
