"""A web server that does everything wrong, on loopback."""

from __future__ import annotations

import asyncio
import gzip
import io
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

Handler = Callable[[asyncio.StreamWriter, int], Coroutine[None, None, None]]


def jpeg(side: int = 64, seed: int = 0) -> bytes:
    """A small photograph of nothing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, and which has no pixels to speak of."""
    ihdr = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    chunks = ((b"IHDR", ihdr), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b""))
    parts = [len(d).to_bytes(4, "big") + k + d + zlib.crc32(k + d).to_bytes(4, "big") for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Server:
    """What it is asked for, it answers by the handler of the path; ``asked`` counts requests by path.

    Attributes:
        address: http://127.0.0.1:PORT.
    """

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.address = ""
        self.at_once = self.most_at_once = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            await asyncio.sleep(0.005)  # so that requests meet
            self.at_once -= 1
            path = head.split(b" ")[1].decode("latin-1")
            self.asked[path] += 1
            await self.handle(path, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def handle(self, path: str, writer: asyncio.StreamWriter) -> None:
        asked = self.asked[path]
        match path.partition("?")[0]:
            case "/robots.txt":
                send(writer, b"User-agent: *\nDisallow: /private/\n", "text/plain", {"X-Robots-Tag": "noindex"})
            case "/long-robots":
                send(writer, b"User-agent: *\nDisallow: /private/\n" + b"# much to say\n" * 100_000, "text/plain")
            case "/never":
                await asyncio.sleep(30)
            case "/trickle":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                for _ in range(100):
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            case "/truncated":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + jpeg()[:100])
            case "/reset":
                writer.transport.abort()
            case "/endless":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
                while True:
                    writer.write(b"\xff" * 65536)
                    await writer.drain()
            case "/html":
                send(writer, b"<html>not here</html>", "image/jpeg")
            case "/empty":
                send(writer, b"")
            case "/bomb":
                send(writer, gzip.compress(b"\0" * 50_000_000), extra={"Content-Encoding": "gzip"})
            case "/zipped":
                send(writer, gzip.compress(jpeg()), extra={"Content-Encoding": "gzip"})
            case "/zipped-cut":
                send(
                    writer, gzip.compress(jpeg())[: len(gzip.compress(jpeg())) // 2], extra={"Content-Encoding": "gzip"}
                )
            case "/zipped-not":
                send(writer, jpeg(), extra={"Content-Encoding": "gzip"})
            case "/no-utf8":
                writer.write(b"HTTP/1.1 404 Not\xe9 Found\x1b[1m\r\nContent-Length: 0\r\n\r\n")
            case "/encoded":
                send(writer, jpeg(), extra={"Content-Encoding": "\udce9\udcff"})
            case "/nonsense":
                writer.write(b"what do you want?\r\n\r\n")
            case "/moved-away":
                send(writer, b"", status="302 Found", extra={"Location": "/gone?moved"})
            case "/zipped-twice":
                halves = jpeg()[:500], jpeg()[500:]
                send(writer, b"".join(map(gzip.compress, halves)), extra={"Content-Encoding": "gzip"})
            case "/pixels":
                send(writer, png_of(12_000, 12_000), "image/png")
            case "/icon":
                send(writer, png_of(16, 16), "image/png")
            case "/loop":
                send(writer, b"", status="302 Found", extra={"Location": "/loop"})
            case "/to-file":
                send(writer, b"", status="302 Found", extra={"Location": "file:///etc/passwd"})
            case "/moved":
                send(writer, b"", status="301 Moved", extra={"Location": "/fine?moved"})
            case "/gone":
                send(writer, b"", status="404 Not Found")
            case "/busy" if asked < 3:
                send(writer, b"", status="503 Unavailable", extra={"Retry-After": "0"})
            case "/always-busy":
                send(writer, b"", status="429 Too Many", extra={"Retry-After": "100000"})
            case "/opt-out":
                send(writer, jpeg(), extra={"X-Robots-Tag": "otherbot: noai, noimageai"})
                # directives after another robot's name are that robot's
            case "/opt-out-all":
                send(writer, jpeg(), extra={"X-Robots-Tag": "noimageai"})
            case _:
                send(writer, jpeg(seed=len(path)))


def send(
    writer: asyncio.StreamWriter,
    body: bytes,
    kind: str = "image/jpeg",
    extra: dict[str, str] | None = None,
    status: str = "200 OK",
) -> None:
    """A well-formed answer."""
    headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(extra or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + body)


@contextmanager
def serving() -> Iterator[Server]:
    """The server, in a thread."""
    server, loop, started = Server(), asyncio.new_event_loop(), threading.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        server.address = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        started.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(main())
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    started.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
