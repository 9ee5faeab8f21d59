"""Place the experts of MoE models on expert-parallel ranks, with the model's answers unchanged.

    from reshard import zigzag, verify, restore, inspect

    zigzag("DeepSeek-R1", "R1-zz", ep_size=8)
    assert verify("R1-zz", "DeepSeek-R1").ok

Data flows one way through the packages, and imports follow it:

    checkpoint  what lies on disk or on the Hub, and where
    model       which tensor belongs to which expert, and how the model routes
    placement   where experts go: permutations, strategies, balance, contract
    plan        what to write, as byte ranges
    record      the manifest
    execute     writing it
    traffic     recorded routing, and what a placement makes of it
    commands    what one can do, one module each
    cli         parsing and printing
    vllm        the plugin, which needs placement and the trace's file form only

Beside them, `errors` has the exceptions, and `arguments` checks and parses what callers give: paths, sizes, numbers.
Each package's docstring says what comes in, what goes out, and what it leaves to others.
"""

from typing import TYPE_CHECKING

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from ._public import *  # noqa: F403  # mypy and editors see the names; Python imports them at their first use
else:

    def __getattr__(name: str) -> object:
        """Import the public names when one is asked for: `reshard --help` and the plugin need none of them."""
        from importlib import import_module

        public = import_module(f"{__name__}._public")
        if name == "__all__" or name in public.__all__:
            return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
