"""What targets share when they write their commands out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping

import numpy as np


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """An .npz of `arrays`, under any names; formats that numpy lacks (bfloat16) as their bits, uint16."""
    file = io.BytesIO()
    # np.savez takes names as keyword arguments, among which a value called "file" would not fit.
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            plain = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, plain, allow_pickle=False)
    return file.getvalue()
