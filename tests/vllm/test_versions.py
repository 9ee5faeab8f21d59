"""Which versions of vLLM are allowed: those that were read, and newer ones if the user says so and the hooks fit."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reshard import UnsupportedError
from reshard.placement.contract import Contract, contract_to_json
from reshard.vllm import configs, request, support, worker
from reshard.vllm.hook_check import source_faults
from reshard.vllm.hooks import OUTPUT, PLACEMENT, TRACE, VLLM_HOOKS, Hook


def write_sources(root: Path, hooks: tuple[Hook, ...]) -> None:
    """Source files with these functions and their parameters."""
    modules: dict[str, list[str]] = defaultdict(list)
    for hook in hooks:
        of_class, _, name = hook.name.rpartition(".")
        function = f"def {name}({', '.join(hook.parameters)}): ..."
        modules[hook.module] += [f"class {of_class}:", f"    {function}"] if of_class else [function]
    for module, lines in modules.items():
        path = root.joinpath(*module.split(".")) / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        methods: dict[str, list[str]] = defaultdict(list)
        for line, following in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("class"):
                methods[line].append(following)
        functions = [line for line in lines if line.startswith("def")]
        path.write_text("\n".join([*functions, *(f"{name}\n" + "\n".join(own) for name, own in methods.items())]))


@pytest.fixture
def newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An installed vLLM 0.34.0 with every function of the list; what it logged."""
    write_sources(tmp_path, VLLM_HOOKS)
    logged: list[str] = []
    logger = SimpleNamespace(warning_once=lambda line, *values: logged.append(line % values))
    vllm = SimpleNamespace(__version__="0.34.0", __file__=str(tmp_path / "vllm" / "__init__.py"))
    monkeypatch.setitem(sys.modules, "vllm", vllm)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "vllm.logger", SimpleNamespace(init_logger=lambda name: logger))  # type: ignore[arg-type]
    return logged


def test_the_made_up_sources_have_the_whole_list(tmp_path: Path) -> None:
    write_sources(tmp_path, VLLM_HOOKS)
    assert source_faults(tmp_path) == ()
    assert len(source_faults(tmp_path / "elsewhere")) == len(VLLM_HOOKS)


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_a_newer_version_is_refused_and_the_variable_is_named(
    value: str | None, newer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("RESHARD_UNTESTED_VLLM", value)
    for purpose in (OUTPUT, PLACEMENT):
        assert "found 0.34.0" in str(support.version_fault(purpose))
        assert "RESHARD_UNTESTED_VLLM=1" in str(support.version_fault(purpose))
    locked = {"model_type": "reshard_x", "expert_placement": {"original": {}}}
    monkeypatch.setattr(configs, "contract_from_json", lambda value, where: None)
    with pytest.raises(UnsupportedError, match=r"^here: .*0\.26 to 0\.33: found 0\.34\.0.*RESHARD_UNTESTED_VLLM=1"):
        configs.read_config(locked, "here")
    with pytest.raises(UnsupportedError, match=r"^RESHARD_PLACEMENT=zigzag: .*found 0\.34\.0.*RESHARD_UNTESTED_VLLM=1"):
        request.resolve_in(SimpleNamespace(additional_config=None), {"RESHARD_PLACEMENT": "zigzag"})
    assert newer == []


def test_a_newer_version_that_fits_is_allowed_with_a_warning(newer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESHARD_UNTESTED_VLLM", "1")
    assert support.version_fault(OUTPUT) is None
    assert support.version_fault(PLACEMENT) is None
    assert len(newer) == 2
    assert "0.34.0 is newer" in newer[0]


@pytest.mark.parametrize("hook", VLLM_HOOKS, ids=str)
def test_a_newer_version_without_a_function_is_refused_for_what_needs_it(
    hook: Hook, newer: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESHARD_UNTESTED_VLLM", "1")
    root = tmp_path / "tampered"
    write_sources(root, tuple(other for other in VLLM_HOOKS if other != hook))
    sys.modules["vllm"].__file__ = str(root / "vllm" / "__init__.py")
    for purpose in (OUTPUT, PLACEMENT, TRACE):
        fault = support.version_fault(purpose)
        assert (fault is not None) == (purpose in hook.needed_by)
        assert fault is None or hook.name in fault


@pytest.mark.parametrize("version", ["0.25.9", "dev", ""])
def test_an_older_version_and_one_without_a_number_stay_refused(
    version: str, newer: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESHARD_UNTESTED_VLLM", "1")
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    assert version in str(support.version_fault(OUTPUT))
    assert "UNTESTED" not in str(support.version_fault(OUTPUT))


def an_output(checked: int, is_output: bool = True) -> Any:
    """A worker of vLLM that loads an output, while `checked` models are checked."""

    contract = contract_to_json(Contract("zigzag", 2, 2, 1, {"model.layers.1.mlp": (0, 2, 1, 3)}, {}))

    class Worker:
        vllm_config = SimpleNamespace(
            additional_config={},
            load_config=SimpleNamespace(load_format="auto"),
            lora_config=None,
            parallel_config=SimpleNamespace(expert_placement_strategy="linear"),
            model_config=SimpleNamespace(
                model="here", hf_config=SimpleNamespace(expert_placement=contract if is_output else None)
            ),
        )

        def load_model(self) -> None:
            for _ in range(checked):
                worker.mark_checked("here")

    worker.install(SimpleNamespace(Worker=Worker))  # type: ignore[arg-type]
    return Worker()


def test_an_output_that_vllm_loaded_past_the_checks_is_not_served() -> None:
    """As a version would whose loaders no longer call what the plugin replaces."""
    an_output(checked=1).load_model()
    an_output(checked=0, is_output=False).load_model()
    with pytest.raises(
        UnsupportedError, match=r"^here: .*without the functions that reshard replaces.*reshard restore"
    ):
        an_output(checked=0).load_model()
