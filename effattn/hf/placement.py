"""Where the weights of a module are, and what stands around its forward.

accelerate (`device_map`, `cpu_offload`, `disk_offload`) puts a hook on every module whose weights
are elsewhere: the module's `forward` becomes an attribute of that one module, which fetches the
weights, calls the real forward of *that* module and lets the weights go, to the meta device.
`torch.compile` puts a module around a module. So a copy of a module must be made of what is inside,
and weights are read while they are `present`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from effattn.errors import Unsupported

HOOK = "_hf_hook"  # accelerate's
DEVICE_MAP = "hf_device_map"  # transformers'
# attributes of one module, bound to it
AROUND = ("forward", "_old_forward", HOOK, "_compiled_call_impl")


def inside(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of; any other is itself."""
    return getattr(module, "_orig_mod", module)


def bare(module: nn.Module) -> nn.Module:
    """The same module without what stands around its forward: parameters, buffers and modules are
    the same objects, in dicts of its own."""
    module = inside(module)
    own = {name: value for name, value in vars(module).items() if name not in AROUND}
    own |= {name: dict(own[name]) for name in ("_parameters", "_buffers", "_modules")}
    twin = type(module).__new__(type(module))  # copy.copy is nothing that torch.compile can trace
    twin.__dict__.update(own)
    return twin


def duplicate(module: nn.Module) -> nn.Module:
    """A copy with weights of its own that are here to stay, on the device where the module
    computes.
    """
    module = inside(module)
    hooks = {id(hook): hook for each in module.modules() for hook in _hooks(each)}
    with present(module):
        twin = copy.deepcopy(module, hooks)  # which hold maps of all weights: they are left behind
    for each in twin.modules():
        _strip(each)
    return twin


def taken(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call as the module's hook gives them to its forward: on the device where
    it computes.
    """
    hook = module.__dict__.get(HOOK)
    return (args, kwargs) if hook is None else hook.pre_forward(module, *args, **kwargs)


@contextmanager
def present(*modules: nn.Module) -> Iterator[None]:
    """While open, the modules and all in them have their weights, to be read: what is written may
    be lost.
    """
    with ExitStack() as stack:
        for each in {each: None for module in modules for each in module.modules()}:
            for hook in _offloading(each):
                hook.pre_forward(each)
                stack.callback(hook.post_forward, each, None)
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its first weight is, or where it is brought for a call."""
    for hook in _offloading(module):
        return _device(hook.execution_device)
    first = next(module.parameters(), None)
    if first is None:
        return torch.device("cpu")
    if first.is_meta:  # it may be a module inside that has the hook
        return next(
            (
                _device(hook.execution_device)
                for each in module.modules()
                for hook in _offloading(each)
            ),
            first.device,
        )
    return first.device


def input_device(model: nn.Module) -> torch.device:
    """Where a model's token ids go. Unsupported for a model without numbers."""
    table = model.get_input_embeddings()
    device = device_of(table) if table.weight.is_meta else table.weight.device
    if device.type == "meta":
        raise Unsupported(
            f"{type(model).__name__} is on the meta device, it has no numbers to compute with"
        )
    return device


def is_elsewhere(model: nn.Module) -> bool:
    """Whether some of a model's weights are only fetched for a call."""
    return any(_offloading(each) for each in model.modules())


def require_here(model: nn.Module, what: str) -> None:
    """Unsupported unless all weights are here and each is in one place, so that they may be changed
    layer by layer. what: that asks for it, "convert_gqa"."""
    where = next((name for name, each in model.named_modules() if _offloading(each)), None)
    if where is None:
        where = next((name for name, each in model.named_parameters() if each.is_meta), None)
    if where is not None:
        raise Unsupported(
            f"{what}: the weights of {where} are elsewhere (device_map or offloading), and it "
            "changes weights; load the model without device_map, or with one that puts every "
            "layer on a device"
        )
    require_own(model, what, embedding=True)


def require_own(model: nn.Module, what: str, embedding: bool = False) -> None:
    """Unsupported where two modules have one weight that the model does not tie by itself: what is
    done to one would be done to the other, and a checkpoint would lose it. embedding: the output
    embedding may be the input's."""
    # transformers' own ties are known to it, and saved once; any other sharing is somebody's own
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    known, first = {*ties, *ties.values()}, {}
    if embedding:
        table = model.get_input_embeddings().weight
        known |= {
            name
            for name, weight in model.named_parameters(remove_duplicate=False)
            if weight is table
        }
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in known or "effattn_" in name:  # what a swap has added may be one for all layers
            continue
        if (other := first.setdefault(id(weight), name)) != name:
            raise Unsupported(
                f"{what}: {other} and {name} are one weight, which {type(model).__name__} does "
                "not tie; give each its own: module.weight = "
                "torch.nn.Parameter(module.weight.detach().clone()); an output embedding that is "
                "the input's needs config.tie_word_embeddings=True when the model is made"
            )


def maps(model: nn.Module) -> list:
    """What the hooks of a model fetch weights from: its copies may have the same."""
    return [hook.weights_map for each in model.modules() for hook in _offloading(each)]


def replaced(root: nn.Module, paths: list[str]) -> str | None:
    """The first of the modules at `paths` whose forward is somebody's own, and not accelerate's;
    None without one.
    """
    modules = {path: vars(inside(root.get_submodule(path))) for path in paths}
    return next(
        (path for path, own in modules.items() if "forward" in own and HOOK not in own), None
    )


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The entries of the state_dict; what is elsewhere is fetched, one at a time."""
    for name, tensor in model.state_dict().items():
        yield name, fetched(model, name, tensor)


def fetched(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """An entry of the state_dict; one that is elsewhere as the hook of its module, or of one around
    it, fetches it.
    """
    if not tensor.is_meta:
        return tensor
    path, below = name.split("."), ""
    while path:
        below = f"{path.pop()}.{below}".rstrip(".")
        for hook in _offloading(model.get_submodule(".".join(path))):
            if below in hook.weights_map:
                return hook.weights_map[below]
    raise Unsupported(
        f"weights: {name} is on the meta device, and nothing in the model says where its numbers "
        "are"
    )


@contextmanager
def saving(model: nn.Module) -> Iterator[None]:
    """While open, `save_pretrained` fetches what is elsewhere: it does where a device map says so,
    and only there.
    """
    if not is_elsewhere(model):
        yield
        return
    own = vars(model).get(DEVICE_MAP)
    model.__dict__[DEVICE_MAP] = {"": "cpu"}
    try:
        yield
    finally:
        del model.__dict__[DEVICE_MAP]
        if own is not None:
            model.__dict__[DEVICE_MAP] = own


def _strip(module: nn.Module) -> None:
    for name in AROUND:
        module.__dict__.pop(name, None)


def _hooks(module: nn.Module) -> list:
    hook = module.__dict__.get(HOOK)
    return [] if hook is None else [hook, *getattr(hook, "hooks", [])]


def _offloading(module: nn.Module) -> list:
    """accelerate's hooks that fetch the module's own weights for a call."""
    return [hook for hook in _hooks(module) if getattr(hook, "offload", False) is True]


def _device(device) -> torch.device:
    return torch.device("cpu") if device is None else torch.device(device)


def check_finite(model: nn.Module) -> None:
    """ValueError naming the first weight that holds NaN or Inf."""
    for name, tensor in weights(model):
        if tensor.is_floating_point() and tensor.dtype.itemsize < 2:
            tensor = tensor.float()  # torch does not ask 8-bit floats
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"weights: {name} holds NaN or Inf ({bad} of {tensor.numel()} values)")
