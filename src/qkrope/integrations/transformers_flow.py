"""How q and k flow through an attention module's forward, and that forward with its calls replaced.

transformers writes one forward an architecture, and all of them the same way: norms are modules
(``self.q_norm(...)``), the rotation is a function of the module's file (``apply_rotary...(q, k,
cos, sin)``), and between the two stand views alone. `read` follows the values through the source of
one module's forward and finds which norms meet which rotation, so that one call can do both;
`rewrite` compiles the same source with those calls replaced. A value that anything else reads on
the way (a scale, a slice) keeps its norm as a call of its own: that is slower and never wrong.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

__all__ = ["NORMS", "Flow", "NormSite", "Refused", "TurnSite", "read", "rewrite"]

# Norms of q, k and v by the names that attention modules give them: the side that each is of.
NORMS = {
    "q_norm": "q",
    "q_layernorm": "q",
    "query_layernorm": "q",
    "q_b_norm": "q",
    "k_norm": "k",
    "k_layernorm": "k",
    "key_layernorm": "k",
    "kv_norm": "k",
    "qk_norm": "qk",
    "v_norm": "v",
    "kv_a_layernorm": "latent",
    "k_rope_only_layernorm": "rest",
}
_ROTATION = "apply_rotary"
_VIEWS = {"view", "reshape", "transpose", "contiguous", "unflatten", "flatten"}
_ABOUT = {"dtype", "device", "shape", "ndim"}  # which a norm and a rotation leave as they are
_KNOWN = {"self", "hasattr", "getattr"}  # what a test that the module alone decides may name


class Refused(Exception):
    """Why a module stays as it is."""


@dataclass(eq=False)
class NormSite:
    """One call of a norm."""

    node: ast.Call
    name: str
    used: bool = False  # by something else than views and a rotation
    met: TurnSite | None = None  # the rotation that does this norm too
    first: bool = True  # before that rotation, not after it


@dataclass(eq=False)
class TurnSite:
    """One call of a rotation."""

    node: ast.Call
    name: str
    norms: list[NormSite | None] = field(default_factory=lambda: [None, None])
    used: bool = False


@dataclass(frozen=True, eq=False)
class Flow:
    """The calls that one module makes, in the order of its source."""

    function: FunctionType
    tree: ast.FunctionDef
    norms: tuple[NormSite, ...]
    turns: tuple[TurnSite, ...]


_Value = NormSite | tuple[TurnSite, int] | None


def rotations(function: Any) -> list[str]:
    """Functions of the file, called by ``function``, that rotate."""
    code = getattr(function, "__code__", None)
    return [] if code is None else [n for n in code.co_names if n.startswith(_ROTATION)]


def read(module: Any, turns: bool) -> Flow:
    """The flow through ``type(module).forward``, where tests that the module decides are decided.

    ``turns`` says whether the model gives this layer ``position_embeddings``.
    Raises Refused where the source cannot be read, or is not that of the code that runs.
    """
    function = type(module).forward
    if not isinstance(function, FunctionType) or function.__code__.co_freevars:
        raise Refused("its forward is no plain function of a file")
    code = function.__code__
    try:
        source = textwrap.dedent(inspect.getsource(code))
        file = "".join(inspect.findsource(code)[0])
    except OSError:
        raise Refused("the source of its forward is not there") from None
    tree = ast.parse(source).body[0]
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Refused("its forward is decorated")
    if _words(code) not in map(_words, _codes(file)):
        raise Refused("the source of its forward is not what runs")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    reader = _Reader(module, turns)
    reader.block(tree.body)
    for turn in reader.turns:
        if turn.used and any(n is not None and not n.first for n in turn.norms):
            raise Refused(f"{turn.name}: its result is read before it is normalised")
    return Flow(function, tree, tuple(reader.norms), tuple(reader.turns))


@functools.lru_cache(maxsize=4)
def _codes(file: str) -> list[CodeType]:
    """Every function of a file: compiled whole, since its imports decide how a call is compiled."""
    found = [compile(file, "", "exec", dont_inherit=True)]
    for code in found:
        found += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


def _words(code: CodeType) -> tuple[Any, ...]:
    """What a function does, and where its source stands."""
    # repr tells -0.0 from 0.0 and 1 from True; that of a set has no fixed order.
    consts: list[Any] = []
    for c in code.co_consts:
        inner = _words(c) if isinstance(c, CodeType) else None
        consts.append(inner or (c if isinstance(c, frozenset) else repr(c)))
    where = code.co_name, code.co_firstlineno
    return where, code.co_code, code.co_names, code.co_varnames, consts


class _Reader:
    """One pass over the statements; ``values`` says where each variable's value comes from."""

    def __init__(self, module: Any, turns: bool) -> None:
        self.module, self.has_positions = module, turns
        self.values: dict[str, _Value] = {}
        self.norms: list[NormSite] = []
        self.turns: list[TurnSite] = []

    def block(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self.assign(statement.targets[0], statement.value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self.assign(statement.target, statement.value)
            elif isinstance(statement, ast.If):
                self.branch(statement)
            else:
                if hasattr(statement, "body") and any(map(_is_site, ast.walk(statement))):
                    raise Refused("its forward normalises or rotates in a loop, or the like")
                self.read_all(statement)

    def assign(self, target: ast.expr, expression: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            names = [t.id if isinstance(t, ast.Name) else None for t in target.elts]
            if isinstance(expression, ast.Tuple) and len(expression.elts) == len(names):
                found = [self.value(item) for item in expression.elts]
            else:
                value = self.value(expression)
                pair = isinstance(value, tuple) and len(names) == 2
                if value is not None and not pair:
                    self.use(value)
                found = [(value[0], i) if pair else None for i in range(len(names))]  # type: ignore[index]
            for name, item in zip(names, found, strict=True):
                self.put(name, item)
        else:
            self.put(target.id if isinstance(target, ast.Name) else None, self.value(expression))

    def put(self, name: str | None, value: _Value) -> None:
        if name is None:
            self.use(value)
        else:
            self.values[name] = value

    def branch(self, statement: ast.If) -> None:
        decided = self.decide(statement.test)
        if decided is not None:
            self.block(statement.body if decided else statement.orelse)
            return
        self.read_all(statement.test)
        before, ends = dict(self.values), []
        for body in (statement.body, statement.orelse):
            self.values = dict(before)
            self.block(body)
            ends.append(self.values)
        names = {*ends[0], *ends[1]}
        self.values = {name: ends[0].get(name) for name in names}
        for name in names:
            if ends[0].get(name) != ends[1].get(name):
                for end in ends:  # whichever it was, its norm is not put off
                    if isinstance(value := end.get(name), NormSite):
                        self.use(value)
                self.values[name] = None

    def decide(self, test: ast.expr) -> bool | None:
        """The outcome of a test, None where it is not the module's alone."""
        text = ast.unparse(test)
        if text in ("position_embeddings is not None", "position_embeddings is None"):
            return self.has_positions == text.endswith("not None")
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        calls = [node.func for node in ast.walk(test) if isinstance(node, ast.Call)]
        plain = all(isinstance(f, ast.Name) for f in calls)
        if "self" not in names or not names <= _KNOWN or not plain:
            return None
        try:
            return bool(eval(text, {"self": self.module}))  # attributes of the module, no more
        except AttributeError:
            return None

    def value(self, node: ast.expr) -> _Value:
        """Where an expression's value comes from; all else that it reads counts as used."""
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.IfExp) and (decided := self.decide(node.test)) is not None:
            return self.value(node.body if decided else node.orelse)
        if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
            if not isinstance(node.value, ast.Name):
                self.read_all(node.value)
            return None
        if not isinstance(node, ast.Call):
            self.read_all(node)
            return None
        function = node.func
        if (name := _norm_name(node)) is not None:
            return self.norm(node, name)
        if (name := _rotation_name(node)) is not None:
            return self.turn(node, name)
        if isinstance(function, ast.Attribute) and function.attr in _VIEWS:
            inner = self.value(function.value)
            self.read_all(*node.args, *node.keywords)
            return inner
        self.read_all(node)
        return None

    def norm(self, node: ast.Call, name: str) -> _Value:
        inner = self.value(node.args[0])
        site = NormSite(node, name)
        self.norms.append(site)
        if isinstance(inner, tuple):  # after a rotation
            turn, index = inner
            turn.norms[index], site.met, site.first = site, turn, False
            return None
        self.use(inner)
        return site

    def turn(self, node: ast.Call, name: str) -> _Value:
        site = TurnSite(node, name)
        self.turns.append(site)
        for i, argument in enumerate(node.args):
            value = self.value(argument)
            if isinstance(value, NormSite) and i < 2 and value.met is None and not value.used:
                site.norms[i], value.met = value, site
            else:
                self.use(value)
        self.read_all(*node.keywords)
        return site, 0

    def read_all(self, *nodes: ast.AST) -> None:
        """Mark every value that is read below the nodes as used."""
        for node in nodes:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.use(self.value(child))
                elif isinstance(child, ast.stmt):
                    self.block([child])
                else:
                    self.read_all(child)

    def use(self, value: _Value) -> None:
        if isinstance(value, NormSite):
            value.used = True
            if value.met is not None:
                value.met.norms = [None if n is value else n for n in value.met.norms]
                value.met = None
        elif value is not None:
            value[0].used = True


def _norm_name(node: ast.AST) -> str | None:
    """x of ``self.x(...)`` where that is a norm."""
    if not isinstance(node, ast.Call) or not isinstance(f := node.func, ast.Attribute):
        return None
    own = isinstance(f.value, ast.Name) and f.value.id == "self"
    plain = len(node.args) == 1 and not node.keywords
    return f.attr if own and plain and f.attr in NORMS else None


def _rotation_name(node: ast.AST) -> str | None:
    """The function that a call of a rotation names."""
    if not isinstance(node, ast.Call) or not isinstance(f := node.func, ast.Name):
        return None
    return f.id if f.id.startswith(_ROTATION) else None


def _is_site(node: ast.AST) -> bool:
    return _norm_name(node) is not None or _rotation_name(node) is not None


# ---- the same source with other calls -----------------------------------------------------------

_compiled: dict[Any, FunctionType] = {}


def rewrite(flow: Flow) -> FunctionType:
    """The forward whose norms and rotations are calls of ``self._qkrope``.

    A norm that a rotation does too is left out; another becomes ``self._qkrope.norm(self, name,
    x)``. The i-th rotation becomes ``self._qkrope.turn(self, i, ...)``. Globals, defaults, file
    and line numbers are the original's. Modules whose calls are alike share one function.
    """
    changes: dict[int, ast.expr] = {}
    key: list[Any] = [flow.function]
    for site in flow.norms:
        apart = [ast.Name("self", ast.Load()), ast.Constant(site.name), site.node.args[0]]
        changes[id(site.node)] = site.node.args[0] if site.met else _own("norm", apart, [])
        key.append((site.node.lineno, site.node.col_offset, site.met is None))
    for i, turn in enumerate(flow.turns):
        arguments = [ast.Name("self", ast.Load()), ast.Constant(i), *turn.node.args]
        changes[id(turn.node)] = _own("turn", arguments, turn.node.keywords)
        key.append((turn.node.lineno, turn.node.col_offset, i))
    if (found := _compiled.get(tuple(key))) is not None:
        return found
    tree = _Replace(changes).visit(flow.tree)
    tree.returns = None  # annotations are the original's, put back below
    for argument in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs):
        argument.annotation = None
    for argument in (tree.args.vararg, tree.args.kwarg):
        if argument is not None:
            argument.annotation = None
    made: dict[str, Any] = {}
    original = flow.function
    program = ast.fix_missing_locations(ast.Module([tree], []))
    exec(compile(program, original.__code__.co_filename, "exec"), original.__globals__, made)
    function = made[original.__name__]
    for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__qualname__"):
        setattr(function, name, copy.copy(getattr(original, name)))
    function.__module__ = original.__module__
    _compiled[tuple(key)] = function
    return function


def is_ours(function: Any) -> bool:
    """Was it made by `rewrite`?"""
    return any(function is made for made in _compiled.values())


def _own(name: str, arguments: Sequence[ast.expr], keywords: list[ast.keyword]) -> ast.Call:
    holder = ast.Attribute(ast.Name("self", ast.Load()), "_qkrope", ast.Load())
    return ast.Call(ast.Attribute(holder, name, ast.Load()), list(arguments), keywords)


class _Replace(ast.NodeTransformer):
    def __init__(self, changes: dict[int, ast.expr]) -> None:
        self.changes = changes

    def visit(self, node: ast.AST) -> Any:
        change = self.changes.pop(id(node), None)  # once: a change holds parts of what it replaces
        if change is None:
            return self.generic_visit(node)
        return self.visit(ast.copy_location(change, node))
