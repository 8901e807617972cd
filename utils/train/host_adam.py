"""AdamW whose moments wait in host memory: 8 bytes a weight that the GPU need not hold between two steps.

LLaMA-7B's adapter of rank 64 has 160 million weights, so Adam's two moments take 1.19 GiB. A step brings
them to the GPU piece by piece, updates the piece's weights by torch's own fused kernel, and sends them back:

    stream 0   in 0 | update | out 0      | in 3 | ...
    stream 1          in 1 | update | out 1      | in 4 | ...
    stream 2                 in 2 | update | out 2 | ...

Reading and writing share no lane of PCIe, so that takes as long as one of them, 25 ms for the 7B; on the GPU
are three pieces of 16 MB. Every number is what AdamW(fused=True) computes. (The paper's paged optimizer
leaves it to the driver to move pages: they stay on the GPU while it has room, whatever cap a run was given.)
"""

from contextlib import nullcontext
from typing import Any

import torch

from utils.fast.memory import allocate_pinned

PIECE = 2**21  # weights that are updated at once
PIECES = 3  # on the GPU at the same time
MOMENTS = ("exp_avg", "exp_avg_sq")


def count_piece_bytes(weights: int) -> int:
    """What an optimizer of so many weights holds on the GPU."""
    return 4 * len(MOMENTS) * PIECES * min(PIECE, weights)


class HostAdamW(torch.optim.AdamW):
    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options | {"fused": True})
        self._step_supports_amp_scaling = False  # a GradScaler looks for infinities itself
        self.streams: list[Any] = []
        self.pieces: list[list[torch.Tensor]] = []

    def begin_state(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            for name in MOMENTS:
                pages = allocate_pinned(4 * weight.numel())
                state[name] = pages.view(torch.float32).view(weight.shape)
        return state

    def begin_pieces(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        largest = max(weight.numel() for group in self.param_groups for weight in group["params"])
        self.streams = [torch.cuda.Stream(device) if on_gpu else None for _ in range(PIECES)]
        self.pieces = [
            [torch.empty(min(PIECE, largest), device=device) for _ in MOMENTS] for _ in range(PIECES)
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)

    def update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.begin_state(weight)
        if not self.pieces:
            self.begin_pieces(weight.device)
        state["step"] += 1
        flat = [x.view(-1) for x in (weight, weight.grad, *(state[name] for name in MOMENTS))]  # type: ignore[union-attr]
        for number, start in enumerate(range(0, weight.numel(), PIECE)):
            slot = number % PIECES
            piece = [x[start : start + PIECE] for x in flat]
            with self.on_stream(slot, is_first=number < PIECES):
                self.update_piece(piece, self.pieces[slot], state["step"], group)
        for stream in filter(None, self.streams):
            torch.cuda.current_stream().wait_stream(stream)

    def on_stream(self, slot: int, is_first: bool) -> Any:
        stream = self.streams[slot]
        if stream is None:
            return nullcontext()
        if is_first:
            stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(stream)

    def update_piece(
        self, piece: list[torch.Tensor], room: list[torch.Tensor], step: torch.Tensor, group: dict[str, Any]
    ) -> None:
        weight, grad, *held = piece
        moments = [
            here[: len(weight)].copy_(x, non_blocking=True) for here, x in zip(room, held, strict=True)
        ]
        first, second = moments
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [weight], [grad], [first], [second], [], [step], lr=group["lr"], beta1=beta1, beta2=beta2,
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        for x, here in zip(held, moments, strict=True):
            x.copy_(here, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        if self.streams and self.streams[0] is not None:
            torch.cuda.synchronize()  # what is on its way out
        return super().state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """torch's own would put the moments where the weights are."""
        super().load_state_dict(saved | {"state": {}})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, values in saved["state"].items():
            state = self.begin_state(weights[number])
            for name, value in values.items():
                state[name].copy_(value)
