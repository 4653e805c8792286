// An echo service and its clients in Rust: the standard library, and the C library's calls.
//
//     echo serve N            prints its port, serves N connections
//     echo call CID PORT N    N connections at the same time, each in a thread
use std::env::args;
use std::io::{copy, Error, ErrorKind, Read, Write};
use std::mem::size_of;
use std::net::{Shutdown, TcpStream};
use std::os::raw::c_int;
use std::os::unix::io::{AsRawFd, FromRawFd};
use std::thread;
use std::time::Duration;

const AF_VSOCK: c_int = 40;
const SOCK_STREAM: c_int = 1;
const ANY: u32 = 0xFFFF_FFFF;
const SIZE: usize = 300_000;

/// struct sockaddr_vm
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

extern "C" {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(fd: c_int, address: *const Address, size: u32) -> c_int;
    fn listen(fd: c_int, backlog: c_int) -> c_int;
    fn accept(fd: c_int, address: *mut Address, size: *mut u32) -> c_int;
    fn connect(fd: c_int, address: *const Address, size: u32) -> c_int;
    fn getsockname(fd: c_int, address: *mut Address, size: *mut u32) -> c_int;
    fn getpeername(fd: c_int, address: *mut Address, size: *mut u32) -> c_int;
}

const ROOM: u32 = size_of::<Address>() as u32;

fn check(result: c_int) -> c_int {
    assert!(result >= 0, "{}", Error::last_os_error());
    result
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, cid, port, ..Address::default() }
}

fn name(of: unsafe extern "C" fn(c_int, *mut Address, *mut u32) -> c_int, fd: c_int) -> Address {
    let (mut found, mut room) = (Address::default(), ROOM);
    check(unsafe { of(fd, &mut found, &mut room) });
    assert_eq!(room, ROOM);
    found
}

fn serve(count: usize) {
    let listener = check(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) });
    check(unsafe { bind(listener, &address(ANY, ANY), ROOM) });
    check(unsafe { listen(listener, count as c_int) });
    println!("{}", name(getsockname, listener).port);
    thread::scope(|threads| {
        for _ in 0..count {
            let (mut peer, mut room) = (Address::default(), ROOM);
            let accepted = check(unsafe { accept(listener, &mut peer, &mut room) });
            assert_eq!(peer, name(getpeername, accepted));
            threads.spawn(move || {
                let mut stream = unsafe { TcpStream::from_raw_fd(accepted) };
                let mut copied = stream.try_clone().unwrap();
                copy(&mut stream, &mut copied).unwrap();
            });
        }
    });
}

fn call(peer: Address) {
    let fd = check(unsafe { socket(AF_VSOCK, SOCK_STREAM, 0) });
    let mut stream = unsafe { TcpStream::from_raw_fd(fd) };
    check(unsafe { connect(stream.as_raw_fd(), &peer, ROOM) });
    assert_eq!(name(getpeername, fd), peer);
    // SO_RCVTIMEO: nothing has come yet.
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let early = stream.read(&mut [0]).unwrap_err();
    assert_eq!(early.kind(), ErrorKind::WouldBlock);
    stream.set_read_timeout(None).unwrap();
    let sent: Vec<u8> = b"vsock".iter().copied().cycle().take(SIZE).collect();
    let mut came = Vec::new();
    thread::scope(|threads| {
        let mut writing = stream.try_clone().unwrap();
        let sent = &sent;
        threads.spawn(move || {
            writing.write_all(sent).unwrap();
            writing.shutdown(Shutdown::Write).unwrap();
        });
        stream.read_to_end(&mut came).unwrap();
    });
    assert!(sent == came, "not what was sent");
}

fn main() {
    let words: Vec<String> = args().skip(1).collect();
    let number = |index: usize| words[index].parse::<u32>().unwrap();
    if words[0] == "serve" {
        return serve(number(1) as usize);
    }
    let peer = address(number(1), number(2));
    thread::scope(|threads| {
        for _ in 0..number(3) {
            threads.spawn(move || call(peer));
        }
    });
    println!("echoed");
}
