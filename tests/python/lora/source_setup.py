"""A hub cache as huggingface_hub lays it out, and installed resolver plug-ins, without hub and pip."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_hub_cache(cache: Path, repo_id: str, adapter: Path, *, branch: str = "main") -> Path:
    """Put an adapter's files into a cache: blobs, links to them, and what the branch stands for."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / branch).write_text(COMMIT)
    for file in adapter.iterdir():
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def install_plugin(site: Path, module: str, source: str, entry_points: dict[str, str]) -> Path:
    """Write a module and its distribution's metadata as pip would; the folder is not on sys.path yet."""
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{module}.py").write_text(source)
    metadata = site / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    lines = [f"{name} = {module}:{attribute}" for name, attribute in entry_points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[lora_serve.adapter_resolvers]", *lines, ""]))
    return site
