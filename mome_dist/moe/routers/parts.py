"""How ranks share what trains in a router."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from mome_dist.moe.routers.base import Router
from mome_dist.parallel.parts import NamedPart
from mome_dist.sharing import Sharing


def router_parts(prefix: str, layer: int, router: Router) -> Iterator[NamedPart]:
    """The trained tensors of the router of a layer's module, which sees a rank's own tokens under sequence parallelism.

    Args:
        prefix: of the module, such as "mome.3".
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in router.named_parameters()}
    for name, parameter, start, shape in router.trained():
        packed = None if name == names[parameter] else f"{prefix}.router_{names[parameter]}"
        sharing = Sharing(layer, partial=True, packed=packed)
        yield NamedPart(f"{prefix}.router_{name}", None, parameter, start, shape, sharing)
