//! What an instance consists of, in the kernel and in the process that looks after it.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::Result;
use aya::{
    maps::MapInfo,
    programs::{loaded_links, loaded_programs},
};

/// How many there are of each.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counts {
    /// Programs that use the instance's maps.
    pub programs: usize,
    /// The maps of those, pinned or not.
    pub maps: usize,
    /// Links of these programs.
    pub links: usize,
    /// Attachments that have pins.
    pub pinned_pods: usize,
    /// Descriptors of the process.
    pub descriptors: usize,
    /// Its threads.
    pub threads: usize,
}

impl Counts {
    /// Of the instance at a pin path, and a process.
    pub fn of(pin_path: &Path, process: u32) -> Result<Self> {
        let pinned = fs::read_dir(pin_path.join("maps"))?;
        let pinned: Vec<_> =
            pinned.map(|map| Ok(MapInfo::from_pin(map?.path())?.id())).collect::<Result<_>>()?;
        let (mut programs, mut maps) = (BTreeSet::new(), BTreeSet::new());
        for program in loaded_programs().filter_map(Result::ok) {
            // One that goes just now is nobody's.
            let Ok(Some(used)) = program.map_ids() else { continue };
            if used.iter().any(|map| pinned.contains(map)) {
                programs.insert(program.id());
                maps.extend(used);
            }
        }
        let links = loaded_links().filter_map(Result::ok);
        let of_process =
            |what: &str| Ok::<_, anyhow::Error>(fs::read_dir(format!("/proc/{process}/{what}"))?.count());
        Ok(Self {
            programs: programs.len(),
            maps: maps.len(),
            links: links.filter(|link| programs.contains(&link.program_id())).count(),
            pinned_pods: fs::read_dir(pin_path.join("pods"))?.count(),
            descriptors: of_process("fd")?,
            threads: of_process("task")?,
        })
    }
}
