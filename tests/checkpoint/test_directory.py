"""What a checkpoint directory may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reshard import CheckpointError
from reshard.checkpoint.directory import MAX_NESTING, read_json_object


def test_brackets_in_a_text_with_escaped_quotes_are_no_nesting(tmp_path: Path) -> None:
    """Chat templates are such texts; one was taken for a config nested too deeply."""
    value = {"chat_template": '{{ "[" }}' * MAX_NESTING}
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_json_object(tmp_path / "config.json") == value


def test_a_config_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"deep": ' + "[" * MAX_NESTING + "]" * MAX_NESTING + "}")
    with pytest.raises(CheckpointError, match="deep"):
        read_json_object(tmp_path / "config.json")
