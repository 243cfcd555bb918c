//! Settings that change in place, under load and with connections that stay.

use std::io::{Read as _, Write as _};

use srcip_tests::{
    Family, client,
    load::Load,
    proxy::{Kind, Proxy},
};

use crate::{
    detach::traces,
    scenario::{Engine, PORT, Scenario},
};

crate::engines!(mark_and_table, proxy_port);

/// Another mark, another table: new connections use them, old ones live on with theirs.
fn mark_and_table(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
    scenario.srcip.detach(&scenario.pod, "--now").unwrap();
    let before = traces(&scenario.pod);
    let mut streams = Vec::new();
    for options in ["", "--route-table 134", "--mark 1338", "--mark 7 --route-table 135", ""] {
        scenario.attach(options);
        for family in Family::BOTH {
            let to = scenario.pod.socket(family, PORT);
            streams.push(client::connect(&scenario.client, to).unwrap());
        }
        for stream in &mut streams {
            stream.write_all(b"still here?\n").unwrap();
            let mut received = String::new();
            while !received.ends_with("still here?\n") {
                let mut buffer = [0; 256];
                let read = stream.read(&mut buffer).unwrap();
                assert_ne!(read, 0, "{options}: closed");
                received.push_str(std::str::from_utf8(&buffer[..read]).unwrap());
            }
        }
    }
    drop(streams);
    scenario.srcip.detach(&scenario.pod, "--drain 10").unwrap();
    assert_eq!(traces(&scenario.pod), before);
}

/// The proxy moves to another port: no connection is refused, none passes it by.
fn proxy_port(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    let moved = Proxy::spawn(&scenario.pod, Kind::Haproxy, |config| config.replace("15006", "15007"));
    let _moved = moved.unwrap();
    scenario.pod.wait_open(15007).unwrap();
    for options in ["--on-proxy-down drop", "--on-proxy-down pass"] {
        let load = Load::start(&scenario.client, scenario.pod.socket(Family::V4, PORT), 2).unwrap();
        for round in 0..6 {
            load.wait_for(30);
            let port = 15006 + round % 2;
            let arguments =
                scenario.srcip.attach_arguments(&scenario.pod, &format!("{} {options}", engine.option()));
            let arguments = arguments.replace("--proxy-port 15006", &format!("--proxy-port {port}"));
            scenario.srcip.run(&arguments).unwrap();
        }
        load.wait_for(30);
        let report = load.stop().unwrap();
        assert_eq!((&report.failures[..], report.bypassed, report.lost), (&[][..], 0, 0), "{options}");
    }
    // It is the one that moved that answers.
    scenario.proxy.take().unwrap().kill();
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
}
