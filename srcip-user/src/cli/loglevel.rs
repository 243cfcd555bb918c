//! `srcip loglevel`

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::{SocketArg, output};
use crate::agent::client::Client;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Show or change what the agent of this node logs, without restarting it.
#[derive(Debug, Args)]
pub(super) struct LogLevel {
    /// A level (error, warn, info, debug, trace) or TARGET=LEVEL, several with commas; shown if not given.
    filter: Option<String>,
    #[command(flatten)]
    socket: SocketArg,
}

impl LogLevel {
    pub(super) fn run(self) -> Result<()> {
        let filter = Client::new(&self.socket.socket, TIMEOUT).log_level(self.filter)?;
        Ok(output::print(format!("{filter}\n").as_bytes())?)
    }
}
