"""Routers: which experts a token uses, and with which gates. `registry` names all there are."""
