"""What every state of a backend is: its public operations, checked in one place, and what it knows
beside its tokens.

A kind of state subclasses `State` and writes `append` and the methods with a leading underscore,
which get checked arguments; one that is `packed` writes `attend` and `layout` too. They know
padding on the left only: `effattn.padding` moves any other padding there, and gives every row a
state of its own (`rows`) where tokens of different rows can no longer lie side by side.

B: rows; Hq, Hkv: query and key/value heads; T: new tokens; D, Dv: of a key, of a value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from effattn.kernels.flash.pattern import Layout, Pattern
from effattn.states.sizes import Sizes, check_rows

# attributes that are not what is held of the tokens
BESIDE = ("real", "rows", "shift", "sizes", "checked")


class State:
    """Base class. `index` tensors are int64 over the batch. `evicts`: whether tokens are forgotten,
    so that few can be taken back; `candidates`: told before a call, so many of its last tokens may
    be taken back after it; `static`: its length is a tensor, so that a step compiles once;
    `in_order`: k and v are all tokens, in the order they came, and all there is.

    Who reads it: keys and values that `append` returns are all that a method needs, or else
    `read_by_method` is True and the state goes with the call (`Call.state`). `packed`: not even the
    method can read it; the state attends by itself (`attend`).

    `owner`: the backend that it belongs to, in words; `sizes`: what it began with; `learning`:
    whether gradients may flow through the present call, so that nothing is written in place. `real`
    (B, seq_len) bool: which tokens were real, None where all were; `moved`: whether they lie
    elsewhere than they came; `rows`: one state for each row; `late`: told before a padded call, by
    which number of tokens every row has a real one (None: nobody knows). `shift`: what position_ids
    had added to each row's positions, which all calls have to do alike. `checked`: what the
    checks of the last call went by, the sizes that were known afterwards, and its rotary rule."""

    evicts = True
    read_by_method = True
    packed = False
    in_order = False
    static = False
    candidates = 0
    owner: str | None = None
    sizes: Sizes | None = None
    learning = False
    real: Tensor | None = None
    moved = False
    late: int | None = None
    rows: list[State] | None = None
    shift: tuple[int, ...] | None = None
    checked: tuple[tuple, Sizes | None, object] = ((), None, None)

    def __getstate__(self) -> dict:
        """Without what the last call was checked by: its rotary rule is not the state's."""
        return {name: value for name, value in vars(self).items() if name != "checked"}

    # What a kind of state writes
    # ---------------------------------------------------------------------------------

    def append(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Layout]:
        """Adds new keys (B, Hkv, T, D) and values (B, Hkv, T, Dv); padding_mask (B, seq_len + T)
        bool, on the left.

        Returns the keys and values to attend over, and where they lie; of a `packed` state only the
        new ones, since nobody else can read the others.
        """
        raise NotImplementedError

    def layout(self, padding_mask: Tensor | None = None) -> Layout:
        """Of a `packed` state: where the new tokens of the next `attend` lie. padding_mask: as in
        `append`.
        """
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, call, impl: str, lse: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Of a `packed` state: attention of q (B, Hq, T, D) over what is held and the new tokens k
        (B, Hkv, T, D), v (B, Hkv, T, Dv), which are held afterwards. call: an `interface.Call`;
        `call.turn` given: keys are raw. Returns out (B, Hq, T, Dv), with `lse` also the log-sum-exp
        (B, Hq, T). Nothing has changed when it raises.
        """
        raise NotImplementedError

    def _seen(self) -> int:
        """Tokens that were appended."""
        raise NotImplementedError

    def _bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in self.tensors())

    def _select(self, index: Tensor) -> None:
        """Keeps the rows of `index`; nothing is shared with what was held before."""
        raise NotImplementedError

    def _reorder(self, index: Tensor) -> None:
        self._select(index)

    def _repeat(self, n: int) -> None:
        raise NotImplementedError

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Every tensor of the tokens becomes `how` of it."""
        for name, value in vars(self).items():
            if name not in BESIDE:
                setattr(self, name, _changed(value, how))

    def _check_crop(self, n: int) -> None:
        """ValueError unless the first 0 < n < _seen() tokens can be gone back to."""

    def _crop(self, n: int) -> None:
        """Keeps the first 0 < n < _seen() tokens, which `_check_crop` has allowed."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forgets all tokens."""
        raise NotImplementedError

    def _release(self) -> None:
        """Forgets all tokens, and holds no memory for new ones: from now on each row is held by
        itself.
        """
        self._reset()

    # What everyone calls
    # -----------------------------------------------------------------------------------------

    @property
    def seq_len(self) -> int:
        """Tokens seen, padding included, whether or not they are still held."""
        return self._seen() if self.rows is None else self.real.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held of keys and values, or of what became of them."""
        return self._bytes() if self.rows is None else sum(row.nbytes for row in self.rows)

    def reorder(self, index: Tensor) -> None:
        """Row i becomes the old row index[i] (beam search): index (B,) int64. ValueError for
        another length, and for rows that are not there."""
        self.check_index(index, whole=True)
        self._take_rows(index, self._reorder)

    def select(self, index: Tensor) -> None:
        """Keeps the rows of `index`, int64 (N,), in its order. ValueError for rows that are not
        there."""
        self.check_index(index)
        self._take_rows(index, self._select)

    def _take_rows(self, index: Tensor, how: Callable[[Tensor], None]) -> None:
        if self.batch is None:
            return
        self._thaw()
        # `alone` copies: a row that is taken twice must not be one object, which would append twice
        if self.rows is not None:
            self.rows = [self.rows[row].alone(0) for row in index.tolist()]
        else:
            how(index)
        self._now(len(index), lambda x: x.index_select(0, index.to(x.device)))

    def repeat(self, n: int) -> None:
        """Each row n times, next to each other. ValueError unless n is an int of at least 1."""
        if type(n) is not int or n < 1:
            raise ValueError(f"repeat: got {n!r}, valid is a whole number of at least 1")
        batch = self.batch
        if batch is None:
            return
        if self.rows is not None:
            self.rows = [row.alone(0) for row in self.rows for _ in range(n)]
        else:
            self._repeat(n)
        self._now(batch * n, lambda x: x.repeat_interleave(n, dim=0))

    def crop(self, n: int) -> None:
        """Keeps the first n tokens. ValueError unless 0 <= n <= seq_len, and for what was
        evicted.
        """
        n = int(n)
        self.check_crop(n)
        self._thaw()
        if n == 0:
            self.reset()
        elif n < int(self.seq_len):
            # the last tokens are real in some rows and padding in others: each row loses its own
            if self._apart(n):
                rows = self._cut(n)
                self._release()
                self.rows = [row for row, _ in rows]
                for row, left in rows:
                    row.crop(left)
            else:
                self._crop(n)
            self.real = None if self.real is None else self.real[:, :n].clone()

    def check_crop(self, n: int) -> None:
        """Raises what `crop(n)` would; nothing is changed."""
        total = int(self.seq_len)
        if not 0 <= n <= total:
            raise ValueError(
                f"crop: got {n}, the state has seen {total} tokens; valid is 0 to {total}"
            )
        if not 0 < n < total:
            return
        if not self._apart(n):
            self._check_crop(n)
            return
        for row, left in self._cut(n):
            row.check_crop(left)

    def reset(self) -> None:
        """Forgets everything: the next call begins a new batch of sequences."""
        self.real = self.rows = self.sizes = self.shift = None
        self.moved = False
        self._reset()

    def move(self, device: torch.device | str) -> None:
        """To another device, with all it holds."""
        self.change(lambda x: x.to(device, non_blocking=True))
        if self.sizes is not None:
            self.sizes = self.sizes._replace(device=torch.empty(0, device=device).device)

    # What it is like
    # ---------------------------------------------------------------------------------------------

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds of its tokens."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in BESIDE:
                yield value
            elif isinstance(value, State):
                yield from value.tensors()

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Every tensor becomes `how` of it."""
        for row in self.rows or ():
            row.change(how)
        self.real = None if self.real is None else how(self.real)
        self._change(how)

    @property
    def batch(self) -> int | None:
        """Rows; None while nothing is held."""
        if self.sizes is not None:
            return self.sizes.batch
        held = next(self.tensors(), None)
        return None if held is None else held.shape[0]

    def check_index(self, index: Tensor, whole: bool = False) -> None:
        """ValueError unless `index` (N,) names rows of the batch; `whole`: as many as there are."""
        batch = self.batch
        if batch is None:
            return
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index: got {index.dtype} {tuple(index.shape)}, valid are row numbers (rows,) "
                "int64"
            )
        if whole and len(index) != batch:
            raise ValueError(
                f"index: expected {batch} rows, got {len(index)}; select() changes the batch"
            )
        check_rows("index", index, batch)

    def ready(self, learning: bool) -> None:
        """Before a call: `learning` says whether gradients may flow."""
        self.learning = learning
        self._thaw()

    def is_like_last(self, step: tuple, rotary: object) -> bool:
        """Whether a call that has `step` and `rotary` needs no checks: the last one's were the
        same, and it is still the last thing that happened to the owner and the sizes."""
        before, sizes, rule = self.checked
        return before == step and sizes is self.sizes and rule is rotary and self.owner == step[-1]

    def _thaw(self) -> None:
        """What was made under inference_mode and may have to be written in place becomes ordinary
        tensors, unless it is inference_mode still."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self._sealed():
            self.change(torch.clone)

    def _sealed(self) -> bool:
        """Whether something of it was made under inference_mode."""
        if type(self).tensors is not State.tensors or self.rows is not None:
            return any(x.is_inference() for x in self.everything())
        # the same for all others, without generators: every step asks
        for value in vars(self).values():
            if isinstance(value, Tensor):
                if value.is_inference():
                    return True
            elif isinstance(value, State) and value._sealed():
                return True
        return False

    def everything(self) -> Iterator[Tensor]:
        """All tensors, of all rows too."""
        yield from self.tensors()
        for row in self.rows or ():
            yield from row.everything()

    def note(self, owner: str, k: Tensor, v: Tensor) -> None:
        """After a call of `owner` with the new tokens k and v."""
        self.owner, self.learning, self.late = owner, False, None
        if self.sizes is None:
            self.sizes = Sizes.of(k, v)

    # Rows apart
    # ----------------------------------------------------------------------------------------------

    def split(self) -> list[State]:
        """A state for each row, with nothing of this one. A row's `real` says where its padding on
        the left ends.
        """
        if self.rows is not None:
            return [row.alone(0) for row in self.rows]
        return [self.alone(row) for row in range(self.batch)]

    def alone(self, row: int) -> State:
        """A copy of one row."""
        one = self.shallow()
        # what is held has its padding on the left, whatever came: sorted, False comes first
        real = None if self.real is None else self.real[row : row + 1].sort(dim=1).values
        one._select(torch.tensor([row], device=next(self.tensors()).device))
        one.real, one.moved = real, False
        one.sizes = None if self.sizes is None else self.sizes._replace(batch=1)
        return one

    def shallow(self) -> State:
        """A copy that shares the tensors."""
        one = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, State):
                setattr(one, name, value.shallow())
            elif isinstance(value, list):
                setattr(one, name, list(value))
        return one

    def _apart(self, n: int) -> bool:
        """Whether rows lose different numbers of tokens when all but the first n go."""
        return self.rows is not None or (self.moved and not bool(self.real[:, n:].all()))

    def _cut(self, n: int) -> list[tuple[State, int]]:
        """For each row its own state, and how many of its tokens are among the first n."""
        gone = self.real[:, n:].sum(dim=1).tolist()
        return [
            (row, int(row.seq_len) - less) for row, less in zip(self.split(), gone, strict=True)
        ]

    def _now(self, batch: int, change: Callable[[Tensor], Tensor]) -> None:
        """What goes with rows that have changed."""
        self.real = None if self.real is None else change(self.real)
        if self.shift is not None and len(set(self.shift)) == 1:  # and who is whose is not asked
            self.shift = self.shift[:1] * batch
        elif self.shift is not None:
            self.shift = tuple(change(torch.tensor(self.shift)).tolist())
        self.sizes = None if self.sizes is None else self.sizes._replace(batch=batch)


def _changed(value, how: Callable[[Tensor], Tensor]):
    if isinstance(value, Tensor):
        return how(value)
    if isinstance(value, State):
        value.change(how)
        return value
    if isinstance(value, (tuple, list)):
        return type(value)(_changed(each, how) for each in value)
    return value.map(how) if hasattr(value, "map") else value
