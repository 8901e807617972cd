"""Baichuan-7B as what it is, a LLaMA with q, k and v in one matrix: no code from the hub is run.

Its remote code of 2023 does not run on today's transformers; its published config and weights are read here,
its tokenizer in tokenizer_files.py. Baichuan-13B (ALiBi) and Baichuan 2 (a normalized head) are no LLaMAs.
"""

from typing import TYPE_CHECKING, Any

from utils.console import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

PACKED = "self_attn.W_pack.weight"  # [3 * hidden, hidden]: q, k, v one under the other
SPLIT = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def is_baichuan(config: dict[str, Any]) -> bool:
    """Whether config.json is Baichuan-7B's. Raises UserError for its relatives, which are no LLaMAs."""
    if config.get("model_type") != "baichuan":
        return False
    if config.get("architectures") != ["BaiChuanForCausalLM"]:  # the 13B and Baichuan 2 write Baichuan...
        raise UserError(
            "of the Baichuan models only Baichuan-7B is read: the 13B has other positions (ALiBi) and "
            "Baichuan 2 another head; use Baichuan-7B or a Qwen2.5 model of that size"
        )
    return True


def build_llama_config(config: dict[str, Any]) -> "LlamaConfig":
    from transformers import LlamaConfig

    # Fields of LLaMA's that its config.json has too mean the same there.
    fields = {name: value for name, value in config.items() if name in LlamaConfig.__annotations__}
    return LlamaConfig(**fields, architectures=["LlamaForCausalLM"])


def load_baichuan(name: str, config: dict[str, Any], **options: Any) -> "PreTrainedModel":
    """A LlamaForCausalLM from Baichuan's weights; `options` as for from_pretrained, quantization included."""
    from transformers import LlamaForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    class BaichuanForCausalLM(LlamaForCausalLM):
        """Named, so that the conversion below is for this checkpoint and not for every LLaMA."""

    split = WeightConverter(PACKED, list(SPLIT), operations=[Chunk(dim=0)])
    register_checkpoint_conversion_mapping(BaichuanForCausalLM.__name__, [split], overwrite=True)
    model: Any = BaichuanForCausalLM.from_pretrained(name, config=build_llama_config(config), **options)
    model.__class__ = LlamaForCausalLM  # from here on it is one, and is saved as one
    model._weight_conversions = []
    return model


def cut_rows(name: str, rows: int) -> dict[str, slice]:
    """{name: its rows} of q, k and v in the W_pack of that name, which has `rows` rows."""
    layer, part = name.removesuffix(PACKED), rows // 3
    return {layer + split: slice(i * part, (i + 1) * part) for i, split in enumerate(SPLIT)}


def split_packed(name: str, tensor: Any) -> dict[str, Any]:
    """{name: tensor} with W_pack cut into q, k and v; any other tensor as it is."""
    if not name.endswith(PACKED):
        return {name: tensor}
    return {part: tensor[rows] for part, rows in cut_rows(name, tensor.shape[0]).items()}


def split_shapes(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """{name: shape} as the loaded model has them."""
    split: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        parts = cut_rows(name, shape[0]) if name.endswith(PACKED) else {}
        split |= {part: [shape[0] // 3, *shape[1:]] for part in parts} or {name: shape}
    return split
