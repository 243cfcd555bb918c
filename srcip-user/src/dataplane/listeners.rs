//! Finds the proxy's listeners that were there before srcip, with an iterator over a pod's sockets.

use std::{
    io::{self, Read as _},
    sync::{Mutex, PoisonError},
};

use aya::{
    Btf, Ebpf,
    maps::{Array, MapData},
    programs::Iter,
};
use aya_log::EbpfLogger;
use aya_obj::btf::BtfKind;
use srcip_common::keys::ListenerKey;

use super::{
    error::{BpfContext as _, Error, Result, load_error},
    object::program,
};
use crate::netns::{Netns, NetnsCookie};

const ITERATOR: &str = "srcip_iter_tcp";
const WANTED: &str = "WANTED";

/// Parsing it takes 20 ms and 23 MB: who asks whether the kernel can leaves it for who loads.
static KERNEL_BTF: Mutex<Option<Btf>> = Mutex::new(None);

/// Whether the kernel has what it takes.
pub(super) fn are_supported() -> bool {
    let Ok(btf) = Btf::from_sys_fs() else { return false };
    let supported = btf.id_by_type_name_kind("bpf_iter_tcp", BtfKind::Func).is_ok();
    *KERNEL_BTF.lock().unwrap_or_else(PoisonError::into_inner) = Some(btf);
    supported
}

/// The iterator, loaded. It serves all pods of an instance, one after the other.
pub(super) struct Listeners {
    object: Ebpf,
    wanted: Array<MapData, ListenerKey>,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    log_level: u8,
}

impl Listeners {
    /// Loads it. `log_level` is what the object was loaded with; 0 to be silent.
    pub(super) fn load(mut object: Ebpf, log_level: u8) -> Result<Self> {
        let kept = KERNEL_BTF.lock().unwrap_or_else(PoisonError::into_inner).take();
        let btf = match kept {
            Some(btf) => btf,
            None => Btf::from_sys_fs().bpf(|| "read the kernel's BTF".to_owned())?,
        };
        let iterator: &mut Iter = program(&mut object, ITERATOR)?;
        iterator.load("tcp", &btf).map_err(|error| load_error(ITERATOR, error))?;
        let wanted = object.take_map(WANTED).ok_or_else(|| Error::Bpf {
            action: format!("find the map {WANTED}"),
            source: "the eBPF object does not have it".into(),
        })?;
        let wanted = Array::try_from(wanted).bpf(|| format!("use the map {WANTED}"))?;
        let logger = match log_level {
            0 => None,
            _ => EbpfLogger::init(&mut object)
                .inspect_err(|error| tracing::debug!("the programs' log cannot be read: {error}"))
                .ok(),
        };
        Ok(Self { object, wanted, logger, log_level })
    }

    /// What it was loaded with.
    pub(super) fn log_level(&self) -> u8 {
        self.log_level
    }

    /// Gives the pod's listeners on `port` (host byte order) their slots. Those to come are given theirs by
    /// the hooks.
    pub(super) fn register(&mut self, netns: &Netns, cookie: NetnsCookie, port: u16) -> Result<()> {
        // Family and slot are for the program to find.
        let wanted = ListenerKey { netns: cookie.0, port, family: 0, slot: 0 };
        self.wanted.set(0, wanted, 0).bpf(|| format!("write the map {WANTED}"))?;
        let iterator: &mut Iter = program(&mut self.object, ITERATOR)?;
        let link = iterator.attach().and_then(|id| iterator.take_link(id));
        let link = link.bpf(|| format!("attach {ITERATOR}"))?;
        let read = netns.run(move || -> io::Result<()> {
            let mut file = link.into_file().map_err(io::Error::other)?;
            file.read_to_end(&mut Vec::new()).map(drop)
        })?;
        read.bpf(|| format!("run {ITERATOR} in {}", netns.path().display()))?;
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        Ok(())
    }
}
