//! What goes wrong on purpose.

use std::time::Duration;

/// All that can go wrong; nothing by default.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Faults {
    /// Connections are refused, and those that were taken are cut.
    pub refuse: bool,
    /// Nothing is answered before.
    pub delay: Duration,
    /// Every request about objects is answered with this status.
    pub status: Option<u16>,
    /// Whose version is gone is told so by the status of the answer, not by what the watch brings.
    pub gone_by_status: bool,
    /// Lists expire before their second page.
    pub lists_expire: bool,
    /// Watches bring nothing, and do not end when they should: as on a connection that has died without a word.
    pub silent: bool,
    /// What happens meanwhile is never told to those that watch.
    pub lossy: bool,
    /// What happens is told twice.
    pub twice: bool,
    /// Instead of what happens, watches bring what is not JSON.
    pub garbage: bool,
    /// A watch breaks off in the middle of the next object that it brings.
    pub torn: bool,
    /// Watches end as soon as they have begun.
    pub short: bool,
}
