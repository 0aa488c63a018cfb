"""Transformer Engine without its kernels: its modules, classes and signatures as its Python sources have them.

The sources cannot be imported where there is no CUDA. They are parsed instead, and whoever imports a module gets one
that has the same names: classes with the same bases, methods and fields, and functions with the same arguments, which
compute nothing unless `BEHAVIOUR` says what. So Megatron-Core and megadiff run on them as they would on the package,
and an argument or a name that the package does not have fails as it would there.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "transformer_engine"
COMPILED = "transformer_engine_torch"
"""The extension module, whose names no Python source tells."""


@dataclass
class Seen:
    """What was asked of the skeleton while it was used."""

    calls: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Arguments of all calls, by qualified name."""
    ignored: dict[str, set[str]] = field(default_factory=dict)
    """Of recipes: arguments that are no fields, which pydantic's dataclasses ignore without a word."""

    texts: dict[str, set[str]] = field(default_factory=dict)
    """By name below the package: all texts in a function's source, among them the keywords that it asks for by name."""


SEEN = Seen()


def install(root: Path, version: str) -> None:
    """Let this process import the package from the unpacked wheel at `root`; nothing of it is executed."""
    sys.meta_path.insert(0, _Finder(root))
    package = importlib.import_module(PACKAGE)
    package.__version__ = version  # type: ignore[attr-defined]


class _Finder(MetaPathFinder, Loader):
    """Finds the modules that the wheel has, and makes them from their sources."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname.split(".")[0] != PACKAGE:
            return None
        place = self._root.joinpath(*fullname.split("."))
        for file, is_package in ((place / "__init__.py", True), (place.with_suffix(".py"), False)):
            if file.exists():
                return importlib.util.spec_from_loader(fullname, self, origin=str(file), is_package=is_package)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None and module.__spec__.origin is not None
        nodes = dict(_named(ast.parse(Path(module.__spec__.origin).read_text()).body))
        is_package = module.__spec__.submodule_search_locations is not None

        def find(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            if name in nodes:
                found = _make(nodes[name], name, module)
            elif is_package and importlib.util.find_spec(f"{module.__name__}.{name}"):
                found = importlib.import_module(f"{module.__name__}.{name}")
            else:
                raise AttributeError(f"module {module.__name__} has no {name}")
            setattr(module, name, found)
            return found

        module.__getattr__ = find  # type: ignore[method-assign]


def _named(body: list[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that statements define, the last definition of each counting; branches are taken as if all ran."""
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                yield name, node
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                yield name, value
            case ast.Import(names=names):
                yield from ((alias.asname or alias.name.split(".")[0], node) for alias in names)
            case ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name, node) for alias in names)
            case ast.If() | ast.Try():
                for inner in (node.body, node.orelse, *(handler.body for handler in getattr(node, "handlers", []))):
                    yield from _named(inner)


def _make(node: ast.AST, name: str, module: ModuleType) -> Any:
    match node:
        case ast.ClassDef():
            return _class(node, module)
        case ast.FunctionDef():
            return _function(node, f"{module.__name__}.{name}")
        case ast.Import(names=names):
            alias = next(alias for alias in names if name in (alias.asname, alias.name.split(".")[0]))
            found = importlib.import_module(alias.name)
            return found if alias.asname else sys.modules[name]
        case ast.ImportFrom(names=names):
            alias = next(alias for alias in names if name in (alias.asname, alias.name))
            return _imported(node, alias.name, module)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return f"<{ast.unparse(node)}>"  # a value that nobody may use


def _imported(node: ast.ImportFrom, name: str, module: ModuleType) -> Any:
    """What `from … import name` brings into a module."""
    package = module.__name__ if hasattr(module, "__path__") else module.__name__.rpartition(".")[0]
    source = node.module or ""
    if node.level:
        base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
        source = f"{base}.{source}" if source else base
    if source.split(".")[0] == COMPILED:
        return _compiled(f"{source}.{name}")
    parent = importlib.import_module(source)
    if parent is module:  # a submodule of its own
        return importlib.import_module(f"{source}.{name}")
    try:
        return getattr(parent, name)
    except AttributeError:
        return importlib.import_module(f"{source}.{name}")


def _compiled(name: str) -> Callable[..., None]:
    def call(*arguments: Any, **settings: Any) -> None:
        raise AssertionError(f"{name} is compiled: nobody knows what it would return")

    return call


def _function(node: ast.FunctionDef, qualified: str) -> Any:
    """A function with the arguments of another, without its annotations, and defaults that are None."""
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    texts = {text.value for text in ast.walk(node) if isinstance(text, ast.Constant) and isinstance(text.value, str)}
    SEEN.texts[qualified.removeprefix(f"{PACKAGE}.")] = texts
    call = ast.parse(f"_called({qualified!r}, dict(locals()))", mode="eval").body
    made = ast.FunctionDef(name=node.name, args=arguments, body=[ast.Return(call)], decorator_list=[], type_params=[])
    tree = ast.fix_missing_locations(ast.Module([made], type_ignores=[]))
    namespace: dict[str, Any] = {"_called": _called}
    exec(compile(tree, qualified, "exec"), namespace)
    return namespace[node.name]


def _called(qualified: str, arguments: dict[str, Any]) -> Any:
    """Note a call, and return what it gives."""
    SEEN.calls.setdefault(qualified, []).append(arguments)
    behaviour = BEHAVIOUR.get(qualified.removeprefix(f"{PACKAGE}."))
    if behaviour is not None:
        return behaviour(arguments)
    this = arguments.get("self")
    if qualified.endswith(".__init__") and isinstance(this, nn.Module) and "_parameters" not in this.__dict__:
        nn.Module.__init__(this)
    return None


def _class(node: ast.ClassDef, module: ModuleType) -> type:
    bases = tuple(base for base in (_base(base, module) for base in node.bases) if base is not None)
    decorators = {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}
    names = dict(_named(node.body))
    if enum.Enum in bases:
        return enum.Enum(node.name, [name for name, value in names.items() if isinstance(value, ast.expr)])  # type: ignore[return-value]
    members: dict[str, Any] = {"__module__": module.__name__}
    for name, member in names.items():
        if name.startswith("__") and name != "__init__":
            continue  # what Python and torch do without them is enough
        if isinstance(member, ast.FunctionDef):
            made = _function(member, f"{module.__name__}.{node.name}.{name}")
            kinds = {"property": property, "classmethod": classmethod, "staticmethod": staticmethod}
            kind = next((ast.unparse(d) for d in member.decorator_list if ast.unparse(d) in kinds), None)
            members[name] = kinds[kind](made) if kind else made
        elif not isinstance(member, ast.ClassDef):
            members[name] = _make(member, name, module)
    if isinstance(names.get("__init__"), ast.FunctionDef):
        members["set_by_init"] = _set_by(names["__init__"])
    if decorators & {"dataclass", "dataclasses.dataclass"}:
        members["__init__"] = _recipe_init(node)
    return type(bases[0])(node.name, bases, members) if bases else type(node.name, (), members)


def _set_by(init: ast.AST) -> set[str]:
    """Attributes that a constructor assigns."""
    targets = (target for node in ast.walk(init) if isinstance(node, ast.Assign) for target in node.targets)
    return {
        target.attr for target in targets if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }


def _base(node: ast.expr, module: ModuleType) -> type | None:
    """A base class, where it is one that can be known: another skeleton, torch's, or Python's."""
    path = ast.unparse(node).split(".")
    found: Any = getattr(module, path[0], None) or getattr(importlib.import_module("builtins"), path[0], None)
    for name in path[1:]:
        found = getattr(found, name, None)
    if inspect.isclass(found) and found.__name__ not in ("ABC", "NamedTuple", "Generic"):
        return found
    return None


def _recipe_init(node: ast.ClassDef) -> Callable[..., None]:
    """A dataclass of pydantic: it takes its fields, and ignores what is none."""
    fields = {x.target.id for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)}

    def init(self: Any, **settings: Any) -> None:
        SEEN.calls.setdefault(node.name, []).append(settings)
        SEEN.ignored.setdefault(node.name, set()).update(settings.keys() - fields)

    return init


# What is computed: as little as a model needs to run once.


def _linear_init(arguments: dict[str, Any]) -> None:
    layer, tp_size = arguments["self"], arguments["tp_size"]
    nn.Module.__init__(layer)
    for name in type(layer).set_by_init & arguments.keys():
        setattr(layer, name, arguments[name])
    rows, columns = arguments["out_features"], arguments["in_features"]
    if arguments["parallel_mode"] == "row":
        columns //= tp_size
    else:
        rows //= tp_size
    if "eps" in arguments:  # the norm's
        layer.layer_norm_weight = nn.Parameter(torch.ones(columns, dtype=arguments["params_dtype"]))
    weight = torch.zeros(rows, columns, dtype=arguments["params_dtype"])
    layer.weight = nn.Parameter(weight)
    arguments["init_method"](layer.weight)


def _linear_forward(arguments: dict[str, Any]) -> Tensor:
    layer, x = arguments["self"], arguments["inp"]
    return nn.functional.linear(x, layer.weight)


def _attention_init(arguments: dict[str, Any]) -> None:
    nn.Module.__init__(arguments["self"])


def _attention_forward(arguments: dict[str, Any]) -> Tensor:
    return arguments["query_layer"].flatten(-2)


def _adam_init(arguments: dict[str, Any]) -> None:
    torch.optim.Optimizer.__init__(arguments["self"], arguments["params"], {"lr": arguments["lr"]})


def _checkpoint(arguments: dict[str, Any]) -> Any:
    """Keywords that the package does not ask for are the function's."""
    known = SEEN.texts["pytorch.distributed.checkpoint"]
    others = {name: value for name, value in arguments["kwargs"].items() if name not in known}
    return arguments["function"](*arguments["args"], **others)


BEHAVIOUR: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pytorch.module.linear.Linear.__init__": _linear_init,
    "pytorch.module.linear.Linear.forward": _linear_forward,
    "pytorch.module.layernorm_linear.LayerNormLinear.__init__": _linear_init,
    "pytorch.module.layernorm_linear.LayerNormLinear.forward": _linear_forward,
    "pytorch.attention.dot_product_attention.dot_product_attention.DotProductAttention.__init__": _attention_init,
    "pytorch.attention.dot_product_attention.dot_product_attention.DotProductAttention.forward": _attention_forward,
    "pytorch.optimizers.fused_adam.FusedAdam.__init__": _adam_init,
    "pytorch.module.base.TransformerEngineBaseModule.register_parameter": lambda arguments: (
        nn.Module.register_parameter(arguments["self"], arguments["name"], arguments["param"])
    ),
    "pytorch.distributed.checkpoint": _checkpoint,
    "pytorch.cpu_offload.get_cpu_offload_context": lambda arguments: (contextlib.nullcontext(), lambda x: x),
    **{
        f"pytorch.quantization.{name}": lambda arguments: contextlib.nullcontext()
        for name in ("autocast", "fp8_autocast", "fp8_model_init", "quantized_model_init")
    },
    **{
        f"pytorch.quantization.{name}": lambda arguments: (True, "")
        for name in ("check_fp8_support", "check_fp8_block_scaling_support", "check_mxfp8_support")
    },
}
"""By qualified name below the package."""
