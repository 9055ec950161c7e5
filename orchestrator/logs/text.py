"""What of a job's own text may reach a terminal. Pure; bytes in, bytes out.

A job may write anything: progress bars, colours, window titles, a binary file. Of all control
sequences only colours (SGR, `CSI … m`) are let through, and only if the caller wants colours.
"""

from __future__ import annotations

import re

RESET = b"\x1b[0m"

# A control string (window title, hyperlink, clipboard …) up to its terminator on the same line. Without one
# only its introducer goes, so that no text is lost. It stops at the next introducer and never backtracks:
# a hostile line costs linear time.
_BODY = rb"(?:[^\x07\x1b\n\r\xc2]|\xc2[^\x90-\x9f\x07\x1b\n\r\xc2])*+(?:\x07|\x1b\\|\xc2\x9c)"
_CSI = rb"[0-?]*[ -/]*[@-~]"
_C0 = [byte for byte in (*range(0x20), 0x7F) if byte not in b"\t\n\r\x1b"]

# Every branch begins with a literal byte: so `re` skips ahead over plain text, eight times as fast.
_CONTROL = re.compile(
    # `\x1b[>4m` is a keyboard mode, not a colour
    rb"\x1b(?:\[(?P<sgr>[0-9;:]*)m|\[" + _CSI + rb"|[\]PX^_]" + _BODY + rb"|[\]PX^_\[]|[ -/]*[0-~]|)"
    # the same in C1, that is in two bytes of UTF-8. Half a character is replaced: removing its
    # neighbour could complete it to a C1 control.
    rb"|\xc2(?:\x9b"
    + _CSI
    + rb"|[\x90\x98\x9d\x9e\x9f]"
    + _BODY
    + rb"|[\x80-\x9f]|(?P<half>(?![\x80-\xbf])))|"
    + b"|".join(re.escape(bytes((byte,))) for byte in _C0)
)

_PLAIN = bytes(byte for byte in range(256) if byte in b"\t\n" or (byte >= 0x20 and byte not in b"\x7f\xc2"))


def is_plain(data: bytes) -> bool:
    """Whether `data` holds nothing that `sanitize` could change; about 1 ns a byte."""
    return not data.translate(None, _PLAIN)


def _keep_sgr(match: re.Match[bytes]) -> bytes:
    sgr = match["sgr"]
    return b"\x1b[" + sgr + b"m" if sgr is not None else _drop_all(match)


def _drop_all(match: re.Match[bytes]) -> bytes:
    return b"" if match["half"] is None else b"\xef\xbf\xbd"


def sanitize(text: bytes, *, color: bool = False) -> bytes:
    """One line (without its newline) as a terminal would finally show it, and nothing that moves it.

    Of the frames that carriage returns separate, the last one with visible text stays. Colours stay
    if `color`, closed at the end of the line so that they do not run into the next rank's.
    """
    if is_plain(text):
        return text
    if text.translate(None, _PLAIN + b"\r"):
        text = _CONTROL.sub(_keep_sgr if color else _drop_all, text)
    if b"\r" in text:
        frames = text.split(b"\r")
        text = next((frame for frame in reversed(frames) if _visible(frame)), frames[-1])
    if color and b"\x1b" in text and not text.endswith(RESET):
        text += RESET
    return text


def _visible(frame: bytes) -> bool:
    return bool((_CONTROL.sub(b"", frame) if b"\x1b" in frame else frame).strip())
