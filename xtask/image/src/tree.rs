//! The files of an image.

use std::{
    collections::BTreeMap,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use tar::{Builder, EntryType, Header};

/// What a path of the image is.
#[derive(Debug, Clone)]
enum Entry {
    Directory {
        mode: u32,
    },
    Bytes {
        contents: Vec<u8>,
        mode: u32,
    },
    /// Copied when the image is written: programs are large.
    Copy {
        source: PathBuf,
        mode: u32,
    },
    Link {
        target: PathBuf,
    },
}

/// Files by their path in the image, without the leading slash. The directories they are in come by
/// themselves.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    entries: BTreeMap<PathBuf, Entry>,
}

impl Tree {
    /// Adds a directory with these permissions.
    pub fn directory(&mut self, path: impl AsRef<Path>, mode: u32) {
        self.add(path.as_ref(), Entry::Directory { mode });
    }

    /// Adds a file with this content.
    pub fn bytes(&mut self, path: impl AsRef<Path>, contents: impl Into<Vec<u8>>, mode: u32) {
        self.add(path.as_ref(), Entry::Bytes { contents: contents.into(), mode });
    }

    /// Adds a copy of a file of this machine, links followed.
    pub fn copy(&mut self, path: impl AsRef<Path>, source: impl Into<PathBuf>, mode: u32) {
        self.add(path.as_ref(), Entry::Copy { source: source.into(), mode });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>) {
        self.add(path.as_ref(), Entry::Link { target: target.into() });
    }

    fn add(&mut self, path: &Path, entry: Entry) {
        let path = path.strip_prefix("/").unwrap_or(path);
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.entries.entry(parent.to_owned()).or_insert(Entry::Directory { mode: 0o755 });
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes all of it as a layer.
    pub(crate) fn write(&self, to: impl Write) -> Result<()> {
        let mut archive = Builder::new(to);
        for (path, entry) in &self.entries {
            let add = |archive: &mut Builder<_>| match entry {
                Entry::Directory { mode } => {
                    let mut header = header(EntryType::Directory, *mode, 0);
                    archive.append_data(&mut header, path.join(""), std::io::empty())
                }
                Entry::Bytes { contents, mode } => {
                    let mut header = header(EntryType::Regular, *mode, contents.len() as u64);
                    archive.append_data(&mut header, path, contents.as_slice())
                }
                Entry::Copy { source, mode } => {
                    let file = File::open(source)?;
                    let mut header = header(EntryType::Regular, *mode, file.metadata()?.len());
                    archive.append_data(&mut header, path, file)
                }
                Entry::Link { target } => {
                    archive.append_link(&mut header(EntryType::Symlink, 0o777, 0), path, target)
                }
            };
            let describe = || match entry {
                Entry::Copy { source, .. } => format!("{} from {}", path.display(), source.display()),
                _ => path.display().to_string(),
            };
            add(&mut archive).with_context(|| format!("adding {} to the image", describe()))?;
        }
        archive.into_inner()?.flush()?;
        Ok(())
    }
}

/// A header that does not depend on when, where and by whom it is written.
fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_what_is_in_them_and_everything_is_sorted() {
        let mut tree = Tree::default();
        tree.bytes("/usr/bin/two", "2", 0o755);
        tree.bytes("one", "1", 0o644);
        tree.directory("/usr/bin", 0o700);
        let mut layer = Vec::new();
        tree.write(&mut layer).unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let entries: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let path = entry.path().unwrap().display().to_string();
                (path, entry.header().mode().unwrap(), entry.header().mtime().unwrap())
            })
            .collect();
        let expected = [("one", 0o644), ("usr/", 0o755), ("usr/bin/", 0o700), ("usr/bin/two", 0o755)];
        assert_eq!(entries, expected.map(|(path, mode)| (path.to_owned(), mode, 0)));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let mut tree = Tree::default();
        tree.copy("srcip", "/nowhere", 0o755);
        let error = format!("{:#}", tree.write(Vec::new()).unwrap_err());
        assert!(error.contains("adding srcip from /nowhere to the image: No such file"), "{error}");
    }
}
