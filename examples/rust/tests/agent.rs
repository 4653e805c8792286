//! The suite of the agent: it plays the host, and each test has the agent in a guest of its own.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::process::{Child, Command, Stdio};

use vsock::VsockStream;

struct Agent {
    cid: u32,
    process: Child,
}

impl Agent {
    /// Start the agent in a guest and return when it listens.
    fn start(cid: u32) -> Agent {
        let mut process = Command::new("vsock")
            .args(["run", "--cid", &cid.to_string(), "--", env!("CARGO_BIN_EXE_agent")])
            .stdout(Stdio::piped())
            .spawn()
            .expect("vsock run");
        let mut line = String::new();
        let output = process.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        Agent { cid, process }
    }

    fn connect(&self) -> BufReader<VsockStream> {
        BufReader::new(VsockStream::connect_with_cid_port(self.cid, 5000).expect("connect"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().expect("kill");
        self.process.wait().expect("wait");
    }
}

fn ask(connection: &mut BufReader<VsockStream>, request: &str) -> std::io::Result<String> {
    writeln!(connection.get_mut(), "{request}")?;
    let mut line = String::new();
    match connection.read_line(&mut line)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_string()),
    }
}

#[test]
fn replies() {
    let agent = Agent::start(3);
    let mut connection = agent.connect();
    assert_eq!(ask(&mut connection, "ping").unwrap(), "pong from context 3");
    assert_eq!(ask(&mut connection, "add 1 2 3").unwrap(), "6");
    assert_eq!(ask(&mut connection, "dance").unwrap(), "unknown request");
}

#[test]
fn two_clients_at_once() {
    let agent = Agent::start(4);
    let (mut one, mut two) = (agent.connect(), agent.connect());
    assert_eq!(ask(&mut two, "add 2").unwrap(), "2");
    assert_eq!(ask(&mut one, "add 1").unwrap(), "1");
}

#[test]
fn a_port_without_a_listener_resets() {
    let agent = Agent::start(5);
    let error = VsockStream::connect_with_cid_port(agent.cid, 5001).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_suspended_machine_loses_its_connections() {
    let agent = Agent::start(6);
    let mut connection = agent.connect();
    ask(&mut connection, "ping").unwrap();
    for change in ["suspend", "resume"] {
        let done = Command::new("vsock").args(["context", change, "6"]).status();
        assert!(done.unwrap().success());
    }
    assert!(ask(&mut connection, "ping").is_err());
    assert_eq!(ask(&mut agent.connect(), "ping").unwrap(), "pong from context 6");
}
