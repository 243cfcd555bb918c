//! Where the programs sit, and which engine a node gets.

use std::process::Command;

use srcip_tests::{
    Family,
    host::Host,
    peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, Scenario};

/// `bpftool net` of a host: all tc, tcx and xdp programs on its devices.
fn programs(host: &Host) -> String {
    let output = host.command("bpftool").unwrap().args(["net", "-j"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The default engine puts no program on any packet path.
#[test]
fn sk_lookup_leaves_the_devices_alone() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.assert_kept(Family::V4);
    for host in [&scenario.pod, scenario.world.node(), &scenario.client] {
        let programs = programs(host);
        assert!(!programs.contains("srcip"), "{programs}");
        let json: serde_json::Value = serde_json::from_str(&programs).unwrap();
        for path in ["xdp", "tc"] {
            assert_eq!(json[0][path], serde_json::json!([]), "{}: {programs}", host.name());
        }
        let filters = host.sh("tc filter show dev eth0 ingress").unwrap_or_default();
        assert_eq!(filters, "");
    }
    // The check can fail: the other engine shows.
    scenario.srcip.attach(&scenario.pod, "--engine tc --tc-hook clsact").unwrap();
    assert!(scenario.pod.sh("tc filter show dev eth0 ingress").unwrap().contains("srcip_tc"));
}

/// Changing the engine in place leaves nothing of the old one, and fails no connection.
#[test]
fn engines_change_in_place() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Envoy);
    let to = scenario.pod.socket(Family::V4, crate::scenario::PORT);
    let load = srcip_tests::load::Load::start(&scenario.client, to, 2).unwrap();
    for options in ["--engine tc --tc-hook clsact", "--engine sk-lookup", "--engine tc", "--engine sk-lookup"]
    {
        load.wait_for(20);
        scenario.srcip.attach(&scenario.pod, options).unwrap();
        let status = scenario.srcip.status(&scenario.pod).unwrap();
        assert!(options.contains(status["engine"].as_str().unwrap()), "{status}");
    }
    load.wait_for(20);
    let report = load.stop().unwrap();
    assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0), "{report:?}");
    assert!(!scenario.pod.sh("tc filter show dev eth0 ingress").unwrap().contains("srcip"));
    assert!(!scenario.pod.sh("tc qdisc show dev eth0").unwrap().contains("clsact"));
    assert!(!programs(&scenario.pod).contains("srcip"));
}

/// `--engine auto` says which and why.
#[test]
fn auto_explains_its_choice() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let said = scenario.srcip.attach(&scenario.pod, "").unwrap();
    assert!(said.contains("engine sk-lookup (the kernel has all it needs"), "{said}");
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    assert_eq!(
        (&status["engine"], &status["missing_guarantees"]),
        (&"sk-lookup".into(), &serde_json::json!([]))
    );
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();

    // Without hooks, the other one, with what is missing then.
    let said = scenario.srcip.attach(&scenario.pod, "--cgroup none").unwrap();
    assert!(said.contains("engine tc (sk-lookup cannot run: it needs the hooks"), "{said}");
    let status = scenario.srcip.status(&scenario.pod).unwrap();
    let missing = status["missing_guarantees"].to_string();
    for guarantee in
        ["the proxy must set the mark itself", "a client that connects from a mirrored port hangs"]
    {
        assert!(missing.contains(guarantee), "{missing}");
    }
    let error = scenario
        .srcip
        .fail(&scenario.srcip.attach_arguments(&scenario.pod, "--cgroup none --engine sk-lookup"));
    let error = error.unwrap();
    assert!(
        error.contains("the sk-lookup engine cannot run here") && error.contains("use --engine tc"),
        "{error}"
    );
}

/// Without hooks, the tc engine serves a proxy that sets its own mark.
#[test]
fn tc_without_hooks() {
    let mut scenario = Scenario::empty(Engine::Tc);
    scenario.application = Some(peer::application(&scenario.pod, &["[::]:8000"]).unwrap());
    let proxy = Proxy::start_with(&scenario.pod, Kind::Envoy, |config| {
        config.replace("original_src.v3.OriginalSrc\n", "original_src.v3.OriginalSrc\n        mark: 1337\n")
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("--cgroup none");
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    assert!(!scenario.srcip.pin_path().join("node/srcip_sock_ops").exists());
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    scenario.assert_direct(Family::V4);
}

/// The way below Linux 6.6, and beside a `clsact` that is not ours.
#[test]
fn tc_with_clsact() {
    let scenario = Scenario::http(Engine::Tc, Kind::Haproxy);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    for ours in [true, false] {
        if !ours {
            scenario.pod.sh("tc qdisc add dev eth0 clsact").unwrap();
        }
        scenario.attach("--tc-hook clsact");
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
        // Again: one filter, not two.
        scenario.attach("--tc-hook clsact --on-proxy-down pass");
        let filters = scenario.pod.sh("tc filter show dev eth0 ingress").unwrap();
        assert_eq!(filters.matches("name srcip_tc").count(), 1, "{filters}");
        scenario.srcip.detach(&scenario.pod, "--now").unwrap();
        let filters = scenario.pod.sh("tc filter show dev eth0 ingress").unwrap();
        assert_eq!(filters, "");
        let qdiscs = scenario.pod.sh("tc qdisc show dev eth0").unwrap();
        assert_eq!(qdiscs.contains("clsact"), !ours, "{qdiscs}");
        scenario.assert_direct(Family::V4);
    }
}

/// IP options and IPv6 extension headers are parsed; fragments of a SYN do not slip past the tc engine.
#[test]
fn fragmented_syns_do_not_pass_the_proxy_by() {
    let scenario = Scenario::http(Engine::Tc, Kind::Haproxy);
    let (client, pod) = (&scenario.client, &scenario.pod);
    let to = pod.socket(Family::V4, 8000);
    let from = client.socket(Family::V4, 40000);
    // The address resolution that a raw packet does not wait for.
    scenario.assert_kept(Family::V4);
    let mut tcp = vec![0_u8; 20];
    tcp[0..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = 2;
    client
        .netns()
        .run(|| {
            use std::os::fd::FromRawFd as _;
            // SAFETY: creates a descriptor, owned by the socket from here on.
            let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW) };
            assert!(raw >= 0);
            // SAFETY: just created and owned by nobody else.
            let raw = unsafe { socket2::Socket::from_raw_fd(raw) };
            for (offset, more) in [(0_usize, true), (8, false)] {
                let part = if more { &tcp[..8] } else { &tcp[8..] };
                let mut packet = vec![0x45, 0, 0, 0, 0, 7, 0, 0, 64, 6, 0, 0];
                packet[6..8].copy_from_slice(&((offset as u16 / 8) | u16::from(more) << 13).to_be_bytes());
                let (std::net::IpAddr::V4(source), std::net::IpAddr::V4(destination)) = (from.ip(), to.ip())
                else {
                    unreachable!()
                };
                packet.extend_from_slice(&source.octets());
                packet.extend_from_slice(&destination.octets());
                packet.extend_from_slice(part);
                raw.send_to(&packet, &to.into()).unwrap();
            }
        })
        .unwrap();
    for _ in 0..200 {
        if scenario.counter("disguised_refused") == 1 {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the first fragment was not counted: {}", scenario.srcip.status(pod).unwrap());
}
