"""Removes NVIDIA's files that PyTorch does not load on a machine without a GPU.

PyTorch is linked against some of them, so that it can't be imported without; those that a process
has mapped once it has imported PyTorch stay, with what belongs to the packages themselves.
"""

from pathlib import Path

import torch
import torch.distributed
import torch.utils.data


def main() -> None:
    nvidia = Path(torch.__file__).parents[1] / "nvidia"
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = {Path(line.split(maxsplit=5)[-1]) for line in lines if str(nvidia) in line}
    if not loaded:
        raise SystemExit(f"{nvidia}: got nothing that PyTorch has loaded")
    freed = 0
    for path in nvidia.rglob("*"):
        if path.is_file() and path not in loaded and path.suffix != ".py":
            freed += path.stat().st_size
            path.unlink()
    print(f"removed {freed // 2**20} MiB that only a GPU needs")


if __name__ == "__main__":
    main()
