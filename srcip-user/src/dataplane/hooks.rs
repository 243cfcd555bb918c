//! The node-wide hooks: `sock_ops`, `connect` and `bind` programs on a cgroup, once per instance.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use aya::{
    Ebpf,
    programs::{
        CgroupAttachMode, CgroupSockAddr, SockOps,
        links::{FdLink, PinnedLink},
    },
};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::{
    error::{BpfContext as _, Error, FileContext as _, Result, load_error},
    object,
    pins::Pins,
    record::CgroupChoice,
};
use crate::telemetry::watch;

const SOCK_OPS: &str = "srcip_sock_ops";
const SOCK_ADDR: [&str; 4] = ["srcip_connect4", "srcip_connect6", "srcip_bind4", "srcip_bind6"];

/// The root of cgroup v2, wherever it is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a
/// hybrid machine.
pub fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        // 36 25 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw: proc_pid_mountinfo(5)
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        (filesystem.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(point))
    })
}

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
    SOCK_ADDR.iter().chain([&SOCK_OPS]).all(|name| pins.node().join(name).exists())
}

/// Attaches the recorder unless it is: the watching program, telling nobody, but remembering the last
/// connections of the pods in `WATCHED`.
pub(super) fn ensure_recorder(pins: &Pins, cgroup: &Path) -> Result<()> {
    let pin = pins.node().join(watch::PROGRAM);
    if pin.exists() {
        return Ok(());
    }
    let mut object = watch::load_recorder(&pins.maps())?;
    let directory = File::open(cgroup).file("open the cgroup", cgroup)?;
    let program: &mut SockOps = object::program(&mut object, watch::PROGRAM)?;
    program.load().map_err(|error| load_error(watch::PROGRAM, error))?;
    let attached = program.attach(&directory, CgroupAttachMode::Single);
    let link = attached.and_then(|id| program.take_link(id));
    let link = link.bpf(|| attach_action(watch::PROGRAM, cgroup))?;
    pin_link(link.try_into().bpf(|| attach_action(watch::PROGRAM, cgroup))?, &pin).map(drop)
}

/// Attaches the hooks that are not attached yet.
pub(super) fn ensure(pins: &Pins, object: &mut Ebpf, cgroup: &Path) -> Result<()> {
    let directory = File::open(cgroup).file("open the cgroup", cgroup)?;
    // "Single" is what a link wants: links stack by themselves, and the flag for more is refused.
    let mode = CgroupAttachMode::Single;

    let pin = pins.node().join(SOCK_OPS);
    if !pin.exists() {
        let program: &mut SockOps = object::program(object, SOCK_OPS)?;
        program.load().map_err(|error| load_error(SOCK_OPS, error))?;
        let attached = program.attach(&directory, mode).and_then(|id| program.take_link(id));
        let link = attached.bpf(|| attach_action(SOCK_OPS, cgroup))?;
        pin_link(link.try_into().bpf(|| attach_action(SOCK_OPS, cgroup))?, &pin)?;
    }
    for name in SOCK_ADDR {
        let pin = pins.node().join(name);
        if pin.exists() {
            continue;
        }
        let program: &mut CgroupSockAddr = object::program(object, name)?;
        program.load().map_err(|error| load_error(name, error))?;
        let attached = program.attach(&directory, mode).and_then(|id| program.take_link(id));
        let link = attached.bpf(|| attach_action(name, cgroup))?;
        pin_link(link.try_into().bpf(|| attach_action(name, cgroup))?, &pin)?;
    }
    Ok(())
}

fn attach_action(name: &str, cgroup: &Path) -> String {
    format!("attach {name} to the cgroup {}", cgroup.display())
}

/// Pins a link, so that it outlives this process.
pub(super) fn pin_link(link: FdLink, path: &Path) -> Result<PinnedLink> {
    link.pin(path).bpf(|| format!("pin a link at {}", path.display()))
}
