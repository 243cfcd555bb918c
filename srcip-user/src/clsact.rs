//! The `clsact` queueing discipline and its filters, for what attaches below Linux 6.6.
//!
//! Everything here acts on the calling thread's network namespace.

use std::io;

use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link as _,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, qdisc_add_clsact},
};
use futures_util::TryStreamExt as _;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use crate::{
    dataplane::link::Tag,
    routing::{Device, Result, failing, netlink},
};

/// Before all filters that came earlier: what another one lets through would otherwise end the chain before ours.
const PRIORITY: u16 = 1;

/// Whether a device takes ingress filters: has `clsact`, or what is a half of it and takes its place, `ingress`.
pub fn exists(device: &Device) -> Result<bool> {
    has_qdisc(device, &["clsact", "ingress"])
}

fn has_qdisc(device: &Device, kinds: &[&str]) -> Result<bool> {
    netlink(async |handle| {
        let request = handle.qdisc().get().index(device.index.cast_signed());
        let found = request.execute().try_collect::<Vec<_>>().await;
        let found = failing("read the queueing disciplines", found)?;
        let is_one = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kinds.contains(&kind.as_str()));
        let index = device.index.cast_signed();
        Ok(found.iter().any(|qdisc| qdisc.header.index == index && qdisc.attributes.iter().any(is_one)))
    })
}

/// An ingress filter that runs a BPF program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Filter {
    /// Its priority.
    pub priority: u16,
    /// Its number among those of that priority.
    pub handle: u32,
    /// Its program's.
    pub tag: Tag,
    /// Its program's number, as the kernel counts.
    pub program: u32,
}

/// The ingress filters of a device that run a BPF program `name`.
pub fn filters(device: &Device, name: &str) -> Result<Vec<Filter>> {
    if !exists(device)? {
        return Ok(Vec::new());
    }
    netlink(async |handle| {
        let filters = handle.traffic_filter(device.index.cast_signed()).get().ingress().execute();
        let filters = failing("read the filters", filters.try_collect::<Vec<_>>().await)?;
        Ok(filters.iter().filter_map(|filter| as_filter(filter, name)).collect())
    })
}

/// The first ingress filter of a device that runs a BPF program `name`.
pub fn find_filter(device: &Device, name: &str) -> Result<Option<Filter>> {
    Ok(filters(device, name)?.first().copied())
}

/// Adds an ingress filter that runs a program, before what is there, and `clsact` first if it is to be `created`.
/// The filter holds the program.
pub fn add_filter(
    program: &mut SchedClassifier,
    device: &Device,
    created: bool,
) -> std::result::Result<(), ProgramError> {
    if created {
        qdisc_add_clsact(&device.name)?;
    }
    let options = TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, ..Default::default() });
    let id = program.attach_with_options(&device.name, TcAttachType::Ingress, options)?;
    // Dropping the link would remove it.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Puts another program into a filter that is there: every run is one of the old program or one of the new.
pub fn replace_filter(
    program: &mut SchedClassifier,
    device: &Device,
    filter: Filter,
) -> std::result::Result<(), ProgramError> {
    let id = program.attach_to_link(filter.link(device)?)?;
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes a filter, and no other.
pub fn remove_filter(device: &Device, filter: Filter) -> std::result::Result<(), ProgramError> {
    filter.link(device)?.detach()
}

impl Filter {
    fn link(self, device: &Device) -> io::Result<SchedClassifierLink> {
        let Self { priority, handle, .. } = self;
        SchedClassifierLink::attached(&device.name, TcAttachType::Ingress, priority, handle.into(), None)
    }
}

/// Removes `clsact` from a device, unless somebody else has filters in it.
pub fn remove_if_empty(device: &Device) -> Result<()> {
    if !has_qdisc(device, &["clsact"])? {
        return Ok(());
    }
    netlink(async |handle| {
        let index = device.index.cast_signed();
        let mut filters = handle.traffic_filter(index);
        for request in [filters.get().ingress(), filters.get().egress()] {
            let found = request.execute().try_collect::<Vec<_>>().await;
            if !failing("read the filters", found)?.is_empty() {
                return Ok(());
            }
        }
        let mut qdiscs = handle.qdisc();
        let mut request = qdiscs.del(index);
        request.message_mut().header.parent = TcHandle::CLSACT;
        request.message_mut().header.handle = TcHandle::from(0xffff_0000);
        failing("remove the clsact queueing discipline", request.execute().await)
    })
}

fn as_filter(message: &TcMessage, name: &str) -> Option<Filter> {
    let (mut tag, mut program) = (None, None);
    let mut is_it = false;
    for attribute in &message.attributes {
        let TcAttribute::Options(options) = attribute else { continue };
        for option in options {
            match option {
                TcOption::Bpf(TcFilterBpfOption::ProgName(found)) => is_it |= found == name,
                TcOption::Bpf(TcFilterBpfOption::ProgTag(found)) => {
                    tag = Some(Tag(u64::from_be_bytes(*found)))
                }
                TcOption::Bpf(TcFilterBpfOption::ProgId(found)) => program = Some(*found),
                _ => {}
            }
        }
    }
    // The upper half is the priority, the lower one the protocol: include/uapi/linux/rtnetlink.h, `tcm_info`.
    let priority = (message.header.info >> 16) as u16;
    let handle = message.header.handle.into();
    let (tag, program) = (tag?, program?);
    is_it.then_some(Filter { priority, handle, tag, program })
}
