"""What general compressors need for a text: the yardstick beside a model's bits per byte."""

import gzip

try:
    import lzma
except ImportError:  # a Python that was built without liblzma
    lzma = None


def compressed_bits_per_byte(data: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for `data`, all headers counted.

    Args:
      data: the whole text in one piece.

    Returns:
      {"gzip -9": …, "xz -9": …}, computed now; without xz where Python lacks it.

    Raises:
      ValueError: if there is no data.
    """
    if not data:
        raise ValueError("no held-out text to compress")
    sizes = {"gzip -9": len(gzip.compress(data, 9, mtime=0))}
    if lzma is not None:
        sizes["xz -9"] = len(lzma.compress(data, preset=9))
    return {name: 8 * size / len(data) for name, size in sizes.items()}
