"""The list of hooks, against the sources of the installed vLLM and against what the plugin really replaces."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

import check_vllm
import pytest
from harness import Serving

from reshard.vllm.hooks import TRANSFORMERS_HOOKS, VLLM_HOOKS, Hook

REPLACED = """
import importlib, json, sys
from reshard.vllm import patching

replace, found = patching.replace_once, set()

def recording(owner, name, wrap):
    module = getattr(owner, "__module__", None)
    found.add(f"{module}.{owner.__qualname__}.{name}" if module else f"{owner.__name__}.{name}")
    replace(owner, name, wrap)

patching.replace_once = recording
import reshard.vllm
reshard.vllm.register()
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
print(json.dumps(sorted(found)))
"""


@pytest.fixture(scope="module")
def site_packages(serving: Serving) -> Path:
    """Where vLLM is installed."""
    ran = serving.python("import importlib.util; print(importlib.util.find_spec('vllm').origin)")
    return Path(ran.stdout.strip()).parent.parent


@pytest.fixture(scope="module")
def sources(site_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of vLLM's sources."""
    root = tmp_path_factory.mktemp("sources")
    only_sources = shutil.ignore_patterns("*.so", "*.pyc", "*.json", "__pycache__")
    shutil.copytree(site_packages / "vllm", root / "vllm", ignore=only_sources)
    return root


def file_of(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_list_has_what_the_plugin_replaces_and_nothing_else(serving: Serving) -> None:
    hooks = [hook for hook in (*VLLM_HOOKS, *TRANSFORMERS_HOOKS) if hook.replaced]
    modules = json.dumps(sorted({hook.module for hook in hooks}))
    code = f"import os; os.environ['RESHARD_TRACE'] = 'trace'\n{REPLACED}"
    ran = serving.python(code, modules)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = set(json.loads(ran.stdout.splitlines()[-1]))
    listed = {str(hook).replace("PretrainedConfig", "PreTrainedConfig") for hook in hooks}
    assert found == listed


def test_every_hook_fits_the_installed_vllm(site_packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_vllm.main([str(site_packages)]) == 0
    assert f"the {len(VLLM_HOOKS)} functions" in capsys.readouterr().out


@pytest.mark.parametrize("hook", VLLM_HOOKS, ids=str)
def test_a_function_that_was_renamed_is_named(hook: Hook, sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = file_of(sources, hook.module), hook.name.rpartition(".")[2]
    text = path.read_text()
    assert re.search(rf"\b{name}\b", text)
    try:
        path.write_text(re.sub(rf"\b{name}\b", f"{name}_moved", text))
        assert check_vllm.main([str(sources)]) == 1
    finally:
        path.write_text(text)
    assert re.search(rf"{re.escape(str(hook))}\b.*needed for {hook.needed_by[0]}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("module", "parameter", "complaint"),
    [
        ("vllm.v1.worker.gpu_worker", "level", r"gpu_worker\.Worker\.sleep takes no level"),
        (
            "vllm.model_executor.layers.fused_moe.router.router_factory",
            "topk_group",
            r"layer\.create_fused_moe_router takes no topk_group",
        ),
        ("vllm.model_executor.model_loader.utils", "model_config", r"initialize_model takes no model_config"),
        ("vllm.model_executor.layers.fused_moe.routed_experts", "shard_id", r"weight_loader takes no shard_id"),
    ],
)
def test_a_parameter_that_was_lost_is_named(
    module: str, parameter: str, complaint: str, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(sources, module)
    text = path.read_text()
    try:
        path.write_text(re.sub(rf"\b{parameter}\b", f"{parameter}_too", text))
        assert check_vllm.main([str(sources)]) == 1
    finally:
        path.write_text(text)
    assert re.search(complaint, capsys.readouterr().out)


def test_a_module_that_moved_and_a_function_that_is_called_elsewhere_are_named(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(sources, "vllm.model_executor.layers.fused_moe.layer")
    text = path.read_text()
    call = re.compile(r"(?<!import )\bcreate_fused_moe_router\(")
    assert call.search(text)
    try:
        path.unlink()
        assert check_vllm.main([str(sources)]) == 1
        assert "no module vllm.model_executor.layers.fused_moe.layer" in capsys.readouterr().out
        path.write_text(call.sub("elsewhere.create_fused_moe_router(", text))
        assert check_vllm.main([str(sources)]) == 1
        assert "layer.create_fused_moe_router is imported there, but not used" in capsys.readouterr().out
    finally:
        path.write_text(text)
    assert check_vllm.main([str(sources)]) == 0


def test_a_wheel_is_downloaded_by_its_version_and_only_its_sources_are_read(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def download(version: str, directory: Path) -> Path:
        asked.append(version)
        with zipfile.ZipFile(directory / "vllm-1.2.3.whl", "w") as wheel:
            for hook in VLLM_HOOKS[:3]:
                path = file_of(sources, hook.module)
                if path.relative_to(sources).as_posix() not in wheel.namelist():
                    wheel.write(path, path.relative_to(sources))
            wheel.writestr("vllm/_C.so", "not read")
        return directory / "vllm-1.2.3.whl"

    monkeypatch.setattr(check_vllm, "download", download)
    assert check_vllm.main(["1.2.3"]) == 1
    assert check_vllm.main([]) == 1
    assert asked == ["1.2.3", ""]
    printed = capsys.readouterr().out
    assert "vllm-1.2.3.whl: it has no module vllm.v1.worker.gpu_worker" in printed
    assert "parse" not in printed, "what is there is found"
