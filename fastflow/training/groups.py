"""Parameter groups for an optimizer, and freezing by part."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastflow.training.parts import named_part_parameters, parts, unwrapped


def parameter_groups(
    flow: nn.Module, lr: float, *, encoder_scale: float = 1.0, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: ``torch.optim.AdamW(parameter_groups(flow, 1e-4, encoder_scale=0.3))``.

    Biases, the parameters of norms (whatever has one dimension) and embedding tables are not decayed.  Frozen
    parameters are left out; every other one is in exactly one group.

    Args:
        lr: learning rate of the estimator.
        encoder_scale: the learning rate of everything that makes its condition (token embedding, encoder, length
            regulator or pre-lookahead, speaker affine) is ``encoder_scale * lr``.
        weight_decay: of the weights that are decayed.

    Returns:
        Up to four groups, with a ``name`` beside ``params``, ``lr`` and ``weight_decay``: ``condition``,
        ``condition, no decay``, ``estimator``, ``estimator, no decay``.

    Raises:
        ValueError: a negative number, or nothing to train.
        TypeError: not a flow.
    """
    for name, value in {"lr": lr, "encoder_scale": encoder_scale, "weight_decay": weight_decay}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be a number >= 0, got {value}")
    tables = {id(m.weight) for m in unwrapped(flow).modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, dict[str, Any]] = {}
    for part, named in named_part_parameters(flow).items():
        side = "estimator" if part == "estimator" else "condition"
        for name, parameter in named.items():
            if not parameter.requires_grad:
                continue
            # pos_bias_u and pos_bias_v have a row for each head
            plain = parameter.dim() < 2 or id(parameter) in tables or "bias" in name.rpartition(".")[2]
            group = groups.setdefault(
                f"{side}, no decay" if plain else side,
                {
                    "params": [],
                    "lr": lr if side == "estimator" else encoder_scale * lr,
                    "weight_decay": 0.0 if plain else weight_decay,
                },
            )
            group["params"].append(parameter)
    if not groups:
        raise ValueError("flow has no parameter that requires a gradient: unfreeze a part first")
    return [{"name": name, **group} for name, group in groups.items()]


def freeze(flow: nn.Module, *names: str) -> None:
    """Stop training some parts: their parameters get ``requires_grad=False`` and lose their ``.grad``.

    As everywhere in PyTorch that is all it does: dropout in a frozen part stays active in training mode; call
    ``flow.encoder.eval()`` (after every ``flow.train()``) for features without it.

    What it saves: the gradients of the parts' parameters, and their optimizer state.  Gradient still *passes through* a
    frozen part to those before it.  When every part up to mu is frozen (``freeze(flow, "embedding", "encoder",
    "length_regulator")``, in CosyVoice 3 ``"embedding", "pre_lookahead"``) autograd records nothing there, and
    nothing is saved for the backward pass.

    Freeze before the optimizer and DistributedDataParallel are made, or make them anew.

    Args:
        names: of ``embedding``, ``encoder``, ``length_regulator``, ``pre_lookahead``, ``speaker``, ``estimator`` those
            that the flow has.

    Raises:
        ValueError: no name, or one that the flow does not have.
        TypeError: not a flow.
    """
    for parameter in _parameters(flow, names):
        parameter.requires_grad_(False)
        parameter.grad = None  # else an optimizer would go on applying the last one


def unfreeze(flow: nn.Module, *names: str) -> None:
    """Train parts again that :func:`freeze` had stopped; arguments and errors as there."""
    for parameter in _parameters(flow, names):
        parameter.requires_grad_(True)


def _parameters(flow: nn.Module, names: tuple[str, ...]) -> Iterable[nn.Parameter]:
    allowed = parts(flow)
    if not names or (unknown := [name for name in names if name not in allowed]):
        given = "none" if not names else ", ".join(map(repr, unknown))
        raise ValueError(
            f"names must be parts of this {type(unwrapped(flow)).__name__}, {', '.join(allowed)}; got {given}"
        )
    return [p for name in names for module in allowed[name] for p in module.parameters()]
