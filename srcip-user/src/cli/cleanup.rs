//! `srcip cleanup`

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;

use super::output;
use crate::{
    cni::{config::Settings, install::Installer},
    dataplane::Dataplane,
    northsouth::dataplane::NorthSouth,
};

/// Remove all traces of this instance, also of an interrupted attach or another version.
///
/// It has to run where it can see the processes, or the names, of the network namespaces that have filters of
/// north-south: what it cannot reach it says, and leaves the pins by which that is found again.
///
/// Upstream connections are not waited for; `srcip detach --all` does that. An agent that runs attaches its pods
/// again: end it first.
#[derive(Debug, Args)]
pub(super) struct Cleanup {
    /// Take the CNI plugin out of the configuration that the container runtime has in this directory, first.
    #[arg(long, value_name = "DIR", requires = "cni_bin_dir")]
    cni_conf_dir: Option<PathBuf>,
    /// Where the container runtime has its CNI plugins: srcip's goes.
    #[arg(long, value_name = "DIR", requires = "cni_conf_dir")]
    cni_bin_dir: Option<PathBuf>,
}

impl Cleanup {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        crate::privileges::require("cleanup")?;
        if let (Some(conf_dir), Some(bin_dir)) = (self.cni_conf_dir, self.cni_bin_dir) {
            let installer =
                Installer { conf_dir, bin_dir, plugin: PathBuf::new(), settings: Settings::default() };
            for path in installer.remove().context("cannot take the CNI plugin away")? {
                output::print(format!("{} put right\n", path.display()).as_bytes())?;
            }
        }
        let north_south = NorthSouth::remove(dataplane.pin_path());
        if matches!(north_south, Ok(true)) {
            output::print(b"north-south removed\n")?;
        }
        // Whatever became of that: pods are another matter.
        for name in dataplane.cleanup()? {
            output::print(format!("{name} removed\n").as_bytes())?;
        }
        north_south.map(drop).context("cannot take north-south away")
    }
}
