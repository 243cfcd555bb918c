//! The TCP sockets of the calling thread's network namespace, from `/proc`.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// `TCP_ESTABLISHED` and its kin: include/net/tcp_states.h.
const TIME_WAIT: u8 = 6;
const CLOSE: u8 = 7;
const LISTEN: u8 = 10;

/// One line of `/proc/net/tcp` or `tcp6`.
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
    fn finds_its_own_sockets() {
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = TcpStream::connect(address).unwrap();
        let sockets = tcp_sockets().unwrap();
        assert!(sockets.iter().any(|s| s.local == address && s.is_listener()));
        let client = client.local_addr().unwrap();
        assert!(sockets.iter().any(|s| s.local == client && s.is_connection()));
    }
}
