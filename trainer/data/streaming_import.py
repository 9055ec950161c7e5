"""The one place that imports mosaicml-streaming.

Its package imports `streaming.vision`, which needs torchvision, and `streaming.text` and `.multimodal`, which
cost another second; none of them is used, so empty modules stand in for them before the first import.

Only parts without process-wide state are used: shard readers and writers, downloaders, hashes, compression and
the shuffle. `StreamingDataset` itself is not. Its constructor takes a slot among numbered shared-memory files
and file locks of the whole machine, meets the other ranks in barriers, and blocks or raises when a killed run
left its own behind; its `clean_stale_shared_memory` deletes those of living jobs too. What is never made need
not be cleaned: `sources/mds.py` holds flocks, which the kernel frees with their holder.
"""

from __future__ import annotations

import sys
from types import ModuleType

_UNUSED = ("streaming.vision", "streaming.text", "streaming.multimodal")


def _stand_in() -> None:
    if "streaming" in sys.modules:
        return  # somebody imported it in full
    for name in _UNUSED:
        sys.modules.setdefault(name, ModuleType(name))


_stand_in()

from streaming.base.compression import decompress  # noqa: E402
from streaming.base.format import MDSWriter, reader_from_json  # noqa: E402
from streaming.base.format.mds import MDSReader  # noqa: E402
from streaming.base.format.mds.encodings import is_mds_encoding_safe  # noqa: E402
from streaming.base.hashing import get_hash, is_hash  # noqa: E402
from streaming.base.shuffle import get_shuffle  # noqa: E402
from streaming.base.storage import CloudDownloader  # noqa: E402
from streaming.base.util import bytes_to_int  # noqa: E402

__all__ = [
    "CloudDownloader",
    "MDSReader",
    "MDSWriter",
    "bytes_to_int",
    "decompress",
    "get_hash",
    "get_shuffle",
    "is_hash",
    "is_mds_encoding_safe",
    "reader_from_json",
]
