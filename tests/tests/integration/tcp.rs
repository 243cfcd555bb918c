//! TCP in all its moods, through the proxy.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use srcip_tests::{
    Family, PATIENCE, client,
    peer::Clients,
    proxy::{Kind, Proxy},
};

use crate::scenario::{Engine, PORT, Scenario};

crate::engines!(
    time_wait_reuse,
    syn_cookies,
    retransmitted_attempts,
    a_full_accept_queue,
    half_close,
    bulk_both_ways,
    keep_alive,
    ten_thousand_in_sequence,
    a_thousand_at_once,
);

/// The client comes back from a port that the proxy's end still has in TIME_WAIT.
fn time_wait_reuse(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Haproxy);
    for family in Family::BOTH {
        let from = scenario.client.socket(family, 45678);
        let to = scenario.pod.socket(family, PORT);
        for round in 0..20 {
            let mut stream = client::connect_from(&scenario.client, Some(from), to).unwrap();
            // The server's side closes first, so that TIME_WAIT is there.
            stream.write_all(b"GET /seen HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).unwrap();
            assert!(response.to_lowercase().contains("via: haproxy"), "round {round}: {response}");
            assert!(response.contains(&from.ip().to_string()), "round {round}: {response}");
            drop(stream);
            // The client's end is gone once its last segment has been acknowledged.
            let deadline = Instant::now() + PATIENCE;
            while scenario.client.tcp_sockets().unwrap().iter().any(|s| s.local.port() == 45678) {
                assert!(Instant::now() < deadline, "round {round}: the client's end stays");
                std::thread::sleep(Duration::from_millis(2));
            }
            if round == 0 {
                let sockets = scenario.pod.sh("ss -Htan state time-wait").unwrap();
                assert!(sockets.contains(":45678"), "{sockets}");
            }
        }
    }
}

fn syn_cookies(engine: Engine) {
    let scenario = Scenario::http(engine, Kind::Envoy);
    scenario.pod.sysctl("net.ipv4.tcp_syncookies", "2").unwrap();
    for family in Family::BOTH {
        for _ in 0..100 {
            scenario.assert_kept(family);
        }
    }
    let sent = scenario.pod.sh("nstat -asz TcpExtSyncookiesSent").unwrap();
    let sent: u64 = sent
        .split_whitespace()
        .last()
        .and_then(|_| {
            sent.lines()
                .find(|l| l.starts_with("TcpExtSyncookiesSent"))?
                .split_whitespace()
                .nth(1)?
                .parse()
                .ok()
        })
        .unwrap();
    assert!(sent >= 200, "cookies were not used: {sent}");
}

/// The first SYN is lost, the client's or the proxy's.
fn retransmitted_attempts(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::EnvoyTcp);
    for (host, chain) in [(&scenario.client, "OUTPUT"), (&scenario.pod, "INPUT -i lo")] {
        for (family, restore) in [(Family::V4, "iptables-restore"), (Family::V6, "ip6tables-restore")] {
            let lose = "-p tcp --syn -m statistic --mode nth --every 2 --packet 0 -j DROP";
            for _ in 0..3 {
                // Anew each time: one that was sent once more than expected would leave the count odd.
                host.feed(restore, &format!("*filter\n-A {chain} {lose}\nCOMMIT\n")).unwrap();
                let start = Instant::now();
                let mut stream = connect(&scenario, family);
                let own = stream.local_addr().unwrap();
                let mut greeting = [0; 256];
                let read = stream.read(&mut greeting).unwrap();
                let greeting = std::str::from_utf8(&greeting[..read]).unwrap();
                assert!(greeting.contains(&own.ip().to_string()), "{greeting}");
                assert!(!greeting.contains(&format!(":{} ", own.port())), "past the proxy: {greeting}");
                // The second SYN came a second later.
                assert!(start.elapsed() > Duration::from_millis(900), "{chain}: no SYN was lost");
            }
            host.feed(restore, "*filter\nCOMMIT\n").unwrap();
        }
    }
    assert_eq!(scenario.counter("steered"), 12);
}

/// The application's queue is full: the proxy's SYN is looked up and dropped, and what it sends again a
/// second later must pass as well.
fn a_full_accept_queue(engine: Engine) {
    use socket2::{Domain, Socket, Type};
    let mut scenario = Scenario::empty(engine);
    let any: SocketAddr = format!("[::]:{PORT}").parse().unwrap();
    let listener = scenario.pod.netns().run(|| {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&any.into()).unwrap();
        // Room for one connection.
        socket.listen(0).unwrap();
        socket.set_nonblocking(true).unwrap();
        std::net::TcpListener::from(socket)
    });
    let listener = listener.unwrap();
    let proxy = Proxy::start_with(&scenario.pod, Kind::EnvoyTcp, |config| {
        // It does not give up while this test looks.
        config.replace("connect_timeout: 10s", "connect_timeout: 100s")
    });
    scenario.proxy = Some(proxy.unwrap());
    scenario.attach("");
    for family in Family::BOTH {
        let loopback = match family {
            Family::V4 => "127.0.0.1",
            Family::V6 => "::1",
        };
        let filler = SocketAddr::new(loopback.parse().unwrap(), PORT);
        let _filler = client::connect(&scenario.pod, filler).unwrap();
        let drops = || scenario.pod.sh("nstat -asz TcpExtListenOverflows").unwrap();
        let before = drops();
        let stream = connect(&scenario, family);
        let own = stream.local_addr().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while drops() == before {
            assert!(Instant::now() < deadline, "no SYN met a full queue");
            std::thread::sleep(Duration::from_millis(20));
        }
        accept(&listener);
        let peer = accept(&listener);
        assert_eq!(peer.ip().to_canonical(), own.ip());
        assert_ne!(peer.port(), own.port(), "past the proxy");
    }
    assert_eq!(scenario.counter("steered"), 2);
}

fn accept(listener: &std::net::TcpListener) -> SocketAddr {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match listener.accept() {
            Ok((_, peer)) => return peer,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < deadline, "no connection arrives");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The client says it is done sending, and still gets everything.
fn half_close(engine: Engine) {
    for kind in [Kind::EnvoyTcp, Kind::HaproxyTcp] {
        let scenario = Scenario::tcp(engine, kind);
        for family in Family::BOTH {
            let mut stream = connect(&scenario, family);
            stream.write_all(&[7; 100_000]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            let start = received.iter().position(|&b| b == b'\n').unwrap() + 1;
            assert_eq!(received[start..], [7; 100_000]);
        }
    }
}

/// 64 MiB both ways at once, compared by a checksum of what was sent and what came back.
fn bulk_both_ways(engine: Engine) {
    const SIZE: usize = 64 << 20;
    for kind in [Kind::EnvoyTcp, Kind::HaproxyTcp] {
        let scenario = Scenario::tcp(engine, kind);
        for family in Family::BOTH {
            let mut stream = connect(&scenario, family);
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
            let mut greeting = [0];
            while greeting != *b"\n" {
                stream.read_exact(&mut greeting).unwrap();
            }
            let mut sender = stream.try_clone().unwrap();
            let sent = std::thread::spawn(move || {
                let mut sum = Checksum::default();
                let mut seed = 1_u64;
                let mut block = vec![0; 1 << 16];
                for _ in 0..SIZE / block.len() {
                    for chunk in block.chunks_exact_mut(8) {
                        // xorshift64: different everywhere, so that a lost or swapped block shows.
                        seed ^= seed << 13;
                        seed ^= seed >> 7;
                        seed ^= seed << 17;
                        chunk.copy_from_slice(&seed.to_le_bytes());
                    }
                    sender.write_all(&block).unwrap();
                    sum.add(&block);
                }
                sender.shutdown(Shutdown::Write).unwrap();
                sum
            });
            let mut received = Checksum::default();
            let mut block = vec![0; 1 << 16];
            loop {
                match stream.read(&mut block) {
                    Ok(0) => break,
                    Ok(read) => received.add(&block[..read]),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => panic!("{kind:?} {family:?}: {error}"),
                }
            }
            let sent = sent.join().unwrap();
            assert_eq!(sent.length, SIZE as u64);
            assert_eq!(sent, received, "{kind:?} {family:?}");
        }
    }
}

/// FNV-1a, 64 bits, with the length.
#[derive(PartialEq, Eq, Debug)]
struct Checksum {
    length: u64,
    hash: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self { length: 0, hash: 0xcbf2_9ce4_8422_2325 }
    }
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        for byte in bytes {
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

fn connect(scenario: &Scenario, family: Family) -> TcpStream {
    client::connect(&scenario.client, scenario.pod.socket(family, PORT)).unwrap()
}

/// Many requests on one connection, and the connection idle in between.
fn keep_alive(engine: Engine) {
    for kind in Kind::HTTP {
        let scenario = Scenario::http(engine, kind);
        for family in Family::BOTH {
            let mut stream = connect(&scenario, family);
            for i in 0..50 {
                if i == 25 {
                    std::thread::sleep(Duration::from_millis(500));
                }
                let seen = client::ask(&mut stream).unwrap();
                assert!(seen.proxied);
                assert_eq!(seen.peer.ip(), scenario.client.address(family));
            }
        }
        assert_eq!(scenario.counter("steered"), 2);
    }
}

fn ten_thousand_in_sequence(engine: Engine) {
    let scenario = Scenario::tcp(engine, Kind::HaproxyTcp);
    for (family, count) in [(Family::V4, 10_000), (Family::V6, 10_000)] {
        let opened = Clients::new(scenario.pod.socket(family, PORT), count, 1).visit(&scenario.client);
        let opened = opened.unwrap();
        assert_eq!((opened.good, &opened.errors[..]), (count, &[][..]));
    }
    assert_eq!(scenario.counter("upstream"), 20_000);
    assert_eq!(scenario.counter("upstream_ports_exhausted"), 0);
}

fn a_thousand_at_once(engine: Engine) {
    for kind in [Kind::EnvoyTcp, Kind::HaproxyTcp] {
        let scenario = Scenario::tcp(engine, kind);
        for family in Family::BOTH {
            let to: SocketAddr = scenario.pod.socket(family, PORT);
            let mut held = Clients::new(to, 1000, 1000).hold(&scenario.client).unwrap();
            let opened = held.opened().unwrap();
            assert_eq!((opened.good, &opened.errors[..]), (1000, &[][..]), "{kind:?}");
            let checked = held.check().unwrap();
            assert_eq!((checked.good, &checked.errors[..]), (1000, &[][..]), "{kind:?}");
            held.close().unwrap();
        }
    }
}
