"""The files of real outputs, chosen as vLLM's loader asks: without a manifest or an index, and beside others.

vLLM takes a model from the Hub without its manifest, which holds no weights; here, outputs lack theirs.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import Spec, build
from command_line import run_well
from earlier_contracts import MARKS, with_shaped_gates

from reshard import IntegrityError, OutputError, UnsupportedError
from reshard._version import __version__
from reshard.placement.contract import CONTRACT_KEY
from reshard.vllm import loading, recording, worker
from reshard.vllm.loading import Build, building
from reshard.vllm.outputs import is_output
from reshard.vllm.served import served_strategy
from reshard.vllm.updates import own_files

INDEX, MANIFEST = "model.safetensors.index.json", "reshard_manifest.json"
CONSOLIDATED = "consolidated.safetensors.index.json"
LAYOUTS = ("ranks", "source")
LIMITED, PLAIN = "deepseek_v3", "qwen3_moe"


def by_index(files: list[str], folder: str, index_file: str) -> list[str]:
    """What vLLM does with the files that it finds."""
    index = Path(folder, index_file)
    if not index.is_file():
        return files
    named = {str(Path(folder, name)) for name in json.loads(index.read_bytes())["weight_map"].values()}
    if named - set(files):
        raise FileNotFoundError
    return [file for file in files if file in named]


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for vLLM's module of the default loader, with the plugin."""
    log = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)
    monkeypatch.setitem(sys.modules, "vllm.logger", SimpleNamespace(init_logger=lambda name: log))  # type: ignore[arg-type]
    monkeypatch.setattr(worker, "_proved", [])
    module = SimpleNamespace(filter_duplicate_safetensors_files=by_index)
    loading.install_file_choice(module)  # type: ignore[arg-type]
    return module


def checkpoint(folder: Path, family: str = PLAIN, layout: str | None = None, files: int = 3) -> Path:
    """A checkpoint; if `layout` is given, its output, as vLLM downloads it: without the manifest."""
    build(Spec(family, experts=8, files=files), folder / "source")
    if layout is None:
        return folder / "source"
    options = ["--ep", "2", "--layout", layout, "--quiet"]
    run_well("zigzag", "--src", folder / "source", "--out", folder / "output", *options)
    (folder / "output" / MANIFEST).rename(folder / MANIFEST)
    return folder / "output"


def built(folder: Path, **changes: Any) -> Build:
    """What vLLM is loading: the model in `folder`, with a contract if its config.json has one."""
    config = json.loads((folder / "config.json").read_text())
    values = {CONTRACT_KEY: config[CONTRACT_KEY]} if CONTRACT_KEY in config else {}
    hf_config = SimpleNamespace(**values)
    model = SimpleNamespace(model=str(folder), hf_config=hf_config, hf_text_config=hf_config, get_num_experts=lambda: 8)
    parallel = {"enable_expert_parallel": False, "enable_eplb": False, "expert_placement_strategy": "linear"}
    settings = {
        "parallel_config": SimpleNamespace(**parallel),
        "additional_config": {},
        **changes,
    }
    return Build(SimpleNamespace(model_config=model, **settings), model, SimpleNamespace(load_format="auto"))


def model_of(build: Build, **changes: Any) -> Build:
    """The same, with another ModelConfig."""
    model = SimpleNamespace(**{**vars(build.model_config), **changes})
    model.__dict__.pop("reshard_numbering", None)
    return Build(build.vllm_config, model, build.load_config)


def chosen(loader: Any, folder: Path, build: Build | None = None, pattern: str = "*", index: str = INDEX) -> set[str]:
    """The names of the files that are loaded."""
    files = sorted(str(path) for path in folder.glob(f"{pattern}.safetensors"))
    with building(build or built(folder)):
        return {Path(file).name for file in loader.filter_duplicate_safetensors_files(files, str(folder), index)}


def weights(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("family", [LIMITED, PLAIN])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_without_its_index_is_refused(family: str, layout: str, loader: Any, tmp_path: Path) -> None:
    """Whatever lay there was loaded, and the experts in absent files stayed uninitialised."""
    output = checkpoint(tmp_path, family, layout)
    assert chosen(loader, output) == weights(output), "the control"
    (output / INDEX).unlink()
    with pytest.raises(OutputError, match=rf"{INDEX}: absent, .*copy the index here, or run `reshard stage` again"):
        chosen(loader, output)


def test_one_rank_file_alone_is_refused_and_a_model_in_one_file_needs_no_index(loader: Any, tmp_path: Path) -> None:
    output = checkpoint(tmp_path, PLAIN, "ranks")
    (output / INDEX).unlink()
    for path in output.glob("*.safetensors"):
        if "model-ep00" not in path.name:
            path.unlink()
    assert len(weights(output)) == 1
    with pytest.raises(OutputError, match=f"{INDEX}: absent"):
        chosen(loader, output)
    whole = checkpoint(tmp_path / "whole", LIMITED, "source", files=1)
    (whole / INDEX).unlink()  # for a model in one file, vLLM downloads no index
    assert chosen(loader, whole) == weights(whole) == {"model.safetensors"}


@pytest.mark.parametrize("family", [LIMITED, PLAIN])
@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_second_weights_of_mistrals_names_are_refused_beside_an_output(
    family: str, layout: str | None, loader: Any, tmp_path: Path
) -> None:
    """vLLM prefers such files, and experts had the original's ids in a model that routes by the output's."""
    folder = checkpoint(tmp_path, family, layout)
    if layout is not None and family == PLAIN:  # the other one is known by its contract
        shutil.copy(tmp_path / MANIFEST, folder)
    shutil.copy(next((tmp_path / "source").glob("*.safetensors")), folder / "consolidated.safetensors")
    if layout is None:
        assert chosen(loader, folder, None, "consolidated*", CONSOLIDATED) == {"consolidated.safetensors"}, (
            "the control"
        )
        return
    assert chosen(loader, folder) == weights(folder) - {"consolidated.safetensors"}, "by another load format"
    with pytest.raises(UnsupportedError, match=r"consolidated\.safetensors: vLLM would load this file.*move it away"):
        chosen(loader, folder, None, "consolidated*", CONSOLIDATED)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_an_output_without_its_manifest_is_known_by_its_files(
    layout: str | None, files: int, loader: Any, tmp_path: Path
) -> None:
    """With --layout source nothing told it from an original, and what names experts by their ids met others."""
    folder = checkpoint(tmp_path, PLAIN, layout, files)
    if files == 1 and layout == "source":
        (folder / INDEX).unlink()
    build = built(folder)
    assert is_output(build.model_config) == (layout is not None), "before anything is loaded, too"
    assert chosen(loader, folder, build) == weights(folder)
    assert is_output(build.model_config) == (layout is not None)
    by_id = model_of(build, model="org/model")
    assert chosen(loader, folder, by_id) == weights(folder)
    assert is_output(by_id.model_config) == (layout is not None), "from the Hub, after its files were read"
    fault = recording._unsupported(build.vllm_config)
    assert (fault is None) if layout is None else "no manifest there says which experts" in str(fault)


def with_placement(folder: Path) -> Build:
    return built(folder, additional_config={"reshard": served_strategy("zigzag", 1, 8, 2, 3)})


def proved(folder: Path) -> Build:
    worker.mark_proved(served_strategy("zigzag", 1, 8, 2, 3))
    return built(folder)


@pytest.mark.parametrize("layout", [*LAYOUTS, None])
@pytest.mark.parametrize("placed", [with_placement, proved])
def test_a_model_with_a_placement_takes_no_output_that_has_lost_its_manifest(
    placed: Callable[[Path], Build], layout: str | None, loader: Any, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, PLAIN, layout)
    build = placed(folder)
    if layout is None:
        assert chosen(loader, folder, build) == weights(folder), "the control"
        return
    with pytest.raises(UnsupportedError, match="an output of reshard, whose experts are renumbered already"):
        chosen(loader, folder, build)


@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_a_running_original_takes_no_files_of_an_output(layout: str | None, loader: Any, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, PLAIN, layout)
    running = built(checkpoint(tmp_path / "running"))
    with own_files():
        if layout is None:
            assert chosen(loader, folder, running) == weights(folder), "the control"
            return
        with pytest.raises(UnsupportedError, match="the running model is an original, and takes an original's weights"):
            chosen(loader, folder, running)
    own = built(folder)
    chosen(loader, folder, own)
    with own_files():
        assert chosen(loader, folder, own) == weights(folder), "an output reloads its own files"


def contract_of(folder: Path) -> dict[str, Any]:
    """The contract in a directory's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())[CONTRACT_KEY]
    return found


def loaded(loader: Any, folder: Path, told: Build) -> list[str]:
    """The files in `folder` that are loaded into the model `told`."""
    with building(told):
        files = sorted(map(str, folder.glob("*.safetensors")))
        found: list[str] = loader.filter_duplicate_safetensors_files(files, str(folder), INDEX)
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_loaded_by_the_contract_that_lies_beside_them_or_not_at_all(
    layout: str, loader: Any, tmp_path: Path
) -> None:
    """With another output's config.json (`--hf-config-path`), tokens went to other experts."""
    output = checkpoint(tmp_path / "one", LIMITED, layout)
    assert loaded(loader, output, built(output)), "the control"
    told = built(output)
    other = json.loads(json.dumps(contract_of(output)))
    order = other["physical_to_logical"]
    (order if isinstance(order, list) else next(iter(order.values()))).reverse()
    setattr(told.model_config.hf_config, CONTRACT_KEY, other)
    with pytest.raises(UnsupportedError, match="another output of reshard, but expert_placement in the config"):
        loaded(loader, output, told)
    original = tmp_path / "one" / "source"
    with pytest.raises(UnsupportedError, match="no output of reshard with expert groups, but expert_placement"):
        loaded(loader, original, built(output))
    assert loaded(loader, original, built(original)), "the control"


def test_a_config_that_its_manifest_contradicts_is_refused(loader: Any, tmp_path: Path) -> None:
    """A config.json copied from another output was served."""
    build(Spec(LIMITED, experts=8, files=3), tmp_path / "source")
    for ep in (2, 4):
        run_well("zigzag", "--src", tmp_path / "source", "--out", tmp_path / f"{ep}", "--ep", ep, "--quiet")
    output = tmp_path / "2"
    assert loaded(loader, output, built(output)), "the control"
    shutil.copy(tmp_path / "4" / "config.json", output)
    with pytest.raises(UnsupportedError, match=r"differs from that in reshard_manifest\.json"):
        loaded(loader, output, built(output))


def two_outputs(folder: Path, family: str, layout: str) -> tuple[Path, Path]:
    """Two outputs of one checkpoint, whose files have equal names."""
    first = checkpoint(folder, family, layout)
    (folder / "map.json").write_text(json.dumps({"physical_to_logical": [7, 6, 5, 4, 3, 2, 1, 0]}))
    options = ["--strategy", "file", "--map", folder / "map.json", "--ep", "2", "--layout", layout, "--quiet"]
    run_well("place", "--src", folder / "source", "--out", folder / "second", *options)
    (folder / "second" / MANIFEST).unlink()
    return first, folder / "second"


@pytest.mark.parametrize("family", [LIMITED, PLAIN])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", [0, 1, -1])
def test_files_of_two_outputs_in_one_directory_are_refused(
    family: str, layout: str, which: int, loader: Any, tmp_path: Path
) -> None:
    """Experts of one, behind routers of the other, were served."""
    output, other = two_outputs(tmp_path, family, layout)
    assert chosen(loader, output) == weights(output) == weights(other), "the control"
    name = sorted(weights(output))[which]
    shutil.copy(other / name, output)
    with pytest.raises(IntegrityError, match="numbered in different ways, by their headers; files of two checkpoints"):
        chosen(loader, output)


@pytest.mark.parametrize("family", [LIMITED, PLAIN])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_files_of_an_output_and_of_its_source_in_one_directory_are_refused(
    family: str, which: int, loader: Any, tmp_path: Path
) -> None:
    output = checkpoint(tmp_path, family, "source")
    names = sorted(weights(output))
    shutil.copy(tmp_path / "source" / names[which], output)
    with pytest.raises(IntegrityError, match=r"are renumbered, and those in .* are not, by their headers"):
        chosen(loader, output)
    for name in names:
        shutil.copy(tmp_path / "source" / name, output)
    if family == PLAIN:
        shutil.copy(tmp_path / "source" / INDEX, output)
        assert chosen(loader, output) == {*names}, "all files are the source's, and so is config.json"
        return
    with pytest.raises(IntegrityError, match="does not say that its experts are numbered as in this output"):
        chosen(loader, output)


@pytest.mark.parametrize(("family", "by"), [(LIMITED, "config.json"), (PLAIN, MANIFEST)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_another_output_than_the_placement_says_are_refused(
    family: str, by: str, layout: str, loader: Any, tmp_path: Path
) -> None:
    output, other = two_outputs(tmp_path, family, layout)
    if by == MANIFEST:
        shutil.copy(tmp_path / MANIFEST, output)
    assert chosen(loader, output), "the control"
    for name in weights(other):
        shutil.copy(other / name, output)
    with pytest.raises(IntegrityError, match="numbered in another way than the placement says, by its header"):
        chosen(loader, output)


@pytest.mark.parametrize("marks", [(), MARKS[:1]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_of_earlier_versions_whose_files_say_less_are_loaded(
    marks: tuple[str, ...], layout: str, loader: Any, tmp_path: Path
) -> None:
    output = checkpoint(tmp_path, PLAIN, layout)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    assert manifest["reshard_version"] == __version__
    (output / MANIFEST).write_text(json.dumps({**manifest, "reshard_version": __version__ if marks else "0.1.0"}))
    with_shaped_gates(tmp_path / "source", output, marks)
    assert chosen(loader, output) == weights(output)


def test_files_of_the_source_beside_the_manifest_of_an_output_are_refused(loader: Any, tmp_path: Path) -> None:
    """They were served as the output's, and the ids of experts that vLLM returns were mapped once too often."""
    output = checkpoint(tmp_path, PLAIN, "source")
    for name in (*weights(output), INDEX):
        shutil.copy(tmp_path / "source" / name, output)
    assert chosen(loader, output) == weights(output), "the control: without the manifest, all of it is the source's"
    shutil.copy(tmp_path / MANIFEST, output)
    with pytest.raises(IntegrityError, match=r"would have marked files, but no file has its mark"):
        chosen(loader, output)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_output_whose_config_lies_elsewhere_is_known_by_its_files(layout: str, loader: Any, tmp_path: Path) -> None:
    """With --download-dir, vLLM keeps only weights and index there; outputs with expert groups were refused."""
    output, other = two_outputs(tmp_path, LIMITED, layout)
    told, others = built(output), built(other)
    (output / "config.json").unlink()
    assert chosen(loader, output, told) == weights(output)
    with pytest.raises(IntegrityError, match="numbered in another way than the placement says"):
        chosen(loader, output, others)
    with_shaped_gates(tmp_path / "source", output, MARKS[:1])
    with pytest.raises(IntegrityError, match="does not say that its experts are numbered as in this output"):
        chosen(loader, output, told)
