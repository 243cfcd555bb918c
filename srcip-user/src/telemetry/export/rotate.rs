//! A file of lines that is renamed when it is full: `LOG` becomes `LOG.1`, that one `LOG.2`, and so on.
//!
//! Crates for this lose lines without a word when the file cannot be opened after a rotation, panic when
//! its directory is gone, or leave half a line when the disk is full; here each of those is an error to
//! count, and the line before it stays whole.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    num::{NonZeroU32, NonZeroU64},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

/// For the owner and the group: clients' addresses are nobody else's business.
const MODE: u32 = 0o640;

/// A file that never has more than its size, and never half a line.
#[derive(Debug)]
pub struct RotatingFile {
    path: PathBuf,
    max_size: u64,
    max_files: u32,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: File,
    /// Up to the end of the last whole line.
    length: u64,
}

impl RotatingFile {
    /// Opens or creates it. `max_files` counts the current one as well.
    pub fn open(path: &Path, max_size: NonZeroU64, max_files: NonZeroU32) -> io::Result<Self> {
        let (max_size, max_files) = (max_size.get(), max_files.get());
        let open = Some(Open::new(path)?);
        Ok(Self { path: path.to_owned(), max_size, max_files, open })
    }

    /// Writes a line, which ends with a newline. One that is longer than a file may be gets a file of its
    /// own. After an error, the file ends where it did before; the next line tries anew.
    pub fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|open| open.is_full(line, self.max_size)) {
            self.open = None;
            self.rotate()?;
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(Open::new(&self.path)?),
        };
        let written = open.file.write_all(line);
        match written {
            Ok(()) => open.length += line.len() as u64,
            Err(_) => {
                // What fitted of the line goes. Opened anew, it shows whether it is still the same file.
                let _ = open.file.set_len(open.length);
                self.open = None;
            }
        }
        written
    }

    /// Makes room for a new file: each one moves on by one, and the oldest goes.
    fn rotate(&self) -> io::Result<()> {
        // More than now wanted, if the number has been lowered since.
        let mut surplus = self.max_files;
        while tolerate_missing(fs::remove_file(self.numbered(surplus)))? {
            surplus += 1;
        }
        if self.max_files == 1 {
            return tolerate_missing(fs::remove_file(&self.path)).map(drop);
        }
        tolerate_missing(fs::remove_file(self.numbered(self.max_files - 1)))?;
        for number in (1..self.max_files - 1).rev() {
            tolerate_missing(fs::rename(self.numbered(number), self.numbered(number + 1)))?;
        }
        tolerate_missing(fs::rename(&self.path, self.numbered(1))).map(drop)
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{number}"));
        path.into()
    }
}

impl Open {
    fn new(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(MODE)
            // A symbolic link in a directory that others write to would lead anywhere; opening a FIFO
            // would wait.
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & !MODE != 0 {
            file.set_permissions(Permissions::from_mode(mode & MODE))?;
        }
        let mut open = Self { file, length: metadata.len() };
        open.end_last_line()?;
        Ok(open)
    }

    /// Whoever wrote here before may have been interrupted.
    fn end_last_line(&mut self) -> io::Result<()> {
        if self.length == 0 {
            return Ok(());
        }
        let mut last = [0];
        self.file.seek(SeekFrom::Start(self.length - 1))?;
        self.file.read_exact(&mut last)?;
        if last != *b"\n" {
            self.file.write_all(b"\n")?;
            self.length += 1;
        }
        Ok(())
    }

    fn is_full(&self, line: &[u8], max_size: u64) -> bool {
        self.length > 0 && self.length + line.len() as u64 > max_size
    }
}

/// Whether there was something.
fn tolerate_missing(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path, size: u64, files: u32) -> RotatingFile {
        RotatingFile::open(path, NonZeroU64::new(size).unwrap(), NonZeroU32::new(files).unwrap()).unwrap()
    }

    fn files(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn it_rotates_between_lines_and_keeps_so_many_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = open(&path, 25, 3);
        for number in 0..9 {
            file.write_line(format!("line {number:04}\n").as_bytes()).unwrap();
        }
        assert_eq!(files(directory.path()), ["log", "log.1", "log.2"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "line 0008\n");
        assert_eq!(fs::read_to_string(directory.path().join("log.1")).unwrap(), "line 0006\nline 0007\n");
        assert_eq!(fs::read_to_string(directory.path().join("log.2")).unwrap(), "line 0004\nline 0005\n");
        // Fewer files from now on.
        let mut file = open(&path, 25, 1);
        for number in 0..3 {
            file.write_line(format!("more {number:04}\n").as_bytes()).unwrap();
        }
        assert_eq!(files(directory.path()), ["log"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "more 0001\nmore 0002\n");
    }

    #[test]
    fn a_line_longer_than_a_file_stays_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut file = open(&path, 4, 2);
        file.write_line(b"a long line\n").unwrap();
        file.write_line(b"another one\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "another one\n");
        assert_eq!(fs::read_to_string(directory.path().join("log.1")).unwrap(), "a long line\n");
    }

    #[test]
    fn an_interrupted_line_is_ended_before_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "whole\nhal").unwrap();
        open(&path, 1000, 2).write_line(b"next\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole\nhal\nnext\n");
    }

    #[test]
    fn others_cannot_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        let mut file = open(&path, 4, 2);
        assert_eq!(mode(&path), 0o640);
        file.write_line(b"line\n").unwrap();
        file.write_line(b"line\n").unwrap();
        assert_eq!(mode(&path) & !0o640, 0);
        assert_eq!(mode(&directory.path().join("log.1")), 0o640);
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("/etc/hostname", &link).unwrap();
        let size = NonZeroU64::new(1).unwrap();
        for path in [&link, directory.path(), Path::new("/dev/null"), Path::new("/no/such/place")] {
            assert!(RotatingFile::open(path, size, NonZeroU32::MIN).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn it_comes_back_after_its_directory_was_gone() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let path = inner.join("log");
        let mut file = open(&path, 5, 2);
        file.write_line(b"1234\n").unwrap();
        fs::remove_dir_all(&inner).unwrap();
        file.write_line(b"lost\n").unwrap_err();
        fs::create_dir(&inner).unwrap();
        file.write_line(b"back\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "back\n");
    }
}
