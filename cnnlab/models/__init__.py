"""Model families, one file each; `create` makes a module from a registered name.

A file defines `VARIANTS: dict[str, dict]` and `build(num_outputs, *, ...) -> nn.Module`. The
module's `__call__(images, *, train)` takes normalised images [B, H, W, C] and gives `Outputs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cnnlab import registry
from cnnlab.types import CnnlabError

if TYPE_CHECKING:
    from flax import linen as nn


def create(
    name: str,
    *,
    num_outputs: int,
    aux: tuple[str, ...] = (),
    aux_hidden: int = 0,
    **fields: Any,
) -> nn.Module:
    """The bare module of a registered model.

    Args:
        name: a variant, such as `"resnet20"`.
        num_outputs: logits.
        aux: features (`"stage1"`, ...) that get an auxiliary head each. The module is then
            wrapped: parameters `{"net": ..., "aux_<feature>": ...}`. Which features there are is
            known when the network is first called, where an unknown one is an error.
        aux_hidden: width of a hidden layer in each head, 0 for none.
        **fields: arguments of the family's `build`, over those that the variant fixes.

    Returns:
        A Flax module; `apply(variables, images, train=...)` gives `Outputs`.

    Raises:
        CnnlabError: an unknown model or field, or a value out of range.
    """
    from cnnlab import layers  # Flax only once a model is made

    plugin = registry.get("models", name)
    known = plugin.parameters
    for field in fields:
        if field not in known:
            raise CnnlabError(
                f"model {name!r} has no field {field!r}{registry.did_you_mean(field, known)}. "
                f"Valid: {', '.join(sorted(known))}"
            )
    if num_outputs < 1:
        raise CnnlabError(f"num_outputs must be at least 1, got {num_outputs}")
    if len(set(aux)) != len(aux):
        raise CnnlabError(f"aux names a feature twice: {aux}; give each once")
    resolved = known | fields
    layers.check_fields(resolved)
    net = plugin.function(num_outputs, **resolved)
    if not aux:
        return net
    return layers.WithAuxHeads(
        net, tuple(aux), num_outputs, aux_hidden, resolved.get("dtype", "float32")
    )
