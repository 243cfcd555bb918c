//! The node-wide hooks: `sock_ops`, `connect` and `bind` programs on a cgroup, once per instance.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use aya::programs::{CgroupAttachMode, Program, ProgramError};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    error::{BpfContext as _, Error, FileContext as _, Result},
    object::{Objects, Programs},
    pins::Pins,
    record::CgroupChoice,
};
use crate::telemetry::watch;

/// What a link wants: links stack by themselves, and the flag for more is refused.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

const HOOKS: [&str; 5] = ["srcip_sock_ops", "srcip_connect4", "srcip_connect6", "srcip_bind4", "srcip_bind6"];

/// The root of cgroup v2, wherever it is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a
/// hybrid machine.
///
/// In a container there may be two: its own, and the host's, mounted there for us. That one counts: hooks on the
/// other would serve this container alone.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let roots = mounts.lines().filter_map(|line| {
        // 36 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw: proc_pid_mountinfo(5)
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // Relative to our cgroup namespace: `/..` is above it.
        let above = root.split('/').filter(|part| !part.is_empty());
        let is_root = filesystem.starts_with("cgroup2 ") && above.clone().all(|part| part == "..");
        is_root.then(|| (above.count(), PathBuf::from(point)))
    });
    // Of several mounts of the same, the first.
    roots
        .rev()
        .max_by_key(|(above, point)| (cgroup_id(point) == Some(ROOT_ID), *above))
        .map(|(_, point)| point)
}

/// The root's id: kernfs numbers from 1.
const ROOT_ID: u64 = 1;

/// The cgroup that `choice` means; `None` to do without hooks.
pub fn resolve_cgroup(choice: &CgroupChoice) -> Result<Option<PathBuf>> {
    let path = match choice {
        CgroupChoice::None => return Ok(None),
        CgroupChoice::Path(path) => path.clone(),
        // None where no cgroup v2 is mounted: whoever chooses the engine takes that into account.
        CgroupChoice::Root => match cgroup_root() {
            Some(path) => path,
            None => return Ok(None),
        },
    };
    let is_cgroup2 = statfs(&path).map_err(Into::into).file("open the cgroup", &path)?.filesystem_type()
        == CGROUP2_SUPER_MAGIC;
    if is_cgroup2 {
        Ok(Some(path))
    } else {
        Err(Error::File {
            action: "use the cgroup",
            path,
            source: std::io::Error::other("it is not a directory of cgroup v2"),
        })
    }
}

/// The id of a cgroup, which is its directory's inode number; `None` if it is not there.
pub fn cgroup_id(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).ok().map(|metadata| metadata.ino())
}

/// Whether all hooks are attached.
pub(super) fn are_attached(pins: &Pins) -> bool {
    HOOKS.iter().all(|name| pins.node().join(name).exists())
}

/// Sees to it that the recorder is attached: the watching program, telling nobody, but remembering the last
/// connections of the pods in `WATCHED`.
pub(super) fn ensure_recorder(objects: &mut Objects, pins: &Pins, cgroup: &Path) -> Result<()> {
    ensure_one(&mut objects.recorder(pins), watch::PROGRAM, cgroup)
}

/// Sees to it that all hooks are attached, and are this build's.
pub(super) fn ensure(objects: &mut Objects, pins: &Pins, cgroup: &Path) -> Result<()> {
    let mut programs = objects.node(pins);
    HOOKS.into_iter().try_for_each(|name| ensure_one(&mut programs, name, cgroup))
}

fn ensure_one(programs: &mut Programs<'_>, name: &'static str, cgroup: &Path) -> Result<()> {
    let pin = programs.pins.node().join(name);
    programs.ensure(name, &pin, |program| {
        let action = || format!("attach {name} to the cgroup {}", cgroup.display());
        let directory = File::open(cgroup).file("open the cgroup", cgroup)?;
        match program {
            Program::SockOps(program) => {
                let link = program.attach(directory, MODE).and_then(|id| program.take_link(id));
                link.bpf(action)?.try_into().bpf(action)
            }
            Program::CgroupSockAddr(program) => {
                let link = program.attach(directory, MODE).and_then(|id| program.take_link(id));
                link.bpf(action)?.try_into().bpf(action)
            }
            _ => Err(ProgramError::UnexpectedProgramType).bpf(action),
        }
    })
}

/// Puts this build's programs in the place of another's, where hooks are attached.
pub(super) fn upgrade(objects: &mut Objects, pins: &Pins) -> Result<()> {
    let mut programs = objects.node(pins);
    for name in HOOKS {
        programs.upgrade(name, &pins.node().join(name))?;
    }
    // Steering does not need it: the old one records on.
    if let Err(error) = objects.recorder(pins).upgrade(watch::PROGRAM, &pins.node().join(watch::PROGRAM)) {
        tracing::warn!("connections are recorded by a program of another build: {error}");
    }
    Ok(())
}
