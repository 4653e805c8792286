//! A guest's agent with the health service of Kata's: ttrpc at port 1024.

use std::collections::HashMap;
use std::os::unix::io::IntoRawFd;
use std::thread;

use protobuf::well_known_types::{Int32Value, StringValue};
use protobuf::{Message, ProtobufError};
use ttrpc::{get_status, response_to_channel, Code, MethodHandler, Request, Response, TtrpcContext};
use vsock::VsockListener;

const ANY: u32 = u32::MAX;
const SERVING: i32 = 1;

/// A method with a request and a reply of one field; these two types have the same bytes as
/// Kata's CheckRequest, HealthCheckResponse and VersionCheckResponse.
struct Method(fn(StringValue) -> Result<Vec<u8>, ProtobufError>);

impl MethodHandler for Method {
    fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<()> {
        let mut response = Response::new();
        match StringValue::parse_from_bytes(&request.payload).and_then(self.0) {
            Ok(payload) => response.set_payload(payload),
            Err(error) => response.set_status(get_status(Code::INVALID_ARGUMENT, error)),
        }
        response_to_channel(context.mh.stream_id, response, context.res_tx)
    }
}

fn check(_service: StringValue) -> Result<Vec<u8>, ProtobufError> {
    let mut reply = Int32Value::new();
    reply.set_value(SERVING);
    reply.write_to_bytes()
}

fn version(_service: StringValue) -> Result<Vec<u8>, ProtobufError> {
    let mut reply = StringValue::new();
    reply.set_value("0.0.1".into());
    reply.write_to_bytes()
}

fn main() {
    let mut methods: HashMap<String, Box<dyn MethodHandler + Send + Sync>> = HashMap::new();
    methods.insert("/grpc.Health/Check".into(), Box::new(Method(check)));
    methods.insert("/grpc.Health/Version".into(), Box::new(Method(version)));
    // ttrpc's own bind("vsock://-1:1024") fails on current kernels before ttrpc 0.8.6.
    let listener = VsockListener::bind_with_cid_port(ANY, 1024).expect("bind");
    listener.set_nonblocking(true).expect("set_nonblocking");
    let server = ttrpc::Server::new().add_listener(listener.into_raw_fd()).expect("listener");
    let mut server = server.register_service(methods);
    server.start().expect("start");
    println!("ready");
    loop {
        thread::park();
    }
}
