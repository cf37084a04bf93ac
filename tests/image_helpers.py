"""Image files for tests, also of kinds that Pillow doesn't write."""

import io
import struct
import zlib

import numpy as np


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(header, rows, *extra):
    """A PNG of (width, height, depth, colour type, interlacing) from its unpacked rows."""
    width, height, depth, colour, interlacing = header
    first = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlacing))
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, step of rows and of columns of each pass (PNG specification, 8.2)."""


def interlaced(pixels):
    """An interlaced PNG of uint8 (H, W, 3), no row filtered."""
    height, width = pixels.shape[:2]
    passes = [pixels[top::down, left::right] for top, left, down, right in ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in np.ascontiguousarray(part))
    return png((width, height, 8, 2, 1), rows)


def png_header(width, height):
    """A valid PNG of 70 bytes that claims to be that large."""
    return png((width, height, 8, 2, 0), b"")


def crc_broken(content):
    position = content.index(b"IDAT") + 6
    return content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :]
