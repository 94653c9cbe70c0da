"""CosyVoice's own flow, where the package ``cosyvoice`` (with Matcha-TTS beside it) can be imported.

The flow's modules import packages that the flow itself never uses (speech tokeniser, audio loading, language model).
Where these are not installed, empty stand-ins take their place.
"""

import importlib
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

FILES = {
    "MaskedDiffWithXvec": "flow.flow",
    "CausalMaskedDiffWithXvec": "flow.flow",
    "CausalMaskedDiffWithDiT": "flow.flow",
    "ConformerEncoder": "transformer.encoder",
    "UpsampleConformerEncoder": "transformer.upsample_encoder",
    "PreLookaheadLayer": "transformer.upsample_encoder",
    "InterpolateRegulator": "flow.length_regulator",
    "ConditionalCFM": "flow.flow_matching",
    "CausalConditionalCFM": "flow.flow_matching",
    "ConditionalDecoder": "flow.decoder",
    "CausalConditionalDecoder": "flow.decoder",
    "DiT": "flow.DiT.dit",
}
NEEDED = ("cosyvoice", "matcha", "diffusers", "einops", "conformer", "x_transformers")  # the flow computes with them


class _Anything:
    """Good as a base class, and as a decorator that changes nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else super().__new__(cls)


class _StandIn(ModuleType):
    """A package that is imported but not used; every name in it is a class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


def missing() -> str:
    """Why upstream cannot run; empty if it can."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"not importable: {', '.join(absent)}" if absent else ""


def _import(module: str) -> ModuleType:
    importlib.import_module("diffusers")  # it looks for the very packages that get stand-ins, so it comes first
    stand_ins: list[str] = []
    try:
        while True:
            try:
                return importlib.import_module(module)
            except ModuleNotFoundError as error:
                package = error.name or ""
                if not package or package.split(".")[0] in NEEDED:
                    raise
                stand_ins.append(package)
                _put_stand_in(package)
    finally:
        for package in stand_ins:  # nobody else shall take them for the real ones
            del sys.modules[package]


def _put_stand_in(package: str) -> None:
    sys.modules[package] = stand_in = _StandIn(package)
    parent, _, name = package.rpartition(".")
    if parent:
        setattr(sys.modules[parent], name, stand_in)


def build(spec: dict[str, Any]) -> nn.Module:
    """Upstream's module for a spec of :func:`fastflow.config.preset`.

    Building CausalConditionalCFM reseeds every global random generator.
    """
    arguments: dict[str, Any] = {
        key: build(value) if isinstance(value, dict) and "class" in value else value for key, value in spec.items()
    }
    name = arguments.pop("class")
    if "cfm_params" in arguments:
        arguments["cfm_params"] = SimpleNamespace(**arguments["cfm_params"])
    return getattr(_import(f"cosyvoice.{FILES[name]}"), name)(**arguments)
