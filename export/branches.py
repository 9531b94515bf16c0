"""What a model asks its tensors (which branch, which sizes), answered by its example inputs."""

from __future__ import annotations

import contextlib
import functools
import linecache
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

LARGE = 256 * 1024**2
"""Bytes of a tensor, or pairs of an attention, not computed only to see what a model asks."""

_OF_TRACED_TENSORS = str(Path(torch._subclasses.__file__).parent)


class Branch(NamedTuple):
    """A place where a model asks whether a tensor is true, or which whole numbers are in it.

    Attributes:
        file: Of the model's code.
        line: In it.
        asked: The method of the tensor, such as ``__bool__`` or ``tolist``.
        taken: The answer: a boolean, a number, or lists of numbers.
    """

    file: str
    line: int
    asked: str
    taken: Any

    @property
    def is_number(self) -> bool:
        """Whether a trace may leave the answer to a run, as a symbol: a boolean it cannot."""
        return not isinstance(self.taken, bool)

    def __str__(self) -> str:
        """The line of code, where it stands, and the answer."""
        code = linecache.getline(self.file, self.line).strip()
        return f"`{code}` ({Path(self.file).name}:{self.line}) is {self.taken}"


def find_branches(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Branch, ...]:
    """Run a model and note what it asks its tensors, in that order; it stays as it was.

    Most ask about what they are given, not about what they make of it. So a run ends where it comes
    to something beyond ``LARGE``, and another computes neither that nor what comes of it. Where
    this one fails, as a question about such a tensor does, the last computes everything.
    """
    with contextlib.suppress(Exception), _kept_whole(model):
        return _answers(model, args, kwargs, limit=LARGE)
    with contextlib.suppress(Exception), _kept_whole(model), _Sparing() as sparing:
        return _answers(model, args, kwargs, sparing=sparing)
    with _kept_whole(model):
        return _answers(model, args, kwargs)


def _answers(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    limit: int | None = None,
    sparing: _Sparing | None = None,
) -> tuple[Branch, ...]:
    with torch.no_grad(), _Listener(limit, sparing) as listener:
        model(*args, **kwargs)
    return tuple(listener.heard)


@contextlib.contextmanager
def decided(model: torch.nn.Module, branches: Iterable[Branch]) -> Iterator[None]:
    """Have a model take these branches while it is traced, and answer NaN where a run would not.

    Its floating-point outputs are NaN wherever a run of the graph finds another answer.
    """
    forward, branches = model.forward, tuple(branches)
    own = vars(model).get("forward")  # of a model in which a hook took the class's place

    @functools.wraps(forward)
    def decided_forward(*args: Any, **kwargs: Any) -> Any:
        with _Prompter(branches) as prompter:
            outputs = forward(*args, **kwargs)
        if not prompter.conditions:
            return outputs
        holds = torch.stack(prompter.conditions).all()

        def guarded(x: Tensor) -> Tensor:
            return torch.where(holds, x, torch.nan) if x.is_floating_point() else x

        return tree_map_only(Tensor, guarded, outputs)

    model.forward = decided_forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextlib.contextmanager
def _kept_whole(model: torch.nn.Module) -> Iterator[None]:
    """What a run changes in a model is undone: buffers, attributes, what lists and dicts hold."""
    parts = [x for module in model.modules() for x in (vars(module), *vars(module).values())]
    before = [(x, x.copy()) for x in parts if type(x) in (dict, OrderedDict, list)]
    buffers = [(x, x.clone()) for x in model.buffers() if not x.is_meta]
    try:
        yield
    finally:
        for kept, contents in before:
            kept.clear()
            (kept.extend if isinstance(kept, list) else kept.update)(contents)
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


class _Sparing(TorchDispatchMode):
    """Tensors beyond ``LARGE``, and what comes of one without values, have no values either."""

    def __init__(self) -> None:
        super().__init__()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)

    def without_values(self, x: Any) -> Any:
        """The tensors in a structure, by their sizes, dtypes and devices alone."""
        return tree_map_only(Tensor, self._fakes.from_tensor, x)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in given):
            with contextlib.suppress(Exception):  # sizes that follow from values, for one
                with self._fakes:
                    made = func(*self.without_values(args), **self.without_values(kwargs))
                if any(x.nbytes > LARGE for x in tree_leaves(made) if isinstance(x, Tensor)):
                    return made
            return func(*args, **kwargs)
        if func._schema.is_mutable and not all(isinstance(x, FakeTensor) for x in given):
            raise RuntimeError(f"{func} writes what is not known to what is")
        with self._fakes:
            return func(*args, **kwargs)


class _Listener(TorchFunctionMode):
    """Notes each answer of a tensor that is asked whether it is true, or for whole numbers."""

    def __init__(self, limit: int | None, sparing: _Sparing | None) -> None:
        super().__init__()
        self.heard: list[Branch] = []
        self._limit, self._sparing = limit, sparing

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        pairs = _pairs(*args, **kwargs) if func is scaled_dot_product_attention else 0
        if self._sparing is not None and pairs > LARGE:
            args, kwargs = (self._sparing.without_values(x) for x in (args, kwargs))
        if self._limit is not None and pairs > self._limit:
            raise MemoryError(f"an attention of {pairs} pairs")
        result = func(*args, **kwargs)
        if self._limit is not None and isinstance(result, Tensor) and result.nbytes > self._limit:
            raise MemoryError(f"a tensor of {result.nbytes} bytes")
        if _asks(func, args):
            self.heard.append(Branch(*_asked_from(), func.__name__, result))
        return result


class _Prompter(TorchFunctionMode):
    """Gives the noted answers, and keeps whether they hold as tensors of the graph."""

    def __init__(self, branches: Iterable[Branch]) -> None:
        super().__init__()
        self.conditions: list[Tensor] = []
        self._answers: defaultdict[tuple[str, int, str], deque[Any]] = defaultdict(deque)
        for file, line, asked, taken in branches:
            # a traced tensor makes a list of numbers by asking for each of them
            asked = "item" if asked == "tolist" else asked
            self._answers[file, line, asked].extend(tree_leaves(taken))

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answers = self._answers[*_asked_from(), func.__name__] if _asks(func, args) else None
        if not answers:
            return func(*args, **(kwargs or {}))
        tensor, taken = args[0], answers.popleft()
        tensor = tensor.bool() if isinstance(taken, bool) else tensor
        self.conditions.append(tensor.reshape(()) == taken)
        return taken


def _pairs(query: Tensor, key: Tensor, *others: Any, **options: Any) -> int:
    """Of a query and a key."""
    return query.shape[-2] * key.shape[-2]


def _asks(func: Any, args: Sequence[Any]) -> bool:
    if func is torch.Tensor.__bool__:
        return True
    reads = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__int__, torch.Tensor.__index__)
    return func in reads and not (args[0].is_floating_point() or args[0].is_complex())


def _asked_from() -> tuple[str, int]:
    """File and line of the code that called a function of a tensor."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(_OF_TRACED_TENSORS) and frame.f_back:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
