"""Every image of a run as a policy sees it: the verdict of each rule, and how near its values are to the thresholds."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation.plots import number
from curation.policy import by_name, decide, made_by
from curation.rules import Policy, Rule, rules

FAILS = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}  # a term holds on one side of its threshold; its rule removes on the other
COMPARE = {"<": np.less, "<=": np.less_equal, ">": np.greater, ">=": np.greater_equal}


def funnel(run: str, policy: str) -> dict[str, Any]:
    """What each rule of a policy removed, as `k2 filter` wrote it."""
    path = Path(run, "selection", f"{policy}.funnel.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run `k2 filter --run {run} --policy {policy}` first")
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Judged:
    """Every image of a run as a policy sees it; arrays have one entry per uid."""

    uids: pa.ChunkedArray
    kept: np.ndarray  # bool
    rules: tuple[Rule, ...]
    verdicts: dict[str, np.ndarray]  # rule -> int8: 1 true, 0 false, -1 unknown
    values: dict[str, np.ndarray]  # column or expression of a term -> float64, NaN where unknown

    def rule(self, name: str) -> Rule:
        """The rule of this name.

        Raises:
            ValueError: the policy has no such rule; the text lists them.
        """
        for rule in self.rules:
            if rule.name == name:
                return rule
        raise ValueError(f"there is no rule {name!r}; choose from {', '.join(rule.name for rule in self.rules)}")

    def worst_term(self, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """(how far beyond its threshold the worst term of a rule is, in spreads of that term; index of that term)."""
        beyond = np.full((len(rule.terms), len(self.uids)), -np.inf)
        for i, term in enumerate(rule.terms):
            values = self.values[term.column]
            spread = float(np.nanstd(values)) if np.isfinite(values).any() else 0.0
            signed = (values - term.threshold) if term.operator in ("<", "<=") else (term.threshold - values)
            beyond[i] = np.nan_to_num(signed / (spread or 1.0), nan=-np.inf)
        return (beyond.max(axis=0), beyond.argmax(axis=0)) if len(rule.terms) else (np.zeros(len(self.uids)), np.zeros(len(self.uids), int))

    def items(self, rule: Rule, chosen: np.ndarray) -> list[dict[str, Any]]:
        """uid, value and label of the chosen images (indices), as contact sheets show them."""
        _, worst = self.worst_term(rule)
        found = []
        for i in chosen.tolist():
            term = rule.terms[worst[i]] if rule.terms else None
            value = float(self.values[term.column][i]) if term else None
            found.append(
                {"uid": self.uids[i].as_py(), "value": value, "label": f"{short(term.column)} {number(value)}".strip() if term else ""}
            )
        return found


@lru_cache(maxsize=8)
def _judge(run: str, policy: Policy, version: str) -> Judged:
    # `version` names the annotations: a notebook that stays open sees new ones.
    columns = list(dict.fromkeys(term.column for rule in rules(policy.sql) for term in rule.terms))
    decided = decide(run, policy, cells=[f"CAST({column} AS DOUBLE)" for column in columns])
    names = decided.column_names[1 : decided.column_names.index("kept")]
    return Judged(
        decided["uid"],
        decided["kept"].to_numpy(),
        tuple(map(by_name(policy), names)),
        {name: decided[name].cast("int8").fill_null(-1).to_numpy() for name in names},
        {column: decided.column(len(names) + 2 + i).fill_null(np.nan).to_numpy() for i, column in enumerate(columns)},
    )


def judge(run: str, policy: str) -> Judged:
    """Every image as a policy sees it, by the text of the policy that `k2 filter` kept in the funnel."""
    described = Policy(policy, funnel(run, policy)["sql"])
    return _judge(str(run), described, made_by(run, described))


def short(column: str) -> str:
    """The column of a term as a label has room for it: its name alone, or nothing for a long expression."""
    names = set(re.findall(r"[a-z_0-9.]*[a-z_][a-z_0-9.]*", re.sub(r"\b\w+\(", "(", column)))
    return names.pop().rpartition(".")[2] if len(names) == 1 else column if len(column) < 20 else ""
