#!/bin/sh
# The suite of the agent, in TAP (https://testanything.org): it plays the host, and the agent runs in guest 3.
number=0 failures=0

check() { # NAME EXPECTED FOUND
    number=$((number + 1))
    if [ "$2" = "$3" ]; then
        echo "ok $number - $1"
    else
        echo "not ok $number - $1 (expected '$2', found '$3')"
        failures=$((failures + 1))
    fi
}

ask() { # REQUEST
    echo "$1" | vsock connect --wait 20 3 5000
}

echo 1..4
vsock run --cid 3 -- ./agent >/dev/null &
check "ping" "pong from context 3" "$(ask ping)"
check "a sum" "5" "$(ask "add 2 3")"
check "an unknown request" "unknown request" "$(ask dance)"
check "another guest does not reach it" "No route to host" \
    "$(vsock run --cid 4 -- vsock connect 3 5000 2>&1 </dev/null | grep -o "No route to host")"
exit $((failures > 0))
