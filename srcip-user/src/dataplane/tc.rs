//! The second engine: a `tc` program at ingress of the pod's devices.

use std::io;

use aya::{
    programs::{
        LinkOrder, ProgramError, ProgramType, SchedClassifier, TcAttachType, links::FdLink,
        tc::TcAttachOptions,
    },
    sys::is_program_supported,
};

use super::{
    engine::Engine,
    error::{BpfContext as _, Result},
    link,
    object::{Programs, Replaced},
    pins::{Pins, make_directory},
    record::{Record, TcDevice, TcHook},
};
use crate::{
    clsact::{self, Filter},
    netns::Netns,
    routing::{self, Device},
};

const PROGRAM: &str = "srcip_tc";

/// An `sk_lookup` program for what a listener cannot simply be assigned to.
pub(super) const COMPANION: &str = "srcip_tc_companion";

/// Whether the kernel can run the companion: Linux 5.9.
pub(super) fn has_companion() -> bool {
    is_program_supported(ProgramType::SkLookup).unwrap_or(false)
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
        programs: &mut Programs<'_>,
        netns: &Netns,
        record: &mut Record,
        remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()> {
        make_directory(&programs.pins.pod(record.netns_cookie))?;
        if record.cgroup.is_some()
            && let Err(error) = programs
                .listeners()
                .and_then(|listeners| listeners.register(netns, record.netns_cookie, record.proxy_port))
        {
            // This engine finds listeners by itself. It is their mark that is missed, and only where Istio's
            // rules are in force as well.
            tracing::debug!("listeners that were there before have no mark: {error}");
        }
        if has_companion() {
            super::sk_lookup::attach_program(programs, netns, record, COMPANION)?;
        }
        let wanted = record.tc_hook.unwrap_or_else(TcHook::newest);
        for i in 0..record.tc_devices.len() {
            let TcDevice { device, hook, .. } = record.tc_devices[i].clone();
            match hook {
                _ if hook != wanted => {}
                TcHook::Tcx => attach_tcx(programs, netns, record, &device)?,
                TcHook::Clsact => {
                    let looked = netns
                        .run(|| Ok((clsact::exists(&device)?, clsact::find_filter(&device, PROGRAM)?)))?;
                    let (exists, filter) = looked.map_err(|e| super::in_netns(e, netns))?;
                    if !exists {
                        // Remembered before it is done, so that an interruption leaves nothing behind.
                        record.tc_devices[i].created_clsact = true;
                        remember(record)?;
                    }
                    match filter {
                        Some(filter) => upgrade_clsact(programs, netns, &device, filter)?,
                        None => attach_clsact(programs, netns, &device, !exists)?,
                    }
                }
            }
        }
        let (keep, replaced) = std::mem::take(&mut record.tc_devices)
            .into_iter()
            .partition::<Vec<_>, _>(|device| device.hook == wanted);
        for device in &replaced {
            detach_device(programs.pins, Some(netns), record, device)?;
        }
        record.tc_devices = keep;
        Ok(())
    }

    fn upgrade(&self, programs: &mut Programs<'_>, netns: Option<&Netns>, record: &Record) -> Result<()> {
        programs.upgrade(COMPANION, &programs.pins.pod(record.netns_cookie).join(COMPANION))?;
        for TcDevice { device, hook, .. } in &record.tc_devices {
            match (hook, netns) {
                (TcHook::Tcx, _) => drop(programs.upgrade(PROGRAM, &pin(programs.pins, record, device))?),
                (TcHook::Clsact, Some(netns)) => {
                    let filter = netns.run(|| clsact::find_filter(device, PROGRAM))?;
                    if let Some(filter) = filter.map_err(|e| super::in_netns(e, netns))? {
                        upgrade_clsact(programs, netns, device, filter)?;
                    }
                }
                // The devices went with their namespace.
                (TcHook::Clsact, None) => {}
            }
        }
        Ok(())
    }

    fn detach(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Result<()> {
        for device in &record.tc_devices {
            detach_device(pins, netns, record, device)?;
        }
        link::remove(&pins.pod(record.netns_cookie).join(COMPANION))
    }

    fn looks_inside(&self) -> bool {
        true
    }

    fn problems(&self, pins: &Pins, netns: Option<&Netns>, record: &Record) -> Vec<String> {
        // The devices went with it.
        let Some(netns) = netns else { return Vec::new() };
        let here = |known: &TcDevice| match known.hook {
            TcHook::Tcx => pin(pins, record, &known.device).exists(),
            TcHook::Clsact => {
                matches!(netns.run(|| clsact::find_filter(&known.device, PROGRAM)), Ok(Ok(Some(_))))
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
        (TcHook::Tcx, _) => link::remove(&pin(pins, record, device)),
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

fn attach_tcx(programs: &mut Programs<'_>, netns: &Netns, record: &Record, device: &Device) -> Result<()> {
    let pin = pin(programs.pins, record, device);
    programs.ensure(PROGRAM, &pin, |program| {
        let program: &mut SchedClassifier = program.try_into().bpf(|| attach_action(device))?;
        let link = netns.run(move || -> std::result::Result<FdLink, ProgramError> {
            // First: what another program lets through would otherwise end the chain before ours.
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
            let link = program.take_link(id)?;
            link.try_into().map_err(|error| ProgramError::IOError(io::Error::other(error)))
        })?;
        link.bpf(|| attach_action(device))
    })
}

fn attach_clsact(programs: &mut Programs<'_>, netns: &Netns, device: &Device, create: bool) -> Result<()> {
    let program = programs.loaded(PROGRAM)?;
    let program: &mut SchedClassifier = program.try_into().bpf(|| attach_action(device))?;
    netns.run(move || clsact::add_filter(program, device, create))?.bpf(|| attach_action(device))
}

/// Puts this build's program into a filter that is there.
fn upgrade_clsact(programs: &mut Programs<'_>, netns: &Netns, device: &Device, filter: Filter) -> Result<()> {
    let (old, new) = (filter.tag, programs.tag(PROGRAM)?);
    if old == new {
        return Ok(());
    }
    let action = || format!("replace {PROGRAM} at the ingress of {}", device.name);
    let program: &mut SchedClassifier = programs.loaded(PROGRAM)?.try_into().bpf(action)?;
    netns.run(move || clsact::replace_filter(program, device, filter))?.bpf(action)?;
    programs.replaced(Replaced { program: PROGRAM, at: netns.path().join(&device.name), old, new });
    Ok(())
}

fn attach_action(device: &Device) -> String {
    format!("attach {PROGRAM} to the ingress of {}", device.name)
}

fn detach_clsact(device: &Device, created: bool) -> io::Result<()> {
    for filter in clsact::filters(device, PROGRAM).map_err(io::Error::other)? {
        clsact::remove_filter(device, filter).map_err(io::Error::other)?;
    }
    if created {
        clsact::remove_if_empty(device).map_err(io::Error::other)?;
    }
    Ok(())
}
