"""A model server for tests with a real card: takes VRAM by the driver's own library, and answers /health.

The card is the first of CUDA_VISIBLE_DEVICES. Nothing but the driver is needed: no CUDA toolkit, no PyTorch.
"""

from __future__ import annotations

import argparse
import ctypes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHUNK_MIB = 512
"""Memory is taken in pieces of this size: one piece of many GiB may find no room of that length."""


def take(mib: int) -> None:
    """Allocates so much, and writes it: the driver may put off what nobody has touched."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    call(driver, "cuInit", ctypes.c_uint(0))
    call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
    call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    call(driver, "cuCtxSetCurrent", context)
    while mib > 0:
        size = ctypes.c_size_t(min(mib, CHUNK_MIB) * 2**20)
        address = ctypes.c_uint64()
        call(driver, "cuMemAlloc_v2", ctypes.byref(address), size)
        call(driver, "cuMemsetD8_v2", address, ctypes.c_ubyte(1), size)
        mib -= CHUNK_MIB
    call(driver, "cuCtxSynchronize")


def call(driver: ctypes.CDLL, name: str, *arguments: object) -> None:
    """A function of the driver; RuntimeError with its number (CUresult) when it fails."""
    status = getattr(driver, name)(*arguments)
    if status:
        raise RuntimeError(f"{name} failed with {status}")


class Handler(BaseHTTPRequestHandler):
    """Every route answers 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mib", type=int, required=True)
    arguments = parser.parse_args()
    take(arguments.mib)
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
