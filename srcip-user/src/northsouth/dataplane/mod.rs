//! The north-south data plane: loads the programs, attaches them, writes their maps.
//!
//! Everything lives in the kernel, pinned below `PIN_PATH/northsouth`, and works without this process. What is
//! there is read back at the start, so that only differences are written.
//!
//! - [`attach`]: programs and devices; by [`links`], or below Linux 6.6 by [`filters`]. [`routes`]: behind which
//!   device an endpoint is. [`compile`]: from Services to what the maps say; pure.
//! - [`maps`]: the maps. [`write`]: brings a service there, in an order that programs may look on.
//! - [`read`]: what is there, for who wants to show it. [`trace`]: what the programs find there for one packet.

mod attach;
mod compile;
mod filters;
mod links;
mod maps;
pub mod read;
mod routes;
pub mod trace;
mod write;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fs,
    net::IpAddr,
    path::Path,
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use srcip_common::northsouth::{Config, FrontendKey, OWN, ServiceId};

use self::{
    attach::{Programs, Role},
    compile::{Compiled, Compiler},
    filters::Filters,
    maps::Maps,
    routes::Routes,
    write::Programmed,
};
use super::{
    Changes, Programmer,
    desired::{Desired, NodeAddress, Place, ServiceName, ServicePort},
};
use crate::{
    dataplane::{
        build::Build,
        engine::Requirement,
        error::{Error, FileContext as _, Result, chain},
        pins::{Pins, remove_tree},
        record::TcHook,
    },
    netns::Netns,
    routing::{self, RoutingError},
};

/// What the programs need of the kernel, and what attaches them. Tells what is there, as tried out just now.
pub fn requirements() -> Vec<Requirement> {
    let helper = |name, since, helper| Requirement {
        name,
        since,
        available: is_helper_supported(ProgramType::SchedClassifier, helper).unwrap_or(false),
    };
    vec![
        helper("bpf_redirect_neigh in tc programs", "5.10", BpfHelper::BPF_FUNC_redirect_neigh),
        helper("bpf_check_mtu in tc programs", "5.12", BpfHelper::BPF_FUNC_check_mtu),
        Requirement {
            name: "network namespace cookies",
            since: "5.14",
            available: Netns::cookie_here().is_ok(),
        },
    ]
}

/// A family of a port of a Service: what the programs call a service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
struct Key {
    name: ServiceName,
    v4: bool,
}

/// The north-south data plane of one instance.
#[derive(Debug)]
pub struct NorthSouth {
    pins: Pins,
    programs: Programs,
    maps: Maps,
    services: BTreeMap<Key, Programmed>,
    /// The next service's number. Above all that are in the maps: flows remember them for a while.
    next: ServiceId,
    /// What was wanted last, of what is programmed by now.
    known: BTreeMap<ServiceName, ServicePort>,
    /// The number of the device behind which an endpoint was found.
    places: HashMap<IpAddr, u32>,
}

impl NorthSouth {
    /// Loads the programs for the instance at `pin_path`, which need not exist. Programs that are attached already
    /// are replaced where they are, without a gap. Linux 5.14.
    pub fn open(pin_path: &Path) -> Result<Self> {
        let pins = pins(pin_path);
        let _lock = pins.create()?;
        maps::check_layout(&pins)?;
        let mut programs = Programs::load(&pins, &Build::current()?)?;
        maps::stamp_layout(&pins)?;
        programs.upgrade(&pins)?;
        let mut maps = Maps::open(&pins)?;
        let services = maps.read_back()?;
        maps.sweep_counters(&services.values().map(|programmed| programmed.id).collect())?;
        let next = services.values().map(|programmed| programmed.id + 1).max().unwrap_or(0);
        let (known, places) = (BTreeMap::new(), HashMap::new());
        Ok(Self { pins, programs, maps, services, next, known, places })
    }

    /// Attaches by this hook, not by the newest that the kernel has, from the next `apply` on. What is attached by
    /// another one is moved then.
    #[must_use]
    pub fn by(mut self, hook: TcHook) -> Self {
        self.programs.hook = hook;
        self
    }

    /// Removes every trace from the instance at `pin_path`. Returns whether there was any. An error if there may be
    /// filters in a network namespace that cannot be seen from here: then the pins stay, by which they are found.
    pub fn remove(pin_path: &Path) -> Result<bool> {
        let pins = pins(pin_path);
        // Held until all of it is gone; the directory goes last.
        let Some(_lock) = pins.lock()? else { return Ok(false) };
        // By the maps' help; so these go later.
        attach::remove_all(&pins)?;
        remove_tree(pins.root())?;
        Ok(true)
    }

    /// Finds the device of every endpoint on this node, attaches to what has no program yet, and lets go of other
    /// uplinks and of devices that are gone. Returns the number of each endpoint's device.
    fn attach(&mut self, desired: &Desired, changes: &mut Changes) -> Result<HashMap<IpAddr, u32>> {
        let in_namespace = |error: RoutingError| Error::Routing(error, None);
        let devices = routing::devices().map_err(in_namespace)?;
        let filters = Filters::here(&self.pins)?;
        self.programs.move_over(&self.pins, &filters, &devices)?;
        // Also of one that takes no other program now: what it has goes on.
        let exists = |index: &u32| devices.iter().any(|device| device.index == *index);
        let uplinks: BTreeSet<u32> =
            desired.uplinks.iter().map(|device| device.index).filter(exists).collect();
        for device in &desired.uplinks {
            let problem = if !devices.contains(device) {
                format!("the uplink {} is not there (any more)", device.name)
            } else if !routing::is_ethernet(device).map_err(in_namespace)? {
                format!("the uplink {} is no Ethernet device: its traffic is left alone", device.name)
            } else if let Err(error) = self.programs.ensure(&self.pins, &filters, Role::Uplink, device) {
                format!("the uplink {} has no program: {}", device.name, chain(&error))
            } else {
                continue;
            };
            changes.missing_uplinks.push(problem);
        }
        let routes = Routes::read().map_err(in_namespace)?;
        let local = |port: &ServicePort| {
            let here = port.endpoints.iter().filter(|endpoint| endpoint.place == Place::Local);
            here.map(|endpoint| endpoint.address.0).collect::<Vec<_>>()
        };
        let addresses: HashSet<IpAddr> = desired.services.values().flat_map(local).collect();
        let mut places: HashMap<IpAddr, u32> = addresses
            .into_iter()
            .filter_map(|ip| Some((ip, routes.device(ip)?)))
            .filter(|(_, index)| !uplinks.contains(index))
            .collect();
        let wanted: BTreeSet<u32> = places.values().copied().collect();
        for device in devices.iter().filter(|device| wanted.contains(&device.index)) {
            // One pod's device is no other pod's concern.
            if let Err(error) = self.programs.ensure(&self.pins, &filters, Role::Pod, device) {
                changes.problems.push(format!(
                    "the pod's device {} has no program: {}",
                    device.name,
                    chain(&error)
                ));
                places.retain(|_, index| *index != device.index);
            }
        }
        attach::keep_only(&self.pins, &filters, &uplinks, &devices)?;
        Ok(places)
    }

    fn write_nodes(&mut self, desired: &Desired) -> Result<()> {
        let mut nodes: HashMap<_, _> = desired.nodes.iter().map(|node| (node.0.into(), 0)).collect();
        nodes.extend(desired.own.iter().map(|own| (own.0.into(), OWN)));
        let own = |v4| first_of(&desired.own, v4).into();
        self.maps.write_nodes(&nodes, Config { own_v4: own(true), own_v6: own(false) })
    }
}

/// The first address of a family, or its "none".
fn first_of(addresses: &[NodeAddress], v4: bool) -> IpAddr {
    let first = addresses.iter().map(|address| address.0).find(|ip| ip.is_ipv4() == v4);
    first.unwrap_or(if v4 {
        std::net::Ipv4Addr::UNSPECIFIED.into()
    } else {
        std::net::Ipv6Addr::UNSPECIFIED.into()
    })
}

impl Programmer for NorthSouth {
    fn apply(&mut self, desired: &Desired) -> Result<Changes> {
        let Some(_lock) = self.pins.lock()? else {
            return Err(Error::NotAttached(self.pins.root().display().to_string()));
        };
        let mut changes = Changes::default();
        let writes = self.maps.writes;
        self.write_nodes(desired)?;
        let places = self.attach(desired, &mut changes)?;
        let before = std::mem::replace(&mut self.places, places.clone());
        let moved = |port: &ServicePort| {
            port.endpoints.iter().any(|e| before.get(&e.address.0) != places.get(&e.address.0))
        };

        // Who goes first: a frontend may be about to change hands.
        let gone: Vec<Key> =
            self.services.keys().filter(|key| !desired.services.contains_key(&key.name)).cloned().collect();
        for key in gone {
            if let Some(programmed) = self.services.remove(&key) {
                self.maps.remove(programmed)?;
            }
            self.known.remove(&key.name);
            if changes.removed.last() != Some(&key.name) {
                changes.removed.push(key.name);
            }
        }

        let mut taken: HashMap<FrontendKey, &ServiceName> = HashMap::new();
        for (name, port) in &desired.services {
            let mut compiler = Compiler { taken: &mut taken, places: &places, problems: Vec::new() };
            let allowed = compiler.claim(port);
            if self.known.get(name) == Some(port) && !moved(port) && compiler.problems.is_empty() {
                continue;
            }
            let mut changed = false;
            for v4 in [true, false] {
                let key = Key { name: name.clone(), v4 };
                let compiled = compiler.compile(port, v4, &allowed);
                changed |= self.program(key, compiled)?;
            }
            changes.problems.append(&mut compiler.problems);
            if changed {
                changes.changed.push(name.clone());
            }
            self.known.insert(name.clone(), port.clone());
        }
        changes.writes = self.maps.writes - writes;
        Ok(changes)
    }

    fn counters(&self) -> Result<BTreeMap<&'static str, u64>> {
        self.maps.counters()
    }
}

impl NorthSouth {
    /// Brings a service to what it is to be; without frontends it is not there. Returns whether that took
    /// anything.
    fn program(&mut self, key: Key, compiled: Option<Compiled>) -> Result<bool> {
        match compiled {
            Some(compiled) => {
                if !self.services.contains_key(&key) {
                    let id = self.next;
                    self.next += 1;
                    self.maps.name(id, &key)?;
                    self.services.insert(key.clone(), Programmed::new(id));
                }
                match self.services.get_mut(&key) {
                    Some(programmed) => self.maps.write(programmed, compiled),
                    None => Ok(false),
                }
            }
            None => match self.services.remove(&key) {
                Some(programmed) => self.maps.remove(programmed).map(|()| true),
                None => Ok(false),
            },
        }
    }
}

/// What is named after a role and a device in a directory, by the devices' numbers. The directory need not exist.
fn numbered(directory: &Path, role: Role) -> Result<BTreeSet<u32>> {
    if !directory.exists() {
        return Ok(BTreeSet::new());
    }
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(directory).file("read", directory)? {
        let name = entry.file("read", directory)?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(role.word())?.strip_prefix('_'));
        found.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    Ok(found)
}

fn pins(pin_path: &Path) -> Pins {
    Pins::new(pin_path.join("northsouth"))
}
