"""Counts what code really does, operation by operation: the check that keeps the cost model from
drifting.

    with Counted(q=q, k=k, v=v) as counted:
        out = attn(q, k, v)
    counted.flops, counted.read_bytes("k")

A tensor's elements are read when an operation takes them: those that the operation's argument
covers, after all views and slices, each element counted once however often it is read. Matrix
products, and attention by its definition (pairs that see each other, not blocks that a kernel
visits), are counted as operations, a multiply-add being 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effattn.errors import check_choice

aten = torch.ops.aten


def _mm(a: Tensor, b: Tensor, *_, **__) -> int:
    return 2 * a.numel() * b.shape[-1]


def _mv(a: Tensor, *_, **__) -> int:
    return 2 * a.numel()


def _added(product: Callable[..., int]) -> Callable[..., int]:
    return lambda bias, *rest, **options: product(*rest, **options)


def _sdpa(q, k, v, dropout=0.0, is_causal=False, attn_mask=None, **_) -> int:
    return attention_flops(q, k, v, attn_mask, is_causal)


def _sdpa_backward(d_out, q, k, v, out, lse, dropout, is_causal, attn_mask=None, **_) -> int:
    """Five products over the pairs: scores once more, and the gradients of weights, values, queries
    and keys.
    """
    pairs = attention_flops(q[..., :1], k, v[..., :0], attn_mask, is_causal)
    return pairs * (3 * q.shape[-1] + 2 * v.shape[-1])


# operation -> its floating-point operations, from its arguments
PRODUCTS: dict[object, Callable[..., int]] = {
    aten.mm: _mm,
    aten.bmm: _mm,
    aten.mv: _mv,
    aten.dot: _mv,
    aten.addmm: _added(_mm),
    aten.addmm_: _added(_mm),
    aten.baddbmm: _added(_mm),
    aten.baddbmm_: _added(_mm),
    aten.addmv: _added(_mv),
    aten._int_mm: _mm,
    aten._grouped_mm: _mm,
    aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}

# operation -> which of its arguments it does not touch as a whole, and what marks the part, in
# `seen`: bool, of the argument's shape
LOOKUPS: dict[object, tuple[int, Callable[..., object]]] = {
    aten.embedding: (
        0,
        lambda seen, table, index, *_, **__: seen.index_fill_(0, index.flatten().cpu(), True),
    ),
    aten.index_select: (0, lambda seen, x, dim, index: seen.index_fill_(dim, index.cpu(), True)),
    aten.index_copy_: (
        0,
        lambda seen, x, dim, index, source: seen.index_fill_(dim, index.cpu(), True),
    ),
    aten.gather: (0, lambda seen, x, dim, index, **_: seen.scatter_(dim, index.cpu(), True)),
    aten.index: (0, lambda seen, x, indices: seen.index_put_(_on_cpu(indices), torch.tensor(True))),
    aten._grouped_mm: (
        1,
        lambda seen, a, b, offsets=None, **more: _experts(seen, more.get("offs", offsets)),
    ),
}


def _on_cpu(indices: list[Tensor | None]) -> list[Tensor | None]:
    return [index if index is None else index.cpu() for index in indices]


def _experts(seen: Tensor, ends: Tensor) -> None:
    """Experts with rows: `ends` (E,) is where each one's rows end."""
    seen[ends.cpu().diff(prepend=torch.zeros(1, dtype=ends.dtype)) > 0] = True


# They take a tensor for its shape only.
SHAPES = {
    aten.empty_like,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.rand_like,
    aten.randn_like,
    aten.new_empty,
    aten.new_empty_strided,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
}


def attention_flops(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> int:
    """Two products over the pairs that see each other: q (B, H, Tq, D), k (B, Hkv, Tk, D), v (B,
    Hkv, Tk, Dv); a mask as torch's `scaled_dot_product_attention` takes it."""
    rows, keys = q[..., 0].numel(), k.shape[-2]
    if is_causal:  # query i sees keys 0 to i
        pairs = rows // q.shape[-2] * sum(min(i + 1, keys) for i in range(q.shape[-2]))
    elif mask is None:
        pairs = rows * keys
    else:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
        pairs = int(seen.expand(*q.shape[:-1], keys).sum())
    return 2 * pairs * (q.shape[-1] + v.shape[-1])


class Counted(TorchDispatchMode):
    """Context manager. `flops` of everything inside; of the named tensors, which elements were read
    and written.

    Watches tensors by name, and modules: `Counted(model=model)` watches "model.lm_head.weight" and
    all the others. Copies made inside are no longer the tensor: making one is counted, reading it
    is not."""

    def __init__(self, **watched: Tensor | nn.Module):
        super().__init__()
        self.flops = 0
        self.watched: dict[str, Tensor] = {}
        for name, one in watched.items():
            if isinstance(one, nn.Module):
                inside = (*one.named_parameters(), *one.named_buffers())
                self.watched |= {f"{name}.{inner}": tensor for inner, tensor in inside}
            elif isinstance(one, Tensor):
                self.watched[name] = one
            else:
                raise ValueError(f"{name}: got {type(one).__name__}, valid is a tensor or a module")
        self._names: dict[int, str] = {}  # of storages
        self._read: dict[str, Tensor] = {}  # bool, one for each element of the storage
        self._written: dict[str, Tensor] = {}
        for name, tensor in self.watched.items():
            if self._names.setdefault(tensor.untyped_storage().data_ptr(), name) != name:
                raise ValueError(
                    f"{name}: shares its memory with {self._name(tensor)}; valid is one of them"
                )
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._read[name], self._written[name] = (
                torch.zeros(size, dtype=torch.bool) for _ in range(2)
            )
        self._attention = _Attention(self)

    def __enter__(self) -> Counted:
        super().__enter__()
        self._attention.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._attention.__exit__(*error)
        super().__exit__(*error)

    def read_bytes(self, *names: str) -> int:
        """Bytes of the elements that were read, of the tensors so called; of all, without names."""
        return self._bytes(self._read, names)

    def write_bytes(self, *names: str) -> int:
        """Bytes of the elements that were written in place."""
        return self._bytes(self._written, names)

    def _bytes(self, marks: dict[str, Tensor], names: tuple[str, ...]) -> int:
        for name in names:
            check_choice("Counted", name, marks)
        return sum(
            int(marks[name].sum()) * self.watched[name].element_size() for name in names or marks
        )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # below torch's own attention, products are its implementation's: they are counted by
        # definition
        operation = func.overloadpacket
        if operation in PRODUCTS and not self._attention.inside:
            self.flops += PRODUCTS[operation](*args, **kwargs)
        if not func.is_view and operation not in SHAPES:
            self._mark_arguments(func, args, kwargs)
        return func(*args, **kwargs)

    def _mark_arguments(self, func, args: tuple, kwargs: dict) -> None:
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for one in tree_leaves(value):
                if not isinstance(one, Tensor) or (name := self._name(one)) is None:
                    continue
                seen = _marks(self._written[name] if written else self._read[name], one)
                lookup = LOOKUPS.get(func.overloadpacket)
                if lookup is not None and number == lookup[0]:
                    lookup[1](seen, *args, **kwargs)
                else:
                    seen.fill_(True)

    def _name(self, tensor: Tensor) -> str | None:
        return (
            None
            if tensor.layout != torch.strided
            else self._names.get(tensor.untyped_storage().data_ptr())
        )


def _marks(storage: Tensor, view: Tensor) -> Tensor:
    """The marks of the elements that `view` covers; repeated ones once."""
    sizes = [
        1 if stride == 0 else size for size, stride in zip(view.shape, view.stride(), strict=True)
    ]
    return storage.as_strided(sizes, view.stride(), view.storage_offset())


class _Attention(TorchFunctionMode):
    """Counts torch's `scaled_dot_product_attention` by its definition, whichever kernel it
    takes.
    """

    def __init__(self, counted: Counted):
        super().__init__()
        self.counted, self.inside = counted, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v, mask, _, causal = (*args, *(None,) * 6)[:6]
        mask, causal = kwargs.get("attn_mask", mask), kwargs.get("is_causal", causal)
        self.counted.flops += attention_flops(q, k, v, mask, bool(causal))
        self.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False
