//! The default engine: an `sk_lookup` program in the pod's network namespace.

use std::io::Read as _;

use aya::{
    Btf, Ebpf,
    programs::{Iter, SkLookup},
};

use super::{
    engine::Engine,
    error::{BpfContext as _, Result, load_error},
    hooks::pin_link,
    object,
    pins::{Pins, make_directory, remove_tree},
    record::Record,
};
use crate::netns::Netns;

const PROGRAM: &str = "srcip_sk_lookup";
const ITERATOR: &str = "srcip_iter_tcp";

/// See the module.
#[derive(Debug)]
pub(super) struct SkLookupEngine;

impl Engine for SkLookupEngine {
    fn prepare(&self, pins: &Pins, netns: &Netns, record: &Record) -> Result<()> {
        register_listeners(&mut object::load(pins, Some(record))?, netns)
    }

    fn attach(
        &self,
        pins: &Pins,
        netns: &Netns,
        record: &mut Record,
        _remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()> {
        let mut object = object::load(pins, Some(record))?;
        // The hooks register listeners from now on; this finds those that were there before.
        register_listeners(&mut object, netns)?;
        attach_program(pins, netns, &mut object, record, PROGRAM)
    }

    fn detach(&self, pins: &Pins, _netns: Option<&Netns>, record: &Record) -> Result<()> {
        remove_tree(&pins.pod(record.netns_cookie).join(PROGRAM))
    }

    fn problems(&self, pins: &Pins, _netns: &Netns, record: &Record) -> Vec<String> {
        if pins.pod(record.netns_cookie).join(PROGRAM).exists() {
            Vec::new()
        } else {
            vec!["its program is gone: attach again".to_owned()]
        }
    }
}

/// Runs the iterator over the pod's sockets.
fn register_listeners(object: &mut Ebpf, netns: &Netns) -> Result<()> {
    let iterator: &mut Iter = object::program(object, ITERATOR)?;
    let btf = Btf::from_sys_fs().bpf(|| "read the kernel's BTF".to_owned())?;
    iterator.load("tcp", &btf).map_err(|error| load_error(ITERATOR, error))?;
    let link = iterator.attach().and_then(|id| iterator.take_link(id));
    let link = link.bpf(|| format!("attach {ITERATOR}"))?;
    let read = netns.run(move || -> std::io::Result<()> {
        let mut file = link.into_file().map_err(std::io::Error::other)?;
        file.read_to_end(&mut Vec::new()).map(drop)
    })?;
    read.bpf(|| format!("run {ITERATOR} in {}", netns.path().display()))?;
    if tracing::enabled!(tracing::Level::DEBUG) {
        match aya_log::EbpfLogger::init(object) {
            Ok(mut logger) => logger.flush(),
            Err(error) => tracing::debug!("the programs' log cannot be read: {error}"),
        }
    }
    Ok(())
}

/// Attaches one of the object's `sk_lookup` programs to the pod's network namespace, unless it is.
pub(super) fn attach_program(
    pins: &Pins,
    netns: &Netns,
    object: &mut Ebpf,
    record: &Record,
    name: &str,
) -> Result<()> {
    let directory = pins.pod(record.netns_cookie);
    let pin = directory.join(name);
    if pin.exists() {
        return Ok(());
    }
    let program: &mut SkLookup = object::program(object, name)?;
    program.load().map_err(|error| load_error(name, error))?;
    make_directory(&directory)?;
    let link = program.attach(netns).and_then(|id| program.take_link(id));
    let action = || format!("attach {name} to {}", netns.path().display());
    pin_link(link.bpf(action)?.into(), &pin)?;
    Ok(())
}
