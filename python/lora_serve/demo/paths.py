"""Where the demo's model and adapters lie in the installed package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_serve.common.errors import NotFoundError
from lora_serve.demo.prompts import PROJECTS


@dataclass(frozen=True)
class DemoPaths:
    """Folders of the demo's files.

    Parameters
    ----------
    model
        A Hugging Face directory: configuration, weights, tokenizer.
    adapters
        Adapter name to its PEFT directory.
    """

    model: Path
    adapters: dict[str, Path]


def demo_paths() -> DemoPaths:
    """The folders of the demo's model and adapters.

    Returns
    -------
    DemoPaths
        Absolute paths. All of them exist.

    Raises
    ------
    NotFoundError
        The package was installed without its demo files.
    """
    assets = Path(__file__).resolve().parent / "assets"
    paths = DemoPaths(assets / "model", {name: assets / "adapters" / name for name in PROJECTS})
    needed = [paths.model / "model.safetensors"]
    needed += [path / "adapter_model.safetensors" for path in paths.adapters.values()]
    for file in needed:
        if not file.is_file():
            raise NotFoundError(
                f"the demo file {file} is missing; install the package again, or make the files with "
                f"'python scripts/train_demo.py --out {assets}'"
            )
    return paths
