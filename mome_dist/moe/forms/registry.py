"""The forms of an expert by the name that ``mome.expert`` gives them. No torch here."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from mome_dist.moe.forms.base import ExpertForm, part_order

DEFAULT = "bottleneck"
FORMS = {
    "bottleneck": "mome_dist.moe.forms.bottleneck:Bottleneck",
    "latent": "mome_dist.moe.forms.latent:Latent",
    "gated": "mome_dist.moe.forms.gated:Gated",
    "linear": "mome_dist.moe.forms.linear:Linear",
}


@cache
def find_form(name: str) -> ExpertForm:
    """The form of a name of `FORMS`.

    Raises:
        ValueError: if its parts do not lie in the order in which files have them.
    """
    module, _, kind = FORMS[name].partition(":")
    form: ExpertForm = getattr(import_module(module), kind)()
    ordered = sorted((part.name for part in form.parts), key=part_order)
    if [part.name for part in form.parts] != ordered:
        raise ValueError(f"{FORMS[name]}: name its parts in the order of `part_order`: {', '.join(ordered)}")
    return form
