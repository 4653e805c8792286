"""VMware file formats."""

from .vmx import Vmx, VmxError, parse_vmx, read_vmx

__all__ = ["Vmx", "VmxError", "parse_vmx", "read_vmx"]
