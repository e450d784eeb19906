"""Decode one image where it can do no harm: in a process of its own, with limits on memory and time.

    this process --bytes--> a server that never decodes --fork--> one child per image, which may crash, hang or eat memory

A decoder that crashes takes its process along, and with it a shard's worker. Whoever tries such a shard again decodes here: a fork of
some ten milliseconds per image, and every image is an array or a `DecodeError`. Linux only (`fork`, /proc).
"""

import atexit
import importlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO

import numpy as np

from curation.decode import LIMITS, READS, Decoded, DecodeError, Header, Limits

DECODER = "curation.decode:decode_for"
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True)
class Bounds:
    """What one image may take of the machine."""

    seconds: int = 60  # of the clock, and of the processor
    memory: int = 6 << 30  # bytes of address space beyond the interpreter's own


BOUNDS = Bounds()


class Isolated:
    """A decoder that outlives its images. The server starts with the first image (about 0.5 s) and ends with `close`.

    Args:
        bounds: Time and memory of one image.
        decoder: "module:function" that decodes, as `curation.decode.decode_for`; tests put one here that crashes.
    """

    def __init__(self, bounds: Bounds = BOUNDS, decoder: str = DECODER):
        self._bounds, self._decoder = bounds, decoder
        self._server: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def decode_for(self, encoded: bytes | None, reads: str = "pixels", limits: Limits = LIMITS) -> Decoded:
        """`curation.decode.decode_for`, in a child.

        Raises:
            DecodeError: as there; or the child crashed, took too long or too much memory.
        """
        assert reads in READS[1:], reads
        if encoded is None:
            raise DecodeError("no image bytes")
        if len(encoded) > limits.max_bytes:
            raise DecodeError(f"file of {len(encoded)} bytes is over the limit of {limits.max_bytes}")
        with self._lock:
            answer, arrays = self._ask({"reads": reads, "limits": asdict(limits)}, encoded)
        if "error" in answer:
            raise DecodeError(answer["error"])
        table = answer["header"]["luma_table"]
        header = Header(**answer["header"] | {"luma_table": None if table is None else tuple(table)})
        shape = tuple(answer["view"])
        number = int(np.prod(shape))
        view = np.frombuffer(arrays, np.uint8, number).reshape(shape)
        if answer["pixels"] is None:
            return Decoded(header, view, None)
        shape = tuple(answer["pixels"])
        # A view that is the whole image is sent once.
        pixels = view if len(arrays) == number else np.frombuffer(arrays, np.uint8, offset=number).reshape(shape)
        return Decoded(header, view, pixels)

    def _ask(self, question: dict[str, Any], encoded: bytes) -> tuple[dict[str, Any], bytearray]:
        for last in (False, True):  # a server that something outside has killed is started again, once
            if self._server is None or self._server.poll() is not None:
                self._start()
            try:
                _send(self._server.stdin, json.dumps(question).encode(), encoded)
                return json.loads(_receive(self._server.stdout)), _receive(self._server.stdout)
            except (EOFError, BrokenPipeError):
                self.close()
                if last:
                    raise DecodeError("the decoding server was killed twice on this image") from None
        raise AssertionError("unreachable")

    def _start(self) -> None:
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        settings = json.dumps({"bounds": asdict(self._bounds), "decoder": self._decoder})
        self._server = subprocess.Popen(
            [sys.executable, "-m", "curation.isolated", settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def close(self) -> None:
        """End the server; the next image starts another."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server.stdin.close()
            self._server.stdout.close()
            self._server = None

    def __enter__(self) -> "Isolated":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_shared: Isolated | None = None


def decode_isolated(encoded: bytes | None, reads: str = "pixels", limits: Limits = LIMITS) -> Decoded:
    """`Isolated.decode_for` with the usual bounds, through one server per process that is kept until the process ends."""
    global _shared
    if _shared is None:
        _shared = Isolated()
        atexit.register(_shared.close)
    return _shared.decode_for(encoded, reads, limits)


def _send(stream: BinaryIO, *messages: bytes | memoryview) -> None:
    for message in messages:
        stream.write(_SIZE.pack(len(message)))
        stream.write(message)
    stream.flush()


def _receive(stream: BinaryIO) -> bytearray:
    size = stream.read(_SIZE.size)
    if len(size) < _SIZE.size:
        raise EOFError
    message = bytearray(_SIZE.unpack(size)[0])
    if stream.readinto(message) < len(message):
        raise EOFError
    return message


def _serve(settings: dict[str, Any]) -> None:
    """Answer one question after another until the input ends."""
    bounds = Bounds(**settings["bounds"])
    module, _, name = settings["decoder"].partition(":")
    function = getattr(importlib.import_module(module), name)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    while True:
        try:
            question, encoded = json.loads(_receive(questions)), bytes(_receive(questions))
        except EOFError:
            return
        limits = Limits(**{f.name: question["limits"][f.name] for f in fields(Limits)})
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                _child(function, encoded, question["reads"], limits, bounds, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            whole = pipe.read()
        _, status = os.waitpid(child, 0)
        if status == 0:
            answers.write(whole)
            answers.flush()
        else:
            _send(answers, json.dumps({"error": _death(status, bounds)}).encode(), b"")


def _child(function: Any, encoded: bytes, reads: str, limits: Limits, bounds: Bounds, writer: int) -> None:
    """Decode and write the answer, or die of a signal."""
    for number in (signal.SIGALRM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (used + bounds.memory, used + bounds.memory))
    resource.setrlimit(resource.RLIMIT_CPU, (bounds.seconds, bounds.seconds + 1))
    signal.setitimer(signal.ITIMER_REAL, bounds.seconds)
    with os.fdopen(writer, "wb") as pipe:
        try:
            decoded = function(encoded, reads, limits)
        except (DecodeError, MemoryError) as error:
            _send(pipe, json.dumps({"error": str(error) or "out of memory while decoding"}).encode(), b"")
        else:
            arrays = [decoded.view] + ([] if decoded.pixels is None or decoded.pixels is decoded.view else [decoded.pixels])
            pixels = None if decoded.pixels is None else decoded.pixels.shape
            _send(pipe, json.dumps({"header": asdict(decoded.header), "view": decoded.view.shape, "pixels": pixels}).encode())
            pipe.write(_SIZE.pack(sum(array.nbytes for array in arrays)))
            for array in arrays:
                pipe.write(np.ascontiguousarray(array).data.cast("B"))
    os._exit(0)


def _death(status: int, bounds: Bounds) -> str:
    """Why a child has died, for the row's error."""
    if not os.WIFSIGNALED(status):
        return f"the decoder failed with exit status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    if number in (signal.SIGALRM, signal.SIGXCPU):
        return f"decoding takes more than {bounds.seconds} s"
    if number == signal.SIGKILL:
        return "the decoder was killed, most likely for want of memory"
    return f"the decoder crashed ({signal.Signals(number).name})"


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
