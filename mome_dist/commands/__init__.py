"""Commands of ``mome-dist`` that are no module of their own elsewhere: each module has a ``main`` of one of them."""
