"""A thin ctypes view of libbpf.so.1: the prototypes we use, typed, with errors raised.

Owns pointers and their checks: libbpf dereferences whatever it is given, so a NULL that slipped through ends the
process with SIGSEGV. No pointer leaves this module; callers hold `BpfObject`, `BpfProgram`, `BpfMap`, `BpfLink` and
`RingBuffer`. It knows nothing of our programs. Needs libbpf >= 1.0 (`libbpf.so.1`), Debian's libbpf1.
Long for the prototypes, which stand in one place with the checks they need.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import errno
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, TypeVar

from .errors import LibbpfError, ProbesUnavailable

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: (result, argument types ...)
    "libbpf_set_print": (c_void_p, c_void_p),
    "libbpf_version_string": (c_char_p,),
    "bpf_object__open_file": (c_void_p, c_char_p, c_void_p),
    "bpf_object__load": (c_int, c_void_p),
    "bpf_object__close": (None, c_void_p),
    "bpf_object__next_program": (c_void_p, c_void_p, c_void_p),
    "bpf_object__next_map": (c_void_p, c_void_p, c_void_p),
    "bpf_program__name": (c_char_p, c_void_p),
    "bpf_program__section_name": (c_char_p, c_void_p),
    "bpf_program__set_autoload": (c_int, c_void_p, c_bool),
    "bpf_program__fd": (c_int, c_void_p),
    "bpf_program__attach": (c_void_p, c_void_p),
    "bpf_program__attach_iter": (c_void_p, c_void_p, c_void_p),
    "bpf_program__attach_perf_event": (c_void_p, c_void_p, c_int),
    "bpf_program__attach_cgroup": (c_void_p, c_void_p, c_int),
    "bpf_link__fd": (c_int, c_void_p),
    "bpf_link__destroy": (c_int, c_void_p),
    "bpf_iter_create": (c_int, c_int),
    "bpf_map__name": (c_char_p, c_void_p),
    "bpf_map__fd": (c_int, c_void_p),
    "bpf_map__max_entries": (c_uint32, c_void_p),
    "bpf_map__set_max_entries": (c_int, c_void_p, c_uint32),
    "bpf_map__key_size": (c_uint32, c_void_p),
    "bpf_map__value_size": (c_uint32, c_void_p),
    "bpf_map__set_autocreate": (c_int, c_void_p, c_bool),
    "bpf_map__initial_value": (c_void_p, c_void_p, c_void_p),
    "bpf_map_update_elem": (c_int, c_int, c_void_p, c_void_p, c_uint64),
    "bpf_map_lookup_elem": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_lookup_and_delete_elem": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_get_next_key": (c_int, c_int, c_void_p, c_void_p),
    "bpf_map_lookup_batch": (c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "btf__load_vmlinux_btf": (c_void_p,),
    "btf__find_by_name": (c_int, c_void_p, c_char_p),
    "btf__free": (None, c_void_p),
    "ring_buffer__new": (c_void_p, c_int, c_void_p, c_void_p, c_void_p),
    "ring_buffer__consume": (c_int, c_void_p),
    "ring_buffer__epoll_fd": (c_int, c_void_p),
    "ring_buffer__free": (None, c_void_p),
}

_PRINT = ctypes.CFUNCTYPE(c_int, c_int, c_void_p, c_void_p)
_SAMPLE = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)


READ_AT_ONCE = 20_000
"""Records of a ring, which take us some 0.5 s."""
_BATCH = 512
"""Elements of a map that one system call reads."""
V = TypeVar("V", bound=ctypes.Structure)


class _IterOptions(ctypes.Structure):
    """struct bpf_iter_attach_opts."""

    _fields_ = [("sz", c_size_t), ("link_info", c_void_p), ("link_info_len", c_uint32)]


class _IterTaskInfo(ctypes.Structure):
    """The `task` arm of union bpf_iter_link_info (since 6.1)."""

    _fields_ = [("tid", c_uint32), ("pid", c_uint32), ("pid_fd", c_uint32), ("pad", c_uint32)]


class Library:
    """libbpf itself, loaded once per process."""

    def __init__(self) -> None:
        try:
            self._so = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise ProbesUnavailable(f"libbpf.so.1 not found ({error})", "install Debian's libbpf1") from error
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self._so, name, None)
            if function is None:
                raise ProbesUnavailable(f"libbpf.so.1 lacks {name}", "install libbpf 1.0 or newer")
            function.restype, function.argtypes = result, arguments
        self._format = ctypes.CDLL(None).vsnprintf
        self._format.argtypes = [c_char_p, c_size_t, c_void_p, c_void_p]
        self.log: deque[str] = deque(maxlen=400)
        self._print = _PRINT(self._remember)  # kept alive as long as libbpf may call it
        self._so.libbpf_set_print(ctypes.cast(self._print, c_void_p))

    def _remember(self, level: int, text_format: int, arguments: int) -> int:
        # A va_list argument is passed as a pointer on x86-64 and aarch64 alike, so it can be handed on as one.
        if level > 1:  # LIBBPF_DEBUG
            return 0
        buffer = ctypes.create_string_buffer(8192)
        self._format(buffer, len(buffer), text_format, arguments)
        self.log.extend(line for line in buffer.value.decode(errors="replace").splitlines() if line.strip())
        return 0

    @property
    def version(self) -> str:
        return bytes(self._so.libbpf_version_string() or b"v?").decode().removeprefix("v")

    def call(self, name: str, *arguments: Any) -> int:
        """An int function: negative means -errno. Raises LibbpfError."""
        self._check_arguments(name, arguments)
        result = int(getattr(self._so, name)(*arguments))
        if result < 0:
            raise LibbpfError(-result, name, tuple(self.log))
        return result

    def pointer(self, name: str, *arguments: Any) -> int:
        """A pointer function: NULL means errno. Raises LibbpfError."""
        self._check_arguments(name, arguments)
        result = getattr(self._so, name)(*arguments)
        if not result:
            raise LibbpfError(ctypes.get_errno() or errno.EINVAL, name, tuple(self.log))
        return int(result)

    def pointer_or_none(self, name: str, *arguments: Any) -> int | None:
        """A pointer function where NULL is an answer (the end of a list)."""
        self._check_arguments(name, arguments)
        result = getattr(self._so, name)(*arguments)
        return int(result) if result else None

    def text(self, name: str, pointer: int) -> str:
        self._check_arguments(name, (pointer,))
        return bytes(getattr(self._so, name)(pointer) or b"").decode(errors="replace")

    def release(self, name: str, pointer: int) -> None:
        self._check_arguments(name, (pointer,))
        getattr(self._so, name)(pointer)

    def _check_arguments(self, name: str, arguments: tuple[Any, ...]) -> None:
        if arguments and arguments[0] in (None, 0) and _SIGNATURES[name][1] is c_void_p:
            raise LibbpfError(errno.EINVAL, f"{name} with a closed object")


_loaded: list[Library] = []


def library() -> Library:
    """The library; raises ProbesUnavailable where there is none."""
    if not _loaded:
        _loaded.append(Library())
    return _loaded[0]


class BpfLink:
    """An attached program; destroying it detaches."""

    def __init__(self, lib: Library, pointer: int) -> None:
        self._lib, self._pointer = lib, pointer

    @property
    def fd(self) -> int:
        return self._lib.call("bpf_link__fd", self._pointer)

    def destroy(self) -> None:
        """Safe to call twice."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            self._lib.call("bpf_link__destroy", pointer)


class BpfProgram:
    def __init__(self, lib: Library, pointer: int) -> None:
        self._lib, self._pointer = lib, pointer
        self.name = lib.text("bpf_program__name", pointer)
        self.section = lib.text("bpf_program__section_name", pointer)

    def invalidate(self) -> None:
        """The object was closed: every later call raises LibbpfError (EINVAL)."""
        self._pointer = 0

    def set_autoload(self, load: bool) -> None:
        self._lib.call("bpf_program__set_autoload", self._pointer, load)

    @property
    def fd(self) -> int:
        return self._lib.call("bpf_program__fd", self._pointer)

    def attach(self) -> BpfLink:
        """Attach as the section name says. Raises LibbpfError."""
        return BpfLink(self._lib, self._lib.pointer("bpf_program__attach", self._pointer))

    def attach_perf_event(self, perf_fd: int) -> BpfLink:
        return BpfLink(self._lib, self._lib.pointer("bpf_program__attach_perf_event", self._pointer, perf_fd))

    def attach_cgroup(self, cgroup_fd: int) -> BpfLink:
        return BpfLink(self._lib, self._lib.pointer("bpf_program__attach_cgroup", self._pointer, cgroup_fd))

    def run_over_tasks(self, tgid: int) -> bytes:
        """Run an iter/task program once over the threads of one process and return what it printed.

        Before 6.1 the kernel cannot narrow the walk: it then visits every task, and the program has to check the tgid.
        """
        info = _IterTaskInfo(pid=tgid)
        options = _IterOptions(ctypes.sizeof(_IterOptions), ctypes.addressof(info), ctypes.sizeof(info))
        try:
            pointer = self._lib.pointer("bpf_program__attach_iter", self._pointer, ctypes.addressof(options))
        except LibbpfError as error:
            if error.errno not in (errno.E2BIG, errno.EINVAL):
                raise
            pointer = self._lib.pointer("bpf_program__attach_iter", self._pointer, None)
        link = BpfLink(self._lib, pointer)
        try:
            fd = self._lib.call("bpf_iter_create", link.fd)
            try:
                chunks = []
                while chunk := os.read(fd, 65536):
                    chunks.append(chunk)
                return b"".join(chunks)
            finally:
                os.close(fd)
        finally:
            link.destroy()


class BpfMap:
    """A map by its descriptor. Keys and values are ctypes objects of the map's exact sizes (checked)."""

    def __init__(self, lib: Library, pointer: int) -> None:
        self._lib, self._pointer = lib, pointer
        self.name = lib.text("bpf_map__name", pointer)
        self.key_size = lib.call("bpf_map__key_size", pointer)
        self.value_size = lib.call("bpf_map__value_size", pointer)
        self._fd: int | None = None

    @property
    def fd(self) -> int:
        if self._fd is None:  # asked for at every lookup
            self._fd = self._lib.call("bpf_map__fd", self._pointer)
        return self._fd

    @property
    def max_entries(self) -> int:
        return self._lib.call("bpf_map__max_entries", self._pointer)

    def invalidate(self) -> None:
        """The object was closed: every later call raises LibbpfError (EINVAL)."""
        self._pointer, self._fd = 0, None

    def set_max_entries(self, count: int) -> None:
        """Before load only."""
        self._lib.call("bpf_map__set_max_entries", self._pointer, count)

    def set_autocreate(self, create: bool) -> None:
        self._lib.call("bpf_map__set_autocreate", self._pointer, create)

    def set_initial_value(self, value: ctypes.Structure) -> None:
        """Overwrite the start of .rodata/.data before load; raises LibbpfError when it is larger than the section."""
        size = c_size_t()
        target = self._lib.pointer("bpf_map__initial_value", self._pointer, ctypes.addressof(size))
        if ctypes.sizeof(value) > size.value:
            raise LibbpfError(errno.E2BIG, f"{self.name} has {size.value} bytes, not {ctypes.sizeof(value)}")
        ctypes.memmove(target, ctypes.addressof(value), ctypes.sizeof(value))

    def initial_bytes(self, count: int) -> bytes:
        size = c_size_t()
        start = self._lib.pointer("bpf_map__initial_value", self._pointer, ctypes.addressof(size))
        return ctypes.string_at(start, min(count, size.value))

    def update(self, key: Any, value: Any, flags: int = 0) -> None:
        """`key` None for queues."""
        self._check(key, value)
        self._lib.call("bpf_map_update_elem", self.fd, _address(key), _address(value), flags)

    def lookup(self, key: Any, value: Any) -> bool:
        """Fill `value`; False when there is no such key."""
        self._check(key, value)
        return self._absent_is_false("bpf_map_lookup_elem", self.fd, _address(key), _address(value))

    def pop(self, value: Any) -> bool:
        """Take the next element of a queue; False when it is empty."""
        self._check(None, value)
        return self._absent_is_false("bpf_map_lookup_and_delete_elem", self.fd, None, _address(value))

    def keys(self, key_type: type[Any]) -> Iterator[Any]:
        """Every key. While others add and delete, a key may be missed or come twice."""
        key, following = key_type(), key_type()
        self._check(key, None)
        found = self._absent_is_false("bpf_map_get_next_key", self.fd, None, _address(key))
        while found:
            yield key_type.from_buffer_copy(key)
            found = self._absent_is_false("bpf_map_get_next_key", self.fd, _address(key), _address(following))
            key, following = following, key

    def items(self, key_type: type[Any], value_type: type[V]) -> list[tuple[int, V]]:
        """Every element of a hash map whose keys are integers, some hundred with each system call.

        While others add and delete, one may be missed or come twice. One by one before Linux 5.6.
        """
        self._check(key_type(), value_type())
        found: list[tuple[int, V]] = []
        room = _BATCH
        at, following = c_uint32(), c_uint32()
        start = None
        while True:
            keys, values, count = (key_type * room)(), (value_type * room)(), c_uint32(room)
            arguments = (start, following, keys, values, count)
            try:
                self._lib.call("bpf_map_lookup_batch", self.fd, *map(_address, arguments), None)
                more = True
            except LibbpfError as error:
                if error.errno == errno.ENOSPC:  # one bucket holds more than there is room for
                    room *= 2
                    continue
                if error.errno != errno.ENOENT:
                    break
                more = False
            found += zip(keys[: count.value], values[: count.value], strict=True)
            if not more:
                return found
            at.value = following.value
            start = at
        if found:
            return found
        value = value_type()
        return [
            (key.value, value_type.from_buffer_copy(value)) for key in self.keys(key_type) if self.lookup(key, value)
        ]

    def map_memory(self, element_bytes: int) -> mmap.mmap:
        """The elements of an mmapable array, shared with the kernel; element i starts at i * element_bytes."""
        size = self.max_entries * element_bytes
        return mmap.mmap(self.fd, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, mmap.MAP_SHARED)

    def _absent_is_false(self, name: str, *arguments: Any) -> bool:
        try:
            self._lib.call(name, *arguments)
        except LibbpfError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def _check(self, key: Any, value: Any) -> None:
        for what, given, size in (("key", key, self.key_size), ("value", value, self.value_size)):
            if given is not None and ctypes.sizeof(given) != size:
                raise LibbpfError(errno.EINVAL, f"{what} of {self.name} has {size} bytes, not {ctypes.sizeof(given)}")


def _address(value: Any) -> int | None:
    return None if value is None else ctypes.addressof(value)


class BpfObject:
    """An opened object file; load() puts its maps and programs into the kernel, close() takes them out."""

    def __init__(self, path: Path) -> None:
        self._lib = library()
        self._lib.log.clear()
        self._pointer = self._lib.pointer("bpf_object__open_file", str(path).encode(), None)
        self.programs = {program.name: program for program in self._each("bpf_object__next_program", BpfProgram)}
        self.maps = {a_map.name: a_map for a_map in self._each("bpf_object__next_map", BpfMap)}

    def _each(self, name: str, wrap: Callable[[Library, int], Any]) -> Iterator[Any]:
        pointer = self._lib.pointer_or_none(name, self._pointer, None)
        while pointer:
            yield wrap(self._lib, pointer)
            pointer = self._lib.pointer_or_none(name, self._pointer, pointer)

    def load(self) -> None:
        """Raises LibbpfError whose `log` says which program or map was refused."""
        self._lib.call("bpf_object__load", self._pointer)

    def close(self) -> None:
        """Safe to call twice. Maps that somebody mapped or holds a descriptor of live on until they let go."""
        if self._pointer:
            for part in (*self.programs.values(), *self.maps.values()):
                part.invalidate()  # what they point to ends with the object
            pointer, self._pointer = self._pointer, 0
            self._lib.release("bpf_object__close", pointer)


class RingBuffer:
    """One ring buffer and its reader. `on_sample(bytes)` runs inside consume(), on the caller's thread."""

    def __init__(self, a_map: BpfMap, on_sample: Callable[[bytes], None], at_once: int = READ_AT_ONCE) -> None:
        self._lib = library()
        self._on_sample = on_sample
        self._at_once = at_once
        self._read_count = 0
        self._failed: BaseException | None = None
        self._callback = _SAMPLE(self._sample)  # kept alive as long as libbpf may call it
        self._pointer = self._lib.pointer(
            "ring_buffer__new", a_map.fd, ctypes.cast(self._callback, c_void_p), None, None
        )

    def _sample(self, _context: int | None, data: int, size: int) -> int:
        # An exception must not unwind through C: it stops the reading and is raised again by consume().
        self._read_count += 1
        try:
            self._on_sample(ctypes.string_at(data, size))
        except BaseException as error:
            self._failed = error
            return -errno.ECANCELED
        return -errno.ECANCELED if self._read_count >= self._at_once else 0

    def fileno(self) -> int:
        """An epoll descriptor, readable while records wait."""
        return self._lib.call("ring_buffer__epoll_fd", self._pointer)

    def consume(self) -> int:
        """Read what is there; returns the number of records.

        At most `at_once`: whoever writes faster than we read would keep us here for ever. The rest waits for the next.
        """
        self._read_count = 0
        try:
            self._lib.call("ring_buffer__consume", self._pointer)
        except LibbpfError:
            if self._failed is not None:
                error, self._failed = self._failed, None
                raise error from None
            if self._read_count < self._at_once:
                raise
        return self._read_count

    def close(self) -> None:
        """Safe to call twice."""
        if self._pointer:
            pointer, self._pointer = self._pointer, 0
            self._lib.release("ring_buffer__free", pointer)


def kernel_has_type(name: str) -> bool:
    """Whether the running kernel's BTF has a type of this name. Raises LibbpfError where it has no BTF."""
    lib = library()
    btf = lib.pointer("btf__load_vmlinux_btf")
    try:
        return lib.call("btf__find_by_name", btf, name.encode()) > 0
    except LibbpfError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    finally:
        lib.release("btf__free", btf)


def monotonic_ns() -> int:
    """The clock of bpf_ktime_get_ns()."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)
