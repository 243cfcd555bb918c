//! The second engine: a `tc` program at ingress of the pod's devices.

use std::io;

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, ProgramType, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program},
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
    record::{Record, TcDevice, TcHook},
};
use crate::{
    clsact,
    netns::Netns,
    routing::{self, Device},
};

const PROGRAM: &str = "srcip_tc";

/// An `sk_lookup` program for what a listener cannot simply be assigned to.
const COMPANION: &str = "srcip_tc_companion";

/// Whether the kernel can run the companion: Linux 5.9.
pub(super) fn has_companion() -> bool {
    is_program_supported(ProgramType::SkLookup).unwrap_or(false)
}

/// The hook that this kernel offers: tcx since Linux 6.6.
pub(super) fn default_hook() -> TcHook {
    let has_tcx = KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 6, 0));
    if has_tcx { TcHook::Tcx } else { TcHook::Clsact }
}

/// Says on which of the pod's devices the program shall sit. Where it sits by another hook, both are
/// remembered until the change is done.
pub(super) fn plan(netns: &Netns, hook: TcHook, record: &mut Record) -> Result<()> {
    let devices = netns.run(routing::devices)?.map_err(|e| super::in_netns(e, netns))?;
    record.tc_devices.retain(|known| devices.iter().any(|device| device.index == known.device.index));
    for device in devices {
        // Devices may be given another name.
        for known in record.tc_devices.iter_mut().filter(|known| known.device.index == device.index) {
            known.device.name.clone_from(&device.name);
        }
        let is_known = |known: &TcDevice| known.device == device && known.hook == hook;
        if !record.tc_devices.iter().any(is_known) {
            record.tc_devices.push(TcDevice { device, hook, created_clsact: false });
        }
    }
    record.tc_hook = Some(hook);
    Ok(())
}

/// See the module.
#[derive(Debug)]
pub(super) struct TcEngine;

impl Engine for TcEngine {
    fn attach(
        &self,
        pins: &Pins,
        netns: &Netns,
        record: &mut Record,
        remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()> {
        let mut object = object::load(pins, Some(record))?;
        let program: &mut SchedClassifier = object::program(&mut object, PROGRAM)?;
        program.load().map_err(|error| load_error(PROGRAM, error))?;
        make_directory(&pins.pod(record.netns_cookie))?;
        if has_companion() {
            super::sk_lookup::attach_program(pins, netns, &mut object, record, COMPANION)?;
        }
        let wanted = record.tc_hook.unwrap_or_else(default_hook);
        for i in 0..record.tc_devices.len() {
            let TcDevice { device, hook, .. } = record.tc_devices[i].clone();
            match hook {
                _ if hook != wanted => {}
                TcHook::Tcx => attach_tcx(pins, netns, &mut object, record, &device)?,
                TcHook::Clsact => {
                    let looked = netns
                        .run(|| Ok((clsact::exists(&device)?, clsact::has_filter(&device, PROGRAM)?)))?;
                    let (exists, has_filter) = looked.map_err(|e| super::in_netns(e, netns))?;
                    if !exists {
                        // Remembered before it is done, so that an interruption leaves nothing behind.
                        record.tc_devices[i].created_clsact = true;
                        remember(record)?;
                    }
                    // One that is there serves on: the settings are in the maps.
                    if !has_filter {
                        attach_clsact(netns, &mut object, &device, !exists)?;
                    }
                }
            }
        }
        let (keep, replaced) = std::mem::take(&mut record.tc_devices)
            .into_iter()
            .partition::<Vec<_>, _>(|device| device.hook == wanted);
        for device in &replaced {
            detach_device(pins, Some(netns), record, device)?;
        }
        record.tc_devices = keep;
        Ok(())
    }

    fn detach(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Result<()> {
        for device in &record.tc_devices {
            detach_device(pins, netns, record, device)?;
        }
        remove_tree(&pins.pod(record.netns_cookie).join(COMPANION))
    }

    fn problems(&self, pins: &Pins, netns: &Netns, record: &Record) -> Vec<String> {
        let here = |known: &TcDevice| match known.hook {
            TcHook::Tcx => pin(pins, record, &known.device).exists(),
            TcHook::Clsact => {
                matches!(netns.run(|| clsact::has_filter(&known.device, PROGRAM)), Ok(Ok(true)))
            }
        };
        let devices = netns.run(routing::devices).ok().and_then(std::result::Result::ok).unwrap_or_default();
        devices
            .iter()
            .filter(|device| !record.tc_devices.iter().any(|known| known.device == **device && here(known)))
            .map(|device| {
                format!("connections that come in by {} are not steered: attach again", device.name)
            })
            .collect()
    }
}

fn detach_device(pins: &Pins, netns: Option<&Netns>, record: &Record, device: &TcDevice) -> Result<()> {
    let TcDevice { device, hook, created_clsact } = device;
    match (hook, netns) {
        (TcHook::Tcx, _) => remove_tree(&pin(pins, record, device)),
        (TcHook::Clsact, Some(netns)) => {
            let detached = netns.run(|| detach_clsact(device, *created_clsact))?;
            detached.bpf(|| format!("detach {PROGRAM} from {}", device.name))
        }
        // The devices went with their namespace.
        (TcHook::Clsact, None) => Ok(()),
    }
}

fn pin(pins: &Pins, record: &Record, device: &Device) -> std::path::PathBuf {
    pins.pod(record.netns_cookie).join(format!("{PROGRAM}_{}", device.index))
}

fn attach_tcx(pins: &Pins, netns: &Netns, object: &mut Ebpf, record: &Record, device: &Device) -> Result<()> {
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

fn detach_clsact(device: &Device, created: bool) -> io::Result<()> {
    if clsact::has_filter(device, PROGRAM).map_err(io::Error::other)? {
        let detached = qdisc_detach_program(&device.name, TcAttachType::Ingress, PROGRAM);
        detached.map_err(io::Error::other)?;
    }
    if created {
        clsact::remove_if_empty(device).map_err(io::Error::other)?;
    }
    Ok(())
}
