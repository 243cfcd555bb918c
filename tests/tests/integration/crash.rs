//! srcip is killed at any moment; what is attached works on, and the next command repairs the rest.

use std::{thread::sleep, time::Duration};

use srcip_tests::{
    Family, peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, Scenario};

crate::engines!(killed_at_any_moment_of_attach, killed_at_any_moment_of_detach);

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

fn rules(scenario: &Scenario) -> String {
    let pod = &scenario.pod;
    let sysctls = ["net.ipv4.tcp_fwmark_accept", "net.ipv4.tcp_tw_reuse", "net.ipv4.fwmark_reflect"];
    let sysctls: Vec<_> = sysctls.iter().map(|name| pod.read_sysctl(name).unwrap()).collect();
    [
        pod.sh("ip rule").unwrap(),
        pod.sh("ip -6 rule").unwrap(),
        pod.sh("tc qdisc show dev eth0").unwrap(),
        sysctls.join(" "),
    ]
    .concat()
}

fn killed_at_any_moment_of_attach(engine: Engine) {
    let scenario = scenario(engine);
    let before = rules(&scenario);
    let hook = if engine == Engine::Tc { "--tc-hook clsact" } else { "" };
    let options = format!("{} {hook}", engine.option());
    let arguments = scenario.srcip.attach_arguments(&scenario.pod, &options);
    let mut ended = 0;
    let mut step = 0;
    // Ever later, until it has ended before it was killed several times.
    while ended < 4 {
        let delay = Duration::from_millis(step * 4);
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
        assert_eq!(rules(&scenario), before, "after {delay:?}");
        scenario.assert_direct(Family::V4);
        step += 1;
        assert!(step < 500, "attach never ends by itself");
    }
}

fn killed_at_any_moment_of_detach(engine: Engine) {
    let scenario = scenario(engine);
    let before = rules(&scenario);
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
        assert_eq!(rules(&scenario), before, "after {delay:?}");
        step += 1;
        assert!(step < 500, "detach never ends by itself");
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
