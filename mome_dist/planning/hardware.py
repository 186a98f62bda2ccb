"""The machine that a plan is for, put together from public figures; `mome_dist.planning.measured` has measured ones.

Public figures are peaks. What a run reaches of them is assumed below and no more than that: measure where you can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mome_dist.errors import UserError

BYTES = {"bf16": 2, "fp32": 4}  # of a value, by precision
# Shares of the published peaks that are counted on: of matrix products, of memory traffic, of links.
PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.8, 0.75
INSIDE_LATENCY, BETWEEN_LATENCY = 10e-6, 25e-6  # seconds of a collective of nothing: NVLink or PCIe; a network
KERNEL_CALL = 6e-6  # seconds from Python to a kernel
# Of a GPU's memory: context, libraries and NCCL's buffers; and the share that fragmentation may waste.
GPU_RUNTIME_BYTES, USABLE_SHARE = 3.0e9, 0.92
# Of a process on a CPU, beyond what it occupies with a model of nothing: kernels compiled for the model's shapes, heaps
# that are partly used. The one constant of the memory model that was fitted: runs of benchmarks.plan_layout on two
# processors are within 10 % with it.
CPU_KERNEL_BYTES = 9e6
CPU_PROCESS_BYTES = 0.5e9  # Python, torch, Megatron-Core, DeepSpeed and process groups, as that benchmark found them


def runtime_bytes(on_gpu: bool) -> float:
    """What a rank occupies before anything is built, of its GPU or of the node."""
    return GPU_RUNTIME_BYTES if on_gpu else CPU_PROCESS_BYTES + CPU_KERNEL_BYTES


@dataclass(frozen=True)
class Link:
    """A way between ranks: bytes a second of one rank in one direction, and seconds of an exchange of nothing."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class GPU:
    """Public peaks of a GPU.

    Attributes:
        memory: bytes.
        bf16_flops: of dense products on tensor cores, FLOP/s.
        fp32_flops: of products without tensor cores.
        memory_bytes: a second, read or written.
        inside: bytes a second to another GPU of the node, one direction.
        between: bytes a second of the network card that goes with it in common systems.
        grouped_products: see `Cluster`.
    """

    memory: float
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    inside: float
    between: float
    grouped_products: bool


# From NVIDIA's data sheets, without sparsity. ``between`` is what NVIDIA's own reference systems have for each GPU:
# 200 Gb/s InfiniBand in DGX A100, 400 Gb/s in DGX H100, H200 and B200; 100 Gb/s is assumed for cards in plain servers.
GPUS: Mapping[str, GPU] = {
    "a100-40gb": GPU(40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9, False),  # NVLink 3: 600 GB/s in both directions
    "a100-80gb": GPU(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, False),
    "h100": GPU(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, True),  # SXM; NVLink 4: 900 GB/s in both directions
    "h200": GPU(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, True),
    "b200": GPU(180e9, 2250e12, 75e12, 8.0e12, 900e9, 50e9, True),  # NVLink 5: 1.8 TB/s in both directions
    "l40s": GPU(48e9, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9, False),  # PCIe 4 x16
    "rtx4090": GPU(24e9, 165e12, 82.6e12, 1.008e12, 32e9, 12.5e9, False),  # PCIe 4 x16
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal ranks, and what one rank reaches.

    Attributes:
        name: for tables.
        nodes, ranks_per_node: a rank is a GPU, or a process on CPU nodes.
        memory: bytes that a plan may use of a rank.
        runtime: bytes of them that libraries and device context take.
        reserves: whether memory that is reserved is occupied; on a CPU only what is touched is.
        bf16_flops, fp32_flops: of wide products, FLOP/s.
        memory_bytes: read or written a second by operations that only move data.
        call: seconds that any operation takes at least.
        inside, between: links of a rank to others of its node and of other nodes.
        workers: ranks of a node that compute at the same time; fewer than its ranks where processes share cores.
        on_gpu: whether ranks are GPUs.
        grouped_products: whether torch has a kernel for bf16 products of many groups of rows, as for compute capability
            9 and 10; else it goes through them one by one.
    """

    name: str
    nodes: int
    ranks_per_node: int
    memory: float
    runtime: float
    reserves: bool
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    call: float
    inside: Link
    between: Link
    workers: int
    on_gpu: bool
    grouped_products: bool = False

    @property
    def ranks(self) -> int:
        """Ranks of all nodes."""
        return self.nodes * self.ranks_per_node

    def flops(self, precision: str) -> float:
        """FLOP/s of wide products in a precision."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    @property
    def fast_precision(self) -> str:
        """What ``precision=auto`` of frozen models comes to."""
        return "bf16" if self.bf16_flops > self.fp32_flops else "fp32"

    def link(self, span: int) -> Link:
        """The slowest link of a group that lies within ``span`` consecutive ranks, which start at a multiple of it."""
        return self.inside if self.ranks_per_node % span == 0 else self.between


def cluster_of_gpus(name: str, nodes: int, gpus_per_node: int) -> Cluster:
    """A cluster of GPUs from `GPUS`.

    Raises:
        UserError: for an unknown GPU.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)}; for others, measure with mome-dist check.")
    inside, between = public_links(gpu)
    return Cluster(
        name=f"{nodes} x {gpus_per_node} {name.upper()} (public figures)",
        nodes=nodes,
        ranks_per_node=gpus_per_node,
        memory=gpu.memory * USABLE_SHARE,
        runtime=GPU_RUNTIME_BYTES,
        reserves=True,
        bf16_flops=gpu.bf16_flops * PRODUCT_SHARE,
        fp32_flops=gpu.fp32_flops * PRODUCT_SHARE,
        memory_bytes=gpu.memory_bytes * MEMORY_SHARE,
        call=KERNEL_CALL,
        inside=inside,
        between=between,
        workers=gpus_per_node,
        on_gpu=True,
        grouped_products=gpu.grouped_products,
    )


def known_gpu(properties_name: str) -> str | None:
    """The name in `GPUS` of what a driver calls "NVIDIA H200" or "NVIDIA A100-SXM4-80GB"; None for others.

    Cards of the same name with other peaks (NVL, PCIe) are others.
    """
    words = properties_name.lower().replace("geforce rtx ", "rtx").replace("-", " ").split()
    if not {"nvl", "pcie"}.isdisjoint(words):
        return None
    return next((name for name in GPUS if set(name.split("-")) <= set(words)), None)


def public_links(gpu: GPU) -> tuple[Link, Link]:
    """Inside a node and between nodes."""
    return Link(gpu.inside * LINK_SHARE, INSIDE_LATENCY), Link(gpu.between * LINK_SHARE, BETWEEN_LATENCY)
