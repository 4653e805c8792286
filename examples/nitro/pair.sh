#!/bin/sh
# A parent at CID 3 with its enclave at CID 16, which reach each other and nothing else.
set -e
for cid in 3 16; do
    vsock context add --profile legacy --unrestricted --domain nitro $cid >/dev/null
done

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
mkfifo "$work/port"
python3 key_service.py >"$work/port" &
read -r port <"$work/port"
printf 'allowlist:\n- {address: 127.0.0.1, port: %s}\n' "$port" >"$work/allow.yaml"

vsock run --cid 3 -- python3 vsock_proxy.py 8000 example.org 443 --config "$work/allow.yaml" || true
vsock run --cid 3 -- python3 vsock_proxy.py 8000 127.0.0.1 "$port" --config "$work/allow.yaml" &
vsock run --cid 16 -- python3 enclave.py &

vsock run --cid 3 -- vsock connect --wait 20 3 8000 </dev/null # until the proxy listens
echo "a document" | vsock run --cid 3 -- vsock connect --wait 20 16 5000
if vsock connect 16 5000 </dev/null; then # as the host: it is not of the pair's domain
    exit 1
fi
