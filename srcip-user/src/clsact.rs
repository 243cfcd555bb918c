//! The `clsact` queueing discipline and its filters, for the `tc` engine below Linux 6.6.
//!
//! Everything here acts on the calling thread's network namespace.

use futures_util::TryStreamExt as _;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use crate::routing::{Device, Result, failing, netlink};

/// Whether a device has `clsact`.
pub fn exists(device: &Device) -> Result<bool> {
    netlink(async |handle| {
        let request = handle.qdisc().get().index(device.index.cast_signed());
        let found = request.execute().try_collect::<Vec<_>>().await;
        let found = failing("read the queueing disciplines", found)?;
        Ok(found.iter().any(|qdisc| {
            qdisc.header.index == device.index.cast_signed()
                && qdisc.attributes.contains(&TcAttribute::Kind("clsact".to_owned()))
        }))
    })
}

/// Whether an ingress filter of a device runs the BPF program `name`.
pub fn has_filter(device: &Device, name: &str) -> Result<bool> {
    if !exists(device)? {
        return Ok(false);
    }
    netlink(async |handle| {
        let filters = handle.traffic_filter(device.index.cast_signed()).get().ingress().execute();
        let filters = failing("read the filters", filters.try_collect::<Vec<_>>().await)?;
        Ok(filters.iter().any(|filter| runs_program(filter, name)))
    })
}

/// Removes `clsact` from a device, unless somebody else has filters in it.
pub fn remove_if_empty(device: &Device) -> Result<()> {
    if !exists(device)? {
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

fn runs_program(filter: &TcMessage, name: &str) -> bool {
    filter.attributes.iter().any(|attribute| match attribute {
        TcAttribute::Options(options) => options.iter().any(
            |option| matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(found)) if found == name),
        ),
        _ => false,
    })
}
