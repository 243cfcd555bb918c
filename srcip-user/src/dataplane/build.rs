//! A build of the eBPF programs: its bytes, and what can be known of it without the kernel.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    env, fmt, fs,
    ops::Range,
    path::{Path, PathBuf},
};

use aya::maps::MapInfo;
use aya_obj::maps::PinningType;
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};

use super::error::{BpfContext as _, Error, FileContext as _, Result};
use crate::{EBPF_OBJECT, NORTH_SOUTH_OBJECT, WATCH_OBJECT};

/// For developers: other objects than those built in.
const STEER_VARIABLE: &str = "SRCIP_EBPF_OBJECT";
const WATCH_VARIABLE: &str = "SRCIP_WATCH_OBJECT";
const NORTH_SOUTH_VARIABLE: &str = "SRCIP_NORTH_SOUTH_OBJECT";

/// The object files that belong together.
#[derive(Clone)]
pub struct Build {
    /// The programs that steer.
    pub steer: Cow<'static, [u8]>,
    /// The program that watches, of which the recorder is a copy.
    pub watch: Cow<'static, [u8]>,
    /// The programs for traffic that enters the cluster.
    pub north_south: Cow<'static, [u8]>,
}

impl fmt::Debug for Build {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Build").finish_non_exhaustive()
    }
}

impl Build {
    /// What is built in, or what the environment names instead.
    pub fn current() -> Result<Self> {
        let named = |variable, built_in: &'static [u8]| -> Result<Cow<'static, [u8]>> {
            let Some(path) = env::var_os(variable).map(PathBuf::from) else { return Ok(built_in.into()) };
            fs::read(&path).file("read", &path).map(Cow::from)
        };
        Ok(Self {
            steer: named(STEER_VARIABLE, EBPF_OBJECT)?,
            watch: named(WATCH_VARIABLE, WATCH_OBJECT)?,
            north_south: named(NORTH_SOUTH_VARIABLE, NORTH_SOUTH_OBJECT)?,
        })
    }
}

/// What a map must be to be shared with these programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, key_size, value_size, max_entries } = self;
        write!(f, "type {kind}, {max_entries} entries of {key_size} + {value_size} bytes")
    }
}

/// One object file, parsed.
pub(super) struct Image {
    bytes: Cow<'static, [u8]>,
    /// Where in the file the constants are.
    constants: BTreeMap<String, Range<usize>>,
    /// The maps that are pinned.
    maps: BTreeMap<String, Shape>,
}

impl Image {
    /// Parses an object. Maps named in `pinned` are pinned, and those that say so themselves.
    pub(super) fn parse(bytes: Cow<'static, [u8]>, pinned: &[&str]) -> Result<Self> {
        let parse = || "parse the eBPF object".to_owned();
        let maps = aya_obj::Object::parse(&bytes)
            .bpf(parse)?
            .maps
            .into_iter()
            .filter(|(name, map)| map.pinning() == PinningType::ByName || pinned.contains(&name.as_str()))
            .map(|(name, map)| {
                let shape = Shape {
                    kind: map.map_type(),
                    key_size: map.key_size(),
                    value_size: map.value_size(),
                    max_entries: map.max_entries(),
                };
                (name, shape)
            })
            .collect();
        let constants = constants(&bytes).bpf(parse)?;
        Ok(Self { bytes, constants, maps })
    }

    /// The object with other values for its constants, in the processor's byte order.
    pub(super) fn with_constants(&self, values: &[(&str, &[u8])]) -> Result<Vec<u8>> {
        let mut bytes = self.bytes.to_vec();
        for (name, value) in values {
            let place = self.constants.get(*name).filter(|place| place.len() == value.len());
            let place = place.ok_or("the eBPF object has no such constant");
            bytes[place.bpf(|| format!("set the constant {name}"))?.clone()].copy_from_slice(value);
        }
        Ok(bytes)
    }

    /// Checks the pinned maps in `directory` and returns their ids. Those that are not there are nobody's
    /// fault: whoever made them was interrupted, or knew nothing of them.
    pub(super) fn check(&self, directory: &Path) -> Result<Vec<Option<u32>>> {
        let check = |(name, &expected): (&String, &Shape)| {
            let path = directory.join(name);
            if !path.exists() {
                return Ok(None);
            }
            let info = MapInfo::from_pin(&path).bpf(|| format!("read what the map {} is", path.display()))?;
            let found = Shape {
                kind: info.map_type().map_or(u32::MAX, |kind| kind as u32),
                key_size: info.key_size(),
                value_size: info.value_size(),
                max_entries: info.max_entries(),
            };
            if found == expected {
                Ok(Some(info.id()))
            } else {
                Err(Error::OtherShape { path, found, expected })
            }
        };
        self.maps.iter().map(check).collect()
    }
}

/// The variables of the sections `.rodata`, by name.
fn constants(bytes: &[u8]) -> object::Result<BTreeMap<String, Range<usize>>> {
    let file = object::File::parse(bytes)?;
    let mut constants = BTreeMap::new();
    for symbol in file.symbols() {
        let Some(section) = symbol.section_index() else { continue };
        let section = file.section_by_index(section)?;
        let Some((offset, _)) = section.file_range().filter(|_| section.name() == Ok(".rodata")) else {
            continue;
        };
        let start = (offset + symbol.address() - section.address()) as usize;
        constants.insert(symbol.name()?.to_owned(), start..start + symbol.size() as usize);
    }
    Ok(constants)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_and_maps_of_what_is_built_in() {
        let build = Build::current().unwrap();
        let image = Image::parse(build.steer, &[]).unwrap();
        let changed = image.with_constants(&[("NETNS_COOKIE", &7_u64.to_ne_bytes())]).unwrap();
        let differ = changed.iter().zip(&*image.bytes).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 1);
        assert!(image.with_constants(&[("NETNS_COOKIE", &[0])]).is_err());
        assert!(image.with_constants(&[("NOTHING", &[0])]).is_err());
        assert!(image.maps.contains_key("PODS") && !image.maps.contains_key(".rodata"));
        let watch = Image::parse(build.watch, &["HISTORY"]).unwrap();
        assert_eq!(watch.maps.keys().collect::<Vec<_>>(), ["HISTORY"]);
    }
}
