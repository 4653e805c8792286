"""A gRPC service at a unix socket: service.py unix:PATH"""

import sys
from concurrent import futures

import grpc


def shout(request: bytes, context: grpc.ServicerContext) -> bytes:
    return request.upper()


# Without generated code, so that one package suffices: messages are bytes.
methods = {"Shout": grpc.unary_unary_rpc_method_handler(shout)}
server = grpc.server(futures.ThreadPoolExecutor(4))
server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("example.Echo", methods)])
server.add_insecure_port(sys.argv[1])
server.start()
server.wait_for_termination()
