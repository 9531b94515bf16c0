"""A stand-in for ONNX Runtime and the CUDA driver: it runs the plugin's node and keeps launches.

It offers the plugin the functions of both that it uses, by their places in ONNX Runtime's table and
their names in the driver, and answers from tensors in the CPU's memory. Nothing is computed.
"""

import ctypes
import subprocess
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import NamedTuple

DRIVER = """
#include <stdint.h>
#include <string.h>

typedef void Hook(const void *, unsigned, unsigned, unsigned, unsigned, void **);
Hook *launched;

int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuLibraryLoadData(const void **library, const void *code) { *library = code; return 0; }
int cuLibraryGetKernel(const void **kernel, void *library, const char *name) {
  (void)library;
  *kernel = name;
  return 0;
}
int cuKernelSetAttribute(int attribute) { return attribute != 8; }
int cuMemsetD8Async(void *address, unsigned char value, size_t bytes) {
  memset(address, value, bytes);
  return 0;
}
int cuTensorMapEncodeTiled(uint64_t *map, int type, uint32_t rank, uint64_t address,
                           const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int promotion,
                           int fill) {
  map[0] = address;
  map[1] = type;
  for (uint32_t i = 0; i < rank; ++i) {
    map[2 + i] = sizes[i];
    map[6 + i] = box[i];
    if (steps[i] != 1) return 1;
  }
  for (uint32_t i = 0; i + 1 < rank; ++i) map[10 + i] = strides[i];
  map[13] = swizzle;
  return rank != 4 || interleave || promotion != 2 || fill;
}
int cuLaunchKernel(const void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void *stream,
                   void **arguments, void **extra) {
  (void)stream;
  launched(kernel, x, y, threads, shared, arguments);
  return z != 1 || threads_y != 1 || threads_z != 1 || extra;
}
int cuGetErrorName(int error, const char **name) { (void)error; *name = "AN_ERROR"; return 0; }
"""
HOOK = ctypes.CFUNCTYPE(
    None, c_char_p, c_uint32, c_uint32, c_uint32, c_uint32, POINTER(c_void_p)
)  # fmt: skip
TYPES = {"i32": ctypes.c_int32, "i64": c_int64, "fp32": c_float}
ELEMENTS = {6: "fp16", 9: "bf16"}  # of tensor maps, as the driver counts them


class TensorMap(NamedTuple):
    """What the driver was told, in PyTorch's order of dimensions; strides count elements."""

    address: int
    dtype: str
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Launch(NamedTuple):
    """One launch; ``arguments`` by the kernel's names, addresses as numbers."""

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared: int
    arguments: dict


class Allocator(ctypes.Structure):
    """``OrtAllocator``, as much of it as is used."""

    _fields_ = (
        ("version", c_uint32),
        ("alloc", c_void_p),
        ("free", ctypes.CFUNCTYPE(None, c_void_p, c_void_p)),
        ("info", ctypes.CFUNCTYPE(c_void_p, c_void_p)),
    )


class CustomOp(ctypes.Structure):
    """``OrtCustomOp``, as much of it as is called."""

    _fields_ = (
        ("version", c_uint32),
        ("create_kernel", c_void_p),
        ("get_name", c_void_p),
        ("other", c_void_p * 6),
        ("destroy", ctypes.CFUNCTYPE(None, c_void_p)),
        ("another", c_void_p * 7),
        ("create", ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p, POINTER(c_void_p))),
        ("compute", ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p)),
    )


def build_driver(folder):
    """A library with the driver's functions, which calls ``launched`` for each launch."""
    source, library = folder / "driver.c", folder / "driver.so"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


class Runtime:
    """Runs one node by a plugin's library.

    Args:
        plugin: The library.
        driver: Of ``build_driver``, which the plugin was linked for.
        node: Its attributes are read.
        inputs: Tensors in its order.
        outputs: Likewise.
        signatures: Parameters of each kernel: Triton's type by name.

    Attributes:
        launches: One ``Launch`` for each.
        scratch: Bytes of workspace by address; given back ones leave.
    """

    def __init__(self, plugin, driver, node, inputs, outputs, signatures):
        self.launches, self.scratch, self.buffers, self.message = [], {}, [], None
        self.node = node.op_type
        self.attributes = {x.name: x for x in node.attribute}
        self.tensors, self.inputs = [*inputs, *outputs], len(inputs)
        self.signatures = signatures
        self.plugin, self.functions = ctypes.CDLL(str(plugin)), []
        free = Allocator._fields_[2][1](lambda _, address: self.scratch.pop(address) and None)
        self.allocator = Allocator(22, None, free, Allocator._fields_[3][1](lambda _: 7))
        self.hook = HOOK(self._launched)
        hook = ctypes.cast(self.hook, c_void_p).value
        c_void_p.in_dll(ctypes.CDLL(str(driver)), "launched").value = hook
        self.table, self.op = (c_void_p * 300)(), None
        self._register()

    def run(self):
        """Create, compute and destroy; raises what the plugin reports."""
        op, kernel = CustomOp.from_address(self.op), c_void_p()
        assert op.create(self.op, ctypes.addressof(self.table), 1, byref(kernel)) is None
        failed = op.compute(kernel, 1)
        op.destroy(kernel)
        if failed:
            raise RuntimeError(self.message)

    def _register(self):
        out = POINTER(c_void_p)
        functions = (
            (0, c_void_p, [c_int, c_char_p], self._status),
            (26, c_void_p, [c_char_p, out], lambda name, domain: _put(domain, 1)),
            (27, c_void_p, [c_void_p, c_void_p], self._added),
            (28, c_void_p, [c_void_p, c_void_p], lambda options, domain: None),
            (51, c_void_p, [c_void_p, out], lambda x, data: _put(data, self._at(x).data_ptr())),
            (61, c_void_p, [c_void_p, POINTER(c_size_t)],
             lambda x, rank: _put(rank, self._at(x).dim())),
            (62, c_void_p, [c_void_p, POINTER(c_int64), c_size_t], self._sizes),
            (65, c_void_p, [c_void_p, out], lambda x, info: _put(info, x)),
            (85, c_void_p, [c_void_p, c_char_p, POINTER(c_float)],
             lambda info, name, value: _put(value, self.attributes[name.decode()].f)),
            (86, c_void_p, [c_void_p, c_char_p, POINTER(c_int64)],
             lambda info, name, value: _put(value, self.attributes[name.decode()].i)),
            (90, c_void_p, [c_void_p, c_size_t, out], lambda _, i, x: _put(x, i + 1)),
            (91, c_void_p, [c_void_p, c_size_t, POINTER(c_int64), c_size_t, out], self._output),
            (99, None, [c_void_p], lambda info: None),
            (132, None, [c_void_p], lambda allocator: None),
            (193, c_void_p, [c_void_p, out], lambda _, stream: _put(stream, 5)),
            (277, c_void_p, [c_void_p, c_void_p, c_size_t, out], self._workspace),
            (278, c_void_p, [c_void_p, c_int, out],
             lambda info, kind, x: _put(x, ctypes.addressof(self.allocator))),
        )  # fmt: skip
        for place, result, arguments, function in functions:
            self.table[place] = self._pointer(result, arguments, function)
        api = ctypes.addressof(self.table)
        base = (c_void_p * 2)(self._pointer(c_void_p, [c_uint32], lambda version: api), None)
        self.plugin.RegisterCustomOps.restype = c_void_p
        assert self.plugin.RegisterCustomOps(c_void_p(3), base) is None

    def _added(self, domain, op):
        name = ctypes.CFUNCTYPE(c_char_p, c_void_p)(CustomOp.from_address(op).get_name)(op)
        if name.decode() == self.node:
            self.op = op

    def _pointer(self, result, arguments, function):
        self.functions.append(ctypes.CFUNCTYPE(result, *arguments)(function))
        return ctypes.cast(self.functions[-1], c_void_p).value

    def _at(self, handle):
        return self.tensors[handle - 1]

    def _status(self, code, message):
        self.message = message.decode()
        return code

    def _sizes(self, handle, sizes, count):
        for i, size in enumerate(self._at(handle).shape):
            sizes[i] = size

    def _output(self, context, index, sizes, count, out):
        assert tuple(sizes[:count]) == self.tensors[self.inputs + index].shape
        _put(out, self.inputs + index + 1)

    def _workspace(self, context, memory, count, out):
        assert memory == 7
        self.buffers.append(ctypes.create_string_buffer(count + 256))
        address = -(-ctypes.addressof(self.buffers[-1]) // 256) * 256
        self.scratch[address] = count
        _put(out, address)

    def _launched(self, name, x, y, threads, shared, addresses):
        kernel, values, at = name.decode(), {}, 0
        for parameter, kind in self.signatures[kernel].items():
            if kind.startswith("tensordesc"):
                values[parameter] = _read_map(addresses, at)
                at += 9
            elif kind != "constexpr":
                number = TYPES.get(kind, ctypes.c_uint64)
                values[parameter] = number.from_address(addresses[at]).value
                at += 1
        scratch = [ctypes.c_uint64.from_address(addresses[at + i]).value for i in range(2)]
        assert scratch == [0, 0]
        self.launches.append(Launch(kernel, (x, y), threads, shared, values))


def _put(place, value):
    place[0] = value


def _read_map(addresses, at):
    """A map, and beside it the sizes and strides that Triton passes on too."""
    words = (ctypes.c_uint64 * 16).from_address(addresses[at])
    sizes, box = tuple(words[2:6])[::-1], tuple(words[6:10])[::-1]
    strides = (*(x // 2 for x in words[10:13][::-1]), 1)
    assert addresses[at] % 64 == 0
    assert sizes == tuple(TYPES["i32"].from_address(addresses[at + 1 + i]).value for i in range(4))
    assert strides == tuple(
        TYPES["i64"].from_address(addresses[at + 5 + i]).value for i in range(4)
    )
    return TensorMap(words[0], ELEMENTS[words[1]], sizes, strides, box, words[13])
