//! The least that a pod can be: a process in a network namespace of its own, where the kubelet would have it.
//! Thousands of them can come and go.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context as _, Result};

/// Its process and its cgroup; both go when it is dropped, and its namespace with them.
#[derive(Debug)]
pub struct Bare {
    child: Child,
    cgroup: PathBuf,
}

impl Bare {
    /// Starts the pod with this UID below a world's cgroup. It is there as soon as its process is in its cgroup.
    pub fn start(world: &Path, uid: &str) -> Result<Self> {
        let cgroup = world.join(format!("kubepods/burstable/pod{uid}"));
        let place = cgroup.join("sandbox");
        fs::create_dir_all(&place).with_context(|| place.display().to_string())?;
        // As a runtime does it: first the network, then the pod's first process.
        let script =
            format!("ip link set lo up && echo 0 > {}/cgroup.procs && exec sleep 600", place.display());
        let child =
            Command::new("unshare").args(["--net", "sh", "-c", &script]).stdin(Stdio::null()).spawn()?;
        Ok(Self { child, cgroup })
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        crate::stale::remove_cgroup(&self.cgroup);
    }
}
