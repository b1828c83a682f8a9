"""How much memory one query takes at its peak, measured in a process of its own; Linux.

``python -m tests.models.peak_memory MODEL DATA OUT`` loads an SCVI from the folder MODEL, asks for the denoised
expression of all genes of the cells in the file DATA (backed), writes it to the zarr array OUT (``-`` for a table in
memory), and prints how far the resident memory rose above what it was before, in bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(which: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    [line] = [line for line in STATUS.read_text().splitlines() if line.startswith(which)]
    return 1024 * int(line.split()[1])


def release() -> int:
    """Give freed memory back to the system, so that what comes next counts in full; return what is still held."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    return resident("VmRSS")


def main(model_folder: str, data: str, out: str) -> int:
    """Return the rise in bytes."""
    import anndata
    import numpy as np
    import torch

    import pyrocell

    torch.set_num_threads(1)
    model = pyrocell.SCVI.load(model_folder)
    adata = anndata.read_h5ad(data, backed="r")
    first = np.arange(min(9_000, adata.n_obs))  # several blocks: what is loaded and set aside once
    model.get_normalized_expression(adata, indices=first, return_numpy=True)
    if out != "-":
        model.get_normalized_expression(adata, indices=first, out=f"{out}.first")
    before = release()
    CLEAR.write_text("5")  # the peak starts again from here
    result = model.get_normalized_expression(adata, out=None if out == "-" else out)
    assert result.shape == adata.shape
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
