"""What the text of a policy says: its rules, their thresholds and reasons, and the annotations that it can do without.

A policy is one SELECT that returns `uid` and BOOLEAN columns, one row per image. Every BOOLEAN column is a rule; an image is kept
when all of its rules are true. NULL is unknown, and not kept. `curation.policy` runs it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import sqlglot
from sqlglot import exp

from curation.buckets import buckets

_OPERATORS = {exp.LT: "<", exp.LTE: "<=", exp.GT: ">", exp.GTE: ">="}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
_ELSEWHERE = (exp.Query, exp.Lambda)  # what stands in these has other columns than the rule


@dataclass(frozen=True)
class Term:
    """One numeric comparison of a rule: `column` (a column, or an expression over columns) `operator` `threshold`."""

    column: str
    operator: str  # < <= > >=
    threshold: float

    def margin(self, value: float | None) -> float | None:
        """How far a value lies on the side where the term holds; negative where it fails, None for an unknown value."""
        if value is None:
            return None
        return self.threshold - value if self.operator in ("<", "<=") else value - self.threshold


@dataclass(frozen=True)
class Rule:
    """A BOOLEAN column of a policy."""

    name: str
    expression: str
    comment: str  # the reason, as written beside the rule
    terms: tuple[Term, ...]  # the numeric comparisons that all have to hold; others (OR, CASE) are not listed
    asks_missing: tuple[str, ...] = ()  # annotations without which the rule keeps every image: OR missing('...')


@dataclass(frozen=True)
class Policy:
    """A policy file: its name and its text."""

    name: str
    sql: str

    @property
    def resolution(self) -> int:
        """The resolution that the selection is for, from the header comment `-- resolution: 256`.

        Raises:
            ValueError: no such comment, or not a multiple of 16.
        """
        found = re.search(r"^--\s*resolution:\s*(\d+)\s*$", self.sql, re.MULTILINE)
        if not found:
            raise ValueError(f"policy {self.name!r} does not name its resolution; add a line such as `-- resolution: 256` at its head")
        buckets(int(found[1]))
        return int(found[1])


def rules(sql: str) -> tuple[Rule, ...]:
    """The columns that a policy returns, but for uid, in order. Which of them are BOOLEAN only DuckDB knows.

    Raises:
        ValueError: not one SELECT statement.
    """
    return tuple(_rule(column) for column in _columns(parse(sql)))


def parse(sql: str) -> exp.Select:
    """The one SELECT of a policy.

    Raises:
        ValueError: something else.
    """
    try:
        statements = [s for s in sqlglot.parse(sql, dialect="duckdb") if s is not None and not isinstance(s, exp.Semicolon)]
    except (sqlglot.errors.SqlglotError, RecursionError) as error:
        raise ValueError(f"the policy is not SQL: {re.sub(chr(27) + r'.*?m', '', str(error))}") from error
    if len(statements) != 1 or not isinstance(statements[0], exp.Select):
        kinds = ", ".join(type(s).__name__ for s in statements) or "nothing"
        raise ValueError(f"a policy is one SELECT; this one has {kinds}")
    return statements[0]


def _columns(query: exp.Select) -> list[exp.Expression]:
    return [column for column in query.selects if column.alias_or_name != "uid" and not column.is_star]


def _rule(column: exp.Expression) -> Rule:
    comments = [comment.strip() for node in column.walk() for comment in node.comments or ()]
    expression = column.this if isinstance(column, exp.Alias) else column
    asked = tuple(dict.fromkeys(_asked(expression)))
    return Rule(column.alias_or_name, text(expression), " ".join(comments), tuple(_terms(bounds_apart(expression))), asked)


def text(expression: exp.Expression) -> str:
    """An expression as DuckDB reads it."""
    return expression.sql(dialect="duckdb", comments=False, normalize_functions=False)


def expression_of(sql: str, rule: str) -> exp.Expression:
    """The expression of a rule, each BETWEEN two numbers written as two comparisons."""
    found = next(column for column in _columns(parse(sql)) if column.alias_or_name == rule)
    return bounds_apart(found.this if isinstance(found, exp.Alias) else found)


def asks_missing(sql: str) -> tuple[str, ...]:
    """The annotations that a policy can do without: it says `missing('...')` of them."""
    return tuple(dict.fromkeys(_asked(parse(sql))))


def _asked(expression: exp.Expression) -> Iterator[str]:
    for call in expression.find_all(exp.Anonymous):
        if call.name.lower() == "missing" and len(call.expressions) == 1 and call.expressions[0].is_string:
            yield call.expressions[0].name


def bounds_apart(expression: exp.Expression) -> exp.Expression:
    """A copy in which `x BETWEEN 1 AND 2` is `(x >= 1 AND x <= 2)`."""

    def apart(node: exp.Expression) -> exp.Expression:
        if isinstance(node, exp.Between) and number(node.args["low"]) is not None and number(node.args["high"]) is not None:
            value, low, high = node.this, node.args["low"], node.args["high"]
            return exp.paren(exp.and_(exp.GTE(this=value.copy(), expression=low), exp.LTE(this=value.copy(), expression=high)))
        return node

    return exp.paren(expression.copy(), copy=False).transform(apart, copy=False).this


def _terms(expression: exp.Expression) -> Iterator[Term]:
    """The comparisons with a number in a conjunction. `... OR missing('x')` is what it is where x is there."""
    expression = expression.unnest()
    if isinstance(expression, exp.And):
        yield from _terms(expression.left)
        yield from _terms(expression.right)
    elif isinstance(expression, exp.Or) and any(_is_missing(side) for side in (expression.left, expression.right)):
        yield from _terms(expression.left if _is_missing(expression.right) else expression.right)
    elif (found := comparison(expression)) is not None:
        yield found


def _is_missing(expression: exp.Expression) -> bool:
    return isinstance(expression, exp.Anonymous) and expression.name.lower() == "missing"


def comparison(expression: exp.Expression) -> Term | None:
    """A comparison of something with a numeric literal, the literal on the right; None for other expressions."""
    if type(expression) not in _OPERATORS:
        return None
    operator, left, right = _OPERATORS[type(expression)], number(expression.left), number(expression.right)
    if left is None and right is not None:
        return Term(text(expression.left), operator, right)
    if left is not None and right is None:
        return Term(text(expression.right), _MIRRORED[operator], left)
    return None


def comparisons(expression: exp.Expression) -> list[tuple[exp.Expression, Term]]:
    """All comparisons with a number in an expression, wherever they stand (OR, CASE, NOT), with their node, in reading order."""
    return [(node, term) for node in _own(expression) if (term := comparison(node)) is not None]


def columns_of(expression: exp.Expression) -> list[str]:
    """The columns that an expression reads, in reading order."""
    return list(dict.fromkeys(text(node) for node in _own(expression) if isinstance(node, exp.Column)))


def _own(expression: exp.Expression) -> Iterator[exp.Expression]:
    yield from expression.dfs(prune=lambda node: isinstance(node, _ELSEWHERE))


def number(expression: exp.Expression) -> float | None:
    """The value of a numeric literal, with or without a sign."""
    expression = expression.unnest()
    if isinstance(expression, exp.Neg):
        value = number(expression.this)
        return None if value is None else -value
    return float(expression.this) if isinstance(expression, exp.Literal) and not expression.is_string else None


def functions(sql: str) -> set[str]:
    """The names of the functions that a policy calls, in lower case; `tablesample` is one of them."""
    query = parse(sql)
    called = [node for node in query.find_all(exp.Func) if not isinstance(node, exp.Connector)]
    names = {re.match(r"\w*", node.sql(dialect="duckdb", comments=False))[0].lower() for node in called}
    return names | ({"tablesample"} if query.find(exp.TableSample) else set())
