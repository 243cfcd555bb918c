//! The programs' clock, and everybody's.

use super::record::Timestamp;

/// From nanoseconds since boot to nanoseconds since 1970.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// What to add.
    pub offset_ns: u64,
}

impl Clock {
    /// As it is now; the offset changes when somebody sets the clock.
    pub fn now() -> Self {
        let read = |clock| {
            nix::time::clock_gettime(clock)
                .map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
        };
        let boot = read(nix::time::ClockId::CLOCK_BOOTTIME);
        Self { offset_ns: read(nix::time::ClockId::CLOCK_REALTIME).saturating_sub(boot) }
    }

    /// This moment, by the same clock.
    pub fn current(self) -> Timestamp {
        self.time(Self::boot_ns())
    }

    /// Nanoseconds since boot, as the programs count them.
    pub fn boot_ns() -> u64 {
        let boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
        boot.map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
    }

    /// A moment.
    pub fn time(self, boot_ns: u64) -> Timestamp {
        Timestamp(boot_ns + self.offset_ns)
    }
}
