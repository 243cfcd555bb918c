//! Which pods are steered, and how that follows what they ask for.

use super::*;

super::sources!(asked_for_by_annotation, bad_values, selected, gone_and_completed);

/// A pod is steered while it asks for it, changes in place, and is put back as it was.
fn asked_for_by_annotation(mut rig: Rig) {
    let mut web = rig.running("web", &[]);
    let before = traces(&web.host);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait("the pod is known", |agent| agent.status().unwrap()["agent"]["pods"] == 1).unwrap();
    rig.assert_direct(&web.host);

    rig.put(web.annotate("sidecar.istio.io/interceptionMode", Some("TPROXY")));
    rig.agent().wait_steered("shop/web").unwrap();
    rig.assert_kept(&web.host);
    let attachment = rig.agent().attachment("shop/web").unwrap().unwrap();
    assert_eq!(attachment["pod"]["uid"], web.object["metadata"]["uid"]);
    // What it tells of itself follows at the end of the round.
    rig.agent().wait("ready", |agent| agent.get("/readyz").unwrap() == (200, "ok".to_owned())).unwrap();
    let steered = |agent: &Agent| agent.metric("srcip_agent_pods{state=\"steered\"}").unwrap();
    rig.agent().wait("counted", |agent| steered(agent) == 1.0).unwrap();

    // In place: connections go on being steered while it changes.
    let load = Load::start(&rig.client, web.host.socket(Family::V4, PORT), 2).unwrap();
    load.wait_for(20);
    rig.put(web.annotate("srcip.io/on-proxy-down", Some("pass")));
    let passes = |attachment: &Value| attachment["on_proxy_down"] == "pass";
    rig.agent()
        .wait("changed", |agent| agent.attachment("shop/web").unwrap().as_ref().is_some_and(passes))
        .unwrap();
    rig.put(web.annotate("srcip.io/engine", Some("tc")));
    let by_tc = |attachment: &Value| attachment["engine"] == "tc";
    rig.agent()
        .wait("the other engine", |agent| agent.attachment("shop/web").unwrap().as_ref().is_some_and(by_tc))
        .unwrap();
    rig.put(web.annotate("srcip.io/engine", None));
    rig.agent()
        .wait("the first engine", |agent| {
            agent.attachment("shop/web").unwrap().is_some_and(|attachment| !by_tc(&attachment))
        })
        .unwrap();
    load.wait_for(20);
    let report = load.stop().unwrap();
    assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0));

    rig.put(web.annotate("traffic.sidecar.istio.io/excludeInboundPorts", Some("8000")));
    rig.agent()
        .wait("excluded", |agent| {
            let attachment = agent.attachment("shop/web").unwrap();
            attachment.is_some_and(|attachment| attachment["exclude_inbound_ports"] == "8000")
        })
        .unwrap();
    rig.assert_direct(&web.host);

    rig.put(web.annotate("sidecar.istio.io/interceptionMode", None));
    rig.agent().wait_gone("shop/web").unwrap();
    rig.assert_direct(&web.host);
    assert_eq!(traces(&web.host), before);
}

/// A bad value steers nothing, is told in three places, and is nobody else's trouble.
fn bad_values(mut rig: Rig) {
    let mut bad = rig.running("bad", &[("srcip.io/steer", "true"), ("srcip.io/proxy-port", "http")]);
    let good = rig.running("good", TPROXY);
    rig.put(&bad.object);
    rig.put(&good.object);
    let mut host = pod("shop", "host", &uid(), TPROXY);
    host["spec"]["hostNetwork"] = true.into();
    rig.put(&host);
    rig.start();
    rig.agent().wait_steered("shop/good").unwrap();
    rig.assert_kept(&good.host);
    rig.assert_direct(&bad.host);
    // What it tells of them follows at the end of the round.
    let series = "srcip_agent_refused_pods{reason=\"InvalidAnnotation\"}";
    rig.agent().wait("counted", |agent| agent.metric(series).is_ok_and(|count| count == 1.0)).unwrap();
    let (reason, note) = rig.agent().problem("shop/bad").unwrap().unwrap();
    assert_eq!(reason, "InvalidAnnotation");
    assert!(note.contains("srcip.io/proxy-port is \"http\""), "{note}");
    assert_eq!(rig.agent().problem("shop/host").unwrap().unwrap().0, "HostNetwork");
    if let Cluster::Api(server) = &rig.cluster {
        let told = |name: &str, reason: &str| {
            let events = server.events();
            let is_it = |event: &&Value| event["regarding"]["name"] == name && event["reason"] == reason;
            events.iter().filter(is_it).count()
        };
        wait_until("both are told of", || {
            told("bad", "InvalidAnnotation") > 0 && told("host", "HostNetwork") > 0
        });
        assert_eq!((told("bad", "InvalidAnnotation"), told("host", "HostNetwork")), (1, 1));
    } else {
        let log = rig.agent().process.log();
        assert!(log.contains("shop/bad") && log.contains("InvalidAnnotation"), "{log}");
    }
    // Put right, it is steered.
    rig.put(bad.annotate("srcip.io/proxy-port", Some("15006")));
    rig.agent().wait_steered("shop/bad").unwrap();
    rig.assert_kept(&bad.host);
    rig.agent().wait("no problem", |agent| agent.problem("shop/bad").unwrap().is_none()).unwrap();
}

/// A selector of the configuration means pods that say nothing; one that says no is left alone.
fn selected(mut rig: Rig) {
    let mut chosen = rig.running("chosen", &[]);
    let mut against = rig.running("against", &[("srcip.io/steer", "false")]);
    for pod in [&mut chosen, &mut against] {
        pod.object["metadata"]["labels"] = json!({"app": "web"});
        rig.put(&pod.object);
    }
    let selector = json!({"matchLabels": {"app": "web"}, "namespace": "shop", "proxyPort": 15006});
    rig.setup.configure(|config| config["steer"] = json!({ "selectors": [selector] })).unwrap();
    rig.start();
    rig.agent().wait_steered("shop/chosen").unwrap();
    rig.assert_kept(&chosen.host);
    rig.assert_direct(&against.host);
    assert!(!rig.agent().steers("shop/against"));
    let (code, text) = rig.agent().get("/config").unwrap();
    let config: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(code, 200);
    assert_eq!(config["config"]["steer"]["selectors"][0]["matchLabels"]["app"], "web", "{text}");
}

/// Pods that are deleted, that have completed, that come back under their name, on another node.
fn gone_and_completed(mut rig: Rig) {
    let mut job = rig.running("job", TPROXY);
    let first = rig.running("web-0", TPROXY);
    rig.put(&job.object);
    rig.put(&first.object);
    let mut elsewhere = pod("shop", "elsewhere", &uid(), TPROXY);
    elsewhere["spec"]["nodeName"] = "node-b".into();
    rig.put(&elsewhere);
    rig.start();
    rig.agent().wait_steered("shop/job").unwrap();
    rig.agent().wait_steered("shop/web-0").unwrap();
    assert_eq!(rig.agent().status().unwrap()["agent"]["pods"], 2, "{NODE} only");

    job.object["status"]["phase"] = "Succeeded".into();
    rig.put(&job.object);
    rig.agent().wait_gone("shop/job").unwrap();

    // Its successor has the same name while the first one is still there.
    let second = rig.running("web-0b", TPROXY);
    let mut successor = second.object.clone();
    successor["metadata"]["name"] = "web-0".into();
    if let Cluster::Api(server) = &rig.cluster {
        // Another pod by the same name is another object there.
        server.delete_pod("shop", "web-0");
    }
    rig.put(&successor);
    let uid = successor["metadata"]["uid"].clone();
    rig.agent()
        .wait("the successor is steered", |agent| {
            let attachment = agent.attachment("shop/web-0").unwrap();
            attachment.is_some_and(|a| a["pod"]["uid"] == uid && a["state"] == "attached")
        })
        .unwrap();
    rig.assert_kept(&second.host);
    rig.assert_direct(&first.host);

    rig.delete("web-0");
    rig.agent().wait_gone("shop/web-0").unwrap();
    assert_eq!(rig.agent().status().unwrap()["attachments"], json!([]));
}

/// A sandbox that goes before its pod's object is deleted is forgotten, and the next one is found.
#[test]
fn a_sandbox_that_is_made_anew() {
    let mut rig = Rig::with_manifests();
    let mut web = rig.running("web", TPROXY);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    let cookie = |agent: &Agent| agent.attachment("shop/web").unwrap().map(|a| a["netns_cookie"].clone());
    let before = cookie(rig.agent());
    let uid = web.object["metadata"]["uid"].as_str().unwrap().to_owned();
    let name = web.host.name().to_owned();
    web.proxy.take();
    let object = web.object.clone();
    drop(web);
    srcip_tests::process::sh(&format!("ip netns del {name}")).unwrap();
    let host = rig.world.pod("web-again", &uid).unwrap();
    let _application = peer::application(&host, &["[::]:8000"]).unwrap();
    let _proxy = Proxy::start(&host, Kind::Haproxy).unwrap();
    rig.agent()
        .wait("the new sandbox is steered", |agent| {
            cookie(agent).is_some_and(|cookie| Some(cookie) != before) && agent.steers("shop/web")
        })
        .unwrap();
    rig.assert_kept(&host);
    assert_eq!(object["metadata"]["uid"], uid);
}

/// A program that somebody removes is put back.
#[test]
fn what_is_broken_is_repaired() {
    let mut rig = Rig::with_manifests();
    let web = rig.running("web", TPROXY);
    rig.put(&web.object);
    rig.start();
    rig.agent().wait_steered("shop/web").unwrap();
    let cookie = web.host.netns().cookie().unwrap();
    let pin = rig.setup.srcip().pin_path().join(format!("pods/{cookie}/srcip_sk_lookup"));
    std::fs::remove_file(&pin).unwrap();
    rig.agent().wait("repaired", |_| pin.exists()).unwrap();
    rig.assert_kept(&web.host);
}

/// An address that another pod has now says nothing about the pod that had it.
#[test]
fn an_address_that_is_used_again() {
    let mut rig = Rig::with_manifests();
    let first = rig.running("first", TPROXY);
    rig.put(&first.object);
    rig.start();
    rig.agent().wait_steered("shop/first").unwrap();
    rig.assert_kept(&first.host);
    // It still runs, without its address, and another one has that.
    let address = first.host.address(Family::V4);
    first.host.ip(&format!("addr del {address}/16 dev eth0")).unwrap();
    let mut plain = rig.running("plain", &[]);
    plain.host.add_address(address).unwrap();
    rig.put(&plain.object);
    rig.agent().wait("both are known", |agent| agent.status().unwrap()["agent"]["pods"] == 2).unwrap();
    let ask = |rig: &Rig| {
        let to = std::net::SocketAddr::new(address, PORT);
        srcip_tests::process::sh(&format!("ip -n {} neigh flush all", rig.client.name())).unwrap();
        client::ask_once(&rig.client, to).unwrap()
    };
    assert!(!ask(&rig).proxied);
    assert!(!rig.agent().steers("shop/plain"));
    rig.put(plain.annotate("sidecar.istio.io/interceptionMode", Some("TPROXY")));
    rig.agent().wait_steered("shop/plain").unwrap();
    let seen = ask(&rig);
    assert!(seen.proxied && seen.peer.ip() == rig.client.address(Family::V4), "{seen:?}");
}
