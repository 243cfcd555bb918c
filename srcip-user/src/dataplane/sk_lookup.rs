//! The default engine: an `sk_lookup` program in the pod's network namespace.

use aya::programs::{Program, SkLookup, links::FdLink};

use super::{
    engine::Engine,
    error::{BpfContext as _, Result},
    link,
    object::Programs,
    pins::{Pins, make_directory},
    record::Record,
};
use crate::netns::Netns;

pub(super) const PROGRAM: &str = "srcip_sk_lookup";

/// See the module.
#[derive(Debug)]
pub(super) struct SkLookupEngine;

impl Engine for SkLookupEngine {
    fn prepare(&self, programs: &mut Programs<'_>, netns: &Netns, record: &Record) -> Result<()> {
        programs.listeners()?.register(netns, record.netns_cookie, record.proxy_port)
    }

    fn attach(
        &self,
        programs: &mut Programs<'_>,
        netns: &Netns,
        record: &mut Record,
        _remember: &mut dyn FnMut(&Record) -> Result<()>,
    ) -> Result<()> {
        // The hooks register listeners from now on; this finds those that were there before.
        self.prepare(programs, netns, record)?;
        attach_program(programs, netns, record, PROGRAM)
    }

    fn upgrade(&self, programs: &mut Programs<'_>, _netns: Option<&Netns>, record: &Record) -> Result<()> {
        let pin = programs.pins.pod(record.netns_cookie).join(PROGRAM);
        programs.upgrade(PROGRAM, &pin).map(drop)
    }

    fn detach(&self, pins: &Pins, _netns: Option<&Netns>, record: &Record) -> Result<()> {
        link::remove(&pins.pod(record.netns_cookie).join(PROGRAM))
    }

    fn looks_inside(&self) -> bool {
        false
    }

    fn problems(&self, pins: &Pins, _netns: Option<&Netns>, record: &Record) -> Vec<String> {
        if pins.pod(record.netns_cookie).join(PROGRAM).exists() {
            Vec::new()
        } else {
            vec!["its program is gone: attach again".to_owned()]
        }
    }
}

/// Sees to it that one of the `sk_lookup` programs is attached to the pod's network namespace.
pub(super) fn attach_program(
    programs: &mut Programs<'_>,
    netns: &Netns,
    record: &Record,
    name: &'static str,
) -> Result<()> {
    let directory = programs.pins.pod(record.netns_cookie);
    make_directory(&directory)?;
    programs.ensure(name, &directory.join(name), |program: &mut Program| {
        let action = || format!("attach {name} to {}", netns.path().display());
        let program: &mut SkLookup = program.try_into().bpf(action)?;
        let link = program.attach(netns).and_then(|id| program.take_link(id));
        Ok(FdLink::from(link.bpf(action)?))
    })
}
