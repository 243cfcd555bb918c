//! OpenTelemetry: a collector gets a log record for every connection that has ended.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::mpsc::{Receiver, Sender, channel},
};

use opentelemetry_proto::tonic::{
    collector::logs::v1::ExportLogsServiceRequest,
    common::v1::{KeyValue, any_value::Value},
    logs::v1::LogRecord,
};
use prost::Message as _;
use srcip_tests::{Family, proxy::Kind};

use super::{Export, connections, scrape, value, visit, wait_for, wait_for_value};
use crate::scenario::{Engine, PORT, Scenario};

const COLLECTOR: &str = "127.0.0.1:4318";
const OPTION: &str = "--otlp-endpoint http://127.0.0.1:4318";

/// A collector on the node, which hands over what it gets. Ends with the test's process.
fn collector(scenario: &Scenario) -> Receiver<ExportLogsServiceRequest> {
    let listener = scenario.world.node().netns().run(|| TcpListener::bind(COLLECTOR)).unwrap().unwrap();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let sender = sender.clone();
            std::thread::spawn(move || serve(stream.unwrap(), &sender));
        }
    });
    receiver
}

fn serve(mut stream: TcpStream, sender: &Sender<ExportLogsServiceRequest>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let head = head.to_ascii_lowercase();
        assert!(head.starts_with("post /v1/logs http/1.1"), "{head}");
        assert!(head.contains("content-type: application/x-protobuf"), "{head}");
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.trim().parse().unwrap()];
        reader.read_exact(&mut body).unwrap();
        let request = ExportLogsServiceRequest::decode(&body[..]).unwrap();
        let _ = sender.send(request);
        let answer = "HTTP/1.1 200 OK\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n";
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// Attributes as text.
fn attributes(all: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &Value| match value {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        Value::BoolValue(truth) => truth.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        other => format!("{other:?}"),
    };
    let value = |attribute: &KeyValue| {
        text(attribute.value.as_ref().and_then(|value| value.value.as_ref()).expect("a value"))
    };
    all.iter().map(|attribute| (attribute.key.clone(), value(attribute))).collect()
}

#[test]
fn a_collector_gets_every_connection() {
    let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
    let requests = collector(&scenario);
    let export = Export::start(&scenario, OPTION);
    visit(&scenario, 6);
    wait_for_value(&scenario, r#"srcip_otlp_records_total{result="exported"}"#, 12.);
    export.stop();
    let mut records: Vec<LogRecord> = Vec::new();
    for request in requests.try_iter() {
        for resource in request.resource_logs {
            let of = attributes(&resource.resource.expect("a resource").attributes);
            assert_eq!(of["service.name"], "srcip");
            assert_eq!(of["service.version"], env!("CARGO_PKG_VERSION"));
            records.extend(resource.scope_logs.into_iter().flat_map(|scope| scope.log_records));
        }
    }
    assert_eq!(records.len(), 12);
    let client = scenario.client.address(Family::V4).to_string();
    let pod = scenario.pod.address(Family::V4).to_string();
    for leg in ["downstream", "upstream"] {
        let of_leg: Vec<_> =
            records.iter().filter(|r| attributes(&r.attributes)["srcip.leg"] == leg).collect();
        assert_eq!(of_leg.len(), 6, "{leg}");
        for record in of_leg {
            assert_eq!(record.event_name, "srcip.connection.close");
            assert!(record.time_unix_nano > 1_700_000_000_000_000_000, "{record:?}");
            let has = attributes(&record.attributes);
            for (name, expected) in [
                ("client.address", &*client),
                ("server.address", &pod),
                ("server.port", &PORT.to_string()),
                ("network.peer.address", if leg == "downstream" { &client } else { &pod }),
                ("network.transport", "tcp"),
                ("network.type", "ipv4"),
                ("srcip.workload", scenario.pod.name()),
                ("srcip.preserved", "true"),
            ] {
                assert_eq!(has[name], expected, "{name} of {has:?}");
            }
            assert!(has["srcip.upstream_local_address"].starts_with(&client), "{has:?}");
            assert!(has["client.port"].parse::<u16>().is_ok(), "{has:?}");
        }
    }
}

/// Nobody there, or somebody who takes and never answers: the rest goes on, and what is lost is counted.
#[test]
fn a_collector_that_does_not_answer_holds_nothing_up() {
    for listens in [false, true] {
        let scenario = Scenario::tcp(Engine::SkLookup, Kind::HaproxyTcp);
        let node = scenario.world.node();
        let stalled = listens.then(|| node.netns().run(|| TcpListener::bind(COLLECTOR)).unwrap().unwrap());
        let path = scenario.world.directory().join("access.json");
        let export = Export::start(&scenario, &format!("{OPTION} --access-log {}", path.display()));
        visit(&scenario, 5);
        wait_for_value(&scenario, &connections(scenario.pod.name(), "upstream", "true"), 5.);
        wait_for_value(&scenario, "srcip_access_log_lines_total", 10.);
        let lost = wait_for("records are given up", || {
            let lost = value(&scrape(&scenario), r#"srcip_otlp_records_total{result="failed"}"#)?;
            (lost > 0.).then_some(lost)
        });
        assert!(lost <= 10., "{lost}");
        // It ends, before patience does.
        let log = export.stop();
        assert_eq!(log.matches("cannot export to").count(), 1, "{log}");
        drop(stalled);
    }
}
