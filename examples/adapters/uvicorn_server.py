"""An ASGI application served over vSockets by uvicorn."""

import sys

import uvicorn

import vsockets


async def app(scope, receive, send):
    """Answer who asks."""
    cid, port = scope["client"]
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    body = f"you are context {cid}, port {port}\n".encode()
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    listener = vsockets.create_server((vsockets.VMADDR_CID_ANY, int(sys.argv[1])))
    uvicorn.Server(uvicorn.Config(app, lifespan="off")).run(sockets=[listener])
