//! Which ports are steered.

use srcip_tests::{
    Family, client, peer,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, Scenario};

crate::engines!(lists, the_proxys_own_ports, a_port_nobody_listens_on);

fn scenario(engine: Engine, kind: Kind) -> Scenario {
    let mut scenario = Scenario::empty(engine);
    let addresses = ["[::]:8000", "[::]:8001", "[::]:9005", "[::]:15020", "[::]:15021", "[::]:15090"];
    scenario.application = Some(peer::application(&scenario.pod, &addresses).unwrap());
    scenario.proxy = Some(Proxy::start(&scenario.pod, kind).unwrap());
    scenario
}

fn lists(engine: Engine) {
    let scenario = scenario(engine, Kind::Haproxy);
    let cases: [(&str, [bool; 3]); 5] = [
        ("", [true, true, true]),
        ("--include-inbound-ports 8000,9000-9010", [true, false, true]),
        ("--exclude-inbound-ports 8001,9005", [true, false, false]),
        ("--include-inbound-ports 8000-8001 --exclude-inbound-ports 8000", [false, true, false]),
        ("--include-inbound-ports *", [true, true, true]),
    ];
    for (options, expected) in cases {
        // The same attachment each time: its settings change in place.
        scenario.attach(options);
        let passed = scenario.counter("passed");
        for family in Family::BOTH {
            for (port, steered) in [8000, 8001, 9005].into_iter().zip(expected) {
                let seen = scenario.ask_port(family, port);
                assert_eq!(seen.proxied, steered, "{options} {family:?} {port}");
                assert_eq!(seen.peer.ip(), scenario.client.address(family));
                assert_eq!(seen.local.port(), port);
            }
        }
        let direct = 2 * expected.iter().filter(|steered| !**steered).count() as u64;
        assert_eq!(scenario.counter("passed") - passed, direct, "{options}");
    }
}

fn the_proxys_own_ports(engine: Engine) {
    let scenario = scenario(engine, Kind::Haproxy);
    // Also when somebody asks for them by name.
    for options in ["", "--include-inbound-ports 8000,15006,15020-15021,15090"] {
        scenario.attach(options);
        for port in [15020, 15021, 15090] {
            assert!(!scenario.ask_port(Family::V4, port).proxied, "{options} {port}");
        }
        // A connection to the proxy's own port reaches the proxy by itself; it is not counted as steered.
        let steered = scenario.counter("steered");
        let to = scenario.pod.socket(Family::V4, 15006);
        drop(client::connect(&scenario.client, to).unwrap());
        assert_eq!(scenario.counter("steered"), steered);
    }
}

fn a_port_nobody_listens_on(engine: Engine) {
    let scenario = scenario(engine, Kind::Envoy);
    scenario.attach("");
    for family in Family::BOTH {
        for port in [1, 7777, 65535] {
            let mut stream = client::connect(&scenario.client, scenario.pod.socket(family, port)).unwrap();
            let error = format!("{:#}", client::http_get(&mut stream, "/").unwrap_err());
            assert!(error.contains("503 Service Unavailable"), "Envoy answers: {error}");
        }
    }
    assert_eq!(scenario.counter("steered"), 6);
}
