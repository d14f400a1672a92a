"""The grammar of symbolic sizes in an exported program, which torch passes to sympy as strings.

sympy evaluates them: `sympy.sympify("__import__('os').system('…')")` runs the command. So a string is allowed only if
it consists of symbols, numbers, operators and the functions that torch writes.
"""

import ast
import re
from typing import Final

FUNCTIONS: Final = frozenset(
    """Abs Add And BooleanFalse BooleanTrue CeilDiv CeilToInt CleanDiv Equality Eq Float FloatPow FloatTrueDiv FloorDiv
    FloorToInt Ge GreaterThan Gt Identity IntInfinity IntTrueDiv Integer IsNonOverlappingAndDenseIndicator LShift Le
    LessThan Lt Max Min Mod ModularIndexing Mul Ne NegativeIntInfinity NegativeOne Not One Or Piecewise Pow PowByNatural
    PythonMod RShift Rational RoundDecimal RoundToInt StrictGreaterThan StrictLessThan Symbol ToFloat TruncToFloat
    TruncToInt Unequality Where Zero ceiling floor sqrt""".split()  # noqa: SIM905
)
_WORDS: Final = frozenset({"true", "false", "oo", "int_oo", "True", "False"})
_ASSUMPTIONS: Final = frozenset({"positive", "negative", "nonnegative", "integer", "real", "finite", "precision"})
# torch counts up to the number of a symbol, one by one.
_SYMBOL: Final = re.compile(r"[A-Za-z]{1,10}\d{1,6}\Z", re.ASCII)
_TEXT: Final = re.compile(r"[A-Za-z0-9_.+-]{1,40}\Z")
_POWERS: Final = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"})
_OPERATORS: Final = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARED: Final = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)

MAX_LENGTH: Final = 20_000
MAX_NODES: Final = 2_000
MAX_POWERS: Final = 8
MAX_EXPONENT: Final = 16


def is_symbolic_expression(text: str) -> bool:
    """Return whether a string is an arithmetic expression over symbols and nothing else.

    >>> is_symbolic_expression("Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(1))")
    True
    >>> is_symbolic_expression("s0 // 2 + Max(1, u1)")
    True
    >>> is_symbolic_expression("__import__('os').system('x')"), is_symbolic_expression("10**10**10")
    (False, False)
    """
    if len(text) > MAX_LENGTH:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    powers = sum(_is_power(node) for node in nodes)
    return len(nodes) <= MAX_NODES and powers <= MAX_POWERS and _legal(tree.body)


def _is_power(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Pow)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _POWERS


def _legal(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=bool()):
            return True
        case ast.Constant(value=int() | float() as number):
            return abs(number) < 1 << 64
        case ast.Name(id=name):
            return name in _WORDS or (name not in FUNCTIONS and _SYMBOL.match(name) is not None)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=inner):
            return _legal(inner)
        case ast.BinOp(left=left, op=op, right=right):
            small = not isinstance(op, ast.Pow) or _is_small(right)
            return isinstance(op, _OPERATORS) and small and _legal(left) and _legal(right)
        case ast.BoolOp(values=values):
            return all(map(_legal, values))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            return all(isinstance(op, _COMPARED) for op in ops) and all(map(_legal, [left, *rest]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in FUNCTIONS:
            return all(map(_is_assumption, keywords)) and _legal_args(name, args)
    return False


def _legal_args(name: str, args: list[ast.expr]) -> bool:
    if name in ("Symbol", "Float"):
        first = args[0].value if len(args) == 1 and isinstance(args[0], ast.Constant) else None
        if name == "Symbol":
            return isinstance(first, str) and _TEXT.match(first) is not None
        return isinstance(first, int | float) or (isinstance(first, str) and _TEXT.match(first) is not None)
    if name in _POWERS and not (len(args) == 2 and _is_small(args[1])):
        return False
    return all(map(_legal, args))


def _is_small(exponent: ast.expr) -> bool:
    """Return whether an exponent is too small to make a number of millions of digits."""
    nodes = list(ast.walk(exponent))
    assumptions = {id(node.value) for node in nodes if isinstance(node, ast.keyword)}  # such as precision=53
    numbers = [n.value for n in nodes if isinstance(n, ast.Constant) and id(n) not in assumptions]
    nested = any(map(_is_power, nodes))
    return not nested and len(numbers) <= 2 and all(map(_is_small_number, numbers))


def _is_small_number(value: object) -> bool:
    """Return whether the number in a constant is small; other text is the name of a symbol."""
    try:
        return abs(float(value)) <= MAX_EXPONENT if isinstance(value, int | float | str) else False
    except (ValueError, OverflowError):
        return isinstance(value, str)


def _is_assumption(keyword: ast.keyword) -> bool:
    value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
    if keyword.arg == "precision":
        return isinstance(value, int) and 0 < value <= 1000
    return keyword.arg in _ASSUMPTIONS and isinstance(value, bool)
