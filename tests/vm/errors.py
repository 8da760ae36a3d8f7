"""The error tree of the VM harness.

    VmError                  one clear line: what, where, remedy
    ├── PackageError         a Debian package, its index or its contents could not be had
    ├── HostUnfit            this host cannot run a guest at all (not root, not amd64, not Debian)
    └── BootFailed           the guest never reached its init, in every attempt

A command that fails or hangs inside the guest is no error here: that is its outcome.
"""


class VmError(Exception):
    """Base of everything the harness raises on purpose; the message is one line for a person."""


class PackageError(VmError):
    """A package could not be resolved, fetched or unpacked."""


class HostUnfit(VmError):
    """The host lacks something no package can supply."""


class BootFailed(VmError):
    """No attempt reached the guest's init; the message carries the end of the console."""
