"""A mixture of projectors: a router sends every compressed feature to a few experts, each of which is a projector.

Three forms: joint experts and joint router (jejr), one pool and one router for both streams; disjoint experts and joint
router (dejr), a pool for each stream, while one router chooses by number in either; both disjoint (dedr). A run of one
stream has one pool and one router, whatever the form.

All experts are computed for all tokens, in two products for a pool: there are few, tokens come before the LLM, and
nothing waits for the host.

Every rank of the first pipeline stage has all experts, whatever ``parallel.ep`` is. Two pools of four, features 1024
wide and H 2048, are 50,405,376 parameters, 202 MB. Spread over four ranks, a rank would have 151 MB less of weights and
as much less of gradients; ZeRO shards the moments either way, and the gradients at stage 2. For that, tokens would
travel before the LLM can begin, and gradients in the backward pass: of 1,500 frames at rates 4 and 2, 1,500 tokens go
to two experts with 1024 numbers and come back with 2048, 37 MB, and as much backward. Nor would a rank compute much
less: all experts for these tokens are 0.2 of the 7.6 TFLOP of the step with Llama 3.2 1B, and two of four are half.

Shape suffixes: T tokens, E experts, K experts a token, d feature width, H hidden size.
Source: Llama-SMoP (arXiv 2505.14336).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mome_dist.moe.routing import Routing, route
from mome_dist.speech.perceptron import perceptron


class ProjectorMixture(nn.Module):
    """Experts and routers of the streams in use; initial values come from `mome_dist.speech.perceptron.initialize`.

    Args:
        input_sizes: width of a compressed feature of each stream.
        hidden_size: of the LLM.
        projector_size: width between the two linear maps of an expert.
        layer_norm: whether experts end in a layer norm.
        form: "jejr", "dejr" or "dedr".
        experts: E, of a pool.
        top_k: K; the gates of the K experts add up to one.
        balance_loss, z_loss: coefficients of the losses of each router, see `mome_dist.speech.balance`.

    Attributes:
        pool_of, router_of: the name of the pool and of the router of each stream: the streams that share it.

    Raises:
        ValueError: if streams of unequal width share a router.
    """

    def __init__(
        self,
        input_sizes: Mapping[str, int],
        hidden_size: int,
        projector_size: int,
        layer_norm: bool,
        form: str,
        experts: int,
        top_k: int,
        balance_loss: float,
        z_loss: float,
    ) -> None:
        super().__init__()
        if form != "dedr" and len(set(input_sizes.values())) > 1:
            raise ValueError(f"{form} joins streams, but their widths differ: {dict(input_sizes)}")
        self.num_experts, self.top_k = experts, top_k
        self.balance_loss, self.z_loss = balance_loss, z_loss
        all_streams = "_".join(input_sizes)
        self.pool_of = {stream: all_streams if form == "jejr" else stream for stream in input_sizes}
        self.router_of = {stream: stream if form == "dedr" else all_streams for stream in input_sizes}
        self.experts = nn.ModuleDict()
        self.routers = nn.ModuleDict()
        for stream, width in input_sizes.items():
            if self.pool_of[stream] not in self.experts:
                pool = perceptron(width, projector_size, hidden_size, layer_norm, experts)
                self.experts[self.pool_of[stream]] = pool
            if self.router_of[stream] not in self.routers:
                self.routers[self.router_of[stream]] = nn.Linear(width, experts, bias=False)

    def forward(self, stream: str, tokens_Td: Tensor) -> tuple[Tensor, Routing]:
        """Project the compressed features of a stream, fp32 [T, d].

        Returns:
            fp32 [T, H], and where they went.
        """
        routing = route(self.routers[self.router_of[stream]](tokens_Td), self.top_k, renormalize=True)
        outputs_ETH = self.experts[self.pool_of[stream]](tokens_Td)
        return (outputs_ETH * routing.gates_TE().t()[:, :, None]).sum(dim=0), routing
