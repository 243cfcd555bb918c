//! What `/proc` says of a process.

use std::{
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
};

use super::cgroup;

/// How much of a file is read: with cgroup v1, a dozen lines with a path of at most 4 KiB each.
const MAX_FILE: u64 = 64 << 10;

/// A process.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Process {
    /// Its number.
    pub(super) pid: u32,
    /// Its parent's.
    pub(super) parent: u32,
    /// When it was started, in clock ticks since boot.
    pub(super) started: u64,
}

/// Reads `/proc`.
#[derive(Debug)]
pub(super) struct Reader {
    root: PathBuf,
    buffer: Vec<u8>,
}

impl Reader {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.to_owned(), buffer: Vec::with_capacity(4096) }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, pid: u32, file: &str) -> PathBuf {
        self.root.join(format!("{pid}/{file}"))
    }

    /// The UID of the pod a process is in, as [`cgroup::normal`] has it; `None` also if it has ended.
    pub(super) fn pod(&mut self, pid: u32) -> Option<String> {
        cgroup::pod(self.read(pid, "cgroup")?)
    }

    /// A process, `None` if it has ended.
    pub(super) fn process(&mut self, pid: u32) -> Option<Process> {
        let (parent, started) = parse_stat(self.read(pid, "stat")?)?;
        Some(Process { pid, parent, started })
    }

    fn read(&mut self, pid: u32, file: &str) -> Option<&[u8]> {
        self.buffer.clear();
        let file = File::open(self.path(pid, file)).ok()?;
        file.take(MAX_FILE).read_to_end(&mut self.buffer).ok()?;
        Some(&self.buffer)
    }
}

/// Parent and start time, fields 4 and 22. Field 2 is what the process calls itself, in parentheses, and may
/// have spaces and parentheses in it: what follows the last one is told apart by spaces.
fn parse_stat(stat: &[u8]) -> Option<(u32, u64)> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let mut fields = std::str::from_utf8(&stat[end + 1..]).ok()?.split_ascii_whitespace();
    // Field 3 is the first one here.
    let parent = fields.nth(1)?.parse().ok()?;
    let started = fields.nth(22 - 5)?.parse().ok()?;
    Some((parent, started))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_cannot_pretend_to_be_fields() {
        let tail = "S 7 1 1 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 98765 1000 2 18446744073709551615";
        for name in ["pause", "a b", "x) S 1 1 (", "((", ") R 0 0", "\u{1b}[2J"] {
            assert_eq!(parse_stat(format!("42 ({name}) {tail}").as_bytes()), Some((7, 98765)), "{name}");
        }
        assert_eq!(parse_stat(b"42 (\xff\xfe) S 7"), None);
    }

    #[test]
    fn our_own_process_is_read() {
        let own = std::process::id();
        let process = Reader::new(Path::new("/proc")).process(own).unwrap();
        assert_eq!((process.pid, process.parent), (own, std::os::unix::process::parent_id()));
        assert!(process.started > 0);
    }

    proptest! {
        #[test]
        fn anything_is_read_or_not(stat: Vec<u8>) {
            let _ = parse_stat(&stat);
        }
    }
}
