//! The second engine: a `tc` program at ingress of the pod's devices.

use std::io;

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, ProgramType, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program},
    },
    sys::is_program_supported,
    util::KernelVersion,
};

use super::{
    engine::Engine,
    error::{BpfContext as _, Result, load_error},
    hooks::pin_link,
    object,
    pins::{Pins, make_directory, remove_tree},
    record::{EngineKind, Record, TcDevice, TcHook},
};
use crate::{
    netns::Netns,
    routing::{self, Device},
};

const PROGRAM: &str = "srcip_tc";

/// An `sk_lookup` program that helps with connections in TIME_WAIT, where the kernel has the type.
const COMPANION: &str = "srcip_tc_reopen";

/// Whether the kernel can run the companion: Linux 5.9.
pub(super) fn has_companion() -> bool {
    is_program_supported(ProgramType::SkLookup).unwrap_or(false)
}

/// The hook that this kernel offers: tcx since Linux 6.6.
pub(super) fn default_hook() -> TcHook {
    let has_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
    if has_tcx { TcHook::Tcx } else { TcHook::Clsact }
}

/// Says on which of the pod's devices the program shall sit.
pub(super) fn plan(netns: &Netns, hook: TcHook, record: &mut Record) -> Result<()> {
    let devices = netns.run(routing::devices)?.map_err(|e| super::in_netns(e, netns))?;
    record.tc_devices = devices
        .into_iter()
        .map(|device| {
            let known = record.tc_devices.iter().find(|known| known.device == device);
            known.cloned().unwrap_or(TcDevice { device, hook, created_clsact: false })
        })
        .collect();
    Ok(())
}

/// See the module.
#[derive(Debug)]
pub(super) struct TcEngine;

impl Engine for TcEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Tc
    }

    fn attach(
        &self,
        pins: &Pins,
        netns: &Netns,
        record: &mut Record,
        remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()> {
        let mut object = object::load(pins, Some(record.netns_cookie))?;
        let program: &mut SchedClassifier = object::program(&mut object, PROGRAM)?;
        program.load().map_err(|error| load_error(PROGRAM, error))?;
        make_directory(&pins.pod(record.netns_cookie))?;
        if has_companion() {
            super::sk_lookup::attach_program(pins, netns, &mut object, record, COMPANION)?;
        }
        for i in 0..record.tc_devices.len() {
            match record.tc_devices[i].hook {
                TcHook::Tcx => attach_tcx(pins, netns, &mut object, record, i)?,
                TcHook::Clsact => {
                    let device = record.tc_devices[i].device.clone();
                    let exists = netns.run(|| has_clsact(&device))?.map_err(|e| super::in_netns(e, netns))?;
                    if !exists {
                        // Remembered before it is done, so that an interruption leaves nothing behind.
                        record.tc_devices[i].created_clsact = true;
                        remember(record)?;
                    }
                    attach_clsact(netns, &mut object, &device, !exists)?;
                }
            }
        }
        Ok(())
    }

    fn detach(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Result<()> {
        for TcDevice { device, hook, created_clsact } in &record.tc_devices {
            match (hook, netns) {
                (TcHook::Tcx, _) => remove_tree(&pin(pins, record, device))?,
                (TcHook::Clsact, Some(netns)) => {
                    let detached = netns.run(|| detach_clsact(device, *created_clsact))?;
                    detached.bpf(|| format!("detach {PROGRAM} from {}", device.name))?;
                }
                // The devices went with their namespace.
                (TcHook::Clsact, None) => {}
            }
        }
        remove_tree(&pins.pod(record.netns_cookie).join(COMPANION))
    }

    fn is_attached(&self, pins: &Pins, record: &Record) -> bool {
        record.tc_devices.iter().all(|TcDevice { device, hook, .. }| match hook {
            TcHook::Tcx => pin(pins, record, device).exists(),
            TcHook::Clsact => true,
        })
    }
}

fn pin(pins: &Pins, record: &Record, device: &Device) -> std::path::PathBuf {
    pins.pod(record.netns_cookie).join(format!("{PROGRAM}_{}", device.index))
}

fn attach_tcx(pins: &Pins, netns: &Netns, object: &mut Ebpf, record: &Record, index: usize) -> Result<()> {
    let device = &record.tc_devices[index].device;
    let pin = pin(pins, record, device);
    if pin.exists() {
        return Ok(());
    }
    let program: &mut SchedClassifier = object::program(object, PROGRAM)?;
    let link = netns.run(move || -> std::result::Result<FdLink, ProgramError> {
        // First: what another program lets through would otherwise end the chain before ours.
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
        let link = program.take_link(id)?;
        link.try_into().map_err(|error| ProgramError::IOError(io::Error::other(error)))
    })?;
    pin_link(link.bpf(|| attach_action(device))?, &pin)?;
    Ok(())
}

fn attach_clsact(netns: &Netns, object: &mut Ebpf, device: &Device, create: bool) -> Result<()> {
    let program: &mut SchedClassifier = object::program(object, PROGRAM)?;
    let attached = netns.run(move || -> std::result::Result<(), ProgramError> {
        if create {
            qdisc_add_clsact(&device.name)?;
        }
        // A filter of an earlier attach serves this one as well.
        match qdisc_detach_program(&device.name, TcAttachType::Ingress, PROGRAM) {
            Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
        let options = TcAttachOptions::Netlink(NlOptions { priority: 1, ..Default::default() });
        let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
        // The filter holds the program from here on; dropping the link would remove it.
        std::mem::forget(program.take_link(id)?);
        Ok(())
    })?;
    attached.bpf(|| attach_action(device))
}

fn attach_action(device: &Device) -> String {
    format!("attach {PROGRAM} to the ingress of {}", device.name)
}

fn detach_clsact(device: &Device, created: bool) -> std::result::Result<(), TcError> {
    let gone = |error: &io::Error| {
        error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
    };
    match qdisc_detach_program(&device.name, TcAttachType::Ingress, PROGRAM) {
        Err(TcError::IoError(error)) if gone(&error) => {}
        // No queueing discipline, so no filter.
        Err(TcError::NetlinkError(_)) if !created => {}
        Err(TcError::NetlinkError(_)) if !has_clsact(device).unwrap_or(false) => {}
        result => result?,
    }
    if created {
        routing::remove_clsact(device).map_err(|e| TcError::IoError(io::Error::other(e)))?;
    }
    Ok(())
}

fn has_clsact(device: &Device) -> std::result::Result<bool, routing::RoutingError> {
    routing::has_clsact(device)
}
