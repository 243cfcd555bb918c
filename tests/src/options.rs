//! Options of sockets, and through them of the packets that they send.

use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
};

use anyhow::{Context as _, Result};
use libc::c_int;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrLike as _, SockaddrStorage, recvmsg};

use crate::Family;

/// The next header, which the kernel fills in, the length, four octets to be skipped.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];

/// Sets an option.
pub fn set(socket: &impl AsRawFd, level: c_int, option: c_int, value: &[u8]) -> io::Result<()> {
    let size = value.len() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the value as long as said.
    let error = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), size) };
    if error == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads an option of at most 64 octets.
fn get(socket: &impl AsRawFd, level: c_int, option: c_int) -> io::Result<Vec<u8>> {
    let mut value = vec![0; 64];
    let mut size = value.len() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the value as long as said.
    let error = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, value.as_mut_ptr().cast(), &raw mut size)
    };
    if error != 0 {
        return Err(io::Error::last_os_error());
    }
    value.truncate(size as usize);
    Ok(value)
}

/// What is too large for the way is refused rather than sent in fragments.
pub fn never_fragment(socket: &impl AsRawFd, family: Family) -> io::Result<()> {
    let (level, option, always) = match family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO),
    };
    set(socket, level, option, &always.to_ne_bytes())
}

/// All packets that the socket sends carry options: the IPv4 option that records the route, with room for four
/// hops; the IPv6 extension header with options for every hop, which mean nothing.
pub fn carry_options(socket: &impl AsRawFd, family: Family) -> io::Result<()> {
    match family {
        Family::V4 => {
            let mut record_route = [0; 20];
            // Kind, length, where to begin; after it, no operation.
            record_route[..3].copy_from_slice(&[7, 19, 4]);
            record_route[19] = 1;
            set(socket, libc::IPPROTO_IP, libc::IP_OPTIONS, &record_route)
        }
        Family::V6 => set(socket, libc::IPPROTO_IPV6, libc::IPV6_HOPOPTS, &PADDING),
    }
}

/// All IPv6 packets that a UDP socket sends carry options for the destination too, which mean nothing.
///
/// Not for TCP: a router that runs Linux looks for the TCP header of a packet made of many segments right behind the
/// options for every hop (`ip6_rcv`), takes a part of the sequence number for its length, and with five connections of
/// sixteen for too big what is not.
pub fn carry_destination_options(socket: &UdpSocket) -> io::Result<()> {
    set(socket, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &PADDING)
}

/// The IPv4 options that came with a TCP connection's first packet, as they will be sent back.
pub fn of_connection(socket: &impl AsRawFd) -> io::Result<Vec<u8>> {
    get(socket, libc::IPPROTO_IP, libc::IP_OPTIONS)
}

/// Has [`receive`] tell of options.
pub fn ask_for_options(socket: &UdpSocket, family: Family) -> io::Result<()> {
    let on = 1_i32.to_ne_bytes();
    match family {
        Family::V4 => set(socket, libc::IPPROTO_IP, libc::IP_RECVOPTS, &on),
        Family::V6 => {
            set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS, &on)?;
            set(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS, &on)
        }
    }
}

/// Receives a datagram. Returns its length, who sent it, and how many kinds of options came with it.
pub fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> Result<(usize, SocketAddr, usize)> {
    let mut space = vec![0; 512];
    let mut parts = [IoSliceMut::new(buffer)];
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    let from = received.address.context("nobody sent it")?;
    let from = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
        (Some(v4), _) => SocketAddr::V4((*v4).into()),
        (None, Some(v6)) => SocketAddr::V6((*v6).into()),
        (None, None) => anyhow::bail!("an address of family {:?}", from.family()),
    };
    let kinds = received.cmsgs()?.filter(|message| matches!(message, ControlMessageOwned::Unknown(_)));
    Ok((received.bytes, from, kinds.count()))
}
