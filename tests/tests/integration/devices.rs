//! Where the programs sit, and which engine a node gets.

use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use srcip_tests::{
    Family, PATIENCE,
    host::Host,
    peer,
    process::run,
    proxy::{Kind, Proxy, with_istios_mark},
};

use crate::scenario::{Engine, Scenario};

/// Programs on the packet paths of a host's devices: tcx by the kernel's own query, tc and xdp by
/// `bpftool net`.
fn programs(host: &Host) -> Vec<String> {
    let mut found = host
        .netns()
        .run(|| {
            let devices = srcip_user::routing::devices().unwrap();
            let names = devices.into_iter().map(|device| device.name).chain(["lo".to_owned()]);
            names
                .flat_map(|name| {
                    [TcAttachType::Ingress, TcAttachType::Egress].into_iter().flat_map(move |at| {
                        let (_, programs) = SchedClassifier::query_tcx(&name, at).unwrap();
                        let name = name.clone();
                        programs.into_iter().map(move |p| format!("{name}: tcx {:?}", p.name_as_str()))
                    })
                })
                .collect::<Vec<_>>()
        })
        .unwrap();
    let net: serde_json::Value = serde_json::from_str(&host.sh("bpftool net -j").unwrap()).unwrap();
    for path in ["xdp", "tc"] {
        let programs = net[0][path].as_array().unwrap();
        found.extend(programs.iter().map(|program| format!("{path}: {program}")));
    }
    found
}

/// The default engine puts no program on any packet path.
#[test]
fn sk_lookup_leaves_the_devices_alone() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.assert_kept(Family::V4);
    for host in [&scenario.pod, scenario.world.node(), &scenario.client] {
        assert_eq!(programs(host), [""; 0], "{}", host.name());
    }
    // The check can fail: the other engine shows, either way.
    for (hook, shows) in [("tcx", "eth0: tcx Some(\"srcip_tc\")"), ("clsact", "srcip_tc")] {
        scenario.srcip.attach(&scenario.pod, &format!("--engine tc --tc-hook {hook}")).unwrap();
        let found = programs(&scenario.pod);
        assert!(found.len() == 1 && found[0].contains(shows), "{hook}: {found:?}");
    }
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
    assert_eq!(programs(&scenario.pod), [""; 0]);
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
    let proxy = Proxy::start_with(&scenario.pod, Kind::Envoy, with_istios_mark);
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
        let filters = scenario.pod.sh("tc filter show dev eth0 ingress").unwrap_or_default();
        assert_eq!(filters, "");
        let qdiscs = scenario.pod.sh("tc qdisc show dev eth0").unwrap();
        assert_eq!(qdiscs.contains("clsact"), !ours, "{qdiscs}");
        scenario.assert_direct(Family::V4);
    }
    // Ours, but somebody else has moved in.
    scenario.pod.sh("tc qdisc del dev eth0 clsact").unwrap();
    scenario.attach("--tc-hook clsact");
    let mut filter = scenario.pod.command("tc").unwrap();
    filter.args(["filter", "add", "dev", "eth0", "egress", "prio", "7", "bpf", "bytecode"]);
    // Classic BPF: match everything.
    run(filter.arg("1,6 0 0 4294967295")).unwrap();
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    assert!(scenario.pod.sh("tc filter show dev eth0 egress").unwrap().contains("pref 7 bpf"));
}

/// What could hide a connection attempt from the tc engine does not reach the application.
#[test]
fn disguised_syns_do_not_pass_the_proxy_by() {
    let scenario = Scenario::http(Engine::Tc, Kind::Haproxy);
    let (client, pod) = (&scenario.client, &scenario.pod);
    // The address resolution that a raw packet does not wait for.
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    let mut tcp = [0_u8; 20];
    tcp[0..2].copy_from_slice(&40000_u16.to_be_bytes());
    tcp[2..4].copy_from_slice(&8000_u16.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = 2;
    let fragment = |offset: u16, more: bool, payload: &[u8]| {
        let mut packet = vec![0x45, 0, 0, 0, 0, 7, 0, 0, 64, 6, 0, 0];
        packet[6..8].copy_from_slice(&((offset / 8) | u16::from(more) << 13).to_be_bytes());
        let ends = [client.address(Family::V4), pod.address(Family::V4)];
        ends.iter().for_each(|ip| packet.extend_from_slice(&octets(*ip)));
        packet.extend_from_slice(payload);
        packet
    };
    // Cut inside the TCP header, and behind it.
    send_raw(client, pod, Family::V4, &fragment(0, true, &tcp[..8]));
    send_raw(client, pod, Family::V4, &fragment(8, false, &tcp[8..]));
    let mut longer = tcp.to_vec();
    longer.extend_from_slice(&[0; 12]);
    send_raw(client, pod, Family::V4, &fragment(0, true, &longer));
    // Seven empty destination options before the TCP header.
    let mut packet = vec![0x60, 0, 0, 0, 0, 7 * 8 + 20, 60, 64];
    let ends = [client.address(Family::V6), pod.address(Family::V6)];
    ends.iter().for_each(|ip| packet.extend_from_slice(&octets(*ip)));
    for i in 0..7 {
        // A PadN of four octets fills each.
        packet.extend_from_slice(&[if i == 6 { 6 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
    }
    packet.extend_from_slice(&tcp);
    send_raw(client, pod, Family::V6, &packet);

    let deadline = std::time::Instant::now() + PATIENCE;
    while scenario.counter("disguised_refused") < 3 {
        assert!(std::time::Instant::now() < deadline, "{}", scenario.srcip.status(pod).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let reached = |s: &srcip_user::sockets::TcpSocket| s.remote.port() == 40000;
    assert!(!pod.tcp_sockets().unwrap().iter().any(reached), "the application has a connection");
}

fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Sends a packet, IP header and all.
fn send_raw(from: &Host, to: &Host, family: Family, packet: &[u8]) {
    use socket2::{Domain, Protocol, Socket, Type};
    let domain = match family {
        Family::V4 => Domain::IPV4,
        Family::V6 => Domain::IPV6,
    };
    let to = to.socket(family, 0);
    let sent = from.netns().run(|| {
        let raw = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
        raw.send_to(packet, &to.into())
    });
    assert_eq!(sent.unwrap().unwrap(), packet.len());
}

/// A node without cgroup v2: `auto` takes the engine that can do without.
#[test]
fn without_cgroup_v2() {
    let scenario = Scenario::empty(Engine::Tc);
    let root = srcip_user::dataplane::hooks::cgroup_root().unwrap();
    // In a mount namespace of its own, where it is not mounted.
    let command = format!(
        "umount -l {} && exec {} attach --netns {} --proxy-port 15006 --pin-path {}",
        root.display(),
        srcip_tests::srcip::binary("srcip").display(),
        scenario.pod.path().display(),
        scenario.srcip.pin_path().display()
    );
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("engine tc (sk-lookup cannot run: it needs the hooks"), "{said}");
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
}

/// A device that turns up after the attach shows in the status, and attaching again takes it in.
#[test]
fn a_device_that_turns_up_later() {
    for hook in ["tcx", "clsact"] {
        let scenario = Scenario::empty(Engine::Tc);
        let attach = || scenario.attach(&format!("--tc-hook {hook}"));
        attach();
        let problems = || scenario.srcip.status(&scenario.pod).unwrap()["problems"].to_string();
        assert!(!problems().contains("not steered"), "{}", problems());
        scenario.pod.ip("link add br1 type bridge").unwrap();
        assert!(problems().contains("come in by br1 are not steered: attach again"), "{}", problems());
        attach();
        assert!(!problems().contains("not steered"), "{}", problems());
        // Somebody else removes the program.
        if hook == "clsact" {
            scenario.pod.sh("tc qdisc del dev eth0 clsact").unwrap();
            assert!(problems().contains("come in by eth0 are not steered"), "{}", problems());
            attach();
            assert!(!problems().contains("not steered"), "{}", problems());
        }
    }
}
