//! `srcip cleanup`

use anyhow::Result;
use clap::Args;

use super::output;
use crate::dataplane::Dataplane;

/// Remove all traces of this instance, also of an interrupted attach or another version.
///
/// Upstream connections are not waited for; `srcip detach --all` does that.
#[derive(Debug, Args)]
pub(super) struct Cleanup {}

impl Cleanup {
    pub(super) fn run(self, dataplane: &Dataplane) -> Result<()> {
        let Self {} = self;
        crate::privileges::require("cleanup")?;
        for name in dataplane.cleanup()? {
            output::print(format!("{name} removed\n").as_bytes())?;
        }
        Ok(())
    }
}
