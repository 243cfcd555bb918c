//! The programs, and the devices they sit on: by a tcx link each, or below Linux 6.6 by a filter.

use std::collections::BTreeSet;

use aya::{Ebpf, EbpfLoader, programs::SchedClassifier};

use super::{
    filters::{self, Filters},
    links,
};
use crate::{
    dataplane::{
        build::Build,
        error::{Result, chain, load_error, object_error},
        object,
        pins::Pins,
        record::TcHook,
    },
    routing::Device,
};

/// What a device is to us, and so which program it gets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Traffic enters the cluster by it.
    Uplink,
    /// The host side of a pod's device.
    Pod,
}

impl Role {
    /// In the order that they are taken away in: what comes in by an uplink needs the way back.
    pub(super) const ALL: [Self; 2] = [Self::Uplink, Self::Pod];

    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Uplink => "srcip_uplink",
            Self::Pod => "srcip_pod",
        }
    }

    /// A device may have been the one and become the other.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Uplink => Self::Pod,
            Self::Pod => Self::Uplink,
        }
    }

    /// What the names of pins begin with.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Uplink => "uplink",
            Self::Pod => "pod",
        }
    }
}

/// The loaded programs.
#[derive(Debug)]
pub(super) struct Programs {
    object: Ebpf,
    /// How they are attached from now on.
    pub(super) hook: TcHook,
}

impl Programs {
    /// Loads them; maps that are not pinned yet are made and pinned.
    pub(super) fn load(pins: &Pins, build: &Build) -> Result<Self> {
        let object = EbpfLoader::new().default_map_pin_directory(pins.maps()).load(&build.north_south);
        let mut object = object.map_err(object_error)?;
        for name in Role::ALL.map(Role::program) {
            let program: &mut SchedClassifier = object::program(&mut object, name)?;
            program.load().map_err(|error| load_error(name, error))?;
        }
        Ok(Self { object, hook: TcHook::newest() })
    }

    fn program(&mut self, role: Role) -> Result<&mut SchedClassifier> {
        object::program(&mut self.object, role.program())
    }

    /// Replaces what is attached already, which another version may have loaded, wherever and however it is.
    pub(super) fn upgrade(&mut self, pins: &Pins) -> Result<()> {
        for role in Role::ALL {
            links::upgrade(pins, role, self.program(role)?)?;
            filters::upgrade(pins, role, self.program(role)?)?;
        }
        Ok(())
    }

    /// Gives to devices that have a program by another hook the same by ours, and then takes the other away.
    pub(super) fn move_over(&mut self, pins: &Pins, filters: &Filters, devices: &[Device]) -> Result<()> {
        for role in Role::ALL {
            let attached = match self.hook {
                TcHook::Tcx => filters.attached(role)?,
                TcHook::Clsact => links::attached(pins, role)?,
            };
            for device in devices.iter().filter(|device| attached.contains(&device.index)) {
                // What has to go on has a program still; who needs another one is told below.
                if let Err(error) = self.ensure(pins, filters, role, device) {
                    tracing::warn!(
                        "{} keeps its program, which cannot be moved: {}",
                        device.name,
                        chain(&error)
                    );
                    continue;
                }
                match self.hook {
                    TcHook::Tcx => filters.remove(role, device.index, Some(device))?,
                    TcHook::Clsact => links::remove(pins, role, device.index)?,
                }
            }
        }
        Ok(())
    }

    /// Sees to it that a device has its program.
    pub(super) fn ensure(
        &mut self,
        pins: &Pins,
        filters: &Filters,
        role: Role,
        device: &Device,
    ) -> Result<()> {
        let hook = self.hook;
        let program = self.program(role)?;
        match hook {
            TcHook::Tcx => links::ensure(pins, role, program, device),
            TcHook::Clsact => filters.ensure(role, program, device),
        }
    }
}

/// Takes the programs from other uplinks, and forgets devices that are gone. A pod's device keeps its program as long
/// as it exists: connections may go on when their pod is no endpoint any more, and their answers are to be translated.
pub(super) fn keep_only(
    pins: &Pins,
    filters: &Filters,
    uplinks: &BTreeSet<u32>,
    devices: &[Device],
) -> Result<()> {
    let existing = devices.iter().map(|device| device.index).collect();
    for (role, keep) in [(Role::Uplink, uplinks), (Role::Pod, &existing)] {
        for index in links::attached(pins, role)?.difference(keep) {
            links::remove(pins, role, *index)?;
        }
        for index in filters.attached(role)?.difference(keep) {
            filters.remove(role, *index, devices.iter().find(|device| device.index == *index))?;
        }
    }
    Ok(())
}

/// Takes all programs away, wherever and however they are attached.
pub(super) fn remove_all(pins: &Pins) -> Result<()> {
    for role in Role::ALL {
        for index in links::attached(pins, role)? {
            links::remove(pins, role, index)?;
        }
    }
    filters::remove_all(pins)
}
