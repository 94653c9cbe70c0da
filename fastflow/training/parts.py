"""The parts of a flow by name, and the blocks inside them.

Parts, in the order in which a batch passes them: ``embedding`` (the token table), ``encoder`` (with the projection
behind it; CosyVoice 1 and 2), ``length_regulator`` (CosyVoice 1), ``pre_lookahead`` (CosyVoice 3), ``speaker`` (the
affine layer of the x-vector), ``estimator`` (the U-Net or DiT).  All but the last make the condition that the
estimator reads: mu and the speaker vector.
"""

from collections.abc import Iterator

from torch import nn

_CHILDREN = {
    "embedding": ("input_embedding",),
    "encoder": ("encoder", "encoder_proj"),
    "length_regulator": ("length_regulator",),
    "pre_lookahead": ("pre_lookahead_layer",),
    "speaker": ("spk_embed_affine_layer",),
    "estimator": ("decoder",),
}
_PART = {child: part for part, children in _CHILDREN.items() for child in children}
_INSIDE = ("decoder.estimator.", "encoder.", "pre_lookahead_layer.", "length_regulator.")


def unwrapped(flow: nn.Module) -> nn.Module:
    """The flow inside DistributedDataParallel and the like."""
    inner = getattr(flow, "module", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else flow


def parts(flow: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each part that the flow has, in the order of the data.

    Raises:
        TypeError: not a flow: parameters outside all parts, or no estimator.
    """
    flow = unwrapped(flow)
    stray = [name for name, _ in flow.named_parameters() if name.partition(".")[0] not in _PART]
    if stray or not hasattr(flow, "decoder"):
        what = f"it has a parameter {stray[0]}" if stray else "it has no decoder"
        raise TypeError(f"flow must be a CosyVoice flow (see fastflow.from_preset), got {type(flow).__name__}: {what}")
    found = {
        part: [child for name in children if isinstance(child := getattr(flow, name, None), nn.Module)]
        for part, children in _CHILDREN.items()
    }
    return {part: modules for part, modules in found.items() if modules}


def named_part_parameters(flow: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """``{part: {qualified name: parameter}}``, every parameter exactly once."""
    found: dict[str, dict[str, nn.Parameter]] = {part: {} for part in parts(flow)}
    for name, parameter in unwrapped(flow).named_parameters():
        found[_PART[name.partition(".")[0]]][name] = parameter
    return found


def block_of(name: str) -> str:
    """The block of a parameter: ``encoder.encoders.3``, ``decoder.estimator.mid_blocks.0``, ``encoder_proj``, ...

    The first module below its part; of a list, the entry.
    """
    base = next((prefix for prefix in _INSIDE if name.startswith(prefix)), "")
    path = name.removeprefix(base).split(".")[:-1]
    return base + ".".join(path[: 2 if len(path) > 1 and path[1].isdigit() else 1])


def blocks(flow: nn.Module) -> Iterator[tuple[str, str, list[nn.Parameter]]]:
    """(part, block, its parameters), part by part in the order of the data."""
    for part, named in named_part_parameters(flow).items():
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in named.items():
            found.setdefault(block_of(name), []).append(parameter)
        for block, parameters in found.items():
            yield part, block, parameters
