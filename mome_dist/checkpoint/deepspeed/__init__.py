"""DeepSpeed's native checkpoints: which file of a layout holds which numbers, writing them and reading them, offline.

A DeepSpeed checkpoint depends on the layout: experts are numbered within a rank's pipeline stage, and ZeRO cuts the
parameters of a rank, laid one after the other, into equal pieces. `plan` says for every file of a layout which range of
which layout-free tensor lies where; `write` fills such files, `read` finds a tensor's ranges in them. Neither needs a
process group, a model or an engine.
"""
