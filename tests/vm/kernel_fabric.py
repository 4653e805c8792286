"""A pytest plugin that runs ``tests/library`` on the AF_VSOCK of a guest's kernel.

The tests' guest is this machine.  Their host is this machine too, at VMADDR_CID_LOCAL; or, if
``VSOCKETS_TEST_HOST`` has the port of its proxy, the fabric's host.

Tests that do not apply are listed with their reasons.
"""

from __future__ import annotations

import os
import re

import pytest

from vm.remote import Remote
from vsockets import VMADDR_CID_LOCAL
from vsockets.attachment import KernelContext


class Loopback(KernelContext):
    """This machine at its loopback CID."""

    cid = VMADDR_CID_LOCAL


_port = os.environ.get("VSOCKETS_TEST_HOST")
_host: KernelContext = Remote(int(_port)) if _port else Loopback()
_guest = KernelContext() if _port else _host

_FABRIC = "tests vsockd"
_DATAGRAMS = "neither virtio nor the loopback supports datagrams"
_BUFFERS = "the kernel's buffers are not negotiated; their default is 256 KiB"
_UNNAMED = "the kernel reports VMADDR_CID_ANY for a socket bound to it or unbound"
_OTHERS = "the kernel does not report the peer's credentials"
_HOST = "the host is this machine itself"
_SAYS = "the kernel's error for an invalid call differs"
_PORTS = "the kernel holds a port until the peer confirms the end of the stream"
_WAITS = "with a timeout, Python waits and the kernel sees a non-blocking connect"
_DESCRIPTOR = "needs a descriptor, which a socket of the host lacks here"

#: Tests, or their parameters ("*" matches any text), that do not apply, with the reasons.
NOT_ON_THE_KERNEL = {
    "test_bad_input.py::test_calls_in_the_wrong_state": _SAYS,
    "test_bad_input.py::test_established_stream_cannot_be_reused*": _SAYS,
    "test_bad_input.py::test_killed_vsockd": _FABRIC,
    "test_bad_input.py::test_reserved_ports_need_a_capability*": _FABRIC,
    "test_bad_input.py::test_datagram_to_any_cid_stays_in_its_context": _DATAGRAMS,
    "test_datagram.py::*": _DATAGRAMS,
    "test_examples.py::*": "the examples are not in the guest",
    "test_modes.py::test_non_blocking_connect_becomes_writable*": _FABRIC,
    "test_modes.py::test_failed_non_blocking_connect*": _SAYS,
    "test_modes.py::test_connect_times_out": _FABRIC,
    "test_modes.py::test_blocking_connect_can_be_retried*": _WAITS,
    "test_modes.py::test_asyncio_socket_calls_and_datagrams": _DATAGRAMS,
    "test_options.py::test_default_sizes_of_the_guide": _BUFFERS,
    "test_options.py::test_negotiation*": _BUFFERS,
    "test_options.py::test_negotiation_without_a_common_size_fails": _BUFFERS,
    "test_options.py::test_small_buffer_blocks_the_sender*": _BUFFERS,
    "test_options.py::test_sizes_set_on_a_listening_socket": _BUFFERS,
    "test_options.py::test_peer_vm_id_and_trust": _OTHERS,
    "test_options.py::test_connect_timeout_option": "the kernel counts in ticks of its clock",
    "test_processes.py::test_detach_and_fileno_of_bound_and_datagram_sockets": _DATAGRAMS,
    "test_processes.py::test_connected_socket_of_another_library": _SAYS,
    "test_stdlib.py::test_install": _UNNAMED,
    "test_stdlib.py::test_subclass_keeps_its_overrides": _DATAGRAMS,
    "test_stdlib.py::test_tls": "the guest has no OpenSSL",
    "test_stream.py::test_both_ends_report_both_addresses*": _UNNAMED,
    "test_stream.py::test_credentials_of_the_peer*": _OTHERS,
    "test_stream.py::test_connect_from_a_bound_port_twice*": _PORTS,
    "test_stream.py::test_bound_port_is_held_while_connected": _PORTS,
    "test_stream.py::test_unaccepted_streams_cost_vsockd_nothing": _FABRIC,
    "test_stream.py::test_unreachable_contexts": _FABRIC,
    "test_stream.py::test_local_cid_is_reachable_from_its_context_only": _SAYS,
    "test_stream.py::test_hundred_connections_at_once": _UNNAMED,
}

NOT_LOOPED_BACK = {
    "test_bad_input.py::test_invalid_addresses*-2]": _DATAGRAMS,
    "test_bad_input.py::test_wildcards_are_invalid_destinations": _SAYS,
    "test_bad_input.py::test_local_cid_and_address_family": _HOST,
    "test_modes.py::test_asyncio_streams": _UNNAMED,
    "test_options.py::test_socket_options_report_a_vsocket": _OTHERS,
    "test_options.py::test_datagram_sockets_have_no_vsocket_options": _DATAGRAMS,
    "test_processes.py::test_exec*": _UNNAMED,
    "test_processes.py::test_passing_a_socket_over_a_unix_socket*": _UNNAMED,
    "test_stream.py::test_addresses_are_filled_in": _HOST,
}

NOT_TO_THE_HOST = {
    "test_modes.py::test_readiness_by_select_poll_epoll_and_selectors*": _DESCRIPTOR,
    "test_processes.py::*": _DESCRIPTOR,
    "test_stdlib.py::test_socketserver": _DESCRIPTOR,
    "test_stdlib.py::test_http_server": _DESCRIPTOR,
    "test_stdlib.py::test_multiprocessing_connections": _DESCRIPTOR,
    "test_stream.py::test_connect_to_the_own_and_the_local_cid": _UNNAMED,
}


class KernelFabric:
    """The parts of a fabric that the tests use."""

    host = _host

    def guest(self) -> KernelContext:
        return _guest

    def environment(self, context: KernelContext) -> dict[str, str]:
        return {**os.environ}


@pytest.fixture
def vsock_fabric() -> KernelFabric:
    return KernelFabric()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {**NOT_ON_THE_KERNEL, **(NOT_TO_THE_HOST if _port else NOT_LOOPED_BACK)}
    for name, reason in reasons.items():
        pattern = re.escape(f"library/{name}").replace(r"\*", ".*")
        found = [item for item in items if re.fullmatch(pattern, item.nodeid)]
        assert found, f"no test {name}"
        for item in found:
            item.add_marker(pytest.mark.skip(reason))
