"""Files of a run, never seen half written: last.pt, all that it needs to go on, and best.pt, weights alone.

Both are read by `tokenlabels.models.load_checkpoint` and, for models of timm, by
``timm.create_model(..., checkpoint_path=)``.
"""

import pickle
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tokenlabels.files import remove_temporaries, replace_file

LAST_FILE, BEST_FILE, CONFIG_FILE = "last.pt", "best.pt", "config.json"
_FORMAT = 1


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values so that a reader finds the old file or the new one, also after a power cut."""
    replace_file(path, lambda file: torch.save({"format": _FORMAT, "versions": versions(), **content}, file))
    remove_temporaries(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is missing or damaged, or no checkpoint of a run.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such checkpoint") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged, or no checkpoint ({error})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or "progress" not in content:
        raise ValueError(
            f"{path}: no checkpoint of a run, from which training goes on; weights alone are for fine-tuning"
        )
    return content


@cache
def versions() -> dict[str, str]:
    """Of the code that makes a run, with the commit if it is a checkout."""
    found = {name: version(name) for name in ("tokenlabels", "torch", "timm")}
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # an installed package: the repository around it is another one
        return found
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return found
    return found | {"commit": commit}
