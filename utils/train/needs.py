"""What a training holds in GPU memory, part by part, found by rehearsing its step (utils/fast/rehearsal.py).

    weights        codes of the quantized layers, their scales; embeddings and norms in 16 bits
    gathered       of layers that GPUs share (--shard_layers): the two that are whole at a time
    adapter        float32 weights and their 16-bit copy; float32 gradients
    optimizer      what it keeps of each adapter weight; a paged one keeps it in managed memory
    activations    of the largest micro-batch, at the peak between forward and backward pass; what short ones
                   of a narrow model take beside
    fragments      what the allocator reserves beside, a share of all

A model's layers are alike, so rehearsals of two and three layers give the bytes of one, and a sum those of
all. Layers that are recomputed come first: when the backward pass reaches them, the kept ones are gone.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from utils.arguments import LoraArguments, ModelArguments
from utils.data.packing import choose_sizes
from utils.fast.host_embedding import find_host_embedding
from utils.fast.loss import CHUNK_ELEMENTS
from utils.fast.model import FastModel, prepare_fast_model
from utils.fast.offload import SMALLEST_WIDTH
from utils.fast.rehearsal import (
    SMALL,
    RehearsedOffload,
    make_packed_batch,
    make_padded_batch,
    rehearse_attention,
    rehearse_evaluation,
    rehearse_step,
)
from utils.models.rehearsed import build_rehearsed, count_weight_bytes
from utils.train.host_adam import count_piece_bytes
from utils.train.savings import COPY, EMBEDDING, LAYERS, OPTIMIZER

MIB = 2**20
# Measured with python -m eval.memory on an H100 (docs/results.md).
WORKSPACE = 107 * MIB  # cuBLAS, one for the stream of graphs and one for the other; what graphs keep
FRAGMENTS = 0.02  # of all tensors
# The same where a model's own attention makes scores of every pair of tokens, in blocks of their own size.
FRAGMENTS_OF_SCORES = 0.04
GRANULES = 20 * MIB  # by which the allocator's pools grow
STATE_BYTES = {"adam": 8, "lion": 4, "ademamix": 12, "rmsprop": 4, "sgd": 4}  # of a weight, in 32 bits


@dataclass(frozen=True)
class Needs:
    """Bytes on the GPU of one choice, by part."""

    codes: int
    scales: int
    other_weights: int
    adapter: int
    gradients: int
    optimizer: int
    paged_optimizer: int  # in managed memory, which the GPU's is short of all the same
    activations: int
    gathered: int = 0
    host: int = field(default=0, compare=False)  # bytes that wait in host memory instead
    host_inputs: int = field(default=0, compare=False)  # of them, the inputs of recomputed layers
    fragment_share: float = field(default=FRAGMENTS, compare=False)

    @property
    def on_gpu(self) -> int:
        frozen = self.codes + self.scales + self.other_weights + self.gathered
        trained = self.adapter + self.gradients + self.optimizer + self.paged_optimizer
        return frozen + trained + self.activations

    @property
    def least_host(self) -> int:
        """Where host memory is short every second input waits there (utils/fast/offload.py)."""
        return self.host - self.host_inputs // 2

    @property
    def fragments(self) -> int:
        """What the allocator reserves and cannot use."""
        return round(self.fragment_share * (self.on_gpu - self.paged_optimizer))

    @property
    def total(self) -> int:
        """All but CUDA's context."""
        return self.on_gpu + self.fragments + WORKSPACE + GRANULES


@dataclass
class StepNeeds:
    """The rehearsed model. `trained`: adapter weights, a number; `measure` gives the needs of a choice."""

    layers: int  # of the real model
    short: FastModel  # two layers
    long: FastModel  # three
    is_packed: bool
    offloads: bool
    shares: int = 1  # GPUs that share the base
    peaks: dict[tuple[int, int, int], tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (count_weight_bytes(fast.model) for fast in (self.short, self.long))
        self.weight_bytes = [self.extrapolate(*pair) for pair in zip(*sizes, strict=True)]
        self.trained = self.extrapolate(self.short.flat.weights.numel(), self.long.flat.weights.numel())
        embedding = find_host_embedding(self.short.causal_model)
        self.embedding_bytes = embedding.weight.nbytes if embedding else 0
        hidden = self.short.causal_model.config.get_text_config().hidden_size
        self.hidden_bytes = hidden * self.short.dtype.itemsize  # of a token between two layers

    def extrapolate(self, of_short: int, of_long: int) -> int:
        return of_short + (self.layers - 2) * (of_long - of_short)

    def find_peak(self, rows: int, tokens: int, layers: int, recomputed: int) -> tuple[int, int]:
        """Bytes of a micro-batch of `tokens` at its peak, the first `recomputed` of two or three `layers` so.

        Of all tensors, and of small ones.
        """
        fast = self.short if layers == 2 else self.long
        key = (rows * tokens, layers, recomputed)
        if key not in self.peaks:
            fast.recomputed_layers = recomputed
            fast.store = RehearsedOffload() if self.offloads else None  # type: ignore[assignment]
            batch = make_packed_batch(tokens) if self.is_packed else make_padded_batch(rows, tokens)
            self.peaks[key] = rehearse_step(fast, batch)
        return self.peaks[key]

    def find_activations(self, rows: int, tokens: int, recomputed: int, small: bool = False) -> int:
        """Bytes of a micro-batch at its peak, with the first `recomputed` layers recomputed.

        The last layer costs nothing more when it is kept: recomputed, it would be there at the same moment.
        """

        def find(layers: int, again: int) -> int:
            return self.find_peak(rows, tokens, layers, again)[small]

        of_layer, inputs = find(3, 0) - find(2, 0), find(3, 3) - find(2, 2)
        all_recomputed, kept = find(2, 2) + (self.layers - 2) * inputs, self.layers - recomputed
        if recomputed == 0:
            return find(2, 0) + (kept - 2) * of_layer
        if kept == 0:
            return all_recomputed
        # On its way to the host one input stays while kept layers are at work. (The first is there anyway.)
        leaving = rows * tokens * self.hidden_bytes if self.offloads and recomputed > 1 and not small else 0
        least = find(3, 1) + (kept - 2) * of_layer + (recomputed - 1) * inputs + leaving
        return max(least, all_recomputed - kept * inputs)

    def find_small(self, tokens: int, recomputed: int) -> int:
        """What packed micro-batches of fewer than `tokens` take beside: their tensors are small ones.

        A layer of SmolLM2-135M works on 576 numbers a token. Those of 2,048 tokens are 2.25 MiB, and what
        they leave free does not serve a micro-batch of 768 tokens, whose tensors are below 1 MiB: the
        allocator takes 0.2 GiB more for them. In wide models no tensor of a layer is that small.
        """
        most = SMALL // self.hidden_bytes
        sizes = [size for size in choose_sizes(tokens, fixed=True) if size <= most]
        if not self.is_packed or not sizes or sizes[-1] == tokens:
            return 0
        few, many = (self.find_activations(1, size, recomputed, small=True) for size in (sizes[-1], tokens))
        return max(0, few - many)

    def measure(
        self, rows: int, tokens: int, recomputed: int, optim: str, savings: tuple[str, ...] = ()
    ) -> Needs:
        """`tokens` of each of `rows`; a packed micro-batch is one row. `savings`: of savings.py"""
        state = count_state_bytes(optim) * self.trained
        copy = 0 if self.short.dtype == torch.float32 or COPY in savings else 2
        is_paged = optim.startswith("paged")
        codes, scales, others = self.weight_bytes
        layer = (codes + scales) // self.layers
        # Beside a share of the output layer's logits in float32 their exponentials lie, and the gradient.
        shared = {} if self.shares == 1 else {"gathered": 2 * layer + 8 * CHUNK_ELEMENTS}
        host = 0
        if EMBEDDING in savings:
            others, host = others - self.embedding_bytes, host + self.embedding_bytes
        if LAYERS in savings:  # two of them are on the GPU
            host += codes + scales
            codes, scales, _ = count_weight_bytes(self.short.model)
        if OPTIMIZER in savings:
            host, state = host + state, count_piece_bytes(self.trained)
        inputs = recomputed * rows * tokens * self.hidden_bytes if self.offloads else 0
        return Needs(
            codes // self.shares,
            scales // self.shares,
            others // self.shares,
            **shared,
            adapter=(4 + copy) * self.trained,
            gradients=4 * self.trained,
            optimizer=0 if is_paged else state,
            paged_optimizer=state if is_paged else 0,
            activations=self.find_activations(rows, tokens, recomputed) + self.find_small(tokens, recomputed),
            host=host + inputs,
            host_inputs=inputs,
            fragment_share=FRAGMENTS_OF_SCORES if self.short.attention_obstacle else FRAGMENTS,
        )


def count_state_bytes(optim: str) -> int:
    """Bytes that the optimizer `optim` (its name in the Trainer) keeps of each weight."""
    bits32 = next((size for name, size in STATE_BYTES.items() if name in optim), 8)
    return bits32 // 4 if "8bit" in optim else bits32


rehearsals: dict[str, StepNeeds | str] = {}  # the last, by all that it follows from


def rehearse_model(
    config: Any,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    dtype: torch.dtype,
    is_packed: bool,
    offload: bool,
) -> StepNeeds | str:
    """The needs of training `config`'s model; a line why they cannot be foreseen.

    The last ones are kept: a run is planned before and after its weights are loaded.
    """
    values = {name: x for name, x in config.to_dict().items() if name not in ("dtype", "quantization_config")}
    key = repr((values, model_args, lora_args, dtype, is_packed, offload))
    if key not in rehearsals:
        rehearsals.clear()
        try:
            rehearsals[key] = rehearse(config, model_args, lora_args, dtype, is_packed, offload)
        except Exception as error:  # whatever a model's code does with tensors that have no data
            line = (str(error) or type(error).__name__).splitlines()[0]
            rehearsals[key] = f"its step cannot be rehearsed: {line}"
    return rehearsals[key]


def rehearse(
    config: Any,
    model_args: ModelArguments,
    lora_args: LoraArguments,
    dtype: torch.dtype,
    is_packed: bool,
    offload: bool,
) -> StepNeeds | str:
    models = []
    for layers in (2, 3):
        model = build_rehearsed(config, layers, model_args, lora_args, dtype)
        fast = prepare_fast_model(model, dtype, offload=False)
        if isinstance(fast, str):
            return fast
        if not is_packed:
            rehearse_attention(model)
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        models.append(fast)
    text = config.get_text_config()
    offloads = offload and text.hidden_size >= SMALLEST_WIDTH
    short, long = models
    step = StepNeeds(text.num_hidden_layers, short, long, is_packed, offloads)
    step.measure(1, 64, 0, "adamw_torch")  # what cannot be rehearsed shows now
    if is_packed:
        rehearse_evaluation(short)
    return step
