"""The tokenizer with a chat template, a pad token, and the tokens that end a reply."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from utils.arguments import DataArguments, ModelArguments
from utils.console import UserError, notice
from utils.models.base import unknown_models_explained
from utils.models.encoding import find_own_bos
from utils.models.tokenizer_files import load_own_tokenizer
from utils.prompts import find_stop_tokens, read_template, render_chat, template_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    model_args: ModelArguments, data_args: DataArguments | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer with a chat template and a pad token. A run's own tokenizer comes before the base's."""
    run = model_args.checkpoint_dir
    if run is None or not Path(run, "tokenizer_config.json").is_file():
        name, revision = model_args.base, model_args.revision
    else:
        name, revision = run, None
    with unknown_models_explained(model_args):
        tokenizer = load_own_tokenizer(
            name, model_args.trust_remote_code, revision=revision, cache_dir=model_args.cache_dir
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model_args.base} has no eos token, so no reply could end")
    add_chat_template(tokenizer, data_args)
    add_bos(tokenizer)
    add_pad_token(tokenizer)
    return tokenizer


def add_chat_template(tokenizer: "PreTrainedTokenizerBase", data_args: DataArguments | None) -> None:
    """Set the prompt format: --template, else the tokenizer's own, else alpaca (guanaco for oasst1)."""
    name = data_args.template if data_args else None
    if name is None and tokenizer.chat_template:
        tokenizer.chat_template = choose_named_template(tokenizer.chat_template)
        return
    if name is None:
        name = "guanaco" if data_args and data_args.dataset_name == "oasst1" else "alpaca"
        notice(f"the tokenizer has no chat template: using {name} (--template chooses another)")
    if name == "chatml" and tokenizer.convert_tokens_to_ids("<|im_end|>") in (None, tokenizer.unk_token_id):
        raise UserError(
            "--template chatml ends replies with <|im_end|>, which this tokenizer does not have: "
            "use another template"
        )
    tokenizer.chat_template = read_template(name)


def add_bos(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Let the template render the BOS that this tokenizer puts before any text: a server adds none itself."""
    rendered = render_chat(tokenizer, [{"role": "user", "content": "Question"}], add_generation_prompt=True)
    if find_own_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
        if tokenizer.chat_template not in map(read_template, template_names()):
            notice(f"the chat template lacks the {tokenizer.bos_token} that its tokenizer puts first: added")
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template


def choose_named_template(template: str | dict[str, str]) -> str:
    """The template, or the one named default where a tokenizer has several (Command R: rag, tool_use)."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise UserError(
            f"the tokenizer has chat templates named {', '.join(sorted(template))} and none named default: "
            f"choose the prompt format with --template ({', '.join(template_names())})"
        )
    notice(f"of the tokenizer's chat templates ({', '.join(sorted(template))}) default is used")
    return template["default"]


def add_pad_token(tokenizer: "PreTrainedTokenizerBase") -> None:
    """pad = unk or a reserved token; else eos. Masks go by length: an eos in an answer is still trained.

    Of several reserved ones that with the smallest id, then the shortest name: get_vocab() has another order
    at each call.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    reserved = sorted(
        (token_id, len(token), token)
        for token, token_id in tokenizer.get_vocab().items()
        if "pad" in token.lower() and token.startswith("<")
    )
    for token in (tokenizer.unk_token, *(token for *_, token in reserved), tokenizer.eos_token):
        if token is not None:
            tokenizer.pad_token = token
            return


def load_stop_ids(model_args: ModelArguments, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids that end a reply: the template's closing token, eos, and what the base's generation_config adds."""
    where: dict[str, Any] = {"revision": model_args.revision, "cache_dir": model_args.cache_dir}
    try:
        config = GenerationConfig.from_pretrained(model_args.base, **where)
    except OSError:  # many models ship none
        config = GenerationConfig()
    eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    # An old LLaMA conversion names the BOS, 1, as its eos; in OPT and GPT-NeoX the two are one token.
    opens = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    return find_stop_tokens(tokenizer, [token for token in eos if token not in (None, opens)])
