//! The TCP sockets of the calling thread's network namespace.
//!
//! From `sock_diag` (sock_diag(7)), which takes a tenth of the time of `/proc/net/tcp`: of both, the greatest part is
//! to walk the hash table that all namespaces share, and `/proc` does that line by line. `/proc` serves where
//! the kernel has no `tcp_diag` (`CONFIG_INET_DIAG`).

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::{
    SockDiagMessage,
    constants::{AF_INET, AF_INET6, IPPROTO_TCP},
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

/// `TCP_ESTABLISHED` and its kin: include/net/tcp_states.h.
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

/// A TCP socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TcpSocket {
    /// The socket's own address, IPv4-mapped ones as IPv4.
    pub local: SocketAddr,
    /// The other end's.
    pub remote: SocketAddr,
    state: u8,
}

impl TcpSocket {
    /// Waits for connections.
    pub fn is_listener(&self) -> bool {
        self.state == LISTEN
    }

    /// Has, or is about to have or to give up, a connection; not one that only waits out TIME_WAIT.
    pub fn is_connection(&self) -> bool {
        !matches!(self.state, LISTEN | TIME_WAIT | CLOSE)
    }
}

/// All TCP sockets of the calling thread's network namespace.
pub fn tcp_sockets() -> io::Result<Vec<TcpSocket>> {
    from_sock_diag().or_else(|error| {
        tracing::debug!("no sock_diag, /proc has to serve: {error}");
        from_proc()
    })
}

fn from_sock_diag() -> io::Result<Vec<TcpSocket>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    let mut sockets = Vec::new();
    dump(&socket, AF_INET, SocketId::new_v4(), &mut sockets)?;
    // A kernel without IPv6 has nothing to tell of it.
    dump(&socket, AF_INET6, SocketId::new_v6(), &mut sockets)?;
    Ok(sockets)
}

fn dump(socket: &Socket, family: u8, any: SocketId, sockets: &mut Vec<TcpSocket>) -> io::Result<()> {
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id: any,
    };
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut octets = vec![0; message.buffer_len()];
    message.serialize(&mut octets);
    socket.send(&octets, 0)?;
    loop {
        // A datagram of several messages; as large as the next one is.
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest).map_err(io::Error::other)?;
            match message.payload {
                NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
                    sockets.push((&response.header).into());
                }
                // A dump that fails ends as one that succeeds does, but for its code.
                NetlinkPayload::Done(done) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code));
                }
                NetlinkPayload::Done(_) => return Ok(()),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => {}
            }
            // Messages begin at multiples of four octets.
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

impl From<&InetResponseHeader> for TcpSocket {
    fn from(header: &InetResponseHeader) -> Self {
        let id = &header.socket_id;
        let end = |ip: IpAddr, port| SocketAddr::new(ip.to_canonical(), port);
        Self {
            local: end(id.source_address, id.source_port),
            remote: end(id.destination_address, id.destination_port),
            state: header.state,
        }
    }
}

fn from_proc() -> io::Result<Vec<TcpSocket>> {
    let mut sockets = Vec::new();
    for table in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{table}");
        match fs::read_to_string(&path) {
            Ok(text) => sockets.extend(text.lines().skip(1).filter_map(parse_line)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table == "tcp6" => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// A line of `/proc/net/tcp` or `tcp6`.
fn parse_line(line: &str) -> Option<TcpSocket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_address(fields.next()?)?;
    let remote = parse_address(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    Some(TcpSocket { local, remote, state })
}

/// `0100007F:1F40`: words of the address as the processor reads them, port in hexadecimal.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |i: usize| -> Option<[u8; 4]> {
        let digits = address.get(i * 8..i * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    #[cfg(target_endian = "little")]
    fn lines_of_both_tables() {
        let v4 = "   0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1";
        let socket = parse_line(v4).unwrap();
        assert_eq!(socket.local, "127.0.0.1:8000".parse().unwrap());
        assert!(socket.is_listener() && !socket.is_connection());
        let v6 = "   1: 0000000000000000FFFF00000100007F:1F40 \
                  B80D01200000000000000000010000FF:C001 01 0:0";
        let socket = parse_line(v6).unwrap();
        assert_eq!(socket.local, "127.0.0.1:8000".parse().unwrap());
        assert_eq!(socket.remote, "[2001:db8::ff00:1]:49153".parse().unwrap());
        assert!(socket.is_connection());
        assert_eq!(parse_line("  sl  local_address"), None);
        assert_eq!(parse_line(""), None);
    }

    #[test]
    fn both_ways_find_the_same_sockets() {
        for address in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let mut to = listener.local_addr().unwrap();
            if to.ip().is_unspecified() {
                // An IPv4-mapped end.
                to.set_ip(Ipv4Addr::LOCALHOST.into());
            }
            let client = TcpStream::connect(to).unwrap();
            let server = listener.accept().unwrap().0;
            for sockets in [from_sock_diag().unwrap(), from_proc().unwrap()] {
                let found = |stream: &TcpStream| {
                    let ends = [stream.local_addr().unwrap(), stream.peer_addr().unwrap()];
                    let [local, remote] =
                        ends.map(|end| SocketAddr::new(end.ip().to_canonical(), end.port()));
                    sockets
                        .iter()
                        .filter(|s| s.local == local && s.remote == remote && s.is_connection())
                        .count()
                };
                assert_eq!((found(&client), found(&server)), (1, 1), "{address}");
                let own = listener.local_addr().unwrap();
                assert_eq!(
                    sockets.iter().filter(|s| s.local == own && s.is_listener()).count(),
                    1,
                    "{address}"
                );
            }
        }
    }
}
