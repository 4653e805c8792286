//! An agent in a guest: it answers each line with a line, and serves the host alone.
#![allow(deprecated)] // the type of addresses in this version of tokio-vsock

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio_vsock::{SockAddr, VsockListener, VsockStream};

const ANY: u32 = u32::MAX;
const HOST: u32 = 2;

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let mut listener = VsockListener::bind(ANY, 5000)?;
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async {
            if let Err(error) = serve(stream).await {
                eprintln!("agent: {error}");
            }
        });
    }
}

async fn serve(stream: VsockStream) -> io::Result<()> {
    if cid_of(stream.peer_addr()?) != HOST {
        return Ok(());
    }
    let cid = cid_of(stream.local_addr()?);
    let (input, mut output) = tokio::io::split(stream);
    let mut lines = BufReader::new(input).lines();
    while let Some(line) = lines.next_line().await? {
        let reply = answer(&line, cid) + "\n";
        output.write_all(reply.as_bytes()).await?;
    }
    Ok(())
}

fn cid_of(address: SockAddr) -> u32 {
    match address {
        SockAddr::Vsock(address) => address.cid(),
        _ => unreachable!("an address of another family"),
    }
}

fn answer(line: &str, cid: u32) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["ping"] => format!("pong from context {cid}"),
        ["add", ref numbers @ ..] => match numbers.iter().map(|one| one.parse::<i64>()).sum() {
            Ok::<i64, _>(sum) => sum.to_string(),
            Err(_) => "invalid number".into(),
        },
        _ => "unknown request".into(),
    }
}
