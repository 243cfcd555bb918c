//! A pinned link: what the kernel says of it, and putting another program behind it.
//!
//! aya does neither for every kind of link.

use std::{
    ffi::CString,
    fmt, fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use aya::programs::ProgramFd;
use aya_obj::generated::{bpf_attr, bpf_cmd};

use super::{
    error::{BpfContext as _, FileContext as _, Result},
    pins::remove_tree,
};

/// The kernel's digest of a program's instructions, maps and constants left out: programs with the same do
/// the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Tag(pub u64);

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Removes the pin of a link, and with it the link: what it attached does not run any more when this returns.
/// That it is gone already is no error.
pub(crate) fn remove(pin: &Path) -> Result<()> {
    // Without a descriptor, the kernel would detach a moment later, from a work queue: `bpf_link_put`, against
    // `bpf_link_put_direct` when the last descriptor is closed.
    let link = Link::open(pin)?;
    remove_tree(pin)?;
    drop(link);
    Ok(())
}

/// A link, opened by its pin.
#[derive(Debug)]
pub(crate) struct Link {
    fd: OwnedFd,
    path: PathBuf,
}

/// What the kernel says of a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinkInfo {
    /// Its program's.
    pub tag: Tag,
    /// For `sk_lookup`: the inode number of its network namespace, 0 once that has gone.
    pub netns_inode: Option<u64>,
}

impl Link {
    /// Opens the link pinned at `path`, `None` if there is none. Linux 5.7.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>> {
        let fd = match object_get(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            fd => fd.file("open the pinned link", path)?,
        };
        Ok(Some(Self { fd, path: path.to_owned() }))
    }

    /// What the kernel says of it. From `/proc`, which has the tag and the namespace of any link, in words
    /// that have not changed since Linux 5.8.
    pub(crate) fn info(&self) -> Result<LinkInfo> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()));
        text.and_then(|text| parse(&text).ok_or_else(|| io::Error::other(format!("not a link: {text:?}"))))
            .file("read what the kernel says of", &self.path)
    }

    /// Puts another program behind it, of the same type: every run is one of the old program or one of the
    /// new. False if what it was attached to has gone. Linux 5.7 for cgroups, 5.9 for network namespaces.
    pub(crate) fn update(&self, program: &ProgramFd) -> Result<bool> {
        match link_update(&self.fd, program) {
            Err(error) if error.raw_os_error() == Some(libc::ENOLINK) => Ok(false),
            updated => updated
                .bpf(|| format!("put another program behind the link {}", self.path.display()))
                .map(|()| true),
        }
    }
}

fn parse(fdinfo: &str) -> Option<LinkInfo> {
    let field = |name: &str| {
        let fields = fdinfo.lines().filter_map(|line| line.split_once(':'));
        fields.filter(|(key, _)| *key == name).map(|(_, value)| value.trim()).next()
    };
    Some(LinkInfo {
        tag: Tag(u64::from_str_radix(field("prog_tag")?, 16).ok()?),
        netns_inode: match field("netns_ino") {
            Some(inode) => Some(inode.parse().ok()?),
            None => None,
        },
    })
}

fn object_get(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = no_attributes();
    attributes.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    let fd = bpf(bpf_cmd::BPF_OBJ_GET, &attributes)?;
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn link_update(link: &OwnedFd, program: &ProgramFd) -> io::Result<()> {
    let mut attributes = no_attributes();
    attributes.link_update.link_fd = link.as_raw_fd().cast_unsigned();
    attributes.link_update.__bindgen_anon_1.new_prog_fd = program.as_fd().as_raw_fd().cast_unsigned();
    bpf(bpf_cmd::BPF_LINK_UPDATE, &attributes).map(drop)
}

fn no_attributes() -> bpf_attr {
    // SAFETY: all zeroes are a valid union of integers, and what the kernel takes for "not given".
    unsafe { std::mem::zeroed() }
}

/// The system call, for commands that only read their attributes.
fn bpf(command: bpf_cmd, attributes: &bpf_attr) -> io::Result<i32> {
    let attributes = std::ptr::from_ref(attributes);
    // SAFETY: the kernel reads as many bytes as the last argument says, which are there, and the string that
    // one of the callers points to and holds.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<bpf_attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says() {
        let netns = "pos:\t0\nflags:\t02000000\nmnt_id:\t15\nino:\t12\nlink_type:\tnetns\nlink_id:\t7\n\
                     prog_tag:\t5ab9f9b0a0d8e4b8\nprog_id:\t41\nnetns_ino:\t4026532242\nattach_type:\t36\n";
        let expected = LinkInfo { tag: Tag(0x5ab9_f9b0_a0d8_e4b8), netns_inode: Some(4_026_532_242) };
        assert_eq!(parse(netns), Some(expected));
        let cgroup = "link_type:\tcgroup\nlink_id:\t3\nprog_tag:\t0b\nprog_id:\t9\ncgroup_id:\t1\n";
        assert_eq!(parse(cgroup), Some(LinkInfo { tag: Tag(11), netns_inode: None }));
        assert_eq!(parse("pos:\t0\nmap_type:\t1\n"), None);
    }
}
