//! The eBPF objects in this process: what is costly is done once, not once for each pod.

use std::{
    collections::HashMap,
    fmt, mem,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{Program, ProgramError, links::FdLink},
};

use super::{
    build::{Build, Image},
    error::{BpfContext as _, Error, Result, load_error, object_error},
    link::{Link, Tag},
    listeners::Listeners,
    pins::Pins,
};
use crate::netns::NetnsCookie;

/// The recorder's maps that are pinned.
const RECORDER_MAPS: [&str; 3] = ["HISTORY", "HISTORY_COUNT", "WATCHED"];

/// A program that was put in another one's place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Replaced {
    /// Its name.
    pub program: &'static str,
    /// Where: the pin of its link, or the device it filters.
    pub at: PathBuf,
    /// What was there.
    pub old: Tag,
    /// What is there now.
    pub new: Tag,
}

/// What a process keeps. Nothing of it is attached to anything.
#[derive(Default)]
pub(super) struct Objects {
    build: Option<Build>,
    parsed: Option<Parsed>,
    tags: HashMap<&'static str, Tag>,
    listeners: Option<(Vec<Option<u32>>, Listeners)>,
    replaced: Vec<Replaced>,
}

struct Parsed {
    /// Without the kernel's BTF, which it reads and parses whenever one is made: 20 ms and 23 MB. These
    /// programs do without.
    loader: EbpfLoader<'static>,
    steer: Image,
    watch: Image,
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").finish_non_exhaustive()
    }
}

impl Objects {
    pub(super) fn of_build(build: Build) -> Self {
        Self { build: Some(build), ..Self::default() }
    }

    fn parsed(&mut self) -> Result<&mut Parsed> {
        if self.parsed.is_none() {
            let Build { steer, watch, .. } = match &self.build {
                Some(build) => build.clone(),
                None => Build::current()?,
            };
            let mut loader = EbpfLoader::new();
            loader.btf(None);
            let steer = Image::parse(steer, &[])?;
            let watch = Image::parse(watch, &RECORDER_MAPS)?;
            self.parsed = Some(Parsed { loader, steer, watch });
        }
        Ok(self.parsed.as_mut().expect("just made"))
    }

    /// Refuses pinned maps that these programs cannot share.
    pub(super) fn check_maps(&mut self, pins: &Pins) -> Result<()> {
        let Parsed { steer, watch, .. } = self.parsed()?;
        steer.check(&pins.maps())?;
        watch.check(&pins.maps()).map(drop)
    }

    /// Makes the pinned maps that are not there.
    pub(super) fn ensure_maps(&mut self, pins: &Pins) -> Result<()> {
        let ids = self.parsed()?.steer.check(&pins.maps())?;
        if ids.contains(&None) {
            self.load(pins, NetnsCookie(0), 0)?;
        }
        Ok(())
    }

    fn load(&mut self, pins: &Pins, NetnsCookie(cookie): NetnsCookie, log_level: u8) -> Result<Ebpf> {
        let Parsed { loader, steer, .. } = self.parsed()?;
        let bytes = steer.with_constants(&[
            ("NETNS_COOKIE", &cookie.to_ne_bytes()),
            (aya_log::LEVEL, &log_level.to_ne_bytes()),
        ])?;
        loader.default_map_pin_directory(pins.maps()).load(&bytes).map_err(object_error)
    }

    fn load_recorder(&mut self, pins: &Pins) -> Result<Ebpf> {
        let Parsed { loader, watch, .. } = self.parsed()?;
        // It tells nobody.
        let bytes = watch.with_constants(&[("TELL", &[0])])?;
        loader.map_max_entries("EVENTS", 4096);
        for name in RECORDER_MAPS {
            loader.map_pin_path(name, pins.maps().join(name));
        }
        loader.load(&bytes).map_err(object_error)
    }

    /// What looks for a pod's listeners, loaded once for an instance.
    pub(super) fn listeners(&mut self, pins: &Pins) -> Result<&mut Listeners> {
        let ids = self.parsed()?.steer.check(&pins.maps())?;
        let level = log_level();
        let is_good = self
            .listeners
            .as_ref()
            .is_some_and(|(of, listeners)| *of == ids && listeners.log_level() == level);
        if !is_good {
            self.listeners = None;
            let object = self.load(pins, NetnsCookie(0), level)?;
            self.listeners = Some((ids, Listeners::load(object, level)?));
        }
        Ok(&mut self.listeners.as_mut().expect("just made").1)
    }

    /// Lets go of an instance's maps.
    pub(super) fn forget_instance(&mut self) {
        self.listeners = None;
    }

    /// What has been replaced since the last time.
    pub(super) fn take_replaced(&mut self) -> Vec<Replaced> {
        mem::take(&mut self.replaced)
    }

    /// The programs of the node.
    pub(super) fn node<'a>(&'a mut self, pins: &'a Pins) -> Programs<'a> {
        Programs { objects: self, pins, of: Of::Node, object: None }
    }

    /// The recorder.
    pub(super) fn recorder<'a>(&'a mut self, pins: &'a Pins) -> Programs<'a> {
        Programs { objects: self, pins, of: Of::Recorder, object: None }
    }

    /// The programs of one pod.
    pub(super) fn pod<'a>(&'a mut self, pins: &'a Pins, cookie: NetnsCookie) -> Programs<'a> {
        Programs { objects: self, pins, of: Of::Pod(cookie), object: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Of {
    Node,
    Recorder,
    Pod(NetnsCookie),
}

/// Programs that are loaded together, when the first is needed.
pub(super) struct Programs<'a> {
    objects: &'a mut Objects,
    pub(super) pins: &'a Pins,
    of: Of,
    object: Option<Ebpf>,
}

impl Programs<'_> {
    /// What looks for the pod's listeners.
    pub(super) fn listeners(&mut self) -> Result<&mut Listeners> {
        self.objects.listeners(self.pins)
    }

    /// A program, in the kernel.
    pub(super) fn loaded(&mut self, name: &'static str) -> Result<&mut Program> {
        let object = match &mut self.object {
            Some(object) => object,
            none => none.insert(match self.of {
                Of::Node => self.objects.load(self.pins, NetnsCookie(0), 0)?,
                Of::Pod(cookie) => self.objects.load(self.pins, cookie, 0)?,
                Of::Recorder => self.objects.load_recorder(self.pins)?,
            }),
        };
        let program = find(object, name)?;
        if program.fd().is_err() {
            load(program).map_err(|error| load_error(name, error))?;
        }
        if !self.objects.tags.contains_key(name) {
            let info = program.info().bpf(|| format!("read what the program {name} is"))?;
            self.objects.tags.insert(name, Tag(info.tag()));
        }
        Ok(program)
    }

    /// What this build's program of a name is like. It is loaded for that, if none has been before.
    pub(super) fn tag(&mut self, name: &'static str) -> Result<Tag> {
        if !self.objects.tags.contains_key(name) {
            self.loaded(name)?;
        }
        Ok(self.objects.tags[name])
    }

    /// Sees to it that the link pinned at `pin` has this build's program, in one step if it has another's.
    /// If there is no link, `attach` makes one.
    pub(super) fn ensure(
        &mut self,
        name: &'static str,
        pin: &Path,
        attach: impl FnOnce(&mut Program) -> Result<FdLink>,
    ) -> Result<()> {
        if self.upgrade(name, pin)? {
            return Ok(());
        }
        let link = attach(self.loaded(name)?)?;
        link.pin(pin).bpf(|| format!("pin a link at {}", pin.display())).map(drop)
    }

    /// The same, for a link that may be there. Returns whether it is.
    pub(super) fn upgrade(&mut self, name: &'static str, pin: &Path) -> Result<bool> {
        let Some(link) = Link::open(pin)? else { return Ok(false) };
        let (old, new) = (link.info()?.tag, self.tag(name)?);
        if old != new {
            let program = self.loaded(name)?.fd().bpf(|| format!("use the program {name}"))?;
            if link.update(program)? {
                self.replaced(Replaced { program: name, at: pin.to_owned(), old, new });
            }
        }
        Ok(true)
    }

    /// Notes that a program was put in another one's place.
    pub(super) fn replaced(&mut self, replaced: Replaced) {
        let Replaced { program, at, old, new } = &replaced;
        tracing::info!("{program} at {}: {old} replaced by {new}", at.display());
        self.objects.replaced.push(replaced);
    }
}

fn find<'a>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut Program> {
    object.program_mut(name).ok_or_else(|| Error::Bpf {
        action: format!("find the program {name}"),
        source: "the eBPF object does not have it".into(),
    })
}

/// A program of the object, as its own type.
pub(crate) fn program<'a, P>(object: &'a mut Ebpf, name: &str) -> Result<&'a mut P>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    find(object, name)?.try_into().bpf(|| format!("use the program {name}"))
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::SockOps(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        // None of the others is ever behind a link that stays.
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// `aya_log_common::Level::Info`. Only the listener iterator logs: it alone runs while we are here to
/// read. Statements above the level cost nothing, the verifier removes them.
fn log_level() -> u8 {
    const INFO: u8 = 3;
    if tracing::enabled!(tracing::Level::DEBUG) { INFO } else { 0 }
}
