//! The data plane: what is in the kernel, and how it gets there and away again.
//!
//! - [`record`]: what an attachment is. [`pins`], [`maps`]: where it is kept.
//! - [`attach`], [`detach`], [`status`]: what can be done with it. [`health`]: whether it is complete, for who
//!   looks after many. [`fill`]: how full its maps are. `whereabouts`: where namespaces were found.
//! - [`build`], [`object`], [`link`]: the programs, and how they get into the kernel; [`upgrade`]: how those of
//!   another build do.
//! - [`engine`]: the two ways to steer, `sk_lookup` and `tc`; [`hooks`]: what both need on the node.

pub mod attach;
pub mod build;
pub mod detach;
pub mod engine;
pub mod error;
pub mod fill;
pub mod health;
pub mod hooks;
pub mod link;
mod listeners;
pub mod maps;
pub mod object;
pub mod pins;
pub mod record;
mod sk_lookup;
pub mod status;
mod tc;
pub mod upgrade;
mod whereabouts;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use build::Build;
use error::{Error, Result};
use maps::{Decoded, Maps};
use object::Objects;
use pins::Pins;
use record::Record;
use srcip_common::telemetry::Event;
use whereabouts::Whereabouts;

use crate::{
    netns::{Netns, NetnsError},
    routing::RoutingError,
};

/// One instance of the data plane: everything below one pin path.
///
/// Clones share what is costly to make; who attaches many pods keeps one. All methods may be called from
/// any thread, and wait for each other and for other processes.
#[derive(Clone, Debug)]
pub struct Dataplane {
    pins: Pins,
    objects: Arc<Mutex<Objects>>,
    decoded: Arc<Mutex<Decoded>>,
    whereabouts: Arc<Whereabouts>,
}

impl Dataplane {
    /// The instance at `pin_path`, which need not exist.
    pub fn new(pin_path: PathBuf) -> Self {
        Self::with_objects(pin_path, Objects::default())
    }

    /// The same with other programs than those built in.
    pub fn with_build(pin_path: PathBuf, build: Build) -> Self {
        Self::with_objects(pin_path, Objects::of_build(build))
    }

    fn with_objects(pin_path: PathBuf, objects: Objects) -> Self {
        Self {
            pins: Pins::new(pin_path),
            objects: Arc::new(Mutex::new(objects)),
            decoded: Arc::default(),
            whereabouts: Arc::default(),
        }
    }

    /// Taken after the instance's lock. Nothing in it is left half-done by a panic.
    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn pin_path(&self) -> &Path {
        self.pins.root()
    }

    /// All attachments, by name.
    pub fn records(&self) -> Result<Vec<Record>> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
        self.records_locked()
    }

    /// The same for who only looks on, and must not wait for a command that is at work: what that changes
    /// may be in it already, or not yet.
    pub fn peek_records(&self) -> Result<Vec<Record>> {
        if self.pins.exists() { self.records_locked() } else { Ok(Vec::new()) }
    }

    /// The same for who holds the lock. Only the one map is read: when an attach was interrupted early,
    /// it may be the only one there is.
    fn records_locked(&self) -> Result<Vec<Record>> {
        Maps::check_layout(&self.pins)?;
        let records =
            Maps::read_records(&self.pins, &mut self.decoded.lock().unwrap_or_else(PoisonError::into_inner));
        let mut records = records.into_iter().collect::<Result<Vec<_>>>()?;
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records)
    }

    /// The last events of steered pods, as the recorder has kept them.
    pub fn history(&self) -> Result<Vec<Event>> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Vec::new()) };
        Maps::check_layout(&self.pins)?;
        maps::read_history(&self.pins)
    }

    /// The attachment of a name.
    pub fn find_name(&self, name: &str) -> Result<Record> {
        let mut records = self.records()?.into_iter();
        records.find(|r| r.name == name).ok_or_else(|| Error::NotAttached(name.to_owned()))
    }

    /// The attachment of the network namespace at `path`; if that one has none, the attachment of one
    /// that was at this path before.
    pub fn find_netns_path(&self, path: &Path) -> Result<Record> {
        let cookie = match Netns::open(path) {
            Ok(netns) => Ok(netns.cookie()?),
            Err(error @ (NetnsError::NotFound(_) | NetnsError::NotANetns(_))) => Err(error),
            Err(error) => return Err(error.into()),
        };
        let records = self.records()?;
        let by_cookie = |cookie| records.iter().find(|record| record.netns_cookie == cookie);
        let by_path = || records.iter().find(|record| record.netns == path);
        match cookie {
            Ok(cookie) => by_cookie(cookie)
                .or_else(by_path)
                .cloned()
                .ok_or_else(|| Error::NotAttached(path.display().to_string())),
            Err(error) => by_path().cloned().ok_or(error.into()),
        }
    }
}

fn in_netns(error: RoutingError, netns: &Netns) -> Error {
    Error::Routing(error, Some(netns.path().display().to_string()))
}
