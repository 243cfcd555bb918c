//! Going over to another build of the programs, or back, without an attachment noticing.
//!
//! The maps stay, and with them settings, listeners, notes and counters; each link gets its new program in one
//! step. Links that are not there are not made: that is what attach is for.

use super::{
    Dataplane,
    error::{Error, Result},
    hooks,
    maps::Maps,
    object::Replaced,
    record::{Record, State},
};

/// What an upgrade did.
#[derive(Debug, Default)]
pub struct Upgraded {
    /// The programs that were replaced.
    pub replaced: Vec<Replaced>,
    /// The attachments that kept an old program, or a part of them, by name; they work on.
    pub failed: Vec<(String, Error)>,
}

impl Dataplane {
    /// Puts this build's programs in the place of another's, wherever they are attached. An instance whose
    /// maps are laid out differently is refused, and left as it is.
    ///
    /// A process that is killed meanwhile leaves some programs of each build, which work together; the next
    /// upgrade, or the next attach of each pod, does the rest.
    pub fn upgrade(&self) -> Result<Upgraded> {
        let Some(_lock) = self.pins.lock()? else { return Ok(Upgraded::default()) };
        let records = self.records_locked()?;
        if records.is_empty() {
            return Ok(Upgraded::default());
        }
        let mut objects = self.objects();
        objects.check_maps(&self.pins)?;
        objects.ensure_maps(&self.pins)?;
        Maps::stamp_layout(&self.pins)?;
        // What the maps of this build have that the other's had not is there from here on.
        hooks::upgrade(&mut objects, &self.pins)?;
        let mut failed = Vec::new();
        for record in records.iter().filter(|record| record.state == State::Attached) {
            let netns = needs_netns(record).then(|| self.find_netns(record)).flatten();
            let mut programs = objects.pod(&self.pins, record.netns_cookie);
            let engine = record.engine.engine();
            if let Err(error) = engine.upgrade(&mut programs, netns.as_ref(), record) {
                failed.push((record.name.clone(), error));
            }
        }
        Ok(Upgraded { replaced: objects.take_replaced(), failed })
    }
}

/// Links can be upgraded from anywhere, filters from where their devices are.
fn needs_netns(record: &Record) -> bool {
    record.tc_devices.iter().any(|device| device.hook == super::record::TcHook::Clsact)
}
