"""NumPy functions as operations of XLA:CPU, on XLA's own buffers: nothing is copied either way.

`jax.pure_callback` copies every result, which costs more than a product of matrices of that size. XLA's
foreign function interface hands out pointers instead; it is C, declared here as far as it is used, after
`xla/ffi/api/c_api.h` (version 0.3, which XLA promises to keep working).
"""

from collections.abc import Callable
import ctypes
from typing import Any

import jax
import numpy as np

API_VERSION = (0, 3)
METADATA, EXECUTE = 1, 3  # type of an extension; stage of a call
INTERNAL_ERROR = 13
DTYPES: dict[int, Any] = {4: ctypes.c_int32, 11: ctypes.c_float, 12: ctypes.c_double}

_Size, _Pointer = ctypes.c_size_t, ctypes.c_void_p


class _Extension(ctypes.Structure):
    pass


_Extension._fields_ = [
    ("size", _Size),
    ("type", ctypes.c_int),
    ("next", ctypes.POINTER(_Extension)),
]


class _Version(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("extension", _Pointer),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
        ("state_type", ctypes.c_int64),
    )


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("extension", _Pointer),
        ("dtype", ctypes.c_int),
        ("data", _Pointer),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("extension", _Pointer),
        ("count", ctypes.c_int64),
        ("types", _Pointer),
        ("items", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("extension", _Pointer),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


_MakeError = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_ErrorArguments))


class _Api(ctypes.Structure):  # its first entries
    _fields_ = (
        ("size", _Size),
        ("extension", _Pointer),
        ("version", _Version),
        ("internal", _Pointer),
        ("make_error", _MakeError),
    )


class _Frame(ctypes.Structure):
    _fields_ = (
        ("size", _Size),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", _Pointer),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
    )


_Handler = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_Frame))
_handlers: list[Any] = []  # XLA keeps bare pointers to them


def register(name: str, function: Callable[..., None]) -> None:
    """Makes `function` the operation `name` of `jax.ffi.ffi_call` on the CPU.

    Args:
      name: of the operation.
      function: takes the operands and then the results, as arrays on XLA's memory, and writes all of the
        results. An exception fails the computation with its words. It must not call JAX.
    """

    @_Handler
    def handler(frame: Any) -> int | None:
        called = frame.contents
        if called.extension and called.extension.contents.type == METADATA:
            _describe(called.extension)
            return None
        try:
            function(*_arrays(called.arguments), *_arrays(called.results))
        except Exception as error:  # it cannot cross C; XLA raises it again
            return _failure(called.api.contents, f"{name}: {type(error).__name__}: {error}")
        return None

    _handlers.append(handler)
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.restype = ctypes.py_object
    make_capsule.argtypes = (_Pointer, ctypes.c_char_p, _Pointer)
    capsule = make_capsule(ctypes.cast(handler, _Pointer), None, None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu", api_version=1)


def _describe(extension: Any) -> None:
    """Answers which version of the interface this is written for."""
    metadata = ctypes.cast(extension, ctypes.POINTER(_MetadataExtension)).contents.metadata.contents
    metadata.version.major, metadata.version.minor = API_VERSION
    metadata.traits = 0


def _arrays(buffers: _Buffers) -> list[np.ndarray]:
    return [_array(buffers.items[i].contents) for i in range(buffers.count)]


def _array(buffer: _Buffer) -> np.ndarray:
    shape = tuple(buffer.dims[i] for i in range(buffer.rank))
    size = int(np.prod(shape))
    if not size:
        return np.empty(shape, DTYPES[buffer.dtype])
    return np.ctypeslib.as_array((DTYPES[buffer.dtype] * size).from_address(buffer.data)).reshape(
        shape
    )


def _failure(api: _Api, message: str) -> int:
    arguments = _ErrorArguments(
        ctypes.sizeof(_ErrorArguments), None, message.encode(), INTERNAL_ERROR
    )
    return api.make_error(ctypes.byref(arguments))
