"""The libvirt configuration of a virtual machine's vSockets device."""

from __future__ import annotations

from xml.etree import ElementTree

from .qemu_args import device_arguments

_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


def domain_xml(device: str, path: str) -> str:
    """Return XML that gives a domain the vSockets device whose process listens at ``path``.

    libvirt has no element for these devices, so the XML passes QEMU arguments, which needs the
    namespace at the domain element.  It also shares the memory with the device.
    """
    ElementTree.register_namespace("qemu", _NAMESPACE)
    domain = ElementTree.Element("domain", {"type": "kvm"})
    memory = ElementTree.SubElement(domain, "memoryBacking")
    ElementTree.SubElement(memory, "source", {"type": "memfd"})
    ElementTree.SubElement(memory, "access", {"mode": "shared"})
    command = ElementTree.SubElement(domain, f"{{{_NAMESPACE}}}commandline")
    for argument in device_arguments(device, path):
        ElementTree.SubElement(command, f"{{{_NAMESPACE}}}arg", {"value": argument})
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")
