"""One micro-batch forward and backward on the fused path: adapter, attention and loss put together.

The fused path must compute what the plain one does, on architectures that it has never seen. So nothing is
taken for granted: each part (attention of packed rows, the loss, a fused MLP, norms, rotary embedding) is
tried once on the model at hand, against the model's own forward, and left out with a printed reason where the
results differ.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from utils.console import notice
from utils.fast.attention import find_attention_obstacle, packed_attention
from utils.fast.compiling import wait_until_compiled
from utils.fast.fused_norm import fuse_norms
from utils.fast.fused_rotation import fuse_rotation
from utils.fast.keyed_noise import key_dropout
from utils.fast.lora_layers import find_obstacles, install_fast_evaluation, install_fast_lora
from utils.fast.loss import OutputLayer, find_loss_obstacle, pick_targets
from utils.fast.offload import SMALLEST_WIDTH, HostOffload, checkpoint_layer
from utils.fast.sharded_layers import ShardedLayers
from utils.fast.trials import find_layers
from utils.prompts.messages import IGNORE_INDEX

MicroBatch = dict[str, Any]


class FastModel:
    """A PEFT model whose adapter gradients go straight into one flat buffer (`flat.grads`).

    Gradients are added up; whoever steps the optimizer, over `flat.weights` alone, zeroes them. With several
    processes the sum of `flat.grads` over them is the gradient: one all-reduce.
    """

    def __init__(
        self,
        model: PeftModel,
        dtype: torch.dtype,
        offload: bool,
        recomputed_layers: int | None = None,
        keeps_copy: bool = True,
    ):
        self.model, self.dtype, self.recomputed_layers = model, dtype, recomputed_layers
        causal_model: Any = model.get_base_model()
        self.causal_model: PreTrainedModel = causal_model
        self.keys = key_dropout(model)
        self.shards: ShardedLayers | None = getattr(causal_model, "shards", None)  # several processes' layers
        self.flat, self.uncovered = install_fast_lora(model, dtype, keeps_copy)
        # Every forward pass begins at the embedding.
        self.causal_model.get_input_embeddings().register_forward_pre_hook(self.refresh_for_evaluation)
        self.attention_obstacle = find_attention_obstacle(self.causal_model)
        self.head = OutputLayer(self.causal_model)
        self.loss_obstacle = find_loss_obstacle(self.causal_model, self.head)
        self.has_own_dropout = has_own_dropout(model)
        self.blocks: list[Any] = [
            module for module in model.modules() if hasattr(module, "gradient_checkpointing")
        ]
        self.layers: list[Any] = list(find_layers(model))
        is_wide = self.causal_model.config.get_text_config().hidden_size >= SMALLEST_WIDTH
        self.store = (
            HostOffload(model.device, len(self.layers))
            if offload and is_wide and model.device.type == "cuda"
            else None
        )

    def print_obstacles(self) -> None:
        if self.uncovered:
            notice(f"fast path: {', '.join(self.uncovered)} keep PEFT's own forward")
        for what, obstacle in (("attention", self.attention_obstacle), ("loss", self.loss_obstacle)):
            if obstacle:
                notice(f"fast path: the model's own {what} is used ({obstacle})")

    def run(self, batch: MicroBatch, loss_scale: torch.Tensor) -> torch.Tensor:
        """Sum of the token losses  # []; adds the gradient of loss_scale times it to `flat.grads`.

        `batch`: input_ids, labels  # [rows, width]; label_positions  # [positions]; position_ids with
        cu_seqlens and max_length (an int) for packed rows, attention_mask for padded ones; token_keys.
        """
        self.keys.read(batch)
        self.flat.attach_gradients()
        self.flat.refresh_copy()
        self.choose_checkpointing()
        if "cu_seqlens" not in batch or self.attention_obstacle:
            loss = self.sum_losses(batch)
            loss.backward(loss_scale)
        else:
            lengths = {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": batch["max_length"]}
            with packed_attention(self.causal_model):  # checkpointing attends again on the way back
                loss = self.sum_losses(batch, **lengths)
                loss.backward(loss_scale)
        if self.store:
            self.store.settle()
        return loss.detach()

    def refresh_for_evaluation(self, *_: Any) -> None:
        """Calls without gradient come between steps, and compute with the adapter as it is now."""
        if not torch.is_grad_enabled():
            self.flat.refresh_copy()

    def choose_checkpointing(self) -> None:
        """Let checkpointing recompute without torch's RNG state, and keep its inputs on the host if asked.

        Our masks repeat by their keys, and no graph can hold that state. Done here, as the Trainer turns
        checkpointing on when training begins, for all layers: those behind the first `recomputed_layers` are
        kept (utils/train/plan.py says how many memory allows).
        """
        if self.store:
            self.store.settle()  # also after a micro-batch that broke off
        for block in self.blocks if not self.has_own_dropout else []:
            block._gradient_checkpointing_func = self.store or checkpoint_layer
        if self.recomputed_layers is not None:
            for number, layer in enumerate(self.layers):
                layer.gradient_checkpointing = number < self.recomputed_layers

    def sum_losses(self, batch: MicroBatch, **lengths: Any) -> torch.Tensor:
        names = ("input_ids", "position_ids", "attention_mask")
        inputs = {name: batch[name] for name in names if name in batch} | lengths | {"use_cache": False}
        positions, labels = batch["label_positions"], batch["labels"]
        if not self.loss_obstacle:
            hidden = self.causal_model.base_model(**inputs)[0]  # [rows, width, hidden_size]
            return self.head.sum_losses(hidden, labels, positions)
        logits = self.causal_model(**inputs).logits[:, positions].float().flatten(0, 1)
        targets = pick_targets(labels, positions)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def prepare_fast_model(
    model: nn.Module,
    dtype: torch.dtype,
    offload: bool = True,
    recomputed_layers: int | None = None,
    keeps_copy: bool = True,
) -> FastModel | str:
    """The fused path of `model`, computing in `dtype`; a line why not where it does not apply.

    `offload`: on a GPU the layer inputs that checkpointing keeps wait in the host's memory.
    `recomputed_layers`: how many, the first ones, checkpointing recomputes where it is on; None: all.
    `keeps_copy`: of the adapter in 16 bits (flat_adapter.py).
    """
    if not isinstance(model, PeftModel):
        return "every weight is trained, there is no adapter to fuse"
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    other = [name for name in trained if ".lora_A." not in name and ".lora_B." not in name]
    if other or not trained:
        return f"{other[0]} is trained besides the adapter" if other else "nothing is trained"
    if any(weight.dtype != torch.float32 for weight in trained.values()):
        return "the adapter is not in float32"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the layers are spread over several devices"
    obstacles = find_obstacles(model, dtype).values()
    if all(obstacles):
        return f"no adapted layer is covered: {', '.join(sorted(set(filter(None, obstacles))))}"
    if model.device.type == "cuda":
        wait_until_compiled()
    if model.device.type != "cpu":
        fuse_norms(model)
        fuse_rotation(model.get_base_model())
    fast = FastModel(model, dtype, offload, recomputed_layers, keeps_copy)
    if model.device.type != "meta":
        fast.print_obstacles()
    return fast


def prepare_fast_evaluation(model: nn.Module, dtype: torch.dtype) -> None:
    """Let a model that is not trained any more compute what its training computed."""
    if isinstance(model, PeftModel) and len({parameter.device for parameter in model.parameters()}) == 1:
        install_fast_evaluation(model, dtype)


def has_own_dropout(model: PeftModel) -> bool:
    """Whether the base drops anything itself: that mask comes from torch's generator, not from our keys."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    # Others hand a number of their config to torch's function.
    config = model.config.get_text_config().to_dict()
    return modules or any(
        value > 0
        for name, value in config.items()
        if "drop" in name and isinstance(value, float) and not name.startswith(("classifier", "summary"))
    )
