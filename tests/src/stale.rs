//! Removes what a run that was killed left behind.
//!
//! Everything a run makes is named `srcip-PID-…` after its process. What bears the number of a process
//! that no longer runs this program is stale.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::Once,
    time::{Duration, Instant},
};

use nix::mount::{MntFlags, umount2};
use srcip_user::dataplane::{Dataplane, hooks::cgroup_root};

use crate::proxy::remove_shared_memory;

/// Where runs keep their files and BPF file systems.
pub const RUN_DIRECTORY: &str = "/run/srcip-worlds";

/// Where nodes with a container runtime keep its images and containers: too much for memory.
pub const STATE_DIRECTORY: &str = "/var/lib/srcip-worlds";

/// The names of this process' things start with this.
pub fn prefix() -> String {
    format!("srcip-{}-", std::process::id())
}

/// Makes a directory and those above it, also while another test takes these away because nothing is left in them.
pub(crate) fn create_directory(path: &Path) -> io::Result<()> {
    let mut result = fs::create_dir_all(path);
    for _ in 0..100 {
        match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => result = fs::create_dir_all(path),
            other => return other,
        }
    }
    result
}

/// Whether `name` is one of a run that has ended.
fn is_stale(name: &str) -> bool {
    let Some(pid) = name.strip_prefix("srcip-").and_then(|rest| rest.split('-').next()) else {
        return false;
    };
    let Ok(pid) = pid.parse::<u32>() else {
        return false;
    };
    // This run has made nothing yet: its number was an earlier one's.
    if pid == std::process::id() {
        return true;
    }
    // A number used again by something else is not that run.
    let runs = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let is_ours = |exe: PathBuf| {
        let name = exe.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("integration-") || name.starts_with("srcip-demo") || name.starts_with("srcip-bench")
    };
    !runs.is_some_and(is_ours)
}

fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect()
}

/// Removes what earlier runs left, the first time it is called; says so. To be called by whatever makes
/// something.
pub(crate) fn remove_first() {
    static FIRST: Once = Once::new();
    FIRST.call_once(|| {
        for what in remove() {
            eprintln!("removed what an earlier run left: {what}");
        }
    });
}

/// Removes everything of runs that have ended. Returns what it was. To be called before this run makes
/// anything.
pub fn remove() -> Vec<String> {
    let mut removed = Vec::new();
    let stale = |directory: &Path| {
        entries(directory).into_iter().filter(|(name, _)| is_stale(name)).collect::<Vec<_>>()
    };
    // Processes first: the rest is in use while they live.
    for (name, path) in cgroup_root().map(|root| stale(&root)).unwrap_or_default() {
        remove_cgroup(&path);
        removed.push(format!("cgroup {name}"));
    }
    for (_, path) in stale(Path::new(STATE_DIRECTORY)) {
        let _ = fs::remove_dir_all(path);
    }
    for (name, path) in stale(Path::new(RUN_DIRECTORY)) {
        remove_directory(&path);
        removed.push(format!("directory {name}"));
    }
    for (name, _) in stale(Path::new("/run/netns")) {
        let _ = Command::new("ip").args(["netns", "del", &name]).output();
        removed.push(format!("network namespace {name}"));
    }
    removed
}

/// Ends the processes of a cgroup and removes it, with the cgroups in it. A container runtime makes cgroups
/// of the same name in the hierarchies of version 1, if there are any; these go too.
pub(crate) fn remove_cgroup(path: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while path.exists() && Instant::now() < deadline {
        let _ = fs::write(path.join("cgroup.kill"), "1");
        if remove_tree(path).is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let name = path.file_name().unwrap_or_default();
    for mount in mounts.lines() {
        if let [_, root, "cgroup", ..] = mount.split(' ').collect::<Vec<_>>()[..] {
            let _ = remove_tree(&Path::new(root).join(name));
        }
    }
}

/// A cgroup's files are no obstacle to its removal, only cgroups in it are.
fn remove_tree(path: &Path) -> io::Result<()> {
    for (_, child) in entries(path) {
        if child.is_dir() {
            remove_tree(&child)?;
        }
    }
    fs::remove_dir(path)
}

/// Removes a run's directory, with the BPF file system in it and what srcip pinned there.
pub(crate) fn remove_directory(path: &Path) {
    let bpf = path.join("bpf");
    for (_, pins) in entries(&bpf) {
        let _ = Dataplane::new(pins).cleanup();
    }
    let _ = umount2(&bpf, MntFlags::MNT_DETACH);
    remove_shared_memory(path);
    let _ = fs::remove_dir_all(path);
}
