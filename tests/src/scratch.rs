//! A directory for a test that needs no world.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context as _, Result};

use crate::stale::{self, RUN_DIRECTORY};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A directory; removed when dropped, or by a later run.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// An empty one.
    pub fn new() -> Result<Self> {
        stale::remove_first();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(RUN_DIRECTORY).join(format!("{}scratch-{number}", stale::prefix()));
        stale::create_directory(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
