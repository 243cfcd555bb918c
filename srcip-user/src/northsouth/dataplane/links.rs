//! Programs behind tcx links, Linux 6.6.
//!
//! Each link is pinned under its device's number: `node/uplink_INDEX`, `pods/pod_INDEX`. The kernel lets go of a
//! device that is removed; its pin is found dead and replaced, or removed with what nobody needs.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
};

use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType, links::FdLink, tc::TcAttachOptions,
};

use super::{attach::Role, numbered};
use crate::{
    dataplane::{
        error::{BpfContext as _, Result},
        link::{self, Link},
        pins::Pins,
    },
    routing::Device,
};

fn directory(pins: &Pins, role: Role) -> PathBuf {
    match role {
        Role::Uplink => pins.node(),
        Role::Pod => pins.root().join("pods"),
    }
}

fn pin(pins: &Pins, role: Role, index: u32) -> PathBuf {
    directory(pins, role).join(format!("{}_{index}", role.word()))
}

/// The numbers of the devices that have a link, or had one before they went.
pub(super) fn attached(pins: &Pins, role: Role) -> Result<BTreeSet<u32>> {
    numbered(&directory(pins, role), role)
}

/// Gives the links that are there this program; dead ones go.
pub(super) fn upgrade(pins: &Pins, role: Role, program: &mut SchedClassifier) -> Result<()> {
    for index in attached(pins, role)? {
        if !replace(program, &pin(pins, role, index))? {
            remove(pins, role, index)?;
        }
    }
    Ok(())
}

/// Sees to it that a device has a link with this program.
pub(super) fn ensure(pins: &Pins, role: Role, program: &mut SchedClassifier, device: &Device) -> Result<()> {
    let pin = pin(pins, role, device.index);
    if replace(program, &pin)? {
        return Ok(());
    }
    link::remove(&pin)?;
    let mut attach = || -> std::result::Result<FdLink, ProgramError> {
        // First: what another program lets through would otherwise end the chain before ours.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
        let link = program.take_link(id)?;
        link.try_into().map_err(|error| ProgramError::IOError(io::Error::other(error)))
    };
    let link = attach().bpf(|| format!("attach {} to the ingress of {}", role.program(), device.name))?;
    link.pin(&pin).bpf(|| format!("pin a link at {}", pin.display())).map(drop)
}

/// Takes the program from a device, now.
pub(super) fn remove(pins: &Pins, role: Role, index: u32) -> Result<()> {
    link::remove(&pin(pins, role, index))
}

/// Gives a pinned link our program, in one step (`BPF_LINK_UPDATE`); nothing happens if it has it. `false` if there
/// is no link, or its device has gone.
fn replace(program: &SchedClassifier, pin: &Path) -> Result<bool> {
    let Some(link) = Link::open(pin)? else { return Ok(false) };
    let action = || format!("replace the program of {}", pin.display());
    link.update(program.fd().bpf(action)?)
}
