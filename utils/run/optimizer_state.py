"""The optimizer's state with the names of the weights it belongs to: resumed under any order of them.

An optimizer only numbers its parameters. On the plain path each is a weight; on the fused path there is one,
the buffer of all weights (flat_adapter.py). The layout, saved beside the state, says which lies where:

    [{"shape": [75264], "pieces": [["...q_proj.lora_A.default.weight", 0, [64, 96]], ...]}, ...]

By it a state tensor that is as large as its parameter (Adam's moments in 32 bits) is cut and put together,
also from one path to the other. What is not (8-bit blocks, Adafactor's rows) goes with its whole parameter.
"""

from copy import deepcopy
from math import prod
from typing import Any

import torch

from utils.console import UserError, notice
from utils.run.resume import raise_unless_forced

Layout = list[dict[str, Any]]
WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes hides its tensors under this name from FSDP


def describe_optimizer(optimizer: Any) -> str:
    """What has a state of the same form, e.g. `bitsandbytes AdamW, 8 bits`; a paged form is no other."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", None)
    # Where our own form of a library's keeps its state (utils/train/host_adam.py) does not matter either.
    kind = next(kind for kind in type(optimizer).__mro__ if not kind.__module__.startswith("utils."))
    package = kind.__module__.partition(".")[0]
    return f"{package} {kind.__name__}" + (f", {bits} bits" if bits else "")


def match_state(
    state: dict[str, Any], optimizer: Any, layout: Layout, checkpoint: str, force: bool
) -> dict[str, Any]:
    """The optimizer's state dict in a training state, as that of `optimizer`, whose weights lie by `layout`.

    Raises UserError where it is another optimizer's, or no layout was saved with it (`force`: a line).
    """
    if "layout" not in state:
        raise_unless_forced(
            f"{checkpoint} is of a version that did not save which weight each part of the optimizer's state "
            "belongs to",
            force,
        )
        return state["optimizer"]
    kind = describe_optimizer(optimizer)
    if state["optimizer_kind"] != kind:
        raise UserError(
            f"{checkpoint} holds the state of {state['optimizer_kind']}, and --optim is now {kind}: give the "
            "--optim that the run began with, or start anew in a new folder"
        )
    if state["layout"] == layout:
        return state["optimizer"]
    notice(f"the optimizer's state in {checkpoint} is put into another order, that of the weights here")
    return rearrange_state(
        state["optimizer"], state["layout"], optimizer.state_dict()["param_groups"], layout
    )


def rearrange_state(
    saved: dict[str, Any], was: Layout, groups: list[dict[str, Any]], now: Layout
) -> dict[str, Any]:
    """The state dict `saved` under layout `was` as that of an optimizer with `groups` and layout `now`.

    Raises UserError where the weights are others than those it was saved of.
    """
    places = {name: (i, start, shape) for i, one in enumerate(was) for name, start, shape in one["pieces"]}
    here, state = {piece[0] for parameter in now for piece in parameter["pieces"]}, {}
    if left := sorted(places.keys() - here):
        raise UserError(f"the checkpoint's optimizer state is also of {left[0]}, which is not trained here")
    for number, parameter in enumerate(now):
        parts = []
        for name, start, shape in parameter["pieces"]:
            source, offset, saved_shape = places.get(name, (-1, -1, "nothing of that name"))
            if saved_shape != shape:
                raise UserError(f"{name} is {shape} and the checkpoint's optimizer state has {saved_shape}")
            parts.append((source, offset, start, prod(shape)))
        state[number] = join_states(saved["state"], was, parts, parameter)
    schedules = [
        {key: saved["param_groups"][i][key] for key in ("lr", "initial_lr")}
        for i in match_groups(saved["param_groups"], was, groups, now)
    ]
    return {
        "state": {number: values for number, values in state.items() if values},
        "param_groups": [group | schedule for group, schedule in zip(groups, schedules, strict=True)],
    }


def match_groups(
    saved: list[dict[str, Any]], was: Layout, groups: list[dict[str, Any]], now: Layout
) -> list[int]:
    """For each of the `groups` the number of the saved one that has its weights; 0 for one without any."""
    homes = {name: i for i, own in enumerate(list_names(saved, was)) for name in own}
    return [homes[own[0]] if own else 0 for own in list_names(groups, now)]


def list_names(groups: list[dict[str, Any]], layout: Layout) -> list[list[str]]:
    """Of the weights in each group."""
    return [
        [piece[0] for number in group["params"] for piece in layout[number]["pieces"]] for group in groups
    ]


def join_states(
    states: dict[int, Any], was: Layout, parts: list[tuple[int, int, int, int]], parameter: dict[str, Any]
) -> dict[str, Any]:
    """State of one parameter from `parts` of the saved ones: (number, first element there and here, size)."""
    first = parts[0][0]
    joined: dict[str, Any] = {}
    if was[first] == parameter:
        return states.get(first, {})
    for number, offset, start, size in parts:
        for name, value in flatten_state(states.get(number, {})).items():
            if not torch.is_tensor(value) or not value.ndim:  # a count of steps, raised in place
                fits = joined.setdefault(name, deepcopy(value)) == value
            elif fits := list(value.shape) == was[number]["shape"] and value.is_floating_point():
                whole = joined.setdefault(name, value.new_zeros(parameter["shape"]))
                whole.view(-1)[start : start + size] = value.flatten()[offset : offset + size]
            if not fits:
                raise UserError(
                    f"the checkpoint's optimizer state has the weights in another order, and its {name} is "
                    "not to be cut: go on with the version that saved it, or start anew in a new folder"
                )
    return joined


def match_schedule(state: dict[str, Any], optimizer: Any, layout: Layout) -> dict[str, Any]:
    """The scheduler's saved state for the groups of `optimizer`, whose weights lie by `layout`."""
    saved, groups = state["scheduler"], optimizer.state_dict()["param_groups"]
    were = state["optimizer"]["param_groups"]
    if state.get("layout", layout) == layout and len(were) == len(groups):
        return saved
    order = match_groups(were, state["layout"], groups, layout)
    return {
        name: [each[i] for i in order] if isinstance(each, list) and len(each) == len(were) else each
        for name, each in saved.items()
    }


def flatten_state(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != WRAPPED} | state.get(WRAPPED, {})


def load_state(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give `optimizer` the state `saved`; bitsandbytes itself would take a paged one's out of its pages."""
    paged = getattr(optimizer, "optimizer", optimizer)
    if not getattr(paged, "is_paged", False):
        optimizer.load_state_dict(saved)
        return
    paged.load_state_dict(saved | {"state": {}})
    places = [(i, j, p) for i, group in enumerate(paged.param_groups) for j, p in enumerate(group["params"])]
    filled = {number: place for number, place in enumerate(places) if number in saved["state"]}
    for group, index, parameter in filled.values():
        paged.init_state(paged.param_groups[group], parameter, group, index)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # zeros are still being written into pages that the host fills next
    for number, (_, _, parameter) in filled.items():
        state = paged.state[parameter]
        for name, value in flatten_state(saved["state"][number]).items():
            if getattr(state.get(name), "is_paged", False):
                state[name].copy_(value)
            else:
                state[name] = value.to(parameter.device) if torch.is_tensor(value) else value
