"""A gRPC client of a unix socket: client.py unix:PATH"""

import sys

import grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    shout = channel.unary_unary("/example.Echo/Shout")
    print(shout(b"hello from a guest", wait_for_ready=True, timeout=60).decode())
    big = b"x" * 1_000_000
    print(len(shout(big, timeout=60)), "bytes")
