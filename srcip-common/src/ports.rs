//! Sets and ranges of TCP ports.

use core::ops::RangeInclusive;

const WORDS: usize = 65536 / 64;

/// A set of TCP ports, one bit each: membership costs one load, whatever the lists looked like.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PortSet([u64; WORDS]);

impl core::fmt::Debug for PortSet {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl PortSet {
    /// No port.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// Whether `port` (host byte order) is in the set.
    #[inline]
    pub const fn contains(&self, port: u16) -> bool {
        // `port >> 6` is at most 1023: the index needs no check, and the verifier can see that.
        self.0[(port >> 6) as usize] >> (port & 63) & 1 == 1
    }

    /// Adds every port of `ports`.
    pub fn insert(&mut self, ports: RangeInclusive<u16>) {
        for port in ports {
            self.0[usize::from(port >> 6)] |= 1 << (port & 63);
        }
    }

    /// Removes every port of `ports`.
    pub fn remove(&mut self, ports: RangeInclusive<u16>) {
        for port in ports {
            self.0[usize::from(port >> 6)] &= !(1 << (port & 63));
        }
    }

    /// The ports of the set in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        (0..=u16::MAX).filter(|&port| self.contains(port))
    }
}

/// Ports from `first` to `last`, both included, host byte order.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PortRange {
    /// The lowest port.
    pub first: u16,
    /// The highest port.
    pub last: u16,
}

impl PortRange {
    #[inline]
    const fn len(self) -> u32 {
        self.last as u32 - self.first as u32 + 1
    }

    #[inline]
    const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

/// How many ranges [`UpstreamPorts`] holds.
pub const MAX_RANGES: usize = 4;

/// The source ports that upstream legs take: up to [`MAX_RANGES`] ranges that do not overlap.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UpstreamPorts {
    ranges: [PortRange; MAX_RANGES],
    used: u32,
    count: u32,
}

/// Why a list of ranges cannot be used as upstream ports.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UpstreamPortsError {
    /// No range at all.
    Empty,
    /// More than [`MAX_RANGES`].
    TooMany,
    /// A range whose first port is 0 or above its last one.
    Invalid(PortRange),
    /// Two ranges that share a port.
    Overlap(PortRange, PortRange),
}

impl UpstreamPorts {
    /// Checks `ranges` and puts them together.
    pub fn new(list: &[PortRange]) -> Result<Self, UpstreamPortsError> {
        if list.is_empty() {
            return Err(UpstreamPortsError::Empty);
        }
        if list.len() > MAX_RANGES {
            return Err(UpstreamPortsError::TooMany);
        }
        let mut ranges = [PortRange::default(); MAX_RANGES];
        let mut count = 0;
        for (i, &range) in list.iter().enumerate() {
            if range.first == 0 || range.first > range.last {
                return Err(UpstreamPortsError::Invalid(range));
            }
            if let Some(&other) = list[..i].iter().find(|r| r.first <= range.last && range.first <= r.last) {
                return Err(UpstreamPortsError::Overlap(other, range));
            }
            ranges[i] = range;
            count += range.len();
        }
        Ok(Self { ranges, used: list.len() as u32, count })
    }

    /// The ranges, in the order they were given.
    pub fn ranges(&self) -> &[PortRange] {
        &self.ranges[..self.used as usize]
    }

    /// How many ports there are, at least 1.
    #[inline]
    pub const fn count(&self) -> u32 {
        self.count
    }

    /// The port at position `n` modulo [`Self::count`], host byte order.
    #[inline]
    pub fn nth(&self, n: u32) -> u16 {
        // A zeroed map value would divide by zero, which BPF defines as 0: never trust it to be valid.
        let mut rest = n.checked_rem(self.count).unwrap_or(0);
        for range in &self.ranges {
            if rest < range.len() {
                return range.first.wrapping_add(rest as u16);
            }
            rest -= range.len();
        }
        self.ranges[0].first
    }

    /// Whether `port` (host byte order) is one of them.
    #[inline]
    pub fn contains(&self, port: u16) -> bool {
        // Port 0 is never valid, so the unused ranges, which are 0-0, match nothing.
        port != 0 && self.ranges.iter().any(|range| range.contains(port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{collections::BTreeSet, vec::Vec};

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    proptest! {
        #[test]
        fn port_set_is_a_set(
            steps in prop::collection::vec((any::<bool>(), any::<u16>(), 0_u16..300), 0..20),
            probe in any::<u16>(),
        ) {
            let mut set = PortSet::EMPTY;
            let mut model = BTreeSet::new();
            for (add, first, len) in steps {
                let ports = first..=first.saturating_add(len);
                if add {
                    set.insert(ports.clone());
                    model.extend(ports);
                } else {
                    set.remove(ports.clone());
                    model.retain(|port| !ports.contains(port));
                }
            }
            prop_assert_eq!(set.contains(probe), model.contains(&probe));
            prop_assert!(set.iter().eq(model.iter().copied()));
        }

        #[test]
        fn nth_visits_every_upstream_port_once_per_round(
            bounds in prop::collection::btree_set(1_u16..5000, 2..=8),
        ) {
            let bounds: Vec<u16> = bounds.into_iter().collect();
            let ranges: Vec<_> = bounds.chunks_exact(2).map(|b| range(b[0], b[1])).collect();
            let ports = UpstreamPorts::new(&ranges).unwrap();
            let seen: Vec<u16> = (0..ports.count()).map(|n| ports.nth(n)).collect();
            prop_assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), seen.len());
            prop_assert_eq!(ports.nth(ports.count()), ports.nth(0));
            for port in 0..=u16::MAX {
                let expected = ranges.iter().any(|r| r.first <= port && port <= r.last);
                prop_assert_eq!(ports.contains(port), expected);
            }
            prop_assert!(seen.iter().all(|&port| ports.contains(port)));
        }
    }

    #[test]
    fn full_range_and_errors() {
        let all = UpstreamPorts::new(&[range(1, 65535)]).unwrap();
        assert_eq!((all.count(), all.nth(0), all.nth(65534)), (65535, 1, 65535));
        assert!(!all.contains(0));
        assert_eq!(UpstreamPorts::new(&[]), Err(UpstreamPortsError::Empty));
        assert_eq!(UpstreamPorts::new(&[range(1, 1); 5]), Err(UpstreamPortsError::TooMany));
        assert_eq!(UpstreamPorts::new(&[range(0, 7)]), Err(UpstreamPortsError::Invalid(range(0, 7))));
        assert_eq!(
            UpstreamPorts::new(&[range(10, 20), range(20, 30)]),
            Err(UpstreamPortsError::Overlap(range(10, 20), range(20, 30)))
        );
    }
}
