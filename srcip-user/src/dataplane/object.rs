//! Loads the eBPF object: its maps from their pins, its programs as they are needed.

use std::{borrow::Cow, env, fs, path::PathBuf};

use aya::{Ebpf, EbpfLoader, programs::Program};

use super::{
    error::{BpfContext as _, Error, FileContext as _, Result, object_error},
    pins::Pins,
    record::Record,
};
use crate::EBPF_OBJECT;

/// For developers: another object than the one built in.
const OBJECT_VARIABLE: &str = "SRCIP_EBPF_OBJECT";

/// Loads the object for the node, or for one pod. Maps that are not pinned yet are made and pinned.
pub(super) fn load(pins: &Pins, pod: Option<&Record>) -> Result<Ebpf> {
    let object: Cow<'_, [u8]> = match env::var_os(OBJECT_VARIABLE) {
        Some(path) => {
            let path = PathBuf::from(path);
            fs::read(&path).file("read", &path)?.into()
        }
        None => EBPF_OBJECT.into(),
    };
    let cookie = pod.map_or(0, |record| record.netns_cookie.0);
    let port = pod.map_or(0, |record| record.proxy_port);
    let level = log_level();
    EbpfLoader::new()
        .default_map_pin_directory(pins.maps())
        .override_global("NETNS_COOKIE", &cookie, true)
        .override_global("PROXY_PORT", &port, true)
        .override_global(aya_log::LEVEL, &level, true)
        .load(&object)
        .map_err(object_error)
}

/// `aya_log_common::Level::Info`. Only the listener iterator logs: it alone runs while we are here to
/// read. Statements above the level cost nothing, the verifier removes them.
fn log_level() -> u8 {
    const INFO: u8 = 3;
    if tracing::enabled!(tracing::Level::DEBUG) { INFO } else { 0 }
}

/// A program of the object, as its own type.
pub(crate) fn program<'a, P>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = aya::programs::ProgramError>,
{
    let program = object.program_mut(name).ok_or_else(|| Error::Bpf {
        action: format!("find the program {name}"),
        source: "the eBPF object does not have it".into(),
    })?;
    program.try_into().bpf(|| format!("use the program {name}"))
}
