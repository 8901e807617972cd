"""What was trained is what is chatted with: same prompt, same stop, same model."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from helpers import ROOT
from helpers.chats import encode_row, stream_reply
from helpers.families import build_llama1
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from utils.arguments import GenerationArguments, ModelArguments
from utils.chat.generation import BatchAnswerer, build_generation_config, load_run, trim_history
from utils.chat.streaming import decode_pieces, drop_leading_blanks, open_reply, stream_text
from utils.console import UserError
from utils.decode.reply import AdapterSwitch
from utils.decode.setup import install_graph_decode
from utils.fast.frozen_weights import read_weight
from utils.models.folder import resolve_model
from utils.models.tokenizer import ChatTokenizer
from utils.models.tokenizer_files import load_own_tokenizer
from utils.prompts.answer_spans import split_chat
from utils.prompts.messages import IGNORE_INDEX, Chat
from utils.train.predictions import find_answered

FLAGS = [
    "--dataset_name",
    ROOT / "data" / "guanaco_identity.jsonl",
    "--model_max_length",
    "200",
    "--lora_r",
    "4",
]
FLAGS += ["--gradient_checkpointing", "False", "--gradient_accumulation_steps", "1"]
SAVED = ["--max_steps", "2", "--save_steps", "1", "--template", "vicuna", "--quant_type", "fp4"]
QUESTION = [{"role": "user", "content": "Who are you?"}]
SHORT = GenerationArguments(max_new_tokens=8)


@pytest.fixture(scope="module")
def run(trained_run):
    return trained_run(*FLAGS, *SAVED)


def open_run(folder, given=(), **flags):
    resolved = resolve_model(ModelArguments(checkpoint_dir=str(folder), **flags), set(given))
    return resolved.args, load_run(resolved)


def test_run_brings_its_base_quantization_template_and_stop_tokens(float32_cpu, run, tiny_model):
    model_args, chat = open_run(run)
    assert (model_args.model_name_or_path, model_args.bits, model_args.quant_type) == (
        str(tiny_model),
        4,
        "fp4",
    )
    assert "USER: " in chat.tokenizer.raw.chat_template
    assert chat.tokenizer.stop_ids == json.loads((run / "run.json").read_text())["prompt"]["stop_ids"]
    assert chat.context == 512
    layer = chat.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    block = read_weight(layer, torch.float32).flatten()[:64]  # which share one scale
    levels = get_4bit_type("fp4", device="cpu")
    distance = (block[:, None] / block.abs().max() - levels / levels.abs().max()).abs().min(1).values
    assert distance.max() < 1e-6 and len(block.unique()) > 4


def test_checkpoint_and_bare_adapter_folders_open_too(run, tiny_model, tmp_path, capsys):
    checkpoint_args, _ = open_run(run / "checkpoint-1")
    assert checkpoint_args.quant_type == "fp4"
    bare = tmp_path / "elsewhere" / "adapter"
    bare.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((run / name).read_bytes())
    bare_args, chat = open_run(bare)
    assert bare_args.model_name_or_path == str(tiny_model)
    assert "has no run.json" in capsys.readouterr().out
    assert "SmolLM" in chat.tokenizer.raw.chat_template


def test_flags_beside_the_run_override_it_with_one_line(run, capsys):
    model_args, _ = open_run(run, given=["bits"], bits=8)
    assert model_args.bits == 8
    assert capsys.readouterr().out.count("--bits 8 overrides the run's 4") == 1


def test_training_goes_on_with_the_adapter_that_is_there(run, call_main, tmp_path):
    """Its shape is the run's; a LoRA flag that says otherwise is refused, not swallowed."""
    argv = ["--checkpoint_dir", run, *FLAGS, "--output_dir", tmp_path / "next", "--max_steps", "1"]
    argv = [*argv, "--do_train"]
    with pytest.raises(UserError, match="--lora_r 8: the adapter in .* has 4; leave the flag out"):
        call_main("qlora_finetune", *argv, "--lora_r", "8")
    with pytest.raises(UserError, match="--use_dora True: the adapter in .* has False"):
        call_main("qlora_finetune", *argv, "--use_dora")
    without = [flag for flag in argv if flag not in ("--lora_r", "4")]
    call_main("qlora_finetune", *without)
    recorded = json.loads((tmp_path / "next" / "run.json").read_text())["arguments"]
    assert recorded["lora_r"] == 4 and "up_proj" in recorded["lora_target_modules"]


def make_old(run):
    """Leave the run as the version left it that tokenized prompts and answers apart."""
    record = json.loads((run / "run.json").read_text())
    del record["tokenization"]
    (run / "run.json").write_text(json.dumps(record))
    template = (run / "chat_template.jinja").read_text()
    (run / "chat_template.jinja").write_text(template.replace('"ASSISTANT:" -}}', '"ASSISTANT: " -}}'))


def test_run_of_an_older_version_is_asked_as_it_was_trained_and_says_so(run_copy, capsys):
    asked = QUESTION, [*QUESTION, {"role": "assistant", "content": "Me."}, *QUESTION]
    new = open_run(run_copy)[1]
    assert "older version" not in capsys.readouterr().out
    make_old(run_copy)
    old = open_run(run_copy)[1]
    assert capsys.readouterr().out.count("was trained by an older version") == 1
    blank = old.tokenizer.raw(" ").input_ids
    for messages in asked:
        assert old.tokenizer.encode_prompt(messages) == new.tokenizer.encode_prompt(messages) + blank


def test_run_of_an_older_version_goes_on_only_when_forced(run_copy, call_main, tiny_model):
    make_old(run_copy)
    argv = ["--model_name_or_path", tiny_model, *FLAGS, "--output_dir", run_copy, *SAVED]
    assert "is finished" in call_main("qlora_finetune", *argv)
    record = json.loads((run_copy / "run.json").read_text())
    (run_copy / "run.json").write_text(json.dumps(record | {"status": "running"}))
    with pytest.raises(UserError, match="tokenized its prompts and answers apart.*--force_resume"):
        call_main("qlora_finetune", *argv)
    assert "--force_resume: " in call_main("qlora_finetune", *argv, "--force_resume")


def test_reply_shows_no_leading_blank(run):
    """The model writes " I": the blank that the template has before an answer is not the reply's."""
    chat = open_run(run)[1]
    prompt = chat.tokenizer.encode_prompt([{"role": "user", "content": "Hi"}])
    assert chat.tokenizer.raw.decode(prompt).endswith("ASSISTANT:")
    said = chat.tokenizer.raw(" I am here.<|im_end|>").input_ids
    pieces = decode_pieces(chat.tokenizer, said)
    assert "".join(drop_leading_blanks(pieces)) == "I am here."


def test_prompt_of_a_row_with_tools_is_the_trained_one(smol_tokenizer):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    smol_tokenizer.chat_template = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    answered = Chat([*QUESTION, {"role": "assistant", "content": "I am Guanaco."}], tools)
    stop_ids = [smol_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    (draft,) = split_chat(smol_tokenizer, answered, ["<|im_end|>"])
    row = encode_row(smol_tokenizer, draft)
    prompt = ChatTokenizer(smol_tokenizer, stop_ids).encode_prompt(Chat(QUESTION, tools))
    assert prompt == row["input_ids"][: row["labels"].count(IGNORE_INDEX)]
    assert "weather" in smol_tokenizer.decode(prompt)
    (asked,) = find_answered([answered, Chat(QUESTION, tools)])
    assert asked.tools == tools


def test_chat_prompt_is_the_training_prompt_token_for_token(run, monkeypatch):
    _, chat = open_run(run)
    answered = [*QUESTION, {"role": "assistant", "content": "I am Guanaco."}]
    (draft,) = split_chat(chat.tokenizer.raw, Chat(answered), chat.tokenizer.stops)
    row = encode_row(chat.tokenizer.raw, draft)
    trained_prompt = row["input_ids"][: row["labels"].count(IGNORE_INDEX)]
    sent = []
    read = chat.decoder.steps.read
    monkeypatch.setattr(
        chat.decoder.steps, "read", lambda ids, cache: (sent.append(ids), read(ids, cache))[1]
    )
    list(stream_reply(chat, QUESTION, SHORT))
    assert sent[0].tolist() == [trained_prompt]


def test_streamed_pieces_are_the_generated_reply(smollm2):
    chat = load_run(resolve_model(ModelArguments(str(smollm2), bits=16), set()))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    flags = GenerationArguments(max_new_tokens=24)
    pieces = list(stream_reply(chat, question, flags))
    (reply,) = BatchAnswerer(chat.model, chat.tokenizer, flags, seed=0).answer([question])
    assert len(pieces) > 3 and "".join(pieces).strip() == reply
    assert "Paris" in reply and "<|im_end|>" not in reply


def test_indented_lines_are_streamed_as_they_are_decoded(tmp_path):
    """LLaMA's decoder takes off the blank that a text begins with; a new line begins none."""
    build_llama1(tmp_path)
    tokenizer = load_own_tokenizer(str(tmp_path), trust_remote_code=False)
    for text in ("def f(a):\n    return a\n    def b", "a\n b\n\n  c", "北京\n  上海"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert "".join(decode_pieces(ChatTokenizer(tokenizer, [2]), ids)) == text


def test_base_beside_an_adapter_has_its_own_head(tmp_path):
    """PEFT's modules_to_save are layers that stand whole beside the base's."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    base, ids = AutoModelForCausalLM.from_config(config).eval(), torch.arange(3, 9)[None]
    expected = base(ids).logits
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(base, saved).eval()
    for name, weight in model.named_parameters():
        if "modules_to_save" in name:
            weight.data.normal_()
    switch = AdapterSwitch(model)
    tuned = model(ids).logits
    switch.turn(False)
    assert torch.equal(model(ids).logits, expected)
    switch.turn(True)
    assert torch.equal(model(ids).logits, tuned) and not torch.allclose(tuned, expected, atol=0.1)


def test_closing_the_stream_stops_the_generation(run):
    _, chat = open_run(run)
    flags = GenerationArguments(max_new_tokens=400, min_new_tokens=400)
    reply = open_reply(chat, QUESTION, flags)
    stream = stream_text(chat.tokenizer, reply)
    next(stream)
    stream.close()
    end = time.monotonic() + 20
    while chat.decoder.is_busy:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert reply.finish_reason == "cancelled" and 0 < reply.new_tokens < 400


def test_failure_while_generating_reaches_the_reader(run, monkeypatch):
    _, chat = open_run(run)

    def fail(*args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(chat.decoder.steps, "read", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_reply(chat, QUESTION, SHORT))


def test_beams_give_the_reply_in_one_piece(run):
    _, chat = open_run(run)
    assert len(list(stream_reply(chat, QUESTION, GenerationArguments(max_new_tokens=4, num_beams=2)))) == 1


def test_batched_replies_equal_single_ones_and_leave_the_rng_alone(smollm2, float32_cpu):
    chat = load_run(resolve_model(ModelArguments(str(smollm2), bits=16), set()))
    chats = [
        QUESTION,
        [{"role": "user", "content": "Name the three primary colours, please, and nothing else."}],
    ]
    state = torch.random.get_rng_state()
    answerer = BatchAnswerer(chat.model, chat.tokenizer, GenerationArguments(max_new_tokens=12), seed=0)
    together = answerer.answer(chats)
    alone = [answerer.answer([one])[0] for one in chats]
    assert together == alone
    assert torch.equal(state, torch.random.get_rng_state())


def test_history_is_trimmed_to_the_context_and_counted(run):
    _, chat = open_run(run)
    turn = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "fine " * 60}]
    system = {"role": "system", "content": "Be brief."}
    messages, dropped = trim_history(chat, [system, *turn * 5, *QUESTION], max_new_tokens=100)
    assert dropped == 4 and messages[0] == system and messages[-1] == QUESTION[0]
    assert len(messages) == 1 + 6 + 1
    assert trim_history(chat, QUESTION, 100) == (QUESTION, 0)


def test_message_longer_than_the_context_is_a_user_error(run):
    _, chat = open_run(run)
    with pytest.raises(UserError, match="the model's context is 512"):
        trim_history(chat, [{"role": "user", "content": "word " * 600}], 100)


def test_sampling_flags_without_sampling_are_named(smol_tokenizer, capsys):
    tokenizer = ChatTokenizer(smol_tokenizer, [2, 0])
    config = build_generation_config(GenerationArguments(temperature=0.7, top_p=0.9), tokenizer)
    assert config.temperature is None or config.temperature == 1.0
    assert "--temperature, --top_p has no effect" in capsys.readouterr().out
    sampling = build_generation_config(GenerationArguments(do_sample=True, temperature=0.7), tokenizer)
    assert sampling.temperature == 0.7 and sampling.eos_token_id == [2, 0]


@pytest.fixture(scope="module")
def smol_chat(smollm2):
    return load_run(resolve_model(ModelArguments(str(smollm2), bits=32), {"bits"}))


def converse(chat, questions, flags, kept=2):
    """The replies of a conversation, and how much of each prompt had been read by then."""
    chat.decoder.open_slots(8, 2048, kept)
    messages, replies, reused = [], [], []
    for question in questions:
        messages = [*messages, {"role": "user", "content": question}]
        reply = open_reply(chat, messages, flags)
        text = "".join(stream_text(chat.tokenizer, reply))
        messages = [*messages, {"role": "assistant", "content": text.strip()}]
        replies.append(text)
        reused.append(reply.reused_tokens)
    return replies, reused


def test_kept_conversation_gives_the_same_tokens_as_a_fresh_prefill(smol_chat):
    questions = ["Name three animals.", "And three plants?", "Which of all these is the tallest?"]
    flags = GenerationArguments(max_new_tokens=24)
    fresh, nothing_reused = converse(smol_chat, questions, flags, kept=0)
    kept, reused = converse(smol_chat, questions, flags)
    assert kept == fresh
    assert nothing_reused == [0, 0, 0] and reused[0] == 0 < reused[1] < reused[2]


def test_kept_conversation_is_cut_where_another_goes_on_from_it(smol_chat):
    flags = GenerationArguments(max_new_tokens=4)
    first = "Here is what I think about it: " + "llama, " * 60
    replies, _ = converse(smol_chat, [first], flags)
    ways = ["And what do you think?", "Name three rivers."]
    asked = [
        [
            {"role": "user", "content": first},
            {"role": "assistant", "content": replies[0].strip()},
            {"role": "user", "content": way},
        ]
        for way in ways
    ]
    said = []
    for messages in asked:
        reply = open_reply(smol_chat, messages, flags)
        said.append("".join(stream_text(smol_chat.tokenizer, reply)))
        assert 60 < reply.reused_tokens < len(reply.prompt)
    smol_chat.decoder.open_slots(8, 2048, kept=0)
    assert said == ["".join(stream_reply(smol_chat, messages, flags)) for messages in asked]


@pytest.mark.slow
def test_second_turn_of_1500_tokens_starts_in_15_percent_of_a_full_prefill(smol_chat):
    flags = GenerationArguments(max_new_tokens=4)
    first = [{"role": "user", "content": "Here is a list. " + "llama, " * 370}]
    smol_chat.decoder.open_slots(8, 2048, kept=2)
    text = "".join(stream_reply(smol_chat, first, flags)).strip()
    second = [*first, {"role": "assistant", "content": text}, {"role": "user", "content": "How many?"}]
    seconds = []
    for kept in (2, 0):
        smol_chat.decoder.open_slots(8, 2048, kept)
        reply = open_reply(smol_chat, second, flags)
        list(stream_text(smol_chat.tokenizer, reply))
        seconds.append(reply.first_token_seconds)
    print(f"{len(reply.prompt)} tokens: first after {seconds[0]:.3f} s, not {seconds[1]:.3f} s")
    assert len(reply.prompt) > 1500 and seconds[0] <= 0.15 * seconds[1]


@pytest.mark.parametrize("fixed_buffers", [False, True])
def test_base_beside_adapter_in_one_model_and_replies_in_turns_never_mix(run, fixed_buffers):
    _, chat = open_run(run)
    for layer in chat.decoder.adapter.layers:  # two steps of training change no word yet
        layer.lora_B["default"].weight.data.normal_()
    flags = GenerationArguments(max_new_tokens=20, min_new_tokens=20)
    with chat.model.disable_adapter():
        base = BatchAnswerer(chat.model, chat.tokenizer, flags, seed=0).answer([QUESTION])
    if fixed_buffers:  # as on a GPU
        chat.decoder.engine.steps = decoder = install_graph_decode(chat.model)
    alone = {tuned: "".join(stream_reply(chat, QUESTION, flags, tuned)) for tuned in (True, False)}
    assert [alone[False].strip()] == base != [alone[True].strip()]
    sides = [True, False, True, False, True]
    replies = [open_reply(chat, QUESTION, flags, tuned) for tuned in sides]
    with ThreadPoolExecutor(len(sides)) as pool:
        texts = list(pool.map(lambda reply: "".join(stream_text(chat.tokenizer, reply)), replies))
    assert texts == [alone[tuned] for tuned in sides]
    assert not fixed_buffers or (decoder.buffers and not decoder.obstacle)


def test_reply_ends_at_its_time_limit(run):
    _, chat = open_run(run)
    flags = GenerationArguments(max_new_tokens=400, min_new_tokens=400)
    reply = open_reply(chat, QUESTION, flags, max_seconds=0.2)
    list(stream_text(chat.tokenizer, reply))
    assert reply.finish_reason == "time" and reply.new_tokens < 400


def test_stop_string_ends_the_reply_before_it(smol_chat):
    flags = GenerationArguments(max_new_tokens=24)
    question = [{"role": "user", "content": "Count from one to ten, in words."}]
    whole = "".join(stream_reply(smol_chat, question, flags))
    for stop in (whole[9:14], whole[20:21], whole[-6:]):
        reply = open_reply(smol_chat, question, flags)
        pieces = list(stream_text(smol_chat.tokenizer, reply, ["never said", stop]))
        assert "".join(pieces) == whole[: whole.index(stop)] and reply.finish_reason == "stop"
    reply = open_reply(smol_chat, question, flags)  # what only begins like one is said in the end
    assert "".join(stream_text(smol_chat.tokenizer, reply, [whole[-3:] + "x"])) == whole
