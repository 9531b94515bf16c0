"""Whole models as files that run without PyTorch, with sparse attention inside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from uta_fx._optional import naming_missing_packages, require
from uta_fx.backend import note_on_layers, plan_of
from uta_fx.config import Config
from uta_fx.explain import Explanation
from uta_fx.export.branches import decided, find_branches
from uta_fx.export.dynamic_shapes import check_dynamic_shapes, names_of_symbols
from uta_fx.export.program import sparsify_program
from uta_fx.export.state import check_kept, opened
from uta_fx.order import COMPUTED_ORDERS
from uta_fx.passes.find_calls import module_path
from uta_fx.policies import SVG2

logger = logging.getLogger(__name__)

TENSORRT_FORMS = ("plugin", "standard", "engine")
LONGEST_NAME = 238
"""Bytes of a file's name: the folder beside it, where it is written first, has 17 more."""
CONFIG_KEY, BRANCHES_KEY = "uta_fx.config", "uta_fx.branches"


def export_onnx(
    model: torch.nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    config: Config | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    decide_branches: bool = False,
) -> Explanation:
    """Write a model as an ONNX file in which video attention is sparse.

    The file runs in any ONNX Runtime, with nothing of ours installed (in bfloat16 on a GPU alone:
    its CPU provider lacks most operations for that dtype): each sparse attention is one
    node ``uta::SparseAttention`` beside a function that says what it is in standard operations, and
    so are steps of the selection of its blocks. ``uta_fx.onnxruntime_session`` runs these nodes by
    our own kernels instead. Metadata of the file: ``uta_fx.version``, ``uta_fx.config`` and
    ``uta_fx.sites``, the last two as JSON; and what was decided about branches, likewise as
    ``uta_fx.branches``.

    An argument may be an object of the model's own, such as a cache that holds keys and values for
    later calls (Wan Animate 2). Its tensors are inputs, named by the argument and their paths in
    it: ``kv_cache_layer_caches_0_key``. What the model leaves in it are more outputs, of the same
    names (with ``_after`` where there is such an input); so are tensors that it puts into a dict or
    a list, or writes to. The arguments themselves stay as they are, and what they hold beside
    tensors is constant. A tensor that is given for two arguments is two inputs.

    Args:
        model: In eval mode, on any device; compiled or not.
        args: Its positional arguments; their sizes are those of the file.
        path: File to write, ending in ``.onnx``; replaced if it is there (what it leads to, if it
            is a link). Weights of more than 1.5 GiB go into a second file beside it, such as
            ``model.onnx.1f3a9c04.data``; they can be moved together. Its name is new each time, and
            that of the file replaced goes.
        config: Settings; None for the defaults. ``inner`` has no effect here.
        kwargs: Its keyword arguments. ``None`` and Python numbers become constants.
        dynamic_shapes: As for ``torch.export.export``, with a dict of its tensors by their paths
            (``layer_caches.0.key``) for an object; ``Dim("batch")`` is ``batch`` in the file, too.
            Frames, height and width of the video may be dynamic (``2 * Dim("rows")``, or
            ``Dim.DYNAMIC``) with the policies ``low_delta`` and ``topk``, the tails ``none``,
            ``block``, ``first_order`` and ``gaussian``, and any order but ``hilbert``; with others,
            and where the graph does not show how the grid follows from its inputs,
            they are refused here by name. Which sites are sparse is decided for the sizes of
            ``args``: a run below ``min_tokens`` is sparse too.
        opset: Version of the standard operations, 18 or higher; None for 18, or 22 where weights
            are bfloat16, which convolutions know only since then. From 23 on, which ONNX Runtime
            reads from 1.23 on, dense attention is one operation too.
        decide_branches: Where the model asks whether a tensor is true (HunyuanVideo 1.5: whether
            its image is empty), write the way that these inputs take; it is run once to find out,
            without its large tensors where it asks about nothing that comes of them.
            So for whole numbers that it reads from tensors, if it cannot be traced with them left
            open (Wan Animate 2: sizes of its video). The file then answers NaN where its inputs
            would take another way or have other numbers. False refuses such a model.

    Returns:
        What was decided about every attention call, and why.

    Raises:
        ImportError: onnx, onnxscript or a package that the model needs is missing.
        TypeError: ``model`` is not a module, or ``args``, ``path``, ``kwargs``, ``opset``,
            ``dynamic_shapes`` or ``decide_branches`` is of another type.
        ValueError: ``path`` cannot be written, ``model`` has no weights, an argument is out of
            range or cannot be copied, ``dense_until`` is set, ``strict`` and a site stays dense, a
            dimension is not there or cannot be dynamic, the model is not one graph, drops out at
            random, keeps in a buffer what its next call reads, or returns what is no tensor, or an
            operation has no translation.
    """
    require("onnxscript", extra="onnx")
    from uta_fx.export.clusters import spell_out_clusters
    from uta_fx.export.onnx_model import write_onnx
    from uta_fx.export.token_orders import spell_out_orders

    config = Config.of(config)
    target = check_place(path, ".onnx")
    policy = config.selection_policy()
    if isinstance(policy, SVG2) and policy.keep:
        raise ValueError(
            "keep=True of policy svg2 cannot be exported: a file keeps nothing from one step to the"
            " next. Take keep=False, with which each step clusters anew"
        )
    opset = _opset(model, opset)
    with _without_gradients(model):
        program, explanation, found = sparse_program(
            model, args, kwargs, dynamic_shapes, config, decide_branches
        )
        program = spell_out_clusters(spell_out_orders(program))
        write_onnx(
            program, explanation.sites, target, opset=opset, left=found.left, sizes=found.sizes,
            metadata=_metadata(config, found.branches),
        )  # fmt: skip
    return explanation


def export_tensorrt(
    model: torch.nn.Module,
    args: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    config: Config | None = None,
    kwargs: Mapping[str, Any] | None = None,
    form: str = "plugin",
    opset: int | None = None,
    decide_branches: bool = False,
) -> Explanation:
    """Write a model for TensorRT, with sparse video attention inside.

    Every size is fixed: how a video is cut into blocks belongs to its resolution, and TensorRT is
    fastest so. ``build_tensorrt_engine`` makes an engine of the first two forms.

    ``"plugin"``: an ONNX file whose sparse attentions are nodes for our plugins, which TensorRT
    10.9 and later compile into the engine from our Triton kernels. ``"standard"``: an ONNX file of
    standard operations alone, for TensorRT-RTX, which has no plugins; it computes the same and
    saves no arithmetic. ``"engine"``: the engine itself, by ``torch_tensorrt`` with the same
    plugins, on a machine with TensorRT and a GPU.

    Args:
        model: In eval mode; on a GPU for ``"engine"``.
        args: Its positional arguments; their sizes are those of the engine.
        path: File to write, replaced if it is there: ``.onnx`` (``.trt.onnx``, say), or
            ``.engine`` for the form ``"engine"``.
        config: Settings; None for the defaults. ``inner`` has no effect here.
        kwargs: Its keyword arguments. ``None`` and Python numbers become constants.
        form: ``"plugin"``, ``"standard"`` or ``"engine"``.
        opset: Version of the standard operations, 18 or higher; None for 18, or 22 where weights
            are bfloat16.
        decide_branches: As for ``export_onnx``.

    Returns:
        What was decided about every attention call, and why.

    Raises:
        ImportError: onnxscript, a package that the model needs, or for ``"engine"`` TensorRT,
            torch_tensorrt or Triton, is missing.
        TypeError: As for ``export_onnx``.
        ValueError: As for ``export_onnx``, or ``form`` is another.
    """
    config = Config.of(config)
    if form not in TENSORRT_FORMS:
        raise ValueError(f"form must be one of {', '.join(TENSORRT_FORMS)}, got {form!r}")
    target = check_place(path, ".engine" if form == "engine" else ".onnx", f" for form={form!r}")
    if isinstance(config.selection_policy(), SVG2):
        raise ValueError(
            "policy svg2 cannot be exported to TensorRT: it has no operation that adds up the"
            " tokens of a cluster. Take topp, whose rule is the same over blocks of neighbouring"
            " tokens, or export_onnx"
        )
    if form == "engine":
        from uta_fx.export.tensorrt_torch import check_torch_tensorrt

        check_torch_tensorrt()
    else:
        require("onnxscript", extra="onnx")
    from uta_fx.export.tensorrt_program import spell_out

    opset = _opset(model, opset)
    with _without_gradients(model):
        program, explanation, found = sparse_program(
            model, args, kwargs, None, config, decide_branches,
            "its attention mask hides padding, which files for TensorRT leave to dense attention",
        )  # fmt: skip
        program = spell_out(program, plugins=form != "standard")
        if form == "engine":
            from uta_fx.export.tensorrt_torch import write_engine

            write_engine(program, target)
        else:
            from uta_fx.export.onnx_model import write_onnx
            from uta_fx.export.tensorrt_model import plugin_dialect, standard_dialect

            dialect = plugin_dialect() if form == "plugin" else standard_dialect()
            write_onnx(
                program, explanation.sites, target, opset=opset,
                metadata=_metadata(config, found.branches), left=found.left, dialect=dialect,
            )  # fmt: skip
    return explanation


def build_tensorrt_engine(
    model: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    rtx: bool = False,
    architectures: Sequence[int] | None = None,
) -> None:
    """Build an engine from an ONNX file of ``export_tensorrt``.

    TensorRT needs the GPU that the engine is for, and Triton where the file has nodes for our
    plugins; the engine needs neither Python nor anything of ours. TensorRT-RTX needs no GPU.

    Args:
        model: The file.
        path: Engine to write; replaced if it is there.
        rtx: Build with TensorRT-RTX instead of TensorRT.
        architectures: Compute capabilities to build for, with TensorRT-RTX alone: such as
            ``(86, 89, 120)``. None for all that it builds for by itself.

    Raises:
        ImportError: onnx, TensorRT or TensorRT-RTX is missing, or TensorRT is too old for plugins.
        RuntimeError: The file cannot be read or built; the message says which node or why.
        ValueError: There is no such file, it is of another kind or from another version, ``path``
            is the file itself, or an architecture is not known.
    """
    require("onnx", extra="onnx")
    from uta_fx.export.tensorrt_engine import build_engine

    source, target = _as_path(model, "model"), check_place(path)
    _check_apart(source, target)
    build_engine(source, target, rtx=rtx, architectures=architectures)


def onnxruntime_session(
    path: str | os.PathLike[str],
    providers: Sequence[Any] | None = None,
    *,
    plugin: str | os.PathLike[str] | bool = True,
    options: Any = None,
) -> Any:
    """Open a file of ``export_onnx`` in ONNX Runtime, with our kernels where they can run.

    On the CUDA provider the nodes of domain ``uta`` run by our Triton kernels, compiled for this
    GPU (seconds, once: the result is kept in ``~/.cache/uta-fx``). Everywhere else, and where that
    cannot be (the log says which, and why), they run by their functions in the file.

    Args:
        path: The file.
        providers: As for ``onnxruntime.InferenceSession``; None for CUDA and the CPU, those of the
            two that the installed ONNX Runtime has.
        plugin: A library of ``build_onnxruntime_plugin``; True to build it where it can run; False
            to run the function.
        options: ``onnxruntime.SessionOptions``; None for the defaults. A plugin is registered in
            them, so that each session with one needs new ones.

    Returns:
        ``onnxruntime.InferenceSession``.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        RuntimeError: No provider has an operation of the file for its dtype, as the CPU's for
            bfloat16.
        TypeError: ``path``, ``options`` or ``plugin`` is of another type.
        ValueError: There is no such file, provider or library, the file is from another version,
            for TensorRT's plugins, or without its weights, ``plugin`` is for another GPU, or
            ``options`` have one already.
    """
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    from uta_fx.export.onnxruntime_session import open_session

    if not isinstance(plugin, (bool, str, os.PathLike)):
        raise TypeError(f"plugin must be a file, True or False, got {plugin!r}")
    library = plugin if isinstance(plugin, bool) else Path(plugin)
    return open_session(_as_path(path, "path"), providers, library, options)


def bind_tensors(
    session: Any, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> Any:
    """Let a session read and write tensors of PyTorch where they lie, without a copy.

    A session on a GPU has a stream of its own: what PyTorch still computes of the inputs has to be
    waited for (``torch.cuda.synchronize()``). A run returns when the outputs are written.

    Args:
        session: ``onnxruntime.InferenceSession``.
        inputs: By the names of the file's inputs, contiguous, on the CPU or the session's GPU, of
            the dtypes and sizes that the file says; a size that it names instead may be any.
        outputs: By the names of its outputs, likewise; written by every run.

    Returns:
        ``onnxruntime.IOBinding``, for ``session.run_with_iobinding``. It keeps the tensors alive.

    Raises:
        ImportError: onnx or onnxruntime is missing.
        TypeError: ``session``, ``inputs`` or ``outputs`` is of another type.
        ValueError: A tensor is not contiguous, or not what the file says, or an input is missing.
    """
    require("onnx", extra="onnx")
    require("onnxruntime", extra="onnx")
    from uta_fx.export.onnxruntime_session import bind

    return bind(session, inputs, outputs)


def build_onnxruntime_plugin(
    model: str | os.PathLike[str], path: str | os.PathLike[str], *, architecture: int
) -> None:
    """Compile our kernels for a file's sparse attention and selection for ONNX Runtime.

    Needs Triton and a C compiler, and no GPU. ONNX Runtime 1.22 or later loads the library by
    ``SessionOptions.register_custom_ops_library(path)``, from any language; it depends on libc
    alone. Its nodes run on the CUDA provider only, so register it only there.

    Args:
        model: File of ``export_onnx``.
        path: Library to write, such as ``model.sm_90.so``; replaced if it is there.
        architecture: Compute capability of the GPU: 80, 86, 89, 90, 100 or 120.

    Raises:
        ImportError: onnx or Triton is missing.
        RuntimeError: There is no C compiler, or it or Triton failed.
        ValueError: There is no such file or it is from another version, ``path`` is the file
            itself, it has no sparse attention, a size that a kernel needs is dynamic, or the
            architecture is another.
    """
    require("onnx", extra="onnx")
    require("triton", extra="triton")
    from uta_fx.export.onnx_functions import check_version
    from uta_fx.export.onnxruntime_plugin import build_plugin

    source = _as_path(model, "model")
    check_version(source, "model")
    target = check_place(path)
    _check_apart(source, target)
    build_plugin(source, architecture, target)


def onnx_schema(name: str = "SparseAttention") -> Any:
    """The schema of a node ``uta::name`` in the files of ``export_onnx``.

    Inputs, outputs, types and attributes with what they mean, the version, and the inference of
    shapes. Files need it nowhere, because each has the functions of its nodes; tools that are to
    know a node by itself do: ``onnx.defs.register_schema(uta_fx.onnx_schema())``.

    Args:
        name: ``"SparseAttention"``, a node that selects its blocks (``"BlockStatistics"``,
            ``"BlockScores"``, ``"SelectBlocks"``, ``"SelectCounted"`` or ``"ListBlocks"``), or
            ``"FitTail"``.

    Returns:
        ``onnx.defs.OpSchema``.

    Raises:
        ImportError: onnx is missing.
        ValueError: There is no such node.
    """
    require("onnx", extra="onnx")
    from uta_fx.export.onnx_schema import published_schema

    return published_schema(name)


def check_place(path: str | os.PathLike[str], suffix: str | None = None, why: str = "") -> Path:
    """Raise ``ValueError``, before the work, where a file cannot be written.

    Args:
        path: The file.
        suffix: What its name must end in; None for anything.
        why: Words for the message.

    Returns:
        What is to be replaced: the file, or what a link leads to, which stays a link.
    """
    given = _as_path(path, "path")
    if suffix is not None and given.suffix != suffix:
        raise ValueError(f"path must end in {suffix}{why}, got {given}")
    target = Path(os.path.realpath(given))
    if not target.parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {target}")
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {target}")
    if target.exists() and not target.is_file():
        raise ValueError(f"path must be a file or new, got {target}, which is neither")
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise ValueError(
            f"path must have a name of at most {LONGEST_NAME} bytes, got {target.name!r}"
        )
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"path must lie in a folder that can be written to, got {target}")
    return target


def _as_path(path: Any, name: str) -> Path:
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name} must be the name of a file, got {path!r}")
    return Path(path)


def _check_apart(model: Path, target: Path) -> None:
    if target == model.resolve():
        raise ValueError(f"path must be another file than model, got {target} for both")


def _opset(model: Any, opset: int | None) -> int:
    if opset is None:
        return 22 if any(x.dtype == torch.bfloat16 for x in _parameters(model)) else 18
    if not isinstance(opset, int):
        raise TypeError(f"opset must be a whole number or None, got {opset!r}")
    latest = require("onnx.defs", extra="onnx").onnx_opset_version()
    if not 18 <= opset <= latest:
        raise ValueError(f"opset must be at least 18 and at most {latest}, got {opset}")
    return opset


class _Found(NamedTuple):
    """What an export has found out beside attention.

    Attributes:
        branches: What was decided.
        left: Names of what the model leaves in objects among its arguments, its last outputs.
        sizes: What ``dynamic_shapes`` call symbols of the program.
    """

    branches: tuple[str, ...]
    left: tuple[str, ...]
    sizes: dict[str, str]


def _metadata(config: Config, branches: Sequence[str]) -> dict[str, str]:
    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    metadata = {CONFIG_KEY: json.dumps(settings, default=repr)}
    if branches:
        metadata[BRANCHES_KEY] = json.dumps(branches)
    return metadata


def _parameters(model: Any) -> Iterator[torch.Tensor]:
    return model.parameters() if isinstance(model, torch.nn.Module) else iter(())


def _without_gradients(model: Any) -> contextlib.AbstractContextManager[None]:
    """The mode to export in: weights, or inputs alone, may be inference tensors.

    Weights that were made so and require gradients may only be traced in the mode that made them.
    """
    inference = any(x.is_inference() for x in _parameters(model))
    return torch.inference_mode() if inference else torch.no_grad()


def sparse_program(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    config: Config,
    decide_branches: bool,
    no_padding: str | None = None,
) -> tuple[ExportedProgram, Explanation, _Found]:
    """Export and rewrite; what was decided is logged as the backend logs it.

    ``no_padding`` is that of a ``Plan``, where the file's form cannot hold it.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            "args must be a tuple of the model's positional arguments, and may be empty, got"
            f" {type(args).__name__}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"kwargs must be a dict of the model's arguments or None, got {type(kwargs).__name__}"
        )
    if not isinstance(decide_branches, bool):
        raise TypeError(f"decide_branches must be True or False, got {decide_branches!r}")
    if config.dense_until:
        raise ValueError(
            f"dense_until={config.dense_until} cannot be exported: a file is one step. Export a"
            " second file with density=1 for the steps that run dense"
        )
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model must be the module itself, got what TorchScript made of one")
    if model.training:
        raise ValueError("model must be in eval mode (model.eval()), got one in training mode")
    if any(x.is_meta for x in model.parameters()):
        raise ValueError("model must have weights, got one on the meta device")
    with torch.no_grad(), opened(model, args, kwargs or {}) as given:
        check_dynamic_shapes(model, given.args, given.kwargs, dynamic_shapes)
        with naming_missing_packages():
            asked = find_branches(model, given.args, given.kwargs) if decide_branches else ()
        branches = tuple(branch for branch in asked if not branch.is_number)

        def trace() -> ExportedProgram:
            with decided(model, branches), naming_missing_packages():
                return torch.export.export(
                    model, given.args, given.kwargs, dynamic_shapes=dynamic_shapes
                )

        try:
            try:
                program = trace()
            except Exception:
                if branches == asked:
                    raise
                branches = asked  # the numbers too, which a graph knows better as symbols
                program = trace()
        except ImportError:
            raise
        except Exception as error:  # of many kinds: data that decides, objects, shapes
            raise ValueError(_why_not_traced(str(error).strip(), dynamic_shapes)) from error
        _check_dropout(program)
        written = sorted(set(check_kept(program)) - set(given.left))
        try:
            plan = plan_of(config, symbolic=config.order in ("none", *COMPUTED_ORDERS))
            plan = dataclasses.replace(plan, no_padding=plan.no_padding or no_padding)
            program, sites = sparsify_program(program, plan, dynamic_shapes)
        except RuntimeError as error:  # torch's, where a policy reads a tensor on the host
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"policy={config.policy!r} cannot be exported: what it chooses must follow from"
                f" tensor operations alone, without a look at their values ({reason})"
            ) from error
    for site in sites:
        logger.info("%s: %s (%s)", site.name, "sparse" if site.sparse else "dense", site.reason)
    refused = [site for site in sites if site.expected and not site.sparse]
    if refused and config.strict:
        raise ValueError(f"strict: {refused[0].name} stays dense: {refused[0].reason}")
    if refused and not any(site.sparse for site in sites):
        logger.warning("no attention was rewritten; %s: %s", refused[0].name, refused[0].reason)
    # a line of code may ask in every layer
    found = _Found(
        tuple(dict.fromkeys(map(str, branches))), tuple(given.left),
        names_of_symbols(model, program, dynamic_shapes),
    )  # fmt: skip
    notes = [f"decided by these inputs, others give NaN: {branch}" for branch in found.branches]
    if found.left:
        notes.append(f"what the model leaves in its arguments is output: {', '.join(found.left)}")
    if written:
        notes.append(f"the model writes to {', '.join(written)}, which the file leaves as it is")
    if given.changed:
        notes.append(
            f"the model sets {', '.join(given.changed)} as it runs: every run of the file starts"
            " from what was there now, and keeps nothing"
        )
    if note := note_on_layers(sites, config):
        notes.append(note)
    return program, Explanation(sites=tuple(sites), graphs=1, notes=tuple(notes)), found


def _check_dropout(program: ExportedProgram) -> None:
    """Refuse a part that is in training mode inside a model in eval mode."""
    for node in program.graph.nodes:
        name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if name.endswith("dropout") and node.args[1] and node.args[2]:
            part = module_path(node) or "forward"
            raise ValueError(
                f"model must be in eval mode in all its parts (model.eval()), got one of which"
                f" {part} drops out at random with p={node.args[1]}"
            )


def _why_not_traced(said: str, dynamic_shapes: Any) -> str:
    """What torch.export said, with what a user can do."""
    reason = said.partition("\n")[0].rstrip(".")
    if reason.startswith(("Constraints violated", "Found the following conflicts")):
        fixes = said.partition("Suggested fixes:\n")[2]  # one a line, up to an empty line
        lines = [x.strip(" -") for x in fixes.partition("\n\n")[0].splitlines()]
        conflicts = (x for x in said.splitlines() if x.lstrip().startswith("- "))
        needs = ", ".join(lines) or next(conflicts, reason).strip(" -").partition(". ")[0]
        return (
            f"dynamic_shapes must be as the model needs them: {needs.rstrip('.')}. A dimension that"
            " is a number there cannot be dynamic: leave it out, and export one file for each size;"
            " one of size 1 in the example inputs always is a number: give it size 2; one that must"
            " be a multiple, as of a patch of 2 x 2, is 2 * Dim('rows')"
        )
    if "`dynamic_shapes" in reason or reason.startswith("Static shape constraint"):
        return f"dynamic_shapes must fit the arguments: {reason}"
    alone = " and no dynamic_shapes" if dynamic_shapes is not None else ""
    return (
        f"model cannot be traced by torch.export: {reason}. See whether it runs with these"
        f" arguments{alone}; if so, export a module that is one graph: no branch on the values of"
        " tensors, and no size read from one, unless decide_branches=True takes the way and the"
        " numbers of these inputs"
    )
