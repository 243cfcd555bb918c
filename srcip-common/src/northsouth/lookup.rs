//! Which endpoint a connection goes to: a table as Maglev has it, filled by rendezvous hashing with a bound.
//!
//! Every node computes the same table from the same endpoints, in whatever order they come, so a client's
//! packets reach the same endpoint by whichever node they enter. The table is what Eisenbud et al. describe in
//! "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016); their way to fill it gives equal shares
//! to the last place, but in a table of this size an endpoint that goes takes along several percent of the connections
//! that had nothing to do with it. Here each place takes the endpoint that scores best for it, so that such a place moves only for
//! want of room: no endpoint gets more than its share and [`SLACK`].

use super::FlowKey;
use crate::address::Address;

/// Places in a table: enough for a few dozen endpoints to get nearly equal shares, few enough for ten thousand
/// services.
pub const SIZE: usize = 3071;

/// How many places more than its share an endpoint can have.
const SLACK: usize = SIZE / 150;

/// In a table without endpoints; no endpoint has this number.
pub const NONE: u16 = u16::MAX;

/// How many places are looked at for an endpoint whose answers can be told from those to other connections of the
/// same client address and port.
pub const ATTEMPTS: u32 = 4;

/// Numbers of endpoints.
pub type Table = [u16; SIZE];

/// The place of a connection.
#[inline]
pub const fn place(hash: u32) -> usize {
    // Its high bits, so that the verifier sees where the result ends; a remainder would be computed in a way that
    // it cannot follow.
    ((hash as u64 * SIZE as u64) >> 32) as usize
}

/// The hash that names the next place, after attempt number `attempt`, of which the first is 0.
#[inline]
pub const fn next(hash: u32, attempt: u32) -> u32 {
    hash.wrapping_mul(0x9e37_79b1).wrapping_add(attempt)
}

/// The hash of a connection by its client's ends. The same on every node, so that a client may enter by any. With
/// affinity (`by_client`), a client goes to one endpoint also where it is not remembered.
#[inline(always)]
pub fn hash_of(request: &FlowKey, by_client: bool) -> u32 {
    let [a, b, c, d] = request.source.words();
    if by_client {
        return hash(&[a, b, c, d]);
    }
    let [e, f, g, h] = request.destination.words();
    let ports = (u32::from(request.source_port) << 16) | u32::from(request.destination_port);
    hash(&[a, b, c, d, e, f, g, h, ports.to_be(), u32::from(request.protocol).to_be()])
}

/// Mixes words to a number, the same everywhere: every node must come to the same place.
#[inline]
pub fn hash(words: &[u32]) -> u32 {
    // MurmurHash3 for 32 bits.
    let mut h = 0_u32;
    for &word in words {
        let k = u32::from_be(word).wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593);
        h = (h ^ k).rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }
    mix(h)
}

#[inline]
const fn mix(h: u32) -> u32 {
    let h = (h ^ (h >> 16)).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

/// An endpoint that is to have places: what names it everywhere, and its number here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Its address.
    pub address: Address,
    /// Its port, host byte order.
    pub port: u16,
    /// What the table is to say.
    pub index: u16,
}

/// Fills a table. `candidates` is sorted; more than there are places are left out.
pub fn fill(table: &mut Table, candidates: &mut [Candidate]) {
    table.fill(NONE);
    candidates
        .sort_unstable_by_key(|candidate| (candidate.address.words().map(u32::from_be), candidate.port));
    let count = candidates.len().min(SIZE);
    let candidates = &candidates[..count];
    if candidates.is_empty() {
        return;
    }
    let mut seeds = [0; SIZE];
    for (seed, candidate) in seeds.iter_mut().zip(candidates) {
        let [a, b, c, d] = candidate.address.words();
        *seed = hash(&[a, b, c, d, u32::from(candidate.port).to_be()]);
    }
    let mut loads = [0; SIZE];
    let bound = SIZE.div_ceil(count) + SLACK;
    for (place, entry) in table.iter_mut().enumerate() {
        let key = (place as u32).wrapping_mul(0x9e37_79b1);
        // One number to compare, without a branch that nobody can foresee; among equals the first.
        let rank = |which: usize| (u64::from(mix(seeds[which] ^ key)) << 32) | u64::from(!(which as u32));
        let mut chosen = first((0..count).map(rank));
        if loads[chosen] >= bound {
            // All of them together have room for more than there is.
            chosen = first((0..count).filter(|&which| loads[which] < bound).map(rank));
        }
        loads[chosen] += 1;
        *entry = candidates[chosen].index;
    }
}

/// Who ranks highest, by the lower half of its rank.
#[inline]
fn first(ranks: impl Iterator<Item = u64>) -> usize {
    !(ranks.fold(0, u64::max) as u32) as usize
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::{collections::BTreeMap, vec::Vec};

    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    fn table(candidates: &[Candidate]) -> Table {
        let mut table = [0; SIZE];
        fill(&mut table, &mut candidates.to_vec());
        table
    }

    /// Endpoints at some addresses of either family; their numbers are their places in the list.
    fn endpoints(count: core::ops::Range<usize>) -> impl Strategy<Value = Vec<Candidate>> {
        let address = prop_oneof![
            any::<u32>().prop_map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
            // Neighbours, as a node's pods are.
            any::<u8>().prop_map(|last| IpAddr::V4(Ipv4Addr::new(10, 244, 1, last))),
            any::<u128>().prop_map(|bits| IpAddr::V6(Ipv6Addr::from(bits))),
        ];
        btree_set((address, 1_u16..), count).prop_map(|set| {
            let numbered = set.into_iter().zip(0..);
            numbered.map(|((ip, port), index)| Candidate { address: ip.into(), port, index }).collect()
        })
    }

    fn shares(table: &Table) -> BTreeMap<u16, usize> {
        let mut shares = BTreeMap::new();
        for &index in table {
            *shares.entry(index).or_default() += 1;
        }
        shares
    }

    fn moved(a: &Table, b: &Table) -> f64 {
        a.iter().zip(b).filter(|(a, b)| a != b).count() as f64 / SIZE as f64
    }

    #[test]
    fn without_endpoints_there_is_none() {
        assert!(table(&[]).iter().all(|&index| index == NONE));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn shares_are_nearly_equal(endpoints in endpoints(1..50)) {
            let shares = shares(&table(&endpoints));
            let fair = SIZE as f64 / endpoints.len() as f64;
            prop_assert_eq!(shares.len(), endpoints.len());
            for &share in shares.values() {
                // Five standard deviations below, and the bound above.
                prop_assert!(share as f64 > fair - 5.0 * fair.sqrt(), "{share} of {fair}");
                prop_assert!(share as f64 <= fair + 1.0 + SLACK as f64, "{share} of {fair}");
            }
        }

        #[test]
        fn the_order_does_not_matter(endpoints in endpoints(1..50).prop_shuffle()) {
            let mut sorted = endpoints.clone();
            sorted.sort_by_key(|candidate| candidate.index);
            prop_assert_eq!(table(&endpoints), table(&sorted));
        }

        #[test]
        fn one_that_goes_or_comes_moves_little_else(endpoints in endpoints(2..100), which: prop::sample::Index) {
            let before = table(&endpoints);
            let mut fewer = endpoints.clone();
            fewer.remove(which.index(endpoints.len()));
            let moved = moved(&before, &table(&fewer));
            let allowed = 1.0 / endpoints.len() as f64 + 0.02;
            prop_assert!(moved <= allowed, "{moved} of all places moved, {allowed} may");
        }

        #[test]
        fn clients_spread_evenly(seed: u32) {
            // Ten thousand ports of one client over ten places' worth of the table.
            let mut counts = [0_u32; 10];
            for port in 0..10_000 {
                counts[place(hash(&[seed, port])) * 10 / SIZE] += 1;
            }
            prop_assert!(counts.iter().all(|&count| (850..1150).contains(&count)), "{counts:?}");
        }
    }
}
