//! `srcip observe`: what it prints, when, and how it ends.

use std::collections::HashMap;

use nix::sys::signal::Signal;
use serde_json::Value;
use srcip_tests::{
    Family, client,
    host::Host,
    observe::{Observe, programs, wait_for_programs},
    peer,
    proxy::{Kind, Proxy},
    wait_until,
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(at_once, filters, the_past);

/// A connection is told of while it is open, whether or not anything else happens.
fn at_once(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Haproxy);
    let observe = Observe::start(&scenario.world, &scenario.srcip, "-o json").unwrap();
    for family in Family::BOTH {
        let to = scenario.pod.socket(family, PORT);
        for _ in 0..15 {
            let mut stream = client::connect(&scenario.client, to).unwrap();
            let own = stream.local_addr().unwrap().to_string();
            let line = observe.find_json(|line| line["downstream_remote_address"] == own).unwrap();
            assert_eq!((&line["event"], &line["leg"]), (&"open".into(), &"downstream".into()), "{line}");
            assert_eq!(line["downstream_local_address"], to.to_string());
            // The rest of its life: what the application sees, and its end.
            client::ask(&mut stream).unwrap();
            let upstream = observe.find_json(|line| line["origin"] == own && line["leg"] == "upstream");
            assert_eq!(upstream.unwrap()["preserved"], true);
            drop(stream);
            let end = observe.find_json(|line| line["origin"] == own && line["event"] == "close").unwrap();
            assert!(end["bytes_received"].as_u64().unwrap() > 0, "{end}");
        }
    }
}

/// Runs it without `-f`, and takes its lines as JSON; without the time, whose last digit depends on how
/// well two clocks could be compared.
fn past(scenario: &Scenario, options: &str) -> Vec<Value> {
    let text = scenario.srcip.run(&format!("observe -o json {options}")).unwrap();
    text.lines().map(timeless).collect()
}

fn timeless(line: &str) -> Value {
    let mut value: Value = serde_json::from_str(line).unwrap();
    assert!(value.as_object_mut().unwrap().remove("time").is_some(), "{line}");
    value
}

/// Every condition selects something and rejects something, and `--not` is the rest.
fn filters(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    scenario.attach("--name web");
    // A pod whose proxy hides its clients.
    let lossy = scenario.world.host("lossy").unwrap();
    let _application = peer::application(&lossy, &["[::]:8000", "[::]:8001"]).unwrap();
    let _proxy = Proxy::start_with(&lossy, Kind::Haproxy, |config| {
        assert!(config.contains("usesrc clientip"));
        config.lines().filter(|line| !line.contains("usesrc")).map(|line| format!("{line}\n")).collect()
    })
    .unwrap();
    scenario.srcip.attach(&lossy, &format!("{} --name lossy", engine.option())).unwrap();
    let ask = |pod: &Host, family, port| {
        client::ask_once(&scenario.client, pod.socket(family, port)).unwrap();
    };
    Family::BOTH.into_iter().for_each(|family| ask(&scenario.pod, family, PORT));
    ask(&lossy, Family::V4, 8001);
    let closed = |line: &&Value| line["event"] == "close" && line["leg"] == "downstream";
    wait_until("three connections have ended", || {
        past(&scenario, "--last 1000").iter().filter(closed).count() == 3
    });

    let [v4, v6] = Family::BOTH.map(|family| scenario.client.address(family).to_string());
    let [pod4, lossy4] = [&scenario.pod, &lossy].map(|pod| pod.address(Family::V4).to_string());
    let starts = |line: &Value, fields: &[&str], prefix: &str| {
        fields.iter().any(|field| line[*field].as_str().is_some_and(|text| text.starts_with(prefix)))
    };
    let froms = ["origin", "downstream_remote_address", "upstream_local_address"];
    let tos = ["downstream_local_address", "upstream_host"];
    type Holds<'a> = Box<dyn Fn(&Value) -> bool + 'a>;
    let conditions: Vec<(String, Holds<'_>)> = vec![
        (format!("--from {v4}"), Box::new(|l| starts(l, &froms, &format!("{v4}:")))),
        (format!("--from {v6}"), Box::new(|l| starts(l, &froms, &format!("[{v6}]:")))),
        ("--from fd13:37::/64".to_owned(), Box::new(|l| starts(l, &froms, "[fd13:37:"))),
        (format!("--to {pod4}"), Box::new(|l| starts(l, &tos, &format!("{pod4}:")))),
        (format!("--to {lossy4}/32"), Box::new(|l| starts(l, &tos, &format!("{lossy4}:")))),
        ("--port 8001".to_owned(), Box::new(|l| l.to_string().contains(":8001\""))),
        ("--pod web".to_owned(), Box::new(|l| l["workload"] == "web")),
        ("--leg upstream".to_owned(), Box::new(|l| l["leg"] == "upstream")),
        ("--lost".to_owned(), Box::new(|l| l["preserved"] == false)),
        ("--pod lossy --leg downstream".to_owned(), {
            Box::new(|l| l["workload"] == "lossy" && l["leg"] == "downstream")
        }),
    ];
    for (options, holds) in conditions {
        // Upstream connections may end any time, so ends are left out.
        let open = |options: &str| {
            let mut lines = past(&scenario, &format!("--last 1000 {options}"));
            lines.retain(|line| line["event"] == "open");
            lines
        };
        let all = open("");
        let (wanted, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(&holds);
        assert!(!wanted.is_empty() && !rest.is_empty(), "{options} is no test: {wanted:?} {rest:?}");
        assert_eq!(open(&options), wanted, "{options}");
        assert_eq!(open(&format!("{options} --not")), rest, "{options} --not");
    }
    // What is lost is what the other pod's proxy hides.
    assert!(past(&scenario, "--last 1000 --lost").iter().all(|line| line["workload"] == "lossy"));
    // Only what is remembered of the pods asked for.
    let lines = past(&scenario, &format!("--last 1000 --netns {}", lossy.path().display()));
    assert!(!lines.is_empty() && lines.iter().all(|line| line["workload"] == "lossy"), "{lines:?}");
    // The reverse of nothing is a mistake.
    let said = scenario.srcip.fail("observe --not").unwrap();
    assert!(said.contains("--from") && said.contains("--lost"), "{said}");
}

/// `--last` and `--since`, without and with `-f`.
fn the_past(engine: Engine) {
    let mut scenario = Scenario::http(engine, Kind::Haproxy);
    for _ in 0..15 {
        Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    }
    let closed = |line: &&Value| line["event"] == "close" && line["leg"] == "downstream";
    wait_until("30 connections have ended", || {
        past(&scenario, "--last 1000").iter().filter(closed).count() == 30
    });
    // Upstream connections are kept for others for a while, and would end in the middle of what follows.
    scenario.restart_application();
    wait_until("a second's silence", || past(&scenario, "--since 1s").is_empty());
    let all = past(&scenario, "--since 1h");
    assert_eq!(past(&scenario, "--last 1000"), all);
    assert_eq!(past(&scenario, ""), all[all.len() - 20..]);
    assert_eq!(past(&scenario, "--last 3"), all[all.len() - 3..]);
    assert_eq!(past(&scenario, "--last 3 --since 1h"), all[all.len() - 3..]);
    assert!(past(&scenario, "--last 0").is_empty());
    let text = scenario.srcip.run("observe -o json --last 1000").unwrap();
    let value = |line| serde_json::from_str::<Value>(line).unwrap();
    let times: Vec<_> = text.lines().map(|line| value(line)["time"].to_string()).collect();
    assert!(times.is_sorted(), "{times:?}");

    // What is remembered, and then what happens; nothing twice.
    let observe = Observe::start(&scenario.world, &scenario.srcip, "-o json --last 4").unwrap();
    let lines: Vec<_> = (0..4).map(|_| timeless(&observe.line().unwrap())).collect();
    assert_eq!(lines, all[all.len() - 4..]);
    let mut stream = client::connect(&scenario.client, scenario.pod.socket(Family::V4, PORT)).unwrap();
    client::ask(&mut stream).unwrap();
    let own = stream.local_addr().unwrap().to_string();
    let first: Value = serde_json::from_str(&observe.line().unwrap()).unwrap();
    assert_eq!((&first["origin"], &first["event"]), (&own.into(), &"open".into()), "{first}");
    drop(observe);
    assert!(!past(&scenario, "--since 30s --leg downstream").is_empty());

    // While connections come and go, none is told of twice.
    let load = srcip_tests::load::Load::start(&scenario.client, scenario.pod.socket(Family::V6, PORT), 2);
    let load = load.unwrap();
    load.wait_for(20);
    let options = "-o json --since 1m --leg downstream";
    let mut observe = Observe::start(&scenario.world, &scenario.srcip, options).unwrap();
    load.wait_for(50);
    load.stop().unwrap();
    observe.signal(Signal::SIGTERM).unwrap();
    assert!(observe.wait().unwrap().0.success());
    let lines: Vec<Value> = observe.rest().iter().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(lines.len() > 100, "{}", lines.len());
    let mut seen = HashMap::new();
    for line in &lines {
        let what = format!("{} {}", line["event"], line["origin"]);
        let before = seen.insert(what, line);
        assert_eq!(before, None, "told of twice: {line}");
    }
}

#[test]
fn columns_and_lines() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    scenario.attach("--name a-name-that-is-longer-than-most");
    Family::BOTH.into_iter().for_each(|family| scenario.assert_kept(family));
    let table = scenario.srcip.run("observe -o table --leg upstream").unwrap();
    let lines: Vec<_> = table.lines().collect();
    assert!(lines[0].starts_with("TIME") && lines.len() >= 3, "{table}");
    for (title, text) in [("LEG", "upstream"), ("ORIGIN", ""), ("VERDICT", "preserved")] {
        let at = lines[0].find(title).unwrap();
        for line in &lines[1..] {
            assert_eq!(line.as_bytes()[at - 1], b' ', "{title}: {table}");
            assert!(line[at..].starts_with(text), "{title}: {table}");
        }
    }
    for family in Family::BOTH {
        let client = scenario.client.address(family).to_string();
        // As the origin, and as what the application sees.
        assert!(lines.iter().any(|line| line.matches(&client).count() == 2), "{client}: {table}");
    }
    let bare = scenario.srcip.run("observe -o table --no-headers").unwrap();
    assert!(!bare.contains("TIME") && bare.contains("preserved"), "{bare}");
    let compact = scenario.srcip.run("observe --leg upstream").unwrap();
    let line = compact.lines().next().unwrap();
    let name = "open  a-name-that-is-longer-than-most upstream";
    for part in [name, " -> ", " => ", ":8000 preserved"] {
        assert!(line.contains(part), "{part:?}: {compact}");
    }
}

/// Nothing of srcip is there but the command.
#[test]
fn without_an_attachment() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let _application = peer::application(&scenario.pod, &["[::]:8000"]).unwrap();
    let observe = Observe::start(&scenario.world, &scenario.srcip, "-o json").unwrap();
    for family in Family::BOTH {
        let mut stream = client::connect(&scenario.client, scenario.pod.socket(family, PORT)).unwrap();
        client::ask(&mut stream).unwrap();
        let own = stream.local_addr().unwrap().to_string();
        let line = observe.find_json(|line| line["origin"] == own).unwrap();
        assert_eq!((&line["leg"], &line["preserved"]), (&"direct".into(), &true.into()), "{line}");
        assert_eq!(line["workload"], scenario.pod.name());
    }
    let output = scenario.srcip.output("observe").unwrap();
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("`srcip observe -f`"), "{output:?}");
    assert!(!scenario.srcip.pin_path().exists());
}

/// By signals, by a reader that goes, by a reader that stands still; and by force.
#[test]
fn endings() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    let cgroup = scenario.world.cgroup();
    let before = programs(cgroup).unwrap();
    let start = || Observe::start(&scenario.world, &scenario.srcip, "-o json").unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut observe = start();
        scenario.assert_kept(Family::V4);
        observe.signal(signal).unwrap();
        let (status, said) = observe.wait().unwrap();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""), "{signal}");
        // What happened before the signal has been told.
        let rest = observe.rest();
        assert!(rest.iter().any(|line| line.contains("\"downstream\"")), "{signal}: {rest:?}");
        wait_for_programs(cgroup, before).unwrap();
    }

    // `head` goes while nothing happens.
    let mut observe = Observe::start_unread(&scenario.world, &scenario.srcip, "").unwrap();
    observe.close_pipe();
    let (status, said) = observe.wait().unwrap();
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));

    // Nobody reads, and the pipe is full.
    let mut observe = Observe::start_unread(&scenario.world, &scenario.srcip, "-o json").unwrap();
    let load =
        srcip_tests::load::Load::start(&scenario.client, scenario.pod.socket(Family::V4, PORT), 2).unwrap();
    load.wait_for(200);
    load.stop().unwrap();
    observe.signal(Signal::SIGTERM).unwrap();
    assert_eq!(observe.wait().unwrap().0.code(), Some(0));

    let mut observe = start();
    observe.signal(Signal::SIGKILL).unwrap();
    assert_eq!(observe.wait().unwrap().0.code(), None);
    wait_for_programs(cgroup, before).unwrap();
}

/// Who makes a network namespace chooses its name.
#[test]
fn names_that_terminals_would_obey() {
    let mut scenario = Scenario::empty(Engine::SkLookup);
    let evil = scenario.world.host("\x1b[31m\u{9b}2J").unwrap();
    let _application = peer::application(&evil, &["[::]:8000"]).unwrap();
    for format in ["compact", "table", "json"] {
        let observe =
            Observe::start(&scenario.world, &scenario.srcip, &format!("-o {format} --port 8000")).unwrap();
        client::ask_once(&scenario.client, evil.socket(Family::V4, PORT)).unwrap();
        let line = observe.find(|line| line.contains("direct")).unwrap();
        assert!(!line.contains(char::is_control), "{line:?}");
        if format == "json" {
            let value: Value = serde_json::from_str(&line).unwrap();
            assert_eq!(value["workload"], evil.name());
        }
    }
}
