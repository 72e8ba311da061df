"""The law of a sweep: how accuracy goes with size, samples and tokens, and what it says of a run before that is made.

The logit of accuracy is taken to be linear in the doublings of size and samples, in the halvings of each tower's
tokens, and in halvings times doublings of size. CLIPA's finding ("An Inverse Scaling Law for CLIP Training", Li, Wang &
Xie, 2023) is that the last is positive: the larger the encoders, the less a halving costs. Intervals are of a
bootstrap that draws configurations with their seed as wholes, since the budgets of one share a trunk.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TOWERS = ("image", "text")
DRAWS, SEED = 1000, 0
PREDICTION = 80.0
LAW = 95.0

Row = Mapping[str, Any]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """A coefficient in logits, with its 95% interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fit."""

    origin: Mapping[str, float]
    """The mean of log2 of weights and samples, and the most tokens of each tower."""
    names: tuple[str, ...]
    coefficients: FloatArray
    draws: FloatArray
    """Coefficients of the bootstrap, one row each."""
    residuals: FloatArray
    """In logits."""

    @property
    def terms(self) -> list[Term]:
        """The coefficients with their intervals."""
        tail = (100 - LAW) / 2
        low, high = np.percentile(self.draws, [tail, 100 - tail], axis=0)
        found = zip(self.names, self.coefficients, low, high, strict=True)
        return [Term(name, float(value), float(down), float(up)) for name, value, down, up in found]

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `holds` says of each tower whether the inverse law is more than chance here."""
        terms = {term.name: term for term in self.terms}
        return {
            "terms": [vars(term) for term in terms.values()],
            "residual": float(np.sqrt(np.mean(self.residuals**2))),
            "holds": {
                tower: verdict(terms[f"{tower} halvings x size"])
                for tower in TOWERS
                if f"{tower} halvings x size" in terms
            },
        }


def verdict(term: Term) -> str:
    """What a coefficient's interval says of the inverse law."""
    return "yes" if term.low > 0 else "the opposite" if term.high < 0 else "not told apart from chance"


def logit(row: Row) -> float:
    """Of a row's accuracy, pulled off 0 and 1 by half an image."""
    count = row["measured_on"]
    share = (row["accuracy"] * count + 0.5) / (count + 1)
    return math.log(share / (1 - share))


def main_rows(rows: Sequence[Row], ways: Mapping[str, str]) -> list[Row]:
    """The rows of the law: of each tower those of its way in `ways`, beside all tokens."""
    return [row for row in rows if all(row[f"{tower}_way"] in ("all", ways[tower]) for tower in TOWERS)]


def features(row: Row, origin: Mapping[str, float]) -> dict[str, float]:
    """A row's place, by the names of the terms."""
    size = math.log2(row["weights"]) - origin["weights"]
    found = {"constant": 1.0, "size": size, "samples": math.log2(row["samples"]) - origin["samples"]}
    for tower in TOWERS:
        halvings = math.log2(origin[tower] / row[f"{tower}_tokens"])
        found |= {f"{tower} halvings": halvings, f"{tower} halvings x size": halvings * size}
    return found


def fit_law(rows: Sequence[Row], ways: Mapping[str, str]) -> Law | None:
    """The law of a sweep's rows, by its way to fewer tokens of each tower; None where they are too few for it, or of
    one size, or of one length.
    """
    rows = main_rows(rows, ways)
    if not rows:
        return None
    origin = {name: float(np.mean([math.log2(row[name]) for row in rows])) for name in ("weights", "samples")}
    origin |= {tower: float(max(row[f"{tower}_tokens"] for row in rows)) for tower in TOWERS}
    places = [features(row, origin) for row in rows]
    names = tuple(name for name in places[0] if name == "constant" or len({place[name] for place in places}) > 1)
    groups: dict[tuple[str, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row["configuration"], row["seed"]), []).append(number)
    if "size" not in names or not any("x size" in name for name in names) or len(groups) <= len(names):
        return None
    x_NP = np.array([[place[name] for name in names] for place in places])
    y_N = np.array([logit(row) for row in rows])
    coefficients = solve(x_NP, y_N)
    rng, members = np.random.default_rng(SEED), list(groups.values())
    draws = []
    for _ in range(DRAWS):
        drawn = np.concatenate([members[index] for index in rng.integers(len(members), size=len(members))])
        draws.append(solve(x_NP[drawn], y_N[drawn]))
    return Law(origin, names, coefficients, np.array(draws), y_N - x_NP @ coefficients)


def solve(x_NP: FloatArray, y_N: FloatArray) -> FloatArray:
    """Least squares; of directions that a draw doesn't have, nothing."""
    return np.asarray(np.linalg.lstsq(x_NP, y_N, rcond=1e-9)[0], np.float64)


def predict(law: Law, row: Row) -> dict[str, float]:
    """The accuracy of a run at the row's place, with an 80% interval: the fit's doubt and a run's own scatter."""
    place = features(row, law.origin)
    x_P = np.array([place[name] for name in law.names])
    rng = np.random.default_rng(SEED)
    # The fit has taken one degree of freedom for each of its terms.
    freedom = math.sqrt(len(law.residuals) / max(1, len(law.residuals) - len(law.names)))
    scattered = law.draws @ x_P + freedom * rng.choice(law.residuals, len(law.draws))
    tail = (100 - PREDICTION) / 2
    low, high = np.percentile(scattered, [tail, 100 - tail])
    values = {"value": float(x_P @ law.coefficients), "low": float(low), "high": float(high)}
    return {name: 1 / (1 + math.exp(-value)) for name, value in values.items()}


def drops(rows: Sequence[Row], tower: str, ways: Mapping[str, str]) -> list[dict[str, Any]]:
    """For each size and length of a tower, by its way in `ways`, at the longest budget: mean accuracy over seeds, and
    what it lost to all tokens, with the standard error over seeds (None of one seed).
    """
    rows = main_rows(rows, ways)
    longest = max((row["samples"] for row in rows), default=0)
    other = TOWERS[1 - TOWERS.index(tower)]
    rows = [row for row in rows if row["samples"] == longest and row[f"{other}_way"] == "all"]
    found = []
    for size in sizes_of(rows):
        own = [row for row in rows if row["size"] == size]
        whole = {row["seed"]: row["accuracy"] for row in own if row[f"{tower}_way"] == "all"}
        for tokens in sorted({row[f"{tower}_tokens"] for row in own}, reverse=True):
            at = {row["seed"]: row["accuracy"] for row in own if row[f"{tower}_tokens"] == tokens}
            lost = [whole[seed] - at[seed] for seed in at if seed in whole]
            error = float(np.std(lost, ddof=1) / math.sqrt(len(lost))) if len(lost) > 1 else None
            found.append(
                {"size": size, "tokens": tokens, "accuracy": float(np.mean(list(at.values()))),
                 "drop": float(np.mean(lost)) if lost else None, "error": error}
            )  # fmt: skip
    return found


def sizes_of(rows: Sequence[Row]) -> list[str]:
    """The sizes, smallest first."""
    weights = {row["size"]: row["weights"] for row in rows}
    return sorted(weights, key=lambda size: weights[size])
