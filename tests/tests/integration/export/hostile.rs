//! Whoever reaches the metrics may be hostile: scraping goes on.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use srcip_tests::{client, proxy::Kind};

use super::{Export, metrics_address, scrape, value};
use crate::scenario::{Engine, Scenario};

fn connect(scenario: &Scenario) -> TcpStream {
    client::connect(scenario.world.node(), metrics_address()).unwrap()
}

/// Sends, and returns what comes back until the connection ends.
fn send(scenario: &Scenario, bytes: &[u8]) -> String {
    let mut stream = connect(scenario);
    // It may be closed before all is sent.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// How many files and sockets it has open.
fn descriptors(export: &Export) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", export.process.pid())).unwrap().count()
}

#[test]
fn other_requests_are_refused() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let export = Export::start(&scenario, "");
    let request = |line: &str| send(&scenario, format!("{line} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
    let get = request("GET /metrics");
    assert!(get.starts_with("HTTP/1.1 200") && get.contains("text/plain; version=0.0.4"), "{get}");
    let head = request("HEAD /metrics");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    assert!(request("GET /").starts_with("HTTP/1.1 404"));
    assert!(request("GET /metrics/../metrics").starts_with("HTTP/1.1 404"));
    let post = request("POST /metrics");
    assert!(post.starts_with("HTTP/1.1 405") && post.contains("allow: GET, HEAD"), "{post}");
    let open_metrics = "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n";
    let answer = send(&scenario, open_metrics.as_bytes());
    assert!(answer.contains("application/openmetrics-text; version=1.0.0") && answer.ends_with("# EOF\n"));
    export.stop();
}

#[test]
fn garbage_and_huge_heads_are_cut_off() {
    let scenario = Scenario::empty(Engine::SkLookup);
    let mut export = Export::start(&scenario, "");
    let many: String = (0..500).map(|number| format!("H{number}: x\r\n")).collect();
    let huge = "x".repeat(1 << 20);
    for bytes in [
        b"\0\xff\x16\x03\x01 no HTTP at all\r\n\r\n".to_vec(),
        b"GET /metrics HTTP/9.9\r\n\r\n".to_vec(),
        format!("GET /metrics HTTP/1.1\r\n{many}\r\n").into_bytes(),
        format!("GET /metrics HTTP/1.1\r\nHost: {huge}\r\n\r\n").into_bytes(),
        format!("GET /{huge} HTTP/1.1\r\n\r\n").into_bytes(),
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n".to_vec(),
    ] {
        let answer = send(&scenario, &bytes);
        assert!(!answer.contains("200 OK"), "{:?}: {answer}", String::from_utf8_lossy(&bytes[..40]));
    }
    assert!(value(&scrape(&scenario), "srcip_open_connections").is_some());
    assert!(export.process.is_running());
    export.stop();
}

/// More connections than the server takes, which send a head byte by byte, or nothing: those who really
/// ask are answered, and the others are cut off after a while.
#[test]
fn slow_clients_do_not_keep_others_out() {
    let scenario = Scenario::http(Engine::SkLookup, Kind::Haproxy);
    let export = Export::start(&scenario, "");
    let before = descriptors(&export);
    let mut slow: Vec<_> = (0..100).map(|_| connect(&scenario)).collect();
    // So many are held, and one that was just taken.
    scrape(&scenario);
    let held = descriptors(&export) - before;
    assert!((16..=33).contains(&held), "{held}");
    for (round, byte) in b"GET /metrics HTTP/1.1\r\nHost:".iter().enumerate() {
        for stream in slow.iter_mut().step_by(2) {
            // Those that have been cut off say so.
            let _ = stream.write_all(&[*byte]);
        }
        if round % 8 == 0 {
            let page = scrape(&scenario);
            assert!(value(&page, "srcip_open_connections").is_some());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for mut stream in slow {
        let mut rest = Vec::new();
        // Any other error would be a timeout: they are cut off after less than the patience of a connection.
        match stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
        assert!(!String::from_utf8_lossy(&rest).contains("200 OK"));
    }
    export.stop();
}
