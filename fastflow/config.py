"""The ways into a flow: presets, CosyVoice yaml files, and checkpoints.

All of them speak one language, the *spec*: a nested dict of plain Python values in which a dict with the key
``class`` stands for a module of that name built from the other keys.  It prints, compares and converts to JSON.
"""

import ast
import functools
import importlib
import inspect
import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastflow.dit import DiT
from fastflow.encoder import ConformerEncoder, PreLookaheadLayer, UpsampleConformerEncoder
from fastflow.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec, MaskedDiffWithXvec
from fastflow.flow_matching import CausalConditionalCFM, ConditionalCFM
from fastflow.length_regulator import InterpolateRegulator
from fastflow.presets import PRESETS, Spec, preset
from fastflow.unet import CausalConditionalDecoder, ConditionalDecoder

__all__ = ["PRESETS", "Spec", "build", "check_state", "from_preset", "load", "preset", "read_checkpoint", "read_yaml"]

FLOWS: tuple[type[nn.Module], ...] = (MaskedDiffWithXvec, CausalMaskedDiffWithXvec, CausalMaskedDiffWithDiT)
PARTS: tuple[type[nn.Module], ...] = (
    ConformerEncoder,
    UpsampleConformerEncoder,
    PreLookaheadLayer,
    InterpolateRegulator,
    ConditionalCFM,
    CausalConditionalCFM,
    ConditionalDecoder,
    CausalConditionalDecoder,
    DiT,
)
# The classes a spec may name.
MODULES = {module.__name__: module for module in FLOWS + PARTS}


def build(spec: Spec, where: str = "flow") -> nn.Module:
    """Construct the module that a spec describes, with freshly initialised weights.

    Args:
        spec: nested dict; ``class`` names one of :data:`MODULES`, the other keys are its constructor arguments.
        where: the name of the whole in error messages.

    Raises:
        ValueError: unknown class, or an argument that the class does not have.
    """
    name = spec.get("class")
    if name not in MODULES:
        raise ValueError(f"{where}: class must be one of {', '.join(MODULES)}; got {name!r}")
    module = MODULES[name]
    known = list(inspect.signature(module).parameters)
    arguments = {key: value for key, value in spec.items() if key != "class"}
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(f"{where}: {name} has no argument {key!r}; it has {', '.join(known)}")
        if isinstance(value, dict) and "class" in value:
            arguments[key] = build(value, f"{where}.{key}")
    try:
        return module(**arguments)
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from error


def from_preset(name: str, **overrides: Any) -> nn.Module:
    """A flow of a known size with freshly initialised weights, in training mode, float32, on the CPU.

    Args:
        name: see :func:`preset`.
        **overrides: arguments of the flow class to replace, for instance ``input_frame_rate=25`` or ``vocab_size=512``.

    Raises:
        ValueError: no such preset, or the flow class has no such argument.
    """
    return build({**preset(name), **overrides})


YAML_NAMES = ("cosyvoice.yaml", "cosyvoice2.yaml", "cosyvoice3.yaml")  # in the order in which CosyVoice looks
CHECKPOINT_NAME = "flow.pt"


def _import(name: str, purpose: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}: pip install {install}") from error


def read_yaml(path: str | Path) -> Spec:
    """The spec of the ``flow:`` section of a CosyVoice yaml file.

    Only that section is read, and the values that it refers to with ``!ref`` or ``!copy``.  Nothing in the file is
    ever imported or called, so ``!apply``, ``!name`` and the like elsewhere (seeds, llm, hift) need no package.

    Args:
        path: a yaml file in HyperPyYAML's notation.  In the section ``!new:cosyvoice.<module>.<class>`` and
            ``!new:fastflow.<class>`` name the classes of :data:`MODULES`; ``!new:omegaconf.DictConfig`` is a dict.

    Raises:
        ValueError: not a yaml file, no flow in it, or a tag in the section that is none of these.
        ImportError: hyperpyyaml is not installed.
    """
    hyperpyyaml = _import("hyperpyyaml", "reading a CosyVoice yaml file", "fastflow[yaml]")
    ruamel = _import("ruamel.yaml", "reading a CosyVoice yaml file", "fastflow[yaml]")
    try:
        tree = ruamel.YAML().load(Path(path).read_text(encoding="utf-8"))
    except (ruamel.error.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a yaml file: {error}") from error
    if not isinstance(tree, dict) or "flow" not in tree:
        found = ", ".join(map(str, tree)) if isinstance(tree, dict) else "no sections at all"
        raise ValueError(f"{path} must have a section 'flow:'; it has {found}")
    needed = _reachable("flow", tree)
    document = io.StringIO()
    ruamel.YAML().dump(ruamel.comments.CommentedMap((key, tree[key]) for key in tree if key in needed), document)
    document.seek(0)
    resolved = ruamel.YAML().load(hyperpyyaml.resolve_references(document))
    spec = _plain(resolved["flow"], "flow")
    flows = [flow.__name__ for flow in FLOWS]
    if not isinstance(spec, dict) or spec.get("class") not in flows:
        raise ValueError(f"{path}: the section 'flow:' must be !new:cosyvoice.flow.flow.<{' | '.join(flows)}>")
    return spec


def _tag(node: Any) -> str:
    return (node.tag.value or "") if hasattr(node, "tag") else ""


def _reachable(key: str, tree: Mapping[str, Any]) -> set[str]:
    """The top-level keys that the section ``key`` depends on through references, itself included."""
    found: set[str] = set()
    waiting: list[Any] = [key]
    while waiting:
        name = waiting.pop()
        if name in found or name not in tree:
            continue
        found.add(name)
        nodes = [tree[name]]
        while nodes:
            node = nodes.pop()
            # resolve_references would act on these two by itself, before the tags of the section are looked at.
            if _tag(node).startswith(("!applyref:", "!include:")):
                raise ValueError(f"the tag {_tag(node)} under {name!r}, which the section 'flow' uses, is not allowed")
            if isinstance(node, Mapping):
                nodes.extend(node.values())
            elif isinstance(node, list):
                nodes.extend(node)
            elif _tag(node) in ("!ref", "!copy"):
                waiting.extend(re.findall(r"<([^\[\].>]+)", node.value))
    return found


def _plain(node: Any, where: str) -> Any:
    """A node of the resolved yaml tree as plain Python, classes as specs."""
    tag = _tag(node)
    if tag == "!new:omegaconf.DictConfig":
        return {str(key): _plain(value, f"{where}.{key}") for key, value in node["content"].items()}
    if tag:
        package, _, name = tag.removeprefix("!new:").partition(".")
        name = name.rpartition(".")[2]
        if not tag.startswith("!new:") or package not in ("cosyvoice", "fastflow") or name not in MODULES:
            raise ValueError(
                f"{where}: the tag {tag} is not allowed; a flow section may hold !ref, !copy, "
                f"!new:omegaconf.DictConfig and !new:cosyvoice... or !new:fastflow... of {', '.join(MODULES)}"
            )
        if isinstance(node, list):
            raise ValueError(f"{where}: the arguments of {tag} must be given by name")
        arguments = node.items() if isinstance(node, Mapping) else ()
        return {"class": name, **{str(key): _plain(value, f"{where}.{key}") for key, value in arguments}}
    if isinstance(node, Mapping):
        return {str(key): _plain(value, f"{where}.{key}") for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value, f"{where}[{i}]") for i, value in enumerate(node)]
    if isinstance(node, str) and re.fullmatch(r"\(.*\)", node):  # HyperPyYAML's notation of a tuple
        return ast.literal_eval(node)
    for kind in (bool, int, float, str):  # strips the yaml library's own subclasses, which remember the layout
        if isinstance(node, kind):
            return kind(node)
    return node


class WeightsToCome(TorchFunctionMode):
    """Skips random initialisation, for modules whose weights are about to be replaced.

    Building then costs no time and no memory worth the name, and draws nothing from the global generator.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load(model_dir_or_yaml: str | Path, checkpoint: str | Path | None = None) -> nn.Module:
    """A flow from a CosyVoice model directory or yaml file, in eval mode, float32, on the CPU.

    Args:
        model_dir_or_yaml: a directory that holds cosyvoice.yaml, cosyvoice2.yaml or cosyvoice3.yaml (the first of them
            counts, as in CosyVoice), or a yaml file (:func:`read_yaml` says what is read of it).
        checkpoint: a state dict in ``.pt`` (read with ``weights_only=True``) or ``.safetensors``; a training
            checkpoint with its ``epoch`` and ``step`` will do.  None takes ``flow.pt`` beside the yaml; where that is
            missing, a directory is refused and a yaml file gives freshly initialised weights.

    Raises:
        FileNotFoundError: no yaml file, or no checkpoint.
        ValueError: the yaml does not describe a flow, or the checkpoint does not fit it: missing, unexpected and
            misshapen keys are named.
    """
    given = path = Path(model_dir_or_yaml)
    if given.is_dir():
        found = [given / name for name in YAML_NAMES if (given / name).is_file()]
        if not found:
            raise FileNotFoundError(f"model_dir_or_yaml: the directory {given} holds none of {', '.join(YAML_NAMES)}")
        path = found[0]
    elif not given.is_file():
        raise FileNotFoundError(f"model_dir_or_yaml must be a directory or a yaml file; {given} does not exist")
    spec = read_yaml(path)
    if checkpoint is None:
        checkpoint = path.parent / CHECKPOINT_NAME
        if path == given and not checkpoint.is_file():
            return build(spec).eval()
    state = read_checkpoint(checkpoint)
    with WeightsToCome():
        flow = build(spec)
    check_state(flow, state, str(checkpoint))
    flow.load_state_dict(state)
    return flow.eval()


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` or ``.safetensors`` file, on the CPU.

    The integers ``epoch`` and ``step`` of a training checkpoint and the prefix ``module.`` of a wrapped model are
    dropped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} does not exist")
    if path.suffix == ".safetensors":
        read: Callable[[Path], Any] = _import("safetensors.torch", "a .safetensors checkpoint", "safetensors").load_file
        unreadable: tuple[type[Exception], ...] = (importlib.import_module("safetensors").SafetensorError,)
    else:
        read = functools.partial(torch.load, map_location="cpu", weights_only=True)
        unreadable = (pickle.UnpicklingError, RuntimeError, EOFError)
    try:
        state = read(path)
    except unreadable as error:
        raise ValueError(f"checkpoint: {path} must hold a state dict and nothing else: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"checkpoint: {path} must hold a state dict; it holds {type(state).__name__}")
    state = {key: value for key, value in state.items() if key not in ("epoch", "step")}
    other = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(
            f"checkpoint: {path} must hold tensors by name; {other[0]!r} is {type(state[other[0]]).__name__}"
        )
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


# Keys that only one version of the flow has.
_SIGNS = {
    "length_regulator.": "MaskedDiffWithXvec (CosyVoice 1)",
    "encoder.up_layer.": "CausalMaskedDiffWithXvec (CosyVoice 2)",
    "decoder.estimator.transformer_blocks.": "CausalMaskedDiffWithDiT (CosyVoice 3)",
}


def check_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Refuse a state dict that does not fit ``module`` key by key and shape by shape.

    Args:
        source: where the state comes from, for the message.

    Raises:
        ValueError: it names the first of the missing, unexpected and misshapen keys, and the version of CosyVoice that
            the keys belong to, if it is another one.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} (given {tuple(value.shape)}, expected {tuple(own[key].shape)})"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if not (missing or unexpected or misshapen):
        return
    lines = [f"{source} does not fit {type(module).__name__}:"]
    for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)):
        if keys:
            lines.append(f"  {len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
    for sign, name in _SIGNS.items():
        if any(key.startswith(sign) for key in unexpected) and not any(key.startswith(sign) for key in own):
            lines.append(f"  its keys look like those of {name}")
    raise ValueError("\n".join(lines))
