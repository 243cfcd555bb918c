//! srcip is killed at any moment; what is attached works on, and the next command repairs the rest.

use std::{thread::sleep, time::Duration};

use srcip_tests::{
    Family, peer,
    proxy::{Kind, Proxy},
};

use crate::{
    detach::traces,
    scenario::{Engine, Scenario},
};

crate::engines!(
    killed_at_any_moment_of_attach,
    killed_at_any_moment_of_a_change,
    killed_at_any_moment_of_detach,
);

fn scenario(engine: Engine) -> Scenario {
    let mut scenario = Scenario::empty(engine);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    scenario.proxy = Some(Proxy::start(&scenario.pod, Kind::Haproxy).unwrap());
    scenario
}

/// Kills `srcip arguments` after `delay`. Returns whether it had ended by itself.
fn kill_after(scenario: &Scenario, arguments: &str, delay: Duration) -> bool {
    let mut child = scenario.srcip.command(arguments);
    child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut child = child.spawn().unwrap();
    sleep(delay);
    let ended = child.try_wait().unwrap().is_some();
    child.kill().unwrap();
    child.wait().unwrap();
    ended
}

fn killed_at_any_moment_of_attach(engine: Engine) {
    let scenario = scenario(engine);
    let before = traces(&scenario.pod);
    let hook = if engine == Engine::Tc { "--tc-hook clsact" } else { "" };
    let options = format!("{} {hook}", engine.option());
    let arguments = scenario.srcip.attach_arguments(&scenario.pod, &options);
    let mut ended = 0;
    let mut step = 0;
    // Ever later, until it has ended before it was killed several times.
    while ended < 4 {
        let delay = Duration::from_millis(step * 7);
        ended += usize::from(kill_after(&scenario, &arguments, delay));
        // Each kind of repair in turn.
        match step % 3 {
            0 => {
                scenario.srcip.attach(&scenario.pod, &options).unwrap();
                scenario.assert_kept(Family::V4);
                scenario.assert_kept(Family::V6);
                scenario.srcip.detach(&scenario.pod, "--now").unwrap();
            }
            1 => drop(scenario.srcip.run("detach --all --now").unwrap()),
            _ => drop(scenario.srcip.run("cleanup").unwrap()),
        }
        assert!(!scenario.srcip.pin_path().exists(), "after {delay:?}");
        assert_eq!(traces(&scenario.pod), before, "after {delay:?}");
        scenario.assert_direct(Family::V4);
        step += 1;
        assert!(step < 500, "attach never ends by itself");
    }
}

/// Attached in one way, killed on the way to another one.
fn killed_at_any_moment_of_a_change(engine: Engine) {
    let scenario = scenario(engine);
    let before = traces(&scenario.pod);
    let (from, to) = match engine {
        Engine::SkLookup => ("--engine sk-lookup", "--engine tc --tc-hook clsact --mark 7 --route-table 134"),
        Engine::Tc => ("--engine tc --tc-hook clsact", "--engine sk-lookup --mark 8 --route-table 135"),
    };
    let change = scenario.srcip.attach_arguments(&scenario.pod, to);
    let mut ended = 0;
    let mut step = 0;
    while ended < 3 {
        scenario.srcip.attach(&scenario.pod, from).unwrap();
        let delay = Duration::from_millis(step * 9);
        ended += usize::from(kill_after(&scenario, &change, delay));
        // Whatever it had come to: what is attached works, and never past the proxy.
        scenario.assert_kept(Family::V4);
        match step % 3 {
            0 => drop(scenario.srcip.run(&change).unwrap()),
            1 => drop(scenario.srcip.attach(&scenario.pod, from).unwrap()),
            _ => {}
        }
        scenario.assert_kept(Family::V6);
        scenario.srcip.run("detach --all --now").unwrap();
        assert!(!scenario.srcip.pin_path().exists(), "after {delay:?}");
        assert_eq!(traces(&scenario.pod), before, "after {delay:?}");
        step += 1;
        assert!(step < 500, "the change never ends by itself");
    }
}

fn killed_at_any_moment_of_detach(engine: Engine) {
    let scenario = scenario(engine);
    let before = traces(&scenario.pod);
    let arguments = format!("detach --netns {} --now", scenario.pod.path().display());
    let mut ended = 0;
    let mut step = 0;
    while ended < 3 {
        scenario.attach("");
        let delay = Duration::from_millis(step);
        ended += usize::from(kill_after(&scenario, &arguments, delay));
        if step % 2 == 0 {
            scenario.attach("");
            scenario.assert_kept(Family::V4);
        }
        scenario.srcip.run("detach --all --now").unwrap();
        assert!(!scenario.srcip.pin_path().exists(), "after {delay:?}");
        assert_eq!(traces(&scenario.pod), before, "after {delay:?}");
        step += 1;
        assert!(step < 500, "detach never ends by itself");
    }
}

/// Killed while the maps were being made: only some of them are there.
#[test]
fn killed_between_two_maps() {
    let scenario = scenario(Engine::SkLookup);
    let before = traces(&scenario.pod);
    for repair in ["status", "detach --all --now", "cleanup", "attach"] {
        let maps = scenario.srcip.pin_path().join("maps");
        std::fs::create_dir_all(&maps).unwrap();
        let mut loader = aya::EbpfLoader::new();
        drop(loader.default_map_pin_directory(&maps).load(srcip_user::EBPF_OBJECT).unwrap());
        for map in std::fs::read_dir(&maps).unwrap() {
            let map = map.unwrap();
            if map.file_name() != "ATTACHMENTS" && map.file_name() != "PODS" {
                std::fs::remove_file(map.path()).unwrap();
            }
        }
        match repair {
            "attach" => {
                scenario.attach("");
                scenario.assert_kept(Family::V4);
            }
            repair => drop(scenario.srcip.run(repair).unwrap()),
        }
        scenario.srcip.run("detach --all --now").unwrap();
        assert!(!scenario.srcip.pin_path().exists(), "{repair}");
        assert_eq!(traces(&scenario.pod), before, "{repair}");
    }
}

/// Interrupted while the instance was being removed: what is left goes on with the maps that it belongs to.
#[test]
fn interrupted_between_two_hooks() {
    let scenario = scenario(Engine::SkLookup);
    let before = traces(&scenario.pod);
    for hook in ["srcip_sock_ops", "srcip_connect4", "srcip_connect6"] {
        scenario.attach("");
        // What is mounted on cannot be removed.
        let pin = scenario.srcip.pin_path().join("node").join(hook);
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some("/dev/null"), &pin, None::<&str>, flags, None::<&str>).unwrap();
        let detached = scenario.srcip.detach(&scenario.pod, "--now");
        nix::mount::umount(&pin).unwrap();
        detached.unwrap();
        assert!(pin.exists(), "{hook}");
        scenario.attach("");
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
        scenario.srcip.run("detach --all --now").unwrap();
        assert!(!scenario.srcip.pin_path().exists(), "{hook}");
        assert_eq!(traces(&scenario.pod), before, "{hook}");
    }
}

/// Two at once on one instance wait for each other.
#[test]
fn two_at_once() {
    let mut scenario = scenario(Engine::SkLookup);
    let other = scenario.world.host("other").unwrap();
    for _ in 0..5 {
        std::thread::scope(|scope| {
            let threads: Vec<_> = [&scenario.pod, &other, &scenario.pod, &other]
                .into_iter()
                .map(|pod| scope.spawn(|| scenario.srcip.attach(pod, "").unwrap()))
                .collect();
            threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
        });
        scenario.assert_kept(Family::V4);
        std::thread::scope(|scope| {
            for pod in [&scenario.pod, &other] {
                scope.spawn(|| scenario.srcip.detach(pod, "--now").unwrap());
            }
        });
        assert!(!scenario.srcip.pin_path().exists());
    }
}
