//! Programs in filters of the `clsact` queueing discipline, for kernels before 6.6.
//!
//! Whatever becomes of this process, a filter stays where it is, and nothing can be pinned that stands for it. So
//! there is a directory for each device, made before its filter and removed after it:
//! `filters/COOKIE/uplink_INDEX`, `filters/COOKIE/pod_INDEX`, with the cookie of the network namespace. In it is
//! another, `clsact_NAME`, if the queueing discipline is ours to remove. It has the device's name, in hexadecimal
//! digits because names may have dots and names of pins may not: a device that got the number of one that has gone is
//! another one. Which filters are ours their programs tell: they use our maps. Nobody else's are touched.

use std::{
    collections::{BTreeSet, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use aya::{
    maps::MapInfo,
    programs::{ProgramError, SchedClassifier, loaded_programs},
};

use super::{attach::Role, numbered};
use crate::{
    clsact::{self, Filter},
    dataplane::{
        error::{BpfContext as _, Error, FileContext as _, Result, chain},
        pins::{Pins, make_directory, remove_tree},
    },
    netns::{Netns, NetnsCookie},
    routing::{self, Device, RoutingError},
};

/// The filters of one instance in the calling thread's network namespace.
pub(super) struct Filters {
    directory: PathBuf,
    maps: PathBuf,
    /// The numbers of the programs that use our maps, once they are asked for: to find out takes a look at every
    /// program of the machine.
    ours: OnceLock<HashSet<u32>>,
}

impl Filters {
    pub(super) fn here(pins: &Pins) -> Result<Self> {
        let cookie = Netns::cookie_here().file("read the network namespace's cookie for", pins.root())?;
        Ok(Self::of(pins, cookie))
    }

    fn of(pins: &Pins, cookie: NetnsCookie) -> Self {
        Self { directory: root(pins).join(cookie.0.to_string()), maps: pins.maps(), ours: OnceLock::new() }
    }

    fn mark(&self, role: Role, index: u32) -> PathBuf {
        self.directory.join(format!("{}_{index}", role.word()))
    }

    /// What says that the queueing discipline of a device is ours.
    fn made(&self, role: Role, device: &Device) -> PathBuf {
        let digits: String = device.name.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.mark(role, device.index).join(format!("clsact_{digits}"))
    }

    /// The numbers of the devices that have a filter, or were about to get one, or had one before they went.
    pub(super) fn attached(&self, role: Role) -> Result<BTreeSet<u32>> {
        numbered(&self.directory, role)
    }

    /// Our filters on a device.
    fn find(&self, role: Role, device: &Device) -> Result<Vec<Filter>> {
        let mut found = clsact::filters(device, role.program()).map_err(in_namespace)?;
        if !found.is_empty() {
            let ours = match self.ours.get() {
                Some(ours) => ours,
                None => {
                    let ours = ours(&self.maps)?;
                    self.ours.get_or_init(|| ours)
                }
            };
            found.retain(|filter| ours.contains(&filter.program));
        }
        Ok(found)
    }

    /// Sees to it that a device has a filter with this program.
    pub(super) fn ensure(&self, role: Role, program: &mut SchedClassifier, device: &Device) -> Result<()> {
        make_directory(&self.mark(role, device.index))?;
        let exists = clsact::exists(device).map_err(in_namespace)?;
        if !exists {
            make_directory(&self.made(role, device))?;
        }
        if self.upgrade(role, program, device)? {
            return Ok(());
        }
        let action = || format!("attach {} to the ingress of {}", role.program(), device.name);
        clsact::add_filter(program, device, !exists).bpf(action)
    }

    /// Gives the filter of a device this program, if it has another. `false` if there is none.
    fn upgrade(&self, role: Role, program: &mut SchedClassifier, device: &Device) -> Result<bool> {
        let action = || format!("replace {} at the ingress of {}", role.program(), device.name);
        let id = program.info().bpf(action)?.id();
        let filters = self.find(role, device)?;
        for &filter in filters.iter().filter(|filter| filter.program != id) {
            clsact::replace_filter(program, device, filter).bpf(action)?;
        }
        Ok(!filters.is_empty())
    }

    /// Takes our filter from a device, and what we made for it, unless it is needed in the other role. `None`: the
    /// device has gone, and all with it.
    pub(super) fn remove(&self, role: Role, index: u32, device: Option<&Device>) -> Result<()> {
        if let Some(device) = device {
            let action = || format!("take {} from the ingress of {}", role.program(), device.name);
            for filter in self.find(role, device)? {
                clsact::remove_filter(device, filter).bpf(action)?;
            }
            if self.made(role, device).exists() {
                let other = role.other();
                if self.mark(other, index).exists() {
                    make_directory(&self.made(other, device))?;
                } else {
                    clsact::remove_if_empty(device).map_err(in_namespace)?;
                }
            }
        }
        remove_tree(&self.mark(role, index))
    }
}

/// Gives the filters that are there this program, in whichever namespaces they are that can be seen.
pub(super) fn upgrade(pins: &Pins, role: Role, program: &mut SchedClassifier) -> Result<()> {
    in_each_namespace(pins, |filters, devices| {
        for device in with_filters(filters, role, devices)? {
            filters.upgrade(role, program, device)?;
        }
        Ok(())
    })
    .map(drop)
}

/// Removes all filters, in whichever namespaces they are. An error if there may be some in one that cannot be seen;
/// what finds them again is still there then.
pub(super) fn remove_all(pins: &Pins) -> Result<()> {
    let unseen = in_each_namespace(pins, |filters, devices| {
        for role in Role::ALL {
            for index in filters.attached(role)? {
                filters.remove(role, index, devices.iter().find(|device| device.index == index))?;
            }
        }
        Ok(())
    })?;
    // A namespace that has gone has taken its filters along, and they their programs.
    let programs = if unseen.is_empty() { HashSet::new() } else { ours(&pins.maps())? };
    if programs.is_empty() {
        return Ok(());
    }
    let list = |numbers: &mut dyn Iterator<Item = u64>| {
        let numbers: BTreeSet<_> = numbers.collect();
        numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    };
    Err(Error::FiltersUnseen {
        path: root(pins),
        cookies: list(&mut unseen.iter().map(|cookie| cookie.0)),
        programs: list(&mut programs.iter().copied().map(u64::from)),
    })
}

fn with_filters<'a>(
    filters: &Filters,
    role: Role,
    devices: &'a [Device],
) -> Result<impl Iterator<Item = &'a Device>> {
    let attached = filters.attached(role)?;
    Ok(devices.iter().filter(move |device| attached.contains(&device.index)))
}

/// Does something in every namespace that has filters. Returns those that cannot be found: they have gone, with their
/// devices, or nothing that can be seen from here leads to them.
fn in_each_namespace(
    pins: &Pins,
    mut act: impl FnMut(&Filters, &[Device]) -> Result<()> + Send,
) -> Result<Vec<NetnsCookie>> {
    let mut unseen = Vec::new();
    let here = Netns::cookie_here().file("read the network namespace's cookie for", pins.root())?;
    for entry in entries(&root(pins))? {
        let Some(cookie) = entry.file_name().and_then(|name| name.to_str()?.parse().ok()).map(NetnsCookie)
        else {
            continue;
        };
        let filters = Filters::of(pins, cookie);
        let mut run = || act(&filters, &routing::devices().map_err(in_namespace)?);
        if cookie == here {
            run()?;
        } else if let Some(netns) = Netns::find(cookie, None) {
            netns.run(run)??;
        } else {
            unseen.push(cookie);
        }
    }
    Ok(unseen)
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    if !directory.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(directory).file("read", directory)?;
    entries.map(|entry| Ok(entry.file("read", directory)?.path())).collect()
}

fn root(pins: &Pins) -> PathBuf {
    pins.root().join("filters")
}

/// The numbers of the loaded programs that use our maps.
fn ours(maps: &Path) -> Result<HashSet<u32>> {
    let number = |map: PathBuf| {
        MapInfo::from_pin(&map)
            .map(|info| info.id())
            .bpf(|| format!("read what the map {} is", map.display()))
    };
    let maps = entries(maps)?.into_iter().map(number).collect::<Result<HashSet<_>>>()?;
    let uses_them = |used: &Option<Vec<u32>>| used.iter().flatten().any(|map| maps.contains(map));
    let mut ours = HashSet::new();
    for program in loaded_programs() {
        match program.and_then(|program| Ok((program.id(), program.map_ids()?))) {
            Ok((id, used)) => ours.extend(uses_them(&used).then_some(id)),
            Err(error) => tell_unless_gone(error)?,
        }
    }
    Ok(ours)
}

/// A program may go while all are looked at.
fn tell_unless_gone(error: ProgramError) -> Result<()> {
    let kind = match &error {
        ProgramError::SyscallError(error) => error.io_error.kind(),
        _ => io::ErrorKind::Other,
    };
    let cure = match kind {
        io::ErrorKind::NotFound => return Ok(()),
        io::ErrorKind::PermissionDenied => {
            "; to look at all programs takes CAP_SYS_ADMIN: run as root, or give the container this capability"
        }
        _ => "",
    };
    let action = "find out which programs use the maps of north-south, to know its filters by".to_owned();
    Err(Error::Bpf { action, source: format!("{}{cure}", chain(&error)).into() })
}

fn in_namespace(error: RoutingError) -> Error {
    Error::Routing(error, None)
}

#[cfg(test)]
mod tests {
    use aya::sys::SyscallError;

    use super::*;

    #[test]
    fn only_programs_that_have_gone_are_passed_over() {
        let error = |number| {
            let io_error = io::Error::from_raw_os_error(number);
            ProgramError::SyscallError(SyscallError { call: "bpf_prog_get_fd_by_id", io_error })
        };
        tell_unless_gone(error(libc::ENOENT)).unwrap();
        let told = tell_unless_gone(error(libc::EPERM)).unwrap_err().to_string();
        assert!(told.contains("Operation not permitted") && told.contains("takes CAP_SYS_ADMIN"), "{told}");
        let told = tell_unless_gone(error(libc::ENOMEM)).unwrap_err().to_string();
        assert!(told.contains("Cannot allocate memory") && !told.contains("CAP_SYS_ADMIN"), "{told}");
    }
}
