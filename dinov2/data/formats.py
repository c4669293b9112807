"""The formats of image files: their endings, how a file of each begins, and which of Pillow's readers may open them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import struct
from typing import BinaryIO

from PIL import Image

NPY = b"\x93NUMPY"
ARRAY = ".npy"

# Pillow reads more formats, but starts other programs for some of them, which is unsafe for files from the web. The
# first ending is the one that we write.
_FORMATS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JPEG": (".jpg", ".jfif", ".jif", ".jpe", ".jpeg"),
    "JPEG2000": (".jp2", ".j2c", ".j2k", ".jpc", ".jpf", ".jpx"),
    "JXL": (".jxl",),
    "MPO": (".jpg", ".mpo"),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pbm", ".pfm", ".pgm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# Packages that teach Pillow a format: the name to install, and the modules that may have it with their functions.
_PLUG_INS: dict[str, tuple[str, dict[str, str | None]]] = {
    "AVIF": ("pillow-avif-plugin", {"pillow_avif": None}),
    "HEIF": ("pillow-heif", {"pillow_heif": "register_heif_opener", "pi_heif": "register_heif_opener"}),
    "JXL": ("pillow-jxl-plugin", {"pillow_jxl": None}),
}
NO_ENDING = "without an ending"
_ENDING = re.compile(r"\.[a-z][a-z0-9]{0,9}|\.[0-9][a-z0-9]{1,3}", re.ASCII)
BEGINNING = 32
"""This many bytes of a file tell whether it could be an image."""
_BRANDS = rb"(?s:.{4})ftyp(?:%s)"
_BEGINS = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM|II[*+]\0|MM\0[*+]|(?s:RIFF.{4}WEBP)"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|P[1-6][\s#]|P[Ff]\s|\x93NUMPY"
    rb"|" + _BRANDS % rb"avi[fs]|mif[12]|msf1|he[iv][cxms]" + rb"|\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"
)
# Often there is one of these for each image, so they are not opened.
_SIDECAR = re.compile(r"\.(cls|csv|html?|json|jsonl|log|md|parquet|py|tar|tsv|txt|xml|ya?ml|zip)")
# These begin like TIFF. What Pillow would read of them is a small preview.
_CAMERA_RAW = re.compile(
    r"\.(3fr|arw|cr2|crw|dcr|dng|erf|fff|iiq|kdc|mef|mos|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)"
)
_MISSING = {
    "HEIF": re.compile(_BRANDS % rb"mif[12]|msf1|he[iv][cxms]"),
    "AVIF": re.compile(_BRANDS % rb"avi[fs]"),
    "JXL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
}


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The formats that this installation of Pillow can open; MPO is opened as JPEG."""
    Image.init()
    for name, (_, modules) in _PLUG_INS.items():
        for module, function in modules.items():
            if name not in Image.OPEN and importlib.util.find_spec(module):
                with contextlib.suppress(ImportError):  # a library that it needs is missing
                    plug_in = importlib.import_module(module)
                    if function is not None:
                        getattr(plug_in, function)()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def image_extensions() -> frozenset[str]:
    """The endings of image files, in lower case with the dot, of all formats that can be read."""
    return frozenset({ARRAY, *(ending for name in known_formats() for ending in _FORMATS[name])})


def extension_of(image: Image.Image) -> str:
    """The ending for the format of an opened image."""
    return _FORMATS[image.format or ""][0]


def ending(path: str) -> str:
    """The ending of a file's name, in lower case with the dot; empty if it has none."""
    name = path[path.rfind("/") + 1 :]
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def is_other(path: str) -> bool:
    """Whether the ending of a file tells that it is no image: texts, tables, archives and the raw data of cameras."""
    return bool(_SIDECAR.fullmatch(ending(path)) or _CAMERA_RAW.fullmatch(ending(path)))


def may_be_image(beginning: bytes) -> bool:
    """Whether a file whose name does not tell could be an image, by its first :data:`BEGINNING` bytes."""
    return _BEGINS.match(beginning) is not None


def label_of(path: str, beginning: bytes = b"") -> str:
    """What a file is counted as that is left out: its ending, and the package that would read it."""
    found = ending(path)
    label = found if _ENDING.fullmatch(found) else NO_ENDING
    package = missing_plug_in(beginning)
    return f"{label} (install {package} to read it)" if package else label


def missing_plug_in(beginning: bytes) -> str | None:
    """The package that Pillow needs for a file that begins so; None if it needs none, or has it."""
    for name, begins in _MISSING.items():
        if begins.match(beginning) and name not in known_formats():
            return _PLUG_INS[name][0]
    return None


def refusal(file: BinaryIO) -> str:
    """Why no reader opens a file, in words of the reader of the format that the file begins like, such as ``; JPEG:
    cannot handle 12-bit layers``; empty if it begins like none."""
    file.seek(0)
    beginning = file.read(BEGINNING)
    if package := missing_plug_in(beginning):
        return f"; it needs the package {package}"
    for name in known_formats():
        reader, accept = Image.OPEN[name]
        if accept is not None and accept(beginning[:16].ljust(16, b"\0")) is True:
            file.seek(0)
            try:
                reader(file, "")
            except Exception as error:  # readers raise errors of many types
                return f"; {name}: {words_of(error)}"
    return ""


def words_of(error: Exception) -> str:
    """The words of an error of a reader; those of :mod:`struct` are about its code."""
    cause = error.__cause__ if isinstance(error, SyntaxError) else error  # Pillow raises a SyntaxError because of it
    if isinstance(cause, struct.error):
        return "its header is cut off or damaged"
    return str(error) or type(error).__name__
