//! Brings a service's maps to what they are to say, in an order that programs may look on.
//!
//! A service is found by its frontends, its endpoints by its tables. So what is pointed at comes first and goes
//! last: ranges and endpoints, the service with its tables in one piece, frontends; then what is not pointed at
//! any more. Its name comes before all and goes after all: it is how an interrupted change is found again. What has been
//! counted stays as long as the service.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use aya::maps::lpm_trie::Key as TrieKey;
use srcip_common::northsouth::{
    ENTERED_HERE, Endpoint, EndpointKey, Frontend, FrontendKey, RangeKey, SENT_HERE, Service, ServiceId,
    counter::ServiceCounters,
    lookup::{self, Candidate, NONE},
    takes_new,
};

use super::{compile::Compiled, maps::Maps};
use crate::dataplane::{
    error::{BpfContext as _, Error, Result},
    maps::tolerate_missing,
};

/// What is in the maps of a service.
#[derive(Debug)]
pub(super) struct Programmed {
    pub(super) id: ServiceId,
    pub(super) frontends: HashMap<FrontendKey, u32>,
    pub(super) endpoints: BTreeMap<u16, Endpoint>,
    pub(super) ranges: BTreeSet<(IpAddr, u32)>,
    /// The next endpoint's number. Numbers are used again as late as possible: flows remember them.
    pub(super) next: u16,
    /// Whether there is a place to count it at; an earlier version had none.
    pub(super) is_counted: bool,
}

impl Programmed {
    pub(super) fn new(id: ServiceId) -> Self {
        Self {
            id,
            frontends: HashMap::new(),
            endpoints: BTreeMap::new(),
            ranges: BTreeSet::new(),
            next: 0,
            is_counted: false,
        }
    }

    /// A number that no endpoint has.
    fn number(&mut self) -> Result<u16> {
        for _ in 0..NONE {
            let number = self.next;
            self.next = if number + 1 == NONE { 0 } else { number + 1 };
            if !self.endpoints.contains_key(&number) {
                return Ok(number);
            }
        }
        Err(Error::Bpf {
            action: "number an endpoint".to_owned(),
            source: "65535 are the most that a Service can have".into(),
        })
    }

    fn tables(&self) -> [lookup::Table; 2] {
        let mut tables = [[NONE; lookup::SIZE]; 2];
        let by_kind =
            |kind| self.endpoints.values().map(move |endpoint| endpoint.flags & takes_new(kind) != 0);
        let are_alike = by_kind(ENTERED_HERE).eq(by_kind(SENT_HERE));
        for kind in [ENTERED_HERE, SENT_HERE] {
            if kind == SENT_HERE && are_alike {
                tables[kind] = tables[ENTERED_HERE];
                break;
            }
            let takes = self.endpoints.iter().filter(|(_, endpoint)| endpoint.flags & takes_new(kind) != 0);
            let mut candidates: Vec<_> = takes
                .map(|(&index, endpoint)| Candidate { address: endpoint.address, port: endpoint.port, index })
                .collect();
            lookup::fill(&mut tables[kind], &mut candidates);
        }
        tables
    }
}

impl Maps {
    /// Writes what differs. Returns whether anything did.
    pub(super) fn write(&mut self, programmed: &mut Programmed, wanted: Compiled) -> Result<bool> {
        let id = programmed.id;
        if !programmed.is_counted
            && let Some(counters) = &mut self.service_counters
        {
            counters.insert(id, ServiceCounters::ZERO, 0).bpf(|| full("NS_SERVICE_COUNTERS"))?;
            self.writes += 1;
            programmed.is_counted = true;
        }
        let mut changed = self.add_ranges(programmed, &wanted.ranges)?;
        let gone = self.write_endpoints(programmed, wanted.endpoints)?;
        let service = Service {
            affinity_ns: wanted.affinity_ns,
            flags: wanted.flags,
            tables: programmed.tables(),
            padding: 0,
        };
        if self.service(id)? != Some(service) {
            self.services.insert(id, service, 0).bpf(|| full("NS_SERVICES"))?;
            self.writes += 1;
            changed = true;
        }
        for (key, flags) in &wanted.frontends {
            if programmed.frontends.get(key) != Some(flags) {
                let frontend = Frontend { service: id, flags: *flags };
                self.frontends.insert(key, frontend, 0).bpf(|| full("NS_FRONTENDS"))?;
                self.writes += 1;
                programmed.frontends.insert(*key, *flags);
                changed = true;
            }
        }

        for key in extra(programmed.frontends.keys(), |key| wanted.frontends.contains_key(key)) {
            self.remove_frontend(&key, id)?;
            programmed.frontends.remove(&key);
            changed = true;
        }
        changed |= !gone.is_empty();
        for index in gone {
            tolerate_missing(self.endpoints.remove(&EndpointKey { service: id, index: index.into() }))?;
            self.writes += 1;
            programmed.endpoints.remove(&index);
        }
        for range in extra(programmed.ranges.iter(), |range| wanted.ranges.contains(range)) {
            tolerate_missing(self.ranges.remove(&trie_key(id, range)))?;
            self.writes += 1;
            programmed.ranges.remove(&range);
            changed = true;
        }
        Ok(changed)
    }

    /// Removes a service.
    pub(super) fn remove(&mut self, programmed: Programmed) -> Result<()> {
        let id = programmed.id;
        for key in programmed.frontends.keys() {
            self.remove_frontend(key, id)?;
        }
        tolerate_missing(self.services.remove(&id))?;
        self.writes += 1;
        for index in programmed.endpoints.into_keys() {
            tolerate_missing(self.endpoints.remove(&EndpointKey { service: id, index: index.into() }))?;
            self.writes += 1;
        }
        for range in programmed.ranges {
            tolerate_missing(self.ranges.remove(&trie_key(id, range)))?;
            self.writes += 1;
        }
        self.remove_counters(id)?;
        tolerate_missing(self.names.remove(&id))?;
        self.writes += 1;
        Ok(())
    }

    fn add_ranges(&mut self, programmed: &mut Programmed, wanted: &BTreeSet<(IpAddr, u32)>) -> Result<bool> {
        let missing = extra(wanted.iter(), |range| programmed.ranges.contains(range));
        for &range in &missing {
            self.ranges.insert(&trie_key(programmed.id, range), 1, 0).bpf(|| full("NS_RANGES"))?;
            self.writes += 1;
            programmed.ranges.insert(range);
        }
        Ok(!missing.is_empty())
    }

    /// Writes new and changed endpoints. Returns the numbers of those that are to go, which are still in the map
    /// but in no table any more.
    fn write_endpoints(
        &mut self,
        programmed: &mut Programmed,
        mut wanted: BTreeMap<(IpAddr, u16), Endpoint>,
    ) -> Result<Vec<u16>> {
        let id = programmed.id;
        let mut gone = Vec::new();
        for (&index, known) in &mut programmed.endpoints {
            match wanted.remove(&(known.address.into(), known.port)) {
                Some(endpoint) if endpoint == *known => {}
                Some(endpoint) => {
                    let key = EndpointKey { service: id, index: index.into() };
                    self.endpoints.insert(key, endpoint, 0).bpf(|| full("NS_ENDPOINTS"))?;
                    self.writes += 1;
                    *known = endpoint;
                }
                None => {
                    known.flags = 0;
                    gone.push(index);
                }
            }
        }
        for endpoint in wanted.into_values() {
            let index = programmed.number()?;
            let key = EndpointKey { service: id, index: index.into() };
            self.endpoints.insert(key, endpoint, 0).bpf(|| full("NS_ENDPOINTS"))?;
            self.writes += 1;
            programmed.endpoints.insert(index, endpoint);
        }
        Ok(gone)
    }

    /// Removes a frontend, unless another service has taken it over.
    fn remove_frontend(&mut self, key: &FrontendKey, id: ServiceId) -> Result<()> {
        match self.frontends.get(key, 0) {
            Ok(frontend) if frontend.service == id => {
                self.writes += 1;
                tolerate_missing(self.frontends.remove(key))
            }
            _ => Ok(()),
        }
    }
}

fn extra<'a, T: Copy + 'a>(items: impl Iterator<Item = &'a T>, wanted: impl Fn(&T) -> bool) -> Vec<T> {
    items.filter(|item| !wanted(item)).copied().collect()
}

fn trie_key(service: ServiceId, (ip, bits): (IpAddr, u32)) -> TrieKey<RangeKey> {
    let service_bits = RangeKey::BITS - 128;
    TrieKey::new(service_bits + bits, RangeKey { service, client: ip.into() })
}

fn full(map: &str) -> String {
    format!("write the map {map}; it may be full")
}
