"""The model card of an output: what it is, how to serve it, and the commands that made it. Text only."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from ..placement.strategies import Zigzag
from ..record.manifest import MANIFEST, Manifest
from .serving import serve_command

CARD = "README.md"
TAGS = ("reshard", "expert-parallelism")
_METADATA = re.compile(r"\s*---[^\n]*\n")  # how a card begins that has any

_EXACT = """\
No weight is changed: experts are renumbered, and the rows of the routers are permuted with them. So the router chooses
the same experts as in the original, and the answers are the original's."""
_PLUGIN = """\
It needs reshard's plugin for vLLM, because the original routes by groups of consecutive experts. Without the plugin,
vLLM and Transformers refuse to load it."""
_ANY_ENGINE = "Any engine that serves the original serves it; it needs no plugin."


def model_card(manifest: Manifest, repo_id: str, revision: str | None, base_model: str | None, original: str) -> str:
    """The card of an output that is published as `repo_id`, in Markdown with YAML metadata.

    Parameters:
        manifest: of the output
        revision: the branch that it is on; None for main
        base_model: the repository of the original; None if nobody knows it
        original: the card of the original, whose text and metadata are kept; empty if it has none

    Raises ValueError, or what PyYAML raises, if the metadata of `original` cannot be read.

    """
    from huggingface_hub.repocard import RepoCard

    with_metadata = original if _METADATA.match(original) else f"---\n{{}}\n---\n{original}"
    card = RepoCard(with_metadata, ignore_metadata_errors=True)
    if base_model is not None:
        card.data["base_model"] = base_model
        card.data.pop("base_model_relation", None)  # the original's, to its own base
    tags = card.data.get("tags")
    tags = tags if isinstance(tags, list) else []
    card.data["tags"] = [*tags, *(tag for tag in TAGS if tag not in tags)]
    lines = [*_lines(manifest, repo_id, revision, base_model)]
    if text := card.text.strip():
        lines += ["", "---", "", f"*The card of {base_model or 'the original'}:*", "", text]
    card.text = "\n".join(["", *lines, ""])
    return str(card)


def _lines(manifest: Manifest, repo_id: str, revision: str | None, base_model: str | None) -> Iterable[str]:
    source, ep_size = manifest.source, manifest.ep_size
    link = "the original" if base_model is None else f"[{base_model}](https://huggingface.co/{base_model})"
    commit = "" if source.revision is None else f" at commit `{source.revision}`"
    name = repo_id.partition("/")[2]
    yield f"# {name}"
    yield ""
    yield f"This is {link}{commit}, with the experts of its MoE layers placed on {ep_size} expert-parallel (EP)"
    yield f"ranks by the strategy `{manifest.strategy}` of reshard {manifest.reshard_version}."
    yield ""
    yield _EXACT
    yield ""
    yield "## Serve it"
    yield ""
    yield _PLUGIN if manifest.plugin_required else _ANY_ENGINE
    yield ""
    plugin = ["pip install reshard vllm"] if manifest.plugin_required else []
    yield from _shell(*plugin, serve_command(f"hf://{repo_id}@{revision}" if revision else repo_id, ep_size))
    yield ""
    yield "## Check it, or get the original back"
    yield ""
    at = f" --revision {shlex.quote(revision)}" if revision else ""
    yield from _shell(
        f"hf download {repo_id}{at} --local-dir ./{name}",
        f"reshard verify ./{name}",
        f"reshard restore {repo_id}{at} --out ./original",
    )
    yield ""
    yield f"`{MANIFEST}` has the digest of each tensor, and the place of each expert."
    yield ""
    yield "## How it was made"
    yield ""
    yield from _shell(_making_command(manifest, base_model, name))


def _shell(*commands: str) -> list[str]:
    return ["```bash", *commands, "```"]


def _making_command(manifest: Manifest, base_model: str | None, out: str) -> str:
    """The command that makes it again. A manifest is a placement file too."""
    source = manifest.source
    where = base_model or "./original"
    revision = ["--revision", source.revision] if base_model is not None and source.revision is not None else []
    command = ["zigzag"]
    if manifest.strategy != Zigzag.name:
        command = ["place", "--strategy", "file", "--map", MANIFEST]
    command += ["--src", where, *revision, "--ep", str(manifest.ep_size)]
    if manifest.layout != "ranks":
        command += ["--layout", manifest.layout]
    return shlex.join(["reshard", *command, "--out", f"./{out}"])
