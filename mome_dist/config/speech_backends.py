"""Which text-to-speech programs are here."""

from __future__ import annotations

import importlib.util
import shutil

from mome_dist.errors import UserError

BACKENDS = ("flite", "espeak")
_INSTALL = {
    "flite": "install flite (`apt-get install flite`)",
    "espeak": "install espeak-ng (`pip install espeakng-loader==0.2.4`)",
}


def installed_backends() -> list[str]:
    """The backends that can run here, the preferred one first."""
    found = {
        "flite": shutil.which("flite") is not None,
        "espeak": importlib.util.find_spec("espeakng_loader") is not None,
    }
    return [backend for backend in BACKENDS if found[backend]]


def resolve_backend(name: str) -> str:
    """The backend that ``name`` (``auto``, ``flite`` or ``espeak``) stands for here.

    Raises UserError when it is unknown or not installed.
    """
    if name not in ("auto", *BACKENDS):
        raise UserError(f"backend {name!r} is unknown; choose auto, {' or '.join(BACKENDS)}")
    installed = installed_backends()
    if not installed:
        raise UserError(f"no speech synthesiser found; {' or '.join(_INSTALL.values())}")
    if name == "auto":
        return installed[0]
    if name not in installed:
        raise UserError(f"backend {name!r} is not installed; {_INSTALL[name]}, or choose backend auto")
    return name
