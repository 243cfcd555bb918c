//! Another build of the programs takes the place of one that is attached, and nobody notices.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    maps::{Array, Map, MapData, MapInfo},
    programs::{
        links::{FdLink, PinnedLink},
        loaded_programs,
    },
};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use srcip_tests::{
    Family, PATIENCE, peer,
    peer::Clients,
    proxy::{Kind, Proxy},
    wait_until,
};
use srcip_user::dataplane::{Dataplane, build::Build, error::Error};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(upgraded_and_rolled_back_under_load, another_layout_is_refused);

/// A build whose programs do the same with other instructions: in each, one move of a small constant is done
/// in 32 bits, which clears the upper half, instead of 64, or the other way round.
fn other_build() -> Build {
    let Build { steer, watch, north_south } = Build::current().unwrap();
    Build {
        steer: differently(&steer).into(),
        watch: differently(&watch).into(),
        north_south: differently(&north_south).into(),
    }
}

pub(crate) fn differently(bytes: &[u8]) -> Vec<u8> {
    const MOVE_64: u8 = 0xb7;
    const MOVE_32: u8 = 0xb4;
    let file = object::File::parse(bytes).unwrap();
    let mut changed = bytes.to_vec();
    for function in file.symbols().filter(|symbol| symbol.kind() == object::SymbolKind::Text) {
        let section = file.section_by_index(function.section_index().unwrap()).unwrap();
        let start = (section.file_range().unwrap().0 + function.address()) as usize;
        let code = &mut changed[start..start + function.size() as usize];
        let small = |instruction: &&mut [u8]| {
            [MOVE_64, MOVE_32].contains(&instruction[0])
                && i32::from_le_bytes(instruction[4..8].try_into().unwrap()) >= 0
        };
        if let Some(instruction) = code.chunks_exact_mut(8).find(small) {
            instruction[0] ^= MOVE_64 ^ MOVE_32;
        }
    }
    changed
}

/// The programs that use this instance's maps, by name and tag.
fn programs(pin_path: &Path) -> Vec<(String, u64)> {
    let maps = fs::read_dir(pin_path.join("maps")).unwrap();
    let maps: BTreeSet<_> = maps.map(|map| MapInfo::from_pin(map.unwrap().path()).unwrap().id()).collect();
    let mut found: Vec<_> = loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| {
            let used = program.map_ids().ok().flatten().unwrap_or_default();
            used.iter().any(|map| maps.contains(map))
        })
        .map(|program| (program.name_as_str().unwrap_or_default().to_owned(), program.tag()))
        // It is not attached to anything, and goes with the process that looked for listeners.
        .filter(|(name, _)| name != "srcip_iter_tcp")
        .collect();
    found.sort();
    found
}

/// The same, once there is one of each: the kernel frees one that was replaced a moment later.
pub(crate) fn one_set(pin_path: &Path) -> Vec<(String, u64)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = programs(pin_path);
        let names: BTreeSet<_> = found.iter().map(|(name, _)| name).collect();
        if names.len() == found.len() {
            return found;
        }
        assert!(Instant::now() < deadline, "more than one of a kind: {found:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The ids of the links that are pinned.
fn links(scenario: &Scenario) -> BTreeSet<u32> {
    let root = scenario.srcip.pin_path();
    let cookie = scenario.pod.netns().cookie().unwrap().to_string();
    let pins = [root.join("node"), root.join("pods").join(cookie)];
    pins.into_iter()
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|pin| FdLink::from(PinnedLink::from_pin(pin.unwrap().path()).unwrap()).info().unwrap().id())
        .collect()
}

fn upgraded_and_rolled_back_under_load(engine: Engine) {
    rounds(&Scenario::tcp(engine, Kind::EnvoyTcp), "");
}

/// The kernel's older hook has no links.
#[test]
fn filters_are_exchanged_under_load() {
    let scenario = Scenario::tcp(Engine::Tc, Kind::EnvoyTcp);
    scenario.attach("--tc-hook clsact");
    rounds(&scenario, "--tc-hook clsact");
}

/// Twenty times another build by `upgrade`, as the agent does at its start, and back by attaching again.
fn rounds(scenario: &Scenario, options: &str) {
    let to = scenario.pod.socket(Family::V4, PORT);
    let mut held = Clients::new(to, 100, 20).hold(&scenario.client).unwrap();
    assert_eq!(held.opened().unwrap().errors, Vec::<String>::new());
    let (ours, our_links) = (one_set(scenario.srcip.pin_path()), links(scenario));
    let other = Dataplane::with_build(scenario.srcip.pin_path().to_owned(), other_build());
    let done = AtomicBool::new(false);

    let visited = std::thread::scope(|scope| {
        let visits = scope.spawn(|| {
            let mut good = 0;
            while !done.load(Ordering::Relaxed) {
                let opened = Clients::new(to, 100, 4).visit(&scenario.client).unwrap();
                assert_eq!(opened.errors, Vec::<String>::new());
                good += opened.good;
            }
            good
        });
        let rounds = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..20 {
                let steered = scenario.counter("steered");
                let upgraded = other.upgrade().unwrap();
                assert!(upgraded.failed.is_empty(), "{upgraded:?}");
                let theirs = one_set(scenario.srcip.pin_path());
                let same: Vec<_> = theirs.iter().filter(|program| ours.contains(program)).collect();
                assert!(same.is_empty() && theirs.len() == ours.len(), "{theirs:?} instead of {ours:?}");
                assert_eq!(upgraded.replaced.len(), ours.len(), "{upgraded:?}");
                assert!(other.upgrade().unwrap().replaced.is_empty(), "twice is like once");
                scenario.attach(options);
                assert_eq!(one_set(scenario.srcip.pin_path()), ours, "round {round}");
                assert_eq!(links(scenario), our_links, "links were replaced, not programs");
                assert!(scenario.counter("steered") >= steered);
            }
        }));
        done.store(true, Ordering::Relaxed);
        let visited = visits.join().unwrap();
        rounds.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        visited
    });

    assert!(visited >= 500, "{visited} connections are no load");
    let checked = held.check().unwrap();
    assert_eq!((checked.good, checked.errors), (100, Vec::new()));
    // Every connection was steered, by one build or the other, and counted.
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    let counters = &status["counters"];
    let connections = (visited + 100) as u64;
    assert!(counters["steered"].as_u64().unwrap() >= connections, "{connections} and {counters}");
    assert_eq!(counters["upstream"].as_u64().unwrap(), connections, "{counters}");
    assert_eq!(counters["refused"], 0, "{counters}");
    println!("{visited} new connections and 100 held ones over 40 changes of programs");
}

fn another_layout_is_refused(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Haproxy);
    let programs_before = programs(scenario.srcip.pin_path());
    let maps = scenario.srcip.pin_path().join("maps");
    let dataplane = Dataplane::with_build(scenario.srcip.pin_path().to_owned(), other_build());
    let attach = scenario.srcip.attach_arguments(&scenario.pod, engine.option());
    let assert_untouched = || {
        // What was loaded in vain is freed a moment later.
        wait_until("the same programs", || programs(scenario.srcip.pin_path()) == programs_before);
        scenario.assert_kept(Family::V4);
        scenario.assert_kept(Family::V6);
    };

    // Another number.
    let layout = Map::Array(MapData::from_pin(maps.join("LAYOUT")).unwrap());
    let mut layout = Array::<_, u32>::try_from(layout).unwrap();
    let number = layout.get(&0, 0).unwrap();
    layout.set(0, number + 1, 0).unwrap();
    for command in [attach.as_str(), "status", "detach --all --now"] {
        let said = scenario.srcip.fail(command).unwrap();
        assert!(said.contains("another version of srcip") && said.contains("srcip cleanup"), "{said}");
    }
    assert!(matches!(dataplane.upgrade().unwrap_err(), Error::OtherVersion { .. }));
    assert_untouched();
    layout.set(0, number, 0).unwrap();

    // The same number, but a map is another one. Which it is does not matter to the programs: they have theirs.
    let other = scenario.world.directory().join("bpf/other");
    fs::create_dir(&other).unwrap();
    let mut loader = EbpfLoader::new();
    loader.map_max_entries("REGISTERED", 99).default_map_pin_directory(&other);
    drop(loader.load(srcip_user::EBPF_OBJECT).unwrap());
    fs::rename(maps.join("REGISTERED"), other.join("ours")).unwrap();
    fs::rename(other.join("REGISTERED"), maps.join("REGISTERED")).unwrap();
    let said = scenario.srcip.fail(&attach).unwrap();
    assert!(said.contains("maps/REGISTERED is another one") && said.contains("99 entries"), "{said}");
    assert!(matches!(dataplane.upgrade().unwrap_err(), Error::OtherShape { .. }));
    scenario.assert_kept(Family::V4);
    fs::rename(other.join("ours"), maps.join("REGISTERED")).unwrap();
    fs::remove_dir_all(&other).unwrap();
    assert_untouched();

    // A map that the other version did not have is made.
    fs::remove_file(maps.join("SLOTS")).unwrap();
    assert!(!dataplane.upgrade().unwrap().replaced.is_empty());
    assert!(maps.join("SLOTS").exists());
    scenario.assert_kept(Family::V4);
    scenario.srcip.run(&attach).unwrap();
    scenario.assert_kept(Family::V6);
    scenario.srcip.run("detach --all --now").unwrap();
    assert!(!scenario.srcip.pin_path().exists());
}

/// Without listeners before, and proxies that come and go: a pod attached by one build is served by the other.
#[test]
fn a_proxy_that_comes_after_the_upgrade() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.attach("");
    let other = Dataplane::with_build(scenario.srcip.pin_path().to_owned(), other_build());
    assert!(!other.upgrade().unwrap().replaced.is_empty());
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Haproxy).unwrap());
    scenario.assert_kept(Family::V4);
    scenario.assert_kept(Family::V6);
}
